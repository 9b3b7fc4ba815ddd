"""Lion (Chen et al., 2023, algorithm 2): the sign of an interpolated momentum."""

from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Every weight moves by its rate, up or down; one momentum, no second moment.

    The authors take a rate 3 to 10 times below AdamW's and a decay as much above, so that their
    product, which is what decays, stays; and betas of 0.9 and 0.99.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0})

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
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            averages = [self.state[p]["exp_avg"] for p in params]
            first, second = group["betas"]
            moves = torch._foreach_lerp(grads, averages, first)
            torch._foreach_sign_(moves)
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1.0 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, moves, alpha=-group["lr"])
            torch._foreach_lerp_(averages, grads, 1.0 - second)
