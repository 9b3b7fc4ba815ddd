"""How the learning rate moves over a run."""

import math
from collections.abc import Callable

from vitcli.config.schema import ScheduleSection


def warmup_steps(section: ScheduleSection, total_steps: int) -> int:
    """Steps of warm-up in a run of `total_steps`."""
    if section.warmup_steps is not None:
        return min(section.warmup_steps, total_steps)
    return round((section.warmup_fraction or 0.0) * total_steps)


def linear(p: float, end: float, decay_fraction: float) -> float:
    """From 1 to `end` along a line, p from 0 to 1."""
    return end + (1.0 - end) * (1.0 - p)


def cosine(p: float, end: float, decay_fraction: float) -> float:
    """From 1 to `end` along half a cosine."""
    return end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * p))


def wsd(p: float, end: float, decay_fraction: float) -> float:
    """Warm-up, stable, decay: 1, then a line down to `end` over the last `decay_fraction`."""
    return linear(max(0.0, (p - 1.0 + decay_fraction) / decay_fraction), end, decay_fraction)


def constant(p: float, end: float, decay_fraction: float) -> float:
    """1 throughout."""
    return 1.0


SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "linear": linear,
    "cosine": cosine,
    "wsd": wsd,
    "constant": constant,
}


def rsqrt(section: ScheduleSection, step: float, total_steps: int) -> float:
    """big_vision's: one over the root of the time since the warm-up, then a line down to 0.

    `timescale` steps after the warm-up it is 1 / sqrt(2); the line takes `cooldown_steps`.
    """
    since = max(0.0, step - warmup_steps(section, total_steps))
    factor = (1.0 + since / section.timescale) ** -0.5
    if section.cooldown_steps:
        factor *= min(1.0, max(0.0, (total_steps - step) / section.cooldown_steps))
    return factor


def schedule_factor(section: ScheduleSection, step: float, total_steps: int) -> float:
    """The share of the base rate that update `step` (the first is 0) is made with.

    As in the official code: `min(1, step / warmup)` times the curve over what follows the warm-up,
    so the first of several warm-up updates has rate 0.
    """
    warmup = warmup_steps(section, total_steps)
    if section.name == "rsqrt":
        factor = rsqrt(section, step, total_steps)
    else:
        p = min(1.0, max(0.0, (step - warmup) / max(1, total_steps - warmup)))
        factor = SCHEDULES[section.name](p, section.final_lr_fraction, section.decay_fraction)
    return factor * min(1.0, step / warmup) if warmup else factor
