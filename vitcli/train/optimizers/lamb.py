"""LAMB (You et al., 2020, algorithm 2): Adam whose steps are as long as the weights are large."""

from typing import Any

import torch


class Lamb(torch.optim.Optimizer):
    """r = corrected m / (sqrt(corrected v) + eps) + decay * w; w moves by lr * |w| / |r| * r.

    Where a group does not decay (biases, norms, tokens) r is taken as it is, without the ratio of
    norms, as in the implementations that DeiT III was trained with.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p]["step"] = torch.zeros((), dtype=torch.float32)
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            for p in params:
                self.state[p]["step"] += 1
            steps = float(self.state[params[0]]["step"])
            means = [self.state[p]["exp_avg"] for p in params]
            squares = [self.state[p]["exp_avg_sq"] for p in params]
            first, second = group["betas"]
            torch._foreach_lerp_(means, grads, 1.0 - first)
            torch._foreach_mul_(squares, second)
            torch._foreach_addcmul_(squares, grads, grads, 1.0 - second)
            roots = torch._foreach_sqrt(squares)
            torch._foreach_div_(roots, (1.0 - second**steps) ** 0.5)
            torch._foreach_add_(roots, group["eps"])
            moves = torch._foreach_div(means, roots)
            torch._foreach_div_(moves, 1.0 - first**steps)
            if group["weight_decay"]:
                torch._foreach_add_(moves, params, alpha=group["weight_decay"])
                sizes, lengths = torch._foreach_norm(params), torch._foreach_norm(moves)
                for move, size, length in zip(moves, sizes, lengths, strict=True):
                    both = (size > 0) & (length > 0)
                    move.mul_(torch.where(both, size / length, torch.ones_like(size)))
            torch._foreach_add_(params, moves, alpha=-group["lr"])
