"""SGD whose momentum is kept in bf16: half the memory of the optimizer, as the paper fine-tunes."""

from typing import Any

import torch


class HalfMomentum(torch.optim.Optimizer):
    """buffer = momentum * buffer + gradient; weights move by the sum before it is rounded.

    As `optax.sgd(accumulator_dtype=bfloat16)` of the official code: the sum itself is
    not rounded before it moves the weights. A decay is added to the gradient.
    """

    def __init__(self, params: Any, lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                total = p.grad.float()
                if group["weight_decay"]:
                    total = total.add(p, alpha=group["weight_decay"])
                if (kept := self.state[p].get("momentum_buffer")) is not None:
                    total = total.add(kept.float(), alpha=group["momentum"])
                self.state[p]["momentum_buffer"] = total.bfloat16()
                p.add_(total.to(p.dtype), alpha=-group["lr"])
