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


@dataclass
class AverageMeter:
    """Sums the metrics of the steps since the last record, on the device that computes them."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add the metrics of one step."""
        self.steps += 1
        # No `.item()` here: it would make the CPU wait for the GPU in every step.
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """The mean of each metric; waits for the device."""
        return {name: float(value) / self.steps for name, value in self.sums.items()}


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

    On a GPU the marks are CUDA events. The program runs ahead of the GPU, so that the clock of the
    CPU says nothing: a wait is the time in which the GPU has nothing to do.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._current: tuple[Any, Any] = (None, None)
        self._marks: list[tuple[Any, Any, Any]] = []  # batch requested, batch ready, step done
        self._steps = 0
        self._window = StepTimes()

    def over(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches; call `step_done` after the step of each."""
        while True:
            requested = self._mark()
            batch = next(batches, None)
            if batch is None:
                return
            self._current = requested, self._mark()
            yield batch

    def step_done(self) -> None:
        """Note that the step on the last batch is finished or queued on the GPU."""
        self._steps += 1
        if self._steps > WARMUP_STEPS:
            self._marks.append((*self._current, self._mark()))

    def read(self) -> StepTimes:
        """The times of the steps since the last call, without those of the warm-up."""
        times = StepTimes()
        for requested, ready, done in self._marks:
            times += StepTimes(self._seconds(requested, ready), self._seconds(ready, done), 1)
        self._marks.clear()
        self._window += times
        return times

    def slow_window(self) -> StepTimes | None:
        """The times of the current window if it is complete and waits too long, else None."""
        window = self._window
        if window.steps < WINDOW_STEPS or window.waited + window.worked < WINDOW_SECONDS:
            return None
        self._window = StepTimes()
        return window if window.wait_fraction > MAX_WAIT_FRACTION else None

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _seconds(self, start: Any, end: Any) -> float:
        if isinstance(start, float):
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


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
