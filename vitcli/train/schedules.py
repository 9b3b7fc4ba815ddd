"""Functions of the step: learning-rate schedules, and the random seed.

A schedule is a warm-up, then one of the curves in `SCHEDULES`.

To add a schedule, write its curve here and enter it in `SCHEDULES`.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from vitcli.config.schema import ScheduleSection
from vitcli.errors import unknown


def warmup_steps(section: ScheduleSection, total_steps: int) -> int:
    """The number of warm-up steps in a run of `total_steps`."""
    if section.warmup_steps is not None:
        return min(section.warmup_steps, total_steps)
    return round((section.warmup_fraction or 0.0) * total_steps)


# Every curve takes (the `[schedule]` settings, steps since the warm-up, steps after the warm-up,
# steps of the warm-up).
def linear(section: ScheduleSection, step: float, steps: int, warmup: int) -> float:
    """From 1 to `final_lr_fraction` in a straight line."""
    return _line(section, _progress(step, steps))


def polynomial(section: ScheduleSection, step: float, steps: int, warmup: int) -> float:
    """From 1 to `final_lr_fraction` along (1 - progress) ^ `power` (big_vision)."""
    return _line(section, 1.0 - (1.0 - _progress(step, steps)) ** section.power)


def stair(section: ScheduleSection, step: float, steps: int, warmup: int) -> float:
    """1, and from each of `stair_steps` on the factor beside it (BiT, big_vision)."""
    # Counted from the start of the run, warm-up included; the listed step has the new factor.
    passed = bisect_right(section.stair_steps, step + warmup)
    return (1.0, *section.stair_factors)[passed]


def cosine(section: ScheduleSection, step: float, steps: int, warmup: int) -> float:
    """From 1 to `final_lr_fraction` along half a cosine."""
    end = section.final_lr_fraction
    return end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * _progress(step, steps)))


def wsd(section: ScheduleSection, step: float, steps: int, warmup: int) -> float:
    """Warm-up, stable, decay: 1, then linear over the last `decay_fraction` of the steps."""
    decay = section.decay_fraction
    return _line(section, max(0.0, (_progress(step, steps) - 1.0 + decay) / decay))


def constant(section: ScheduleSection, step: float, steps: int, warmup: int) -> float:
    """1 in every step."""
    return 1.0


def rsqrt(section: ScheduleSection, step: float, steps: int, warmup: int) -> float:
    """1 / sqrt(1 + (step + `shift`) / `timescale`), and a linear `cooldown_steps` to 0.

    Source: create_learning_rate_schedule in big_vision/utils.py.
    """
    # Without a shift, the factor is 1 / sqrt(2) `timescale` steps after the warm-up.
    factor = (1.0 + (max(0.0, step) + section.shift) / section.timescale) ** -0.5
    if section.cooldown_steps:
        factor *= min(1.0, max(0.0, (steps - step) / section.cooldown_steps))
    return factor


# Clamped: a run whose budget became shorter or longer may ask for a position outside of the curve.
def _progress(step: float, steps: int) -> float:
    return min(1.0, max(0.0, step / max(1, steps)))


def _line(section: ScheduleSection, progress: float) -> float:
    end = section.final_lr_fraction
    return end + (1.0 - end) * (1.0 - progress)


@dataclass(frozen=True)
class ScheduleEntry:
    """A schedule in the registry: its curve, and the keys of `[schedule]` that only it reads."""

    curve: Callable[[ScheduleSection, float, int, int], float]
    settings: frozenset[str]


SCHEDULES = {
    "linear": ScheduleEntry(linear, frozenset({"final_lr_fraction"})),
    "polynomial": ScheduleEntry(polynomial, frozenset({"final_lr_fraction", "power"})),
    "stair": ScheduleEntry(stair, frozenset({"stair_steps", "stair_factors"})),
    "cosine": ScheduleEntry(cosine, frozenset({"final_lr_fraction"})),
    "wsd": ScheduleEntry(wsd, frozenset({"final_lr_fraction", "decay_fraction"})),
    "constant": ScheduleEntry(constant, frozenset()),
    "rsqrt": ScheduleEntry(rsqrt, frozenset({"timescale", "shift", "cooldown_steps"})),
}


def find_schedule(section: ScheduleSection) -> ScheduleEntry:
    """The registry entry of `schedule.name`."""
    if section.name not in SCHEDULES:
        raise unknown("schedule", section.name, SCHEDULES)
    return SCHEDULES[section.name]


def schedule_factor(section: ScheduleSection, step: float, total_steps: int) -> float:
    """The fraction of the base rate in update `step`, where the first update is 0.

    `step` is not always an integer: a run with a budget moves along its schedule in other strides.
    """
    warmup = warmup_steps(section, total_steps)
    factor = find_schedule(section).curve(section, step - warmup, total_steps - warmup, warmup)
    # min(1, step / warmup) as in the official code: the very first update has the rate 0.
    return factor * min(1.0, step / warmup) if warmup else factor


def step_seed(seed: int, step: int, process: int) -> int:
    """The random seed of update `step` (dropout, stochastic depth)."""
    # Odd multipliers, as in splitmix64, keep the seeds of neighbours apart.
    mixed = seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + process * 0x94D049BB133111EB
    return mixed & 0x7FFF_FFFF_FFFF_FFFF
