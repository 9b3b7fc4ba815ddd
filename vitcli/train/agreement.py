"""Values that all processes agree on, so that they save, evaluate and stop at the same step."""

from dataclasses import dataclass
from typing import Any

import torch

TIME_IS_UP = 0  # a reason to stop; the others are numbers of signals, which are larger and win
NONE = -(2**62)  # stands for None; smaller than any value that processes agree on


@dataclass(frozen=True)
class Decision:
    """What follows a step.

    Attributes:
        signal: the number of a signal that stops the run, or None.
        is_last: the run is complete.
        saves, evaluates, logs: what is due.
        changes_length: a budget changed the number of steps.
    """

    signal: int | None
    is_last: bool
    saves: bool
    evaluates: bool
    logs: bool
    changes_length: bool

    @property
    def must_wait(self) -> bool:
        """True if the records of all steps must be written now."""
        return self.saves or self.evaluates or self.is_last


def mean_over_processes(accelerator: Any, metrics: dict[str, float]) -> dict[str, float]:
    """The mean of each metric over all processes."""
    if accelerator.num_processes == 1:
        return metrics
    # In fp64: the sum over processes must not round away what a mean of fp32 values has.
    mine = torch.tensor([*metrics.values()], device=accelerator.device).double()
    means = accelerator.reduce(mine, reduction="mean").tolist()
    return dict(zip(metrics, means, strict=True))


def max_over_processes(accelerator: Any, value: int | None) -> int | None:
    """The largest value of all processes; None counts as the smallest."""
    if accelerator.num_processes == 1:
        return value
    mine = torch.tensor(NONE if value is None else value, device=accelerator.device)
    largest = int(accelerator.gather(mine[None]).max())
    return None if largest == NONE else largest


def min_over_processes(accelerator: Any, value: int) -> int:
    """The smallest value of all processes."""
    largest = max_over_processes(accelerator, -value)
    assert largest is not None
    return -largest


def gather(items: list[Any], accelerator: Any) -> list[Any]:
    """The items of all processes, in one list."""
    if accelerator.num_processes == 1:
        return items
    from accelerate.utils import gather_object

    found: list[Any] = gather_object(items)
    return found
