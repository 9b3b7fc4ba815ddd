"""An exponential moving average (EMA) of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """The moving average of the trainable parameters of a module.

    With a warm-up the decay of update t (from 0) is min(decay, (1 + t) / (10 + t)), as in
    TensorFlow. Without one, the average of a run of a hundred steps still contains its random
    start. The paper's runs start from pretrained weights and are as long as 2 / (1 - decay) steps;
    there the warm-up would only shorten the average (Polyak and Juditsky, 1992).
    """

    def __init__(self, module: nn.Module, decay: float, *, warmup: bool = True) -> None:
        self.decay, self.warmup = decay, warmup
        # Frozen weights are their own average, so they take no memory here.
        trainable = ((name, p) for name, p in module.named_parameters() if p.requires_grad)
        self.tensors = {name: p.detach().clone() for name, p in trainable}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Add the parameters after update `step` to the average."""
        # The warm-up follows TensorFlow's `ExponentialMovingAverage(num_updates=...)`: without it,
        # the average of a short run consists mostly of the initial weights.
        cap = (1.0 + step) / (10.0 + step) if self.warmup else 1.0
        weight = 1.0 - min(self.decay, cap)
        parameters = dict(module.named_parameters())
        torch._foreach_lerp_(
            list(self.tensors.values()),
            [parameters[name].detach() for name in self.tensors],
            weight,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name."""
        return self.tensors


@contextmanager
def averaged(module: nn.Module, ema: Ema | None) -> Iterator[None]:
    """Put the averaged weights into `module` inside the block; without an average do nothing."""
    if ema is None:
        yield
        return
    parameters = dict(module.named_parameters())
    trained = {name: parameters[name].detach().clone() for name in ema.tensors}
    try:
        _overwrite(parameters, ema.tensors)
        yield
    finally:  # also when a signal interrupts the evaluation: a checkpoint follows
        _overwrite(parameters, trained)


@torch.no_grad()
def _overwrite(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)
