"""Whether the images or the model set the pace of a run."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vitcli.data.batch import Batch
from vitcli.data.loader import TrainLoader
from vitcli.data.prefetch import default_workers

WARM_STEPS = 5  # threads fill their queue meanwhile, and the first steps are slow
WINDOW_STEPS, WINDOW_SECONDS = 20, 10.0  # what a verdict looks at, at least
TOLERATED = 0.2  # of the time


@dataclass
class Spent:
    """What some steps took, in seconds: waiting for their batches, and working on them."""

    waited: float = 0.0
    worked: float = 0.0
    steps: int = 0

    def __iadd__(self, other: "Spent") -> "Spent":
        self.waited += other.waited
        self.worked += other.worked
        self.steps += other.steps
        return self

    @property
    def fraction(self) -> float:
        """Of the time that was spent waiting."""
        return self.waited / max(self.waited + self.worked, 1e-9)


class Pace:
    """Times each wait for a batch and each step; what comes between steps counts as neither.

    On a GPU the marks are events in its stream of work: a wait is the time in which it had nothing
    to do, however far ahead of it the program runs.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._began: tuple[Any, Any] = (None, None)
        self._marks: list[tuple[Any, Any, Any]] = []  # batch asked for, there, step done
        self._steps = 0
        self._window = Spent()

    def over(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; `done` is to be called when the step of each is."""
        while True:
            asked = self._mark()
            batch = next(batches, None)
            if batch is None:
                return
            self._began = asked, self._mark()
            yield batch

    def done(self) -> None:
        """The step on the last batch is finished, or all of it given to the device."""
        self._steps += 1
        if self._steps > WARM_STEPS:
            self._marks.append((*self._began, self._mark()))

    def read(self) -> Spent:
        """What the steps since the last call took, the first of the run left out."""
        spent = Spent()
        for asked, there, done in self._marks:
            spent += Spent(self._seconds(asked, there), self._seconds(there, done), 1)
        self._marks.clear()
        self._window += spent
        return spent

    def verdict(self) -> Spent | None:
        """The time of a window whose waits were too long; None where they were not, or as yet."""
        window = self._window
        if window.steps < WINDOW_STEPS or window.waited + window.worked < WINDOW_SECONDS:
            return None
        self._window = Spent()
        return window if window.fraction > TOLERATED else None

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


def is_filling(loader: TrainLoader, seen: int) -> bool:
    """Whether the first epoch still decodes what later ones find in memory; it tells nothing."""
    return getattr(loader.images, "is_cached", False) and seen < len(loader.images)


def warning(spent: Spent, loader: TrainLoader, data: str) -> str:
    """What to tell about a loader that is too slow, and what would help.

    Args:
        spent: of a window.
        loader: of the run.
        data: DATA, as the user wrote it.
    """
    images = spent.steps * loader.batch_size
    text = (
        f"images arrive at {images / (spent.waited + spent.worked):.4g}/s, the model could take "
        f"{images / spent.worked:.4g}/s: it waits {spent.fraction:.0%} of the time"
    )
    if getattr(loader.images, "decodes_each_epoch", False):
        return f"{text}; `vitcli patchify {data} --out DIR` stores them decoded, and DIR is DATA"
    usual = default_workers(loader.world_size)
    return f"{text}; `--set data.workers={usual}`" if loader.workers < usual else text
