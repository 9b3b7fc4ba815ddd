"""Schedules against the official implementations."""

import json

import numpy as np
import pytest

from vitcli.config.schema import ScheduleSection
from vitcli.train.schedules import schedule_factor, warmup_steps


def test_schedules_equal_the_official_ones(shared):
    entries = json.loads((shared / "reference/schedules/schedules.json").read_text())
    compared = 0
    for family, default_end in (("vit_jax", 1e-5), ("big_vision", 0.0)):
        for entry in entries[family]:
            kwargs = entry["kwargs"]
            base = kwargs["base"]
            end = kwargs.get("linear_end", default_end) if kwargs["decay_type"] == "linear" else 0.0
            section = ScheduleSection(
                name=kwargs["decay_type"],
                warmup_steps=kwargs["warmup_steps"],
                final_lr_fraction=end / base,
                timescale=kwargs.get("timescale", 10_000),
                cooldown_steps=kwargs.get("cooldown_steps", 0),
            )
            for step, expected in zip(entry["steps"], entry["lr_float64"], strict=True):
                got = base * schedule_factor(section, step, kwargs["total_steps"])
                assert got == pytest.approx(expected, abs=1e-6 * base)
                compared += 1
    assert compared == 96


def test_wsd_is_stable_and_then_decays():
    section = ScheduleSection(
        name="wsd", warmup_fraction=0.1, decay_fraction=0.25, final_lr_fraction=0.2
    )
    factors = [schedule_factor(section, step, 100) for step in range(101)]
    assert factors[0] == 0 and factors[5] == pytest.approx(0.5)
    assert factors[10:78] == [1.0] * 68
    assert factors[100] == pytest.approx(0.2)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_warmup_in_steps_or_as_a_share():
    assert warmup_steps(ScheduleSection(warmup_steps=30), 20) == 20
    assert warmup_steps(ScheduleSection(warmup_fraction=0.1), 95) == 10
    assert warmup_steps(ScheduleSection(), 95) == 0


def test_polynomial_is_big_visions_formula():
    """end + (1 - end) (1 - p)^power; with power 1 it is the line."""
    for power, end in ((2.0, 0.0), (0.5, 0.1), (3.0, 0.25)):
        section = ScheduleSection(
            name="polynomial", power=power, final_lr_fraction=end, warmup_steps=10
        )
        for step in (10, 11, 40, 55, 99, 100, 103):
            p = np.clip((step - 10) / 90, 0, 1)
            expected = end + (1 - end) * (1 - p) ** power
            assert schedule_factor(section, step, 100) == pytest.approx(expected, abs=1e-12)
    line = ScheduleSection(name="linear", final_lr_fraction=0.1)
    same = ScheduleSection(name="polynomial", power=1.0, final_lr_fraction=0.1)
    assert all(
        schedule_factor(line, i, 50) == pytest.approx(schedule_factor(same, i, 50))
        for i in range(52)
    )


def test_stair_changes_at_the_listed_steps():
    """big_vision: index = searchsorted(steps, step + 1), so lr(199) is old and lr(200) is new."""
    steps, factors = (200, 300, 450), (0.1, 0.01, 0.001)
    section = ScheduleSection(
        name="stair", stair_steps=steps, stair_factors=factors, warmup_steps=50
    )
    for step in (0, 25, 49, 50, 199, 200, 201, 299, 300, 449, 450, 499, 510):
        expected = (1.0, *factors)[np.searchsorted(steps, step + 1)] * min(1, step / 50)
        assert schedule_factor(section, step, 500) == pytest.approx(expected)
    with pytest.raises(ValueError, match="as many values"):
        ScheduleSection(name="stair", stair_steps=(3,))
    with pytest.raises(ValueError, match="must increase"):
        ScheduleSection(name="stair", stair_steps=(3, 3), stair_factors=(0.1, 0.2))
    with pytest.raises(ValueError, match="needs `stair_steps`"):
        ScheduleSection(name="stair")


def test_rsqrt_with_a_shift_is_big_visions_formula():
    section = ScheduleSection(name="rsqrt", timescale=200, shift=300, warmup_steps=100)
    for step in (0, 1, 50, 99, 100, 101, 500, 999):
        late = step >= 100
        expected = 1 / np.sqrt(1 + ((step + 300 - 100) if late else 300) / 200)
        assert schedule_factor(section, step, 1000) == pytest.approx(expected * min(1, step / 100))
