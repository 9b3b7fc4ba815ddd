"""What would make a run cheaper: a smaller model, a larger patch, fewer steps, fewer pixels.

The same run elsewhere, and cheaper ones here: the tables at the end of a plan.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from vitcli.config.recipe import check, lay_over, nest
from vitcli.config.schema import Recipe, Settings
from vitcli.cost.flops import stages_of
from vitcli.cost.machine import Hardware
from vitcli.cost.plan import DAY, Count, Plan, Span, fits_on, span_here, span_on
from vitcli.cost.probe import loop_of, step_times
from vitcli.errors import VitcliError
from vitcli.progress import Quiet, Watcher
from vitcli.vit import VARIANTS, ResNetConfig, ViTConfig
from vitcli.weights.loaded import LoadedModel

SMALLER_SIDE = 0.72  # of the present one: half of the pixels
TOO_SMALL = {"mu"}  # one layer: a test of code more than a model
KEPT = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_dim")


@dataclass(frozen=True)
class Change:
    """One change of a recipe.

    Attributes:
        name: of the kind: `model`, `patch`, `resolution`, `steps`.
        text: the setting that makes it.
        recipe: with it.
    """

    name: str
    text: str
    recipe: Recipe


def changes_of(recipe: Recipe, config: ViTConfig | ResNetConfig) -> Iterator[Change]:
    """Changes that this recipe allows; weights that are there already keep their shape."""
    fresh = recipe.command == "pretrain"
    if isinstance(config, ResNetConfig):
        return
    side, patch = min(config.image_size), config.pixels_per_patch
    if fresh and (name := smaller_variant(recipe)):
        yield from _as_change(recipe, "model", f"model.name={name}", {"model.name": name})
    if fresh and config.stem is None and side % (2 * patch) == 0:
        yield from _as_change(
            recipe,
            "patch",
            f"model.patch_size={2 * patch}",
            {"model.patch_size": 2 * patch},
        )
    smaller = int(side * SMALLER_SIDE) // patch * patch
    if 2 * patch <= smaller < side and config.image_size[0] == config.image_size[1]:
        yield from _as_change(
            recipe, "resolution", f"model.image_size={smaller}", {"model.image_size": smaller}
        )


def smaller_variant(recipe: Recipe) -> str | None:
    """The next smaller size with the same patch; None where the recipe shapes its model itself."""
    section = recipe.model
    name = section.name or ""
    if any(getattr(section, key) is not None for key in KEPT[1:]) or "/" not in name:
        return None
    head, _, patch = name.rpartition("/")
    stem, plus, size = head.rpartition("+")
    if size not in VARIANTS or size in TOO_SMALL:
        return None
    order = sorted(set(VARIANTS) - TOO_SMALL, key=lambda key: _weight(VARIANTS[key]))
    place = order.index(size)
    return f"{stem}{plus}{order[place - 1]}/{patch}" if place else None


def _weight(size: Any) -> int:
    return int(size.depth * size.embed_dim * (4 * size.embed_dim + 2 * size.mlp_dim))


def _as_change(recipe: Recipe, name: str, text: str, keys: dict[str, Any]) -> Iterator[Change]:
    """The change, where the recipe stays one that can be checked."""
    settings: Settings = recipe.model_dump(mode="json", exclude_none=True)
    for key, value in keys.items():
        lay_over(settings, nest(key, value))
    if "model" in keys and name == "resolution":
        settings.pop("preprocess", None)
    try:
        yield Change(name, text, check(Recipe, settings, text))
    except VitcliError:
        return


CHANGE_SECONDS = 1.0
MakeModel = Callable[[Recipe], LoadedModel]


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
