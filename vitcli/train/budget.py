"""`--budget 10m`: how many steps fit into a time, and how the run keeps to it.

`plan_budget` times a few steps before the run. While the run trains, its `Deadline` compares the
plan with the clock, and its `Timeline` moves the schedule so that it ends with the last step.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vitcli.config.schema import TrainSection, parse_duration
from vitcli.devices import synchronize
from vitcli.errors import VitcliError, counted
from vitcli.train.agreement import max_over_processes
from vitcli.train.param_groups import set_lr
from vitcli.train.validate import eval_batch_size
from vitcli.vit.config import ViTConfig

if TYPE_CHECKING:
    from vitcli.train.loop import Loop


@dataclass
class Timeline:
    """The steps of a run, and the position of each step on the schedule.

    Schedules, image sizes and patch dropout are functions of the position on a timeline of
    `planned` steps. If a run with a budget is faster or slower than expected, `replan` changes the
    number of steps that follow. The position continues without a jump and still reaches `planned`
    in the last step.

    Attributes:
        planned: the number of steps as first planned.
        total: the number of steps now.
        since: the step of the last change of `total`.
        position: the position at that step.
    """

    planned: int = 0
    total: int = 0
    since: int = 0
    position: float = 0.0

    @classmethod
    def of(cls, total: int) -> "Timeline":
        """The timeline of a run of `total` steps."""
        return cls(planned=total, total=total)

    def at(self, step: int) -> float:
        """The position of update `step` (the first is 0), from 0 to `planned`."""
        # Without a change it is the integer itself: no rounding may move the schedule.
        if self.since == 0 and self.total == self.planned:
            return step
        share = (step - self.since) / max(1, self.total - self.since)
        return self.position + (self.planned - self.position) * share

    def replan(self, step: int, total: int) -> None:
        """From `step` on, the run ends with step `total`."""
        self.position, self.since, self.total = float(self.at(step)), step, max(step, total)

    def values(self) -> list[float]:
        """The numbers that a checkpoint stores."""
        return [self.planned, self.total, self.since, self.position]

    def restore(self, values: Sequence[float]) -> None:
        """Take over the result of `values`."""
        planned, total, since, position = values
        self.planned, self.total, self.since = int(planned), int(total), int(since)
        self.position = position


# Fractions of the run at which its length is planned again; more of them towards the end, where
# there is less time left to correct an error.
REPLAN_AT = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98, 0.99)
MIN_CHANGE = 0.003  # smaller changes of the length are noise


@dataclass
class Deadline:
    """The moment by which a run must be finished and written.

    Attributes:
        at: the moment, in seconds of `time.monotonic`.
        reserve: seconds for the last evaluation and for writing, as measured before the run.
        stages: (fraction of the timeline at which the stage ends, seconds per step as measured).
    """

    at: float
    reserve: float
    stages: Sequence[tuple[float, float]]
    _next: int = 0
    _last_seen: tuple[int, float] | None = None
    _slowest: float = 0.0
    _slowdown: float = 1.0
    _before: float = field(default_factory=time.monotonic)

    def is_up(self) -> bool:
        """True if another step, as long as the slowest of the last ones, would end too late."""
        now = time.monotonic()
        step, self._before = now - self._before, now
        self._slowest = max(step, 0.9 * self._slowest)  # forgets one slow step after a while
        return now + self._slowest + self._end() > self.at

    def is_due(self, timeline: Timeline, step: int) -> bool:
        """True if the length must be planned again after `step` steps."""
        share = timeline.at(step) / timeline.planned
        if self._last_seen is None:
            self._last_seen = step, time.monotonic()
        if self._next == len(REPLAN_AT) or share < REPLAN_AT[self._next]:
            return False
        while self._next < len(REPLAN_AT) and share >= REPLAN_AT[self._next]:
            self._next += 1
        return True

    def total(self, timeline: Timeline, step: int) -> int:
        """The number of steps of the whole run that fit, given the speed of the last steps."""
        now, share = time.monotonic(), timeline.at(step) / timeline.planned
        assert self._last_seen is not None
        since, then = self._last_seen
        if step <= since or share >= 1.0:  # nothing measured, or the schedule is at its end
            return timeline.total
        began = timeline.at(since) / timeline.planned
        # Stages differ in speed, so it is the ratio to their measured speed that is extrapolated.
        expected = self._cost(began, share) / max(share - began, 1e-9)
        self._slowdown = (now - then) / (step - since) / expected
        self._last_seen = step, now
        left = self.at - self._end() - now
        per_step = self._cost(share, 1.0) / max(1.0 - share, 1e-9) * self._slowdown
        total = step + max(0, int(left / per_step))
        change = abs(total - timeline.total)
        return timeline.total if change < MIN_CHANGE * timeline.total else total

    def forget(self) -> None:
        """Forget the measured speed, because the run went back to an earlier step."""
        self._last_seen = None

    def _end(self) -> float:
        """Seconds that the end of the run takes, given how slow the machine is now."""
        return self.reserve * max(1.0, self._slowdown)

    def seconds_per_step(self) -> float:
        """The mean over the stages, as measured."""
        return self._cost(0.0, 1.0)

    def _cost(self, start: float, end: float) -> float:
        """The integral of the seconds per step from `start` to `end`, both fractions of the run."""
        cost, begin = 0.0, 0.0
        for until, seconds in self.stages:
            cost += max(0.0, min(end, until) - max(start, begin)) * seconds
            begin = until
        return cost


WARMUP_STEPS, TIMED_STEPS = 1, 4
SCALE = 1000  # stages are timed on a timeline of this length; only fractions of it matter
# Batches per process of a timed evaluation, after one that starts threads and kernels. If that
# first one takes longer than this many seconds, its start-up does not matter and it counts itself.
EVAL_BATCHES, EVAL_SECONDS = 3, 2.0
TIMING_FRACTION = 0.05  # of the budget; after it, each stage is timed by one step only
# The last checkpoint, weights, curves, report and the exit of the program: seconds, and steps.
WRITING_SECONDS, WRITING_STEPS = 2.5, 1.0
BETWEEN_FRACTION = 0.05  # of the budget, at most, for evaluations between steps
# A run of less than an epoch is too short, unless it makes ENOUGH_STEPS. A longer one gains up to
# USEFUL_EPOCHS, the fewest that `finetune` chooses. A grid of SMALL_GRID patches per side still
# shows the parts of an object.
ENOUGH_STEPS, USEFUL_EPOCHS, SMALL_GRID = 200, 3, 6
EVAL_MARGIN = 1.15  # other work on the machine may make an evaluation slower than measured


class NoStepFits(VitcliError):
    """The budget is too small for the first step."""


@dataclass(frozen=True)
class Budget:
    """A time, turned into a number of steps and the deadline that keeps to it.

    Attributes:
        evaluations: number of evaluations between steps that the plan has time for.
    """

    steps: int
    deadline: Deadline
    evaluations: int = 0


def plan_budget(
    loop: "Loop", seconds: float, held_out: tuple[int, int], evaluations: int = 0
) -> Budget:
    """The number of steps that fit into `seconds` from now, with the last evaluation.

    `held_out` is the number of images that are evaluated during training and once at the end.
    At most `evaluations` evaluations between steps get time too, if they are cheap.

    Each stage of the run is timed on real batches. All rates are zero meanwhile, so that no weight
    moves, and the optimizer states are cleared afterwards.

    Raises:
        NoStepFits: no step fits.
    """
    at = time.monotonic() + seconds
    import matplotlib.figure  # noqa: F401  # imported now, so that the curves take no time at the end

    late = time.monotonic() - at
    if max_over_processes(loop.accelerator, int(late > 0.0)):  # all processes must raise together
        raise NoStepFits(
            "no step fits into the budget: it was over before one could be timed, "
            f"{max(0.0, late):.1f} s ago",
            "give a longer `--budget`: it includes loading the libraries and the data",
        )
    stages = stage_fractions(loop.recipe.train)
    time_limit = time.monotonic() + TIMING_FRACTION * seconds
    costs = [time_steps_and_reset(loop, position, time_limit) for position, _ in stages]
    average = sum(share * cost for (_, share), cost in zip(stages, costs, strict=True))
    last_evaluation = _evaluation_seconds(loop, held_out)
    reserve = WRITING_SECONDS + WRITING_STEPS * max(costs) + last_evaluation
    one = last_evaluation * held_out[0] / max(1, sum(held_out)) + WRITING_SECONDS  # it may save
    evaluations = min(evaluations, int(BETWEEN_FRACTION * seconds / one))
    steps = int((at - time.monotonic() - reserve - evaluations * one) / average)
    if steps < 1:
        raise NoStepFits(
            f"no step fits into the budget: one step takes {average:.2f} s, and starting and the "
            "last evaluation need the rest",
            "give a longer `--budget`, a smaller model, or a larger patch size",
        )
    ends, begin = [], 0.0
    for (_, share), cost in zip(stages, costs, strict=True):
        begin += share
        ends.append((begin, cost))
    return Budget(steps, Deadline(at, reserve, ends), evaluations)


def warn_of_few_steps(loop: "Loop", total: int, plan: Budget, num_images: int) -> None:
    """Say if a budget is shorter than USEFUL_EPOCHS; below one epoch it is a warning.

    Many steps are enough for a model, however few of the images they see.
    """
    train = loop.recipe.train
    epochs = total * train.batch_size / num_images
    if epochs >= USEFUL_EPOCHS or total >= ENOUGH_STEPS or train.budget is None:
        return
    missing = USEFUL_EPOCHS * num_images / train.batch_size - total
    needed = parse_duration(train.budget) + missing * plan.deadline.seconds_per_step()
    ways = f"use `--budget {math.ceil(needed / 60)}m` for {USEFUL_EPOCHS} epochs"
    config = loop.loaded.network.config
    rows, columns = config.grid if isinstance(config, ViTConfig) else (0, 0)
    if rows == columns >= 2 * SMALL_GRID:
        stride = config.image_size[0] // rows
        ways += f", or smaller images: `--set model.image_size={rows // 2 * stride}`"
    steps = counted(total, "step is", "steps are")
    line = f"budget {train.budget}: {steps} {epochs:.2g} epochs of {num_images:,} training images"
    if epochs < 1.0:
        loop.watch.warn(f"{line}, too few to learn from; {ways}")
    else:
        loop.watch.note(f"{line}; more usually give a higher accuracy: {ways}")


def stage_fractions(train: TrainSection) -> list[tuple[int, float]]:
    """(a step of `SCALE` inside the stage, its fraction of the run) for each stage.

    A stage is a part of the run in which the image size and the patch dropout do not change.
    """
    ends = [until for _, until in train.smaller_sizes]
    if train.patch_drop_rate:
        ends.append(train.patch_drop_until)
    stages, begin = [], 0.0
    for end in [*sorted(end for end in ends if 0.0 < end < 1.0), 1.0]:
        if end > begin:
            stages.append((int(begin * SCALE), end - begin))
        begin = max(begin, end)
    return stages


def compile_stages(loop: "Loop") -> None:
    """Make a pass of each stage that is left, so that it is compiled before the run starts.

    Otherwise each change of the image size or of the patch dropout would stop the run for as long
    as the compiler takes. A stage that does not fit into memory gets its micro-batch here. No
    weight moves.
    """
    train, state = loop.recipe.train, loop.state
    if not train.compile or state.step >= loop.total_steps:
        return
    done, end, left = loop.timeline.at(state.step) / loop.timeline.planned, 0.0, []
    for position, fraction in stage_fractions(train):
        end += fraction
        left += [position] if end > done else []
    loop.watch.note(
        f"compiling the training step{f' for {len(left)} stages' if len(left) > 1 else ''}"
    )
    batch = next(iter(loop.loader.batches(0, 1))).to(loop.device)
    timeline, step = state.timeline, state.step
    loop.wrapped.train()
    for position in left:
        state.timeline, state.step = Timeline.of(SCALE), position
        loop.gradients(batch)
    state.timeline, state.step = timeline, step
    loop.wrapped_optimizer.zero_grad(set_to_none=True)


def _evaluation_seconds(loop: "Loop", held_out: tuple[int, int]) -> float:
    """The seconds of the last evaluation, on all held-out images, extrapolated from a few."""
    validate = next(iter(loop.evaluations.values()), None)
    if validate is None or not held_out[0]:
        return 0.0
    at_once = eval_batch_size(loop.device) * loop.accelerator.num_processes
    loop.wrapped.eval()
    for few in (at_once, EVAL_BATCHES * at_once):
        few = min(few, held_out[0])
        start = time.perf_counter()
        validate(loop.loaded, limit=few)
        seconds = time.perf_counter() - start
        if max_over_processes(loop.accelerator, int(seconds > EVAL_SECONDS)):
            break
    loop.wrapped.train()
    return seconds * sum(held_out) / few * EVAL_MARGIN


def time_steps_and_reset(
    loop: "Loop",
    position: int,
    time_limit: float,
    max_steps: int = TIMED_STEPS,
    warmup: int = WARMUP_STEPS,
) -> float:
    """Time a few steps, then restore `state.timeline` and `state.step` and clear the optimizers.

    The steps are made as the run makes them at step `position` of `SCALE`, with a rate of zero, so
    that no weight moves.

    Args:
        time_limit: the moment of `time.monotonic` after which no further step starts.
        max_steps: the most steps that are timed.
        warmup: untimed steps before them.

    Returns:
        The mean seconds per step.
    """
    state = loop.state
    timeline, step = state.timeline, state.step
    state.timeline, state.step = Timeline.of(SCALE), position
    set_lr(state.optimizers, 0.0)
    loop.wrapped.train()
    begin, timed = time.perf_counter(), 0
    for number, batch in enumerate(loop.loader.batches(0, warmup + max_steps)):
        if number == warmup:
            synchronize(loop.device)  # the warm-up does not count
            begin = time.perf_counter()
        loop.step(batch)
        timed = number + 1 - warmup
        # All processes must stop together: each step averages the gradients of all.
        if timed > 0 and max_over_processes(loop.accelerator, int(time.monotonic() > time_limit)):
            break
    synchronize(loop.device)
    seconds = (time.perf_counter() - begin) / timed
    state.timeline, state.step = timeline, step
    for optimizer in state.optimizers:
        optimizer.state.clear()
    return seconds
