"""Schedules against the official implementations."""

import json

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
