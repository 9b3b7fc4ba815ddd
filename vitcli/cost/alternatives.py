"""The same run elsewhere, and cheaper ones here: the tables at the end of a plan."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from vitcli.config.schema import Recipe
from vitcli.cost.changes import Change, changes_of
from vitcli.cost.figures import Plan
from vitcli.cost.hardware import Hardware
from vitcli.cost.plan import DAY, Count, Span, fits_on, span_here, span_on
from vitcli.cost.probe import loop_of, step_times
from vitcli.cost.work import stages_of
from vitcli.errors import VitcliError
from vitcli.progress import Quiet, Watcher
from vitcli.vit import Model

CHANGE_SECONDS = 1.0
MakeModel = Callable[[Recipe], Model]


def devices(plan: Plan, hardware: list[Hardware]) -> list[dict[str, Any]]:
    """A row for each device of the table: an estimate, from its peak and an assumed share of it."""
    rows: list[dict[str, Any]] = []
    if not hardware:
        return rows
    train = plan.subject.recipe.train
    for device, room in zip(hardware, fits_on(plan.subject, plan.count, hardware), strict=True):
        low, high = device.mfu
        middle = (low * high) ** 0.5
        each = 2.0 * plan.count.training_macs * train.batch_size  # operations of a step
        steps = plan.count.steps
        if steps is None and plan.budget is not None:
            steps = int(plan.budget / span_on(device, each, middle))
        flops = None if steps is None else each * steps
        spans = [None if flops is None else span_on(device, flops, m) for m in (high, middle, low)]
        rows.append(
            {
                "device": device.name,
                "estimate": True,
                "peak_flops": device.peak_flops,
                "memory_bytes": int(device.memory),
                "bandwidth": device.bandwidth,
                "assumed_mfu": [low, high],
                "steps": steps,
                "seconds": spans[1],
                "seconds_range": [spans[0], spans[2]],
                "device_days": None if spans[1] is None else spans[1] / DAY,
                "device_days_range": [None if s is None else s / DAY for s in (spans[0], spans[2])],
                "images_per_second": device.peak_flops * middle / (2.0 * plan.count.training_macs),
                **room,
                **plan.prices.of(spans[1]),
                "source": device.source,
            }
        )
    return rows


def cheaper(
    plan: Plan, own: Recipe, make: MakeModel, accelerator: Any, probing: bool, watch: Watcher
) -> list[dict[str, Any]]:
    """A row for each change: what becomes of the time of the whole run."""
    subject, counted, speed = plan.subject, plan.count, plan.speed
    steps = own.train.total_steps(subject.images) or (plan.span.steps if plan.span else None)
    before = None
    if speed is not None and steps is not None:
        before = span_here(own, counted, speed, steps)
    rows = [_row("as it is", "", counted.training_macs, counted, before, plan.budget, None)]
    half = None
    if before is not None and steps is not None and speed is not None:
        half = span_here(own, counted, speed, max(1, steps // 2))
    rows.append(
        _row(
            "half the steps",
            "",
            counted.training_macs / 2,
            counted,
            half,
            plan.budget,
            before,
        )
    )
    with watch.progress("changes") as bar:
        for change in changes_of(own, subject.config):
            with suppress(VitcliError):
                row = _changed(plan, change, make, accelerator, probing, steps, before)
                rows.append(row)
            bar.advance()
    return rows


def _row(
    name: str,
    text: str,
    training_macs: float,
    counted: Count,
    span: Span | None,
    budget: float | None,
    before: Span | None,
) -> dict[str, Any]:
    return {
        "change": name,
        "settings": text,
        "training_flops_ratio": training_macs / counted.training_macs,
        "seconds": span.seconds if span else None,
        "time_ratio": span.train / before.train if span and before else (1.0 if span else None),
        "fits": None if budget is None or span is None else span.seconds <= budget,
    }


def _changed(
    plan: Plan,
    change: Change,
    make: MakeModel,
    accelerator: Any,
    probing: bool,
    steps: int | None,
    before: Span | None,
) -> dict[str, Any]:
    """One change, counted; and where steps are made here, timed by some of its own."""
    subject = plan.subject
    made = make(change.recipe)
    other = replace(subject, recipe=change.recipe, model=made)
    stages = tuple(stages_of(change.recipe, made.config, other.objective()))
    counted = replace(plan.count, stages=stages)
    span = None
    if probing and plan.speed is not None and steps is not None:
        loop = loop_of(other, accelerator, Quiet())
        speed = replace(plan.speed, steps=step_times(loop, CHANGE_SECONDS, warm=1))
        span = span_here(change.recipe, counted, speed, steps)
    name = {"model": "smaller model", "patch": "larger patch", "resolution": "lower resolution"}
    return _row(
        name[change.name],
        change.text,
        counted.training_macs,
        plan.count,
        span,
        plan.budget,
        before,
    )
