"""How far a run has come: steps, and for a budget steps that may still become more or fewer.

Keeping the time that a run was given.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Timeline:
    """A run's steps, and where on its schedule each of them lies.

    Schedules, image sizes and patch dropout are functions of the place on a timeline of `planned`
    steps. When a run with a budget finds itself faster or slower than it was measured, `settle`
    changes how many steps are still to come; the place goes on from where it is, without a jump,
    and reaches the end with the last step.

    Attributes:
        planned: the steps as first settled.
        total: the steps as they stand.
        since: the step at which `total` was last changed.
        place: the place on the timeline at that step.
    """

    planned: int = 0
    total: int = 0
    since: int = 0
    place: float = 0.0

    @classmethod
    def of(cls, total: int) -> "Timeline":
        """A run of so many steps."""
        return cls(planned=total, total=total)

    def at(self, step: int) -> float:
        """The place of update `step` (the first is 0), from 0 to `planned`."""
        if self.since == 0 and self.total == self.planned:
            return step
        share = (step - self.since) / max(1, self.total - self.since)
        return self.place + (self.planned - self.place) * share

    def settle(self, step: int, total: int) -> None:
        """From `step` on the run is to end with step `total`."""
        self.place, self.since, self.total = float(self.at(step)), step, max(step, total)

    def values(self) -> list[float]:
        """What a checkpoint keeps."""
        return [self.planned, self.total, self.since, self.place]

    def restore(self, values: Sequence[float]) -> None:
        """Take over what `values` gave."""
        planned, total, since, place = values
        self.planned, self.total, self.since = int(planned), int(total), int(since)
        self.place = place


# Shares of the run after which its length is looked at again.
MARKS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98, 0.99)
WORTH_IT = 0.003  # smaller changes of the length are noise


@dataclass
class Deadline:
    """The moment by which everything must be written, and what the steps until then cost.

    Attributes:
        at: of `time.monotonic`.
        reserve: seconds for the last evaluation and for writing, as measured at the start; on a
            machine that has become slower since, as much more.
        stages: (share of the timeline at which it ends, seconds a step as measured at the start).
    """

    at: float
    reserve: float
    stages: Sequence[tuple[float, float]]
    _next: int = 0
    _seen: tuple[int, float] | None = None
    _slowest: float = 0.0
    _slower: float = 1.0
    _before: float = field(default_factory=time.monotonic)

    def is_up(self) -> bool:
        """Whether one more step, as long as the longest of late, would come too late."""
        now = time.monotonic()
        step, self._before = now - self._before, now
        self._slowest = max(step, 0.9 * self._slowest)
        return now + self._slowest + self._end() > self.at

    def is_due(self, timeline: Timeline, step: int) -> bool:
        """Whether the length is to be looked at again after so many steps."""
        share = timeline.at(step) / timeline.planned
        if self._seen is None:
            self._seen = step, time.monotonic()
        if self._next == len(MARKS) or share < MARKS[self._next]:
            return False
        while self._next < len(MARKS) and share >= MARKS[self._next]:
            self._next += 1
        return True

    def total(self, timeline: Timeline, step: int) -> int:
        """The steps of the whole run that fit, by how fast the last stretch of them was."""
        now, share = time.monotonic(), timeline.at(step) / timeline.planned
        assert self._seen is not None
        since, then = self._seen
        if step <= since or share >= 1.0:  # nothing seen, or the schedule is at its end
            return timeline.total
        began = timeline.at(since) / timeline.planned
        expected = self._cost(began, share) / max(share - began, 1e-9)
        self._slower = (now - then) / (step - since) / expected
        self._seen = step, now
        left = self.at - self._end() - now
        rest = self._cost(share, 1.0) / max(1.0 - share, 1e-9) * self._slower  # a step, on average
        total = step + max(0, int(left / rest))
        return timeline.total if abs(total - timeline.total) < WORTH_IT * timeline.total else total

    def forget(self) -> None:
        """What was seen of the speed: the run went back to an earlier step."""
        self._seen = None

    def _end(self) -> float:
        """The seconds that the end of the run takes, as slow as the machine is now."""
        return self.reserve * max(1.0, self._slower)

    def _cost(self, start: float, end: float) -> float:
        """The integral of the seconds a step over the shares from `start` to `end`."""
        cost, begin = 0.0, 0.0
        for until, seconds in self.stages:
            cost += max(0.0, min(end, until) - max(start, begin)) * seconds
            begin = until
        return cost
