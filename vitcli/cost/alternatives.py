"""Cheaper alternatives of a run: other machines (estimated), and changes of the recipe."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from vitcli.config.recipe import check, lay_over, nest
from vitcli.config.schema import Recipe, Settings
from vitcli.cost.flops import run_stages
from vitcli.cost.hardware import Hardware
from vitcli.cost.plan import CostEstimate, RunTime, run_time
from vitcli.cost.planned_run import PlannedRun, RunCounts
from vitcli.cost.probe import time_steps, unsaved_loop
from vitcli.errors import VitcliError
from vitcli.progress import Quiet, Watcher
from vitcli.vit import VARIANTS, Config, ResNetConfig
from vitcli.weights.loaded import LoadedModel

SECONDS_PER_DAY = 86_400.0
USABLE_MEMORY = 0.92  # of a GPU; the rest is for the context, kernel buffers and fragmentation
CHANGE_SECONDS = 1.0  # of timed steps for each change
SMALLER_SIDE = 0.72  # of the present image size: about half of the pixels
TOO_SMALL = {"mu"}  # one layer: a variant for tests
SIZE_KEYS = ("embed_dim", "depth", "num_heads", "mlp_dim")

MakeModel = Callable[[Recipe], LoadedModel]


def device_rows(estimate: CostEstimate, hardware: list[Hardware]) -> list[dict[str, Any]]:
    """One row per device, estimated from its peak FLOP/s and an assumed MFU."""
    if not hardware:
        return []
    counts, batch = estimate.counts, estimate.planned.recipe.train.batch_size
    image_flops = 2.0 * counts.training_macs
    rows: list[dict[str, Any]] = []
    for device, memory in zip(hardware, _memory_on(estimate, hardware), strict=True):
        low, high = device.mfu
        middle = (low * high) ** 0.5  # geometric mean
        steps = counts.steps
        if steps is None and estimate.budget is not None:
            steps = int(estimate.budget / device.seconds(image_flops * batch, middle))
        slowest = typical = fastest = None
        if steps is not None:
            flops = image_flops * batch * steps
            fastest, typical, slowest = (device.seconds(flops, m) for m in (high, middle, low))
        days = [None if s is None else s / SECONDS_PER_DAY for s in (fastest, typical, slowest)]
        rows.append(
            {
                "device": device.name,
                "estimate": True,
                "peak_flops": device.peak_flops,
                "memory_bytes": int(device.memory),
                "bandwidth": device.bandwidth,
                "assumed_mfu": [low, high],
                "steps": steps,
                "seconds": typical,
                "seconds_range": [fastest, slowest],
                "device_days": days[1],
                "device_days_range": [days[0], days[2]],
                "images_per_second": device.peak_flops * middle / image_flops,
                **memory,
                **estimate.prices.of(typical),
                "source": device.source,
            }
        )
    return rows


def _memory_on(estimate: CostEstimate, hardware: list[Hardware]) -> list[dict[str, Any]]:
    """For each device: the bytes of the run, and the largest micro-batch.

    A GPU trains in bf16 with fused attention. Memory is linear in the micro-batch, so two traces
    are enough.
    """
    planned, counts = estimate.planned, estimate.counts
    checkpointing = planned.recipe.train.activation_checkpointing
    small, large = 4, 8
    a, b = (
        planned.step_memory(
            list(counts.stages), checkpointing, micro, on_gpu=True, precision="bf16"
        )
        for micro in (small, large)
    )
    per_image = a.growth_per_image(b, large - small)
    fixed = b.peak - large * per_image
    needed = fixed + per_image * planned.micro_batch
    return [
        {
            "needed": int(needed),
            "fits": needed <= device.memory * USABLE_MEMORY,
            "largest_micro_batch": max(
                0, int((device.memory * USABLE_MEMORY - fixed) // per_image)
            ),
        }
        for device in hardware
    ]


@dataclass(frozen=True)
class RecipeChange:
    """A change of a recipe: its name, the setting that makes it, and the changed recipe."""

    name: str
    setting: str
    recipe: Recipe


def recipe_changes(recipe: Recipe, config: Config) -> Iterator[RecipeChange]:
    """The changes that suit this recipe; pretrained weights keep their size and patch size."""
    if isinstance(config, ResNetConfig):
        return
    is_new = recipe.command == "pretrain"
    side, patch = min(config.image_size), config.pixels_per_patch
    if is_new and (name := smaller_variant(recipe)):
        yield from _change(recipe, "smaller model", "model.name", name)
    if is_new and not config.is_hybrid and side % (2 * patch) == 0:
        yield from _change(recipe, "larger patch", "model.patch_size", 2 * patch)
    smaller = int(side * SMALLER_SIDE) // patch * patch
    if 2 * patch <= smaller < side and config.image_size[0] == config.image_size[1]:
        yield from _change(recipe, "lower resolution", "model.image_size", smaller)


def _change(recipe: Recipe, name: str, key: str, value: Any) -> Iterator[RecipeChange]:
    """The change, if the changed recipe is valid."""
    settings: Settings = recipe.model_dump(mode="json", exclude_none=True)
    lay_over(settings, nest(key, value))
    setting = f"{key}={value}"
    with suppress(VitcliError):
        yield RecipeChange(name, setting, check(Recipe, settings, setting))


def smaller_variant(recipe: Recipe) -> str | None:
    """The next smaller variant with the same patch size; None if the recipe sets the sizes."""
    name = recipe.model.name or ""
    if any(getattr(recipe.model, key) is not None for key in SIZE_KEYS) or "/" not in name:
        return None
    head, _, patch = name.rpartition("/")
    stem, plus, size = head.rpartition("+")
    if size not in VARIANTS or size in TOO_SMALL:
        return None

    def weights(key: str) -> int:
        variant = VARIANTS[key]
        d = variant.embed_dim
        return variant.depth * d * (4 * d + 2 * variant.mlp_dim)

    order = sorted(set(VARIANTS) - TOO_SMALL, key=weights)
    position = order.index(size)
    return f"{stem}{plus}{order[position - 1]}/{patch}" if position else None


def change_rows(
    estimate: CostEstimate,
    recipe: Recipe,
    make_model: MakeModel,
    accelerator: Any,
    watch: Watcher,
) -> list[dict[str, Any]]:
    """One row per change: FLOPs and time relative to `recipe`. A probe times some steps of each."""
    planned, counts, measured = estimate.planned, estimate.counts, estimate.probe
    steps = recipe.train.total_steps(planned.images)
    if steps is None and estimate.time is not None:
        steps = estimate.time.steps
    full = half = None
    if measured is not None and steps is not None:
        full = run_time(recipe, counts, measured, steps)
        half = run_time(recipe, counts, measured, max(1, steps // 2))

    def row(name: str, setting: str, training_macs: float, time: RunTime | None) -> dict[str, Any]:
        fits = None
        if estimate.budget is not None and time is not None:
            fits = time.seconds <= estimate.budget
        return {
            "change": name,
            "settings": setting,
            "training_flops_ratio": training_macs / counts.training_macs,
            "seconds": time.seconds if time else None,
            "time_ratio": time.train / full.train if time and full and full.train else None,
            "fits": fits,
        }

    rows = [
        row("as it is", "", counts.training_macs, full),
        row("half the steps", "", counts.training_macs / 2, half),
    ]
    with watch.progress("changes") as bar:
        for change in recipe_changes(recipe, planned.config):
            with suppress(VitcliError):  # the changed recipe does not suit the data
                model = make_model(change.recipe)
                changed = replace(planned, recipe=change.recipe, model=model)
                changed_counts = _recount(counts, changed)
                time = None
                if measured is not None and steps is not None:
                    loop = unsaved_loop(changed, accelerator, Quiet())
                    times = time_steps(loop, CHANGE_SECONDS, warmup=1)
                    probe = replace(measured, steps=times)
                    time = run_time(change.recipe, changed_counts, probe, steps)
                rows.append(row(change.name, change.setting, changed_counts.training_macs, time))
            bar.advance()
    return rows


def _recount(counts: RunCounts, changed: PlannedRun) -> RunCounts:
    stages = run_stages(changed.recipe, changed.config, changed.build_objective())
    return replace(counts, stages=tuple(stages))
