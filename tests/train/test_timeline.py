"""A run's length, which a budget may change, and the clock that changes it."""

import time

import pytest

from vitcli.train import budget as deadline
from vitcli.train.budget import Deadline, Timeline


def test_a_run_of_fixed_length_is_counted_in_steps():
    line = Timeline.of(7)
    assert [line.at(step) for step in range(8)] == list(range(8))
    assert all(isinstance(line.at(step), int) for step in range(8))


def test_the_place_goes_on_without_a_jump_and_ends_with_the_last_step():
    line = Timeline.of(100)
    line.replan(40, 60)
    assert line.at(40) == 40 and line.at(60) == 100 and line.at(50) == 70
    line.replan(50, 150)
    assert line.at(50) == 70 and line.at(150) == 100 and line.at(100) == 85
    places = [line.at(step) for step in range(50, 151)]
    assert places == sorted(places)
    line.replan(70, 70)  # at once
    assert line.total == 70


def test_it_is_restored():
    line, other = Timeline.of(100), Timeline()
    line.replan(40, 60)
    other.restore(line.values())
    assert other == line and other.at(55) == line.at(55)


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(deadline.time, "monotonic", clock)
    return clock


def cost_at(stages, place):
    """Seconds a step, as measured at the start."""
    return next(cost for until, cost in stages if place < until or until == 1.0)


def run(clock, seconds_at, planned, budget, stages=((1.0, 0.1),), reserve=1.0):
    """Seconds and steps of a run whose step at place p takes `seconds_at(p)`.

    Its end takes `reserve`, and longer where the last step did.
    """
    limit = Deadline(clock.now + budget, reserve, stages)
    line, step, start = Timeline.of(planned), 0, clock.now
    while step < line.total:
        place = line.at(step) / planned
        clock.now += seconds_at(place)
        slower = max(1.0, seconds_at(place) / cost_at(stages, place))
        step += 1
        if limit.is_up():
            line.replan(step, step)
        elif limit.is_due(line, step):
            line.replan(step, limit.total(line, step))
    return clock.now - start + reserve * slower, step, line.at(step) / planned


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.0, 1.3, 2.0, 4.0])
def test_a_budget_is_kept_whatever_the_machine_does(clock, factor):
    seconds, _, end = run(clock, lambda p: 0.1 * factor, 600, 61.0)
    assert 0.98 * 61 <= seconds <= 61
    assert end > 0.98


@pytest.mark.parametrize("factor", [0.7, 1.6])
def test_also_when_it_changes_in_the_middle(clock, factor):
    stages = ((0.4, 0.05), (0.7, 0.1), (1.0, 0.2))

    def seconds_at(place):
        return cost_at(stages, place) * (factor if place > 0.45 else 1.0)

    seconds, _, end = run(clock, seconds_at, 542, 61.0, stages)
    assert 0.98 * 61 <= seconds <= 61
    assert end > 0.97


def test_a_step_that_would_come_too_late_is_not_made():
    limit = Deadline(time.monotonic() + 0.05, 0.0, ((1.0, 0.01),))
    assert not limit.is_up()
    time.sleep(0.03)
    assert limit.is_up()  # another one like this does not fit


@pytest.mark.parametrize("planned", [1, 2, 5, 40])
def test_the_last_step_asks_for_no_more(clock, planned):
    """The share of a short run's last step passes a mark, and nothing is left to divide by."""
    limit, line = Deadline(clock.now + 1e6, 0.0, ((1.0, 0.1),)), Timeline.of(planned)
    for step in range(1, planned + 1):
        clock.now += 0.1
        if limit.is_due(line, step) and step == planned:
            assert limit.total(line, step) == planned
