"""Adafactor as big_vision trains with (Zhai et al., 2022): factors, and a bf16 momentum.

Beside Shazeer and Stern's (2018): a plain learning rate that is not multiplied by the size of the
weights, no clipping of the update, the decay of the second moments capped, a first moment. A large
matrix of n x m has n + m numbers of second moment, so the optimizer takes little more than half a
copy of the weights.
"""

from typing import Any

import torch
from torch import Tensor

SMALLEST = 32  # sides from which a matrix is factored
POWER, CAP = 0.8, 0.999  # the decay of step t is min(CAP, 1 - t^-POWER)
FLOOR = 1e-30  # added to squared gradients


class Adafactor(torch.optim.Optimizer):
    """See the module. Kernels of convolutions are factored as (outputs, inputs)."""

    def __init__(self, params: Any, lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] = state.get("step", torch.zeros((), dtype=torch.float32)) + 1
                decay = min(CAP, 1.0 - float(state["step"]) ** -POWER)
                move = scaled(p.grad.float(), state, decay)
                kept = state.get("exp_avg")
                share = 1.0 - group["momentum"]
                average = move * share
                if kept is not None:
                    average = average.add(kept.float(), alpha=group["momentum"])
                state["exp_avg"] = average.bfloat16()
                if group["weight_decay"]:
                    p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(average.to(p.dtype), alpha=-group["lr"])


def scaled(gradient: Tensor, state: dict[str, Any], decay: float) -> Tensor:
    """The gradient over the root of its second moment, which `state` keeps."""
    g = gradient.flatten(1) if gradient.ndim > 2 else gradient
    square = g.square() + FLOOR
    if g.ndim < 2 or min(g.shape) < SMALLEST:
        state["exp_avg_sq"] = mixed(state.get("exp_avg_sq"), square, decay)
        return (g * state["exp_avg_sq"].rsqrt()).reshape(gradient.shape)
    state["row"] = mixed(state.get("row"), square.mean(dim=1), decay)  # (outputs,)
    state["column"] = mixed(state.get("column"), square.mean(dim=0), decay)  # (inputs,)
    rows = (state["row"] / state["row"].mean()).rsqrt()
    return (g * rows[:, None] * state["column"].rsqrt()).reshape(gradient.shape)


def mixed(old: Tensor | None, new: Tensor, decay: float) -> Tensor:
    """The moving average; zeros before the first step."""
    return new * (1.0 - decay) if old is None else old * decay + new * (1.0 - decay)
