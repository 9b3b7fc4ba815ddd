"""An exponential moving average of the weights, which needs no guessing on short runs."""

import torch
from torch import Tensor, nn


class Ema:
    """The average of what the parameters of a module that learn were.

    The decay of update t (from 0) is min(decay, (1 + t) / (10 + t)), so that a run of a hundred
    steps is not an average of its random start.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        # Frozen weights are their own average.
        learning = ((name, p) for name, p in module.named_parameters() if p.requires_grad)
        self.tensors = {name: p.detach().clone() for name, p in learning}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the parameters after update `step`."""
        weight = 1.0 - min(self.decay, (1.0 + step) / (10.0 + step))
        parameters = dict(module.named_parameters())
        torch._foreach_lerp_(
            list(self.tensors.values()),
            [parameters[name].detach() for name in self.tensors],
            weight,
        )

    def state(self) -> dict[str, Tensor]:
        """The averages by parameter name."""
        return self.tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over averages that `state` gave."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
