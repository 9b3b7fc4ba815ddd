"""Meters of the loop: mean training metrics, and the time that the model waits for data."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vitcli.data.batch import Batch
from vitcli.data.loader import TrainLoader
from vitcli.data.prefetch import default_workers

WARMUP_STEPS = 5  # not timed: the loader fills its queue meanwhile, and the first steps are slow
WINDOW_STEPS, WINDOW_SECONDS = 20, 10.0  # a warning looks at no less than this
MAX_WAIT_FRACTION = 0.2  # of the time; more is a warning


# A moment on the clock of a device: seconds, or a CUDA event. A program runs ahead of its GPU, so
# that the clock of the CPU says nothing about the GPU's work.
Mark = Any


def mark(device: torch.device) -> Mark:
    """This moment on `device`: on a GPU, when the work so far is done."""
    if device.type != "cuda":
        return time.perf_counter()
    event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(start: Mark, end: Mark) -> float:
    """Seconds from one moment to another; waits for the second."""
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


@dataclass
class AverageMeter:
    """Sums the metrics of the steps since the last record, on the device that computes them."""

    started: Mark
    sums: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add the metrics of one step."""
        self.steps += 1
        # No `.item()` here: it would make the CPU wait for the GPU in every step.
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def copy_sums(self) -> Tensor:
        """The sums (M,) on their way to the CPU; they are there when a later `mark` is passed."""
        sums = torch.stack([*self.sums.values()])
        # From a GPU to pinned memory. Other devices have no mark that says when it is there.
        return sums.to("cpu", non_blocking=sums.is_cuda)


@dataclass
class StepTimes:
    """The seconds of some steps: waiting for batches, and working on them."""

    waited: float = 0.0
    worked: float = 0.0
    steps: int = 0

    def __iadd__(self, other: "StepTimes") -> "StepTimes":
        self.waited += other.waited
        self.worked += other.worked
        self.steps += other.steps
        return self

    @property
    def wait_fraction(self) -> float:
        """The fraction of the time spent waiting."""
        return self.waited / max(self.waited + self.worked, 1e-9)


class WaitTimer:
    """Measures the wait for each batch and the work on it; time between steps counts as neither.

    On a GPU a wait is the time in which it has nothing to do.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._current: tuple[Mark, Mark] = (None, None)
        self._marks: list[tuple[Mark, Mark, Mark]] = []  # batch requested, batch ready, step done
        self._steps = 0
        self._window = StepTimes()

    def over(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches; call `step_done` after the step of each."""
        while True:
            requested = mark(self.device)
            batch = next(batches, None)
            if batch is None:
                return
            self._current = requested, mark(self.device)
            yield batch

    def step_done(self) -> None:
        """Note that the step on the last batch is finished or queued on the GPU."""
        self._steps += 1
        if self._steps > WARMUP_STEPS:
            self._marks.append((*self._current, mark(self.device)))

    def take(self) -> list[tuple[Mark, Mark, Mark]]:
        """The marks of the steps since the last call, without those of the warm-up."""
        marks, self._marks = self._marks, []
        return marks

    def read(self, marks: list[tuple[Mark, Mark, Mark]] | None = None) -> StepTimes:
        """The times of the steps of `marks`; default: those since the last `take`."""
        times = StepTimes()
        for requested, ready, done in self.take() if marks is None else marks:
            times += StepTimes(seconds_between(requested, ready), seconds_between(ready, done), 1)
        self._window += times
        return times

    def slow_window(self) -> StepTimes | None:
        """The times of the current window if it is complete and waits too long, else None."""
        window = self._window
        if window.steps < WINDOW_STEPS or window.waited + window.worked < WINDOW_SECONDS:
            return None
        self._window = StepTimes()
        return window if window.wait_fraction > MAX_WAIT_FRACTION else None


def is_filling_cache(loader: TrainLoader, seen: int) -> bool:
    """True in the first epoch of a loader that keeps decoded images: later epochs are faster."""
    images = loader.images
    return images.kind == "images" and images.is_cached and seen < len(images)


def slow_data_warning(times: StepTimes, loader: TrainLoader, data: str) -> str:
    """The warning about a loader that is too slow, and what makes it faster.

    Args:
        times: of a window.
        data: DATA, as the user wrote it.
    """
    seen, images = times.steps * loader.batch_size, loader.images
    text = (
        f"data loading is slow: {seen / (times.waited + times.worked):.4g} images/s, the model "
        f"can train on {seen / times.worked:.4g} images/s and waits {times.wait_fraction:.0%} of "
        "the time"
    )
    if images.kind == "images" and images.decodes_each_epoch:
        return f"{text}; run `vitcli patchify {data} --out DIR` once and use DIR as DATA"
    usual = default_workers(loader.world_size)
    return f"{text}; `--set data.workers={usual}`" if loader.workers < usual else text
