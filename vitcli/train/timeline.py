"""How far a run has come: steps, and for a budget steps that may still become more or fewer."""

from collections.abc import Sequence
from dataclasses import dataclass


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
