"""`vitcli plan`: the cost of a run before it starts."""

import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vitcli import distributed
from vitcli.config.recipe import lay_over, load_recipe, nest, recipe_path
from vitcli.config.schema import Recipe, Settings, parse_duration
from vitcli.cost.alternatives import change_rows, device_rows
from vitcli.cost.hardware import find_hardware, includes_this_machine
from vitcli.cost.machine import system_memory
from vitcli.cost.memory import base_memory
from vitcli.cost.plan import CostEstimate, Prices, ProbeResult, RunTime, run_time
from vitcli.cost.planned_run import PlannedRun, count_run
from vitcli.cost.probe import probe, unsaved_loop
from vitcli.cost.recipe_header import RecipeHeader, noise_source
from vitcli.data.image_set import ImageSet, Stream
from vitcli.data.source import Source
from vitcli.devices import pick_device
from vitcli.errors import VitcliError
from vitcli.files import parse_toml
from vitcli.progress import Quiet, Watcher
from vitcli.run import check_free
from vitcli.train.build import check_names, open_source, start_accelerator
from vitcli.train.further import initial_model
from vitcli.train.objectives import objective_class
from vitcli.train.resolve import (
    ResolvedRun,
    finetune_recipe,
    newest_pretrained,
    pretrain_recipe,
    pretrained_model,
    random_model,
)
from vitcli.train.resuming import is_run
from vitcli.weights.load import names_weights
from vitcli.weights.loaded import LoadedModel

__all__ = ["CostEstimate", "Prices", "run"]

PROBE_SECONDS = 4.0
MAX_CPU_PARAMETERS = 300_000_000  # a step of a larger model takes minutes on a CPU
MAX_MEMORY_SHARE = 0.8  # of the available memory; a larger step is not probed
GIB = 2**30


@dataclass(frozen=True)
class PlanTarget:
    """The command line to plan; see `run` for its fields."""

    recipe: str | None
    data: str | None
    command: str | None
    model: str | None
    settings: Settings | None

    def resolve(self, watch: Watcher) -> tuple[ResolvedRun, RecipeHeader]:
        """The recipe that the training command would use, and its header."""
        recipe, model, settings = self.recipe, self.model, self.settings
        if recipe is not None and (Path(recipe) / "recipe.toml").is_file():
            recipe = str(Path(recipe) / "recipe.toml")
        elif recipe is not None and Path(recipe).is_dir():
            raise VitcliError(
                f"`{recipe}` is not a run: it has no recipe.toml",
                "to plan for DATA, put the recipe first: `vitcli plan RECIPE DATA`",
            )
        text = recipe_path(recipe).read_text(encoding="utf-8") if recipe is not None else ""
        stated = RecipeHeader.parse(text)
        if (self.command or _command_of(text)) == "pretrain":
            if model is not None:
                settings = {}
                lay_over(settings, self.settings or {})
                lay_over(settings, nest("model.name", model))
            return pretrain_recipe(self.data, recipe, settings, watch), stated
        if model is None and recipe is not None:
            named = load_recipe(recipe, settings or {}).model.name
            model = None if named else _default_model(stated, watch)
        return finetune_recipe(self.data, model, recipe, settings, watch), stated

    def without_budget(self, resolved: ResolvedRun) -> Recipe | None:
        """The recipe with its own number of steps, if the command line gives a budget."""
        train = (self.settings or {}).get("train", {})
        if "budget" not in train:
            return None
        if resolved.defaults is not None:
            length = {"budget": None, "epochs": resolved.defaults.epochs}
            own = resolved.recipe.train.model_copy(update=length)
            return resolved.recipe.model_copy(update={"train": own})
        rest = {key: value for key, value in train.items() if key != "budget"}
        settings = {**(self.settings or {}), "train": rest}
        with suppress(VitcliError):  # the recipe has no number of steps
            recipe = replace(self, settings=settings).resolve(Quiet())[0].recipe
            return recipe if recipe.train.budget is None else None
        return None


def run(
    recipe: str | None = None,
    data: str | None = None,
    *,
    command: str | None = None,
    model: str | None = None,
    settings: Settings | None = None,
    out: Path | None = None,
    resume: bool = False,
    images: int | None = None,
    classes: int | None = None,
    probing: bool = True,
    device: str | None = None,
    prices: Prices | None = None,
    compare: bool = True,
    watch: Watcher | None = None,
) -> CostEstimate:
    """Estimate the cost of a run. Nothing is written.

    Args:
        recipe: name or file of a recipe, or a run directory; None takes the default of `command`.
        data: DATA; None takes that of the recipe, else the header of the recipe.
        command: `pretrain` or `finetune`, for `--dry-run`; None takes that of the recipe.
        model: MODEL of a `finetune` recipe.
        settings: nested settings that override the recipe.
        out, resume: `--out` and `--resume` of the planned command.
        images, classes: size of the training set if there are no data.
        probing: make a few real steps on this machine.
        device: devices of the table, with commas, or `all`; None is this machine.
        prices: power and prices of the machine.
        compare: estimate cheaper alternatives.

    Raises:
        VitcliError: bad input.
    """
    began = distributed.started_at or time.monotonic()
    watch, prices = watch or Quiet(), prices or Prices()
    if out is not None and not resume:
        check_free(out)
    if resume and recipe is None and out is not None and is_run(out):
        recipe = str(out)
    hardware = find_hardware(device) if device else []
    here = includes_this_machine(device)
    request = PlanTarget(recipe, data, command, model, settings)
    target, stated = request.resolve(watch)
    name, resolved = target.name, target.recipe
    check_names(resolved)
    own = request.without_budget(target)
    accelerator, precision = start_accelerator(resolved)
    if resolved.data.name is None:
        channels = resolved.model.num_channels or 3
        regression = objective_class(resolved.objective.name).regression
        source = noise_source(name, stated, images, classes, channels, watch, regression)
    else:
        source = open_source(resolved, watch, target.source)
    torch.manual_seed(resolved.train.seed)
    base = base_memory() if pick_device().type == "cpu" else None
    make_model = partial(_make_model, source=source, weights=probing and here)
    planned = PlannedRun(
        resolved,
        source,
        make_model(resolved, watch=watch),
        images if images is not None else _count_images(resolved, source),
        accelerator.num_processes,
        precision,
    )
    startup = time.monotonic() - began
    estimate = CostEstimate(planned, name, count_run(planned), base, prices)
    if resolved.train.budget is not None:
        estimate.budget = parse_duration(resolved.train.budget)
    if probing and here:
        _add_probe(estimate, own, accelerator, startup, watch)
    _add_devices(estimate, hardware, here)
    if compare:
        quiet_model = partial(make_model, watch=Quiet())
        estimate.changes = change_rows(estimate, own or resolved, quiet_model, accelerator, watch)
    return estimate


def _command_of(recipe: str) -> str:
    """The command of the text of a recipe; a text that is not TOML is refused when it is loaded."""
    with suppress(ValueError):
        if parse_toml(recipe).get("command") == "finetune":
            return "finetune"
    return "pretrain"


def _default_model(stated: RecipeHeader, watch: Watcher) -> str:
    """The newest pretrained run, else the model in the header of the recipe."""
    try:
        model = newest_pretrained()
        watch.note(f"no `--model` given: using {model}")
    except VitcliError:
        if stated.model is None:
            raise
        model = stated.model
        watch.note(f"no `--model` given: using {model}, from the header of the recipe")
    return model


def _count_images(recipe: Recipe, source: Source) -> int:
    """The number of training images. A stream does not know it, and needs it for epochs only."""
    images: ImageSet | Stream = source.splits["train"]
    return 1 if images.kind == "stream" and recipe.train.epochs is None else len(images)


def _make_model(recipe: Recipe, source: Source, weights: bool, watch: Watcher) -> LoadedModel:
    """The model of the run; without weights if no step will be made with it."""
    if recipe.command == "finetune":
        return pretrained_model(recipe, source, watch)
    if names_weights(str(recipe.model.name)):
        return initial_model(recipe, source, watch)
    empty = random_model(recipe, source, empty=True)
    parameters = sum(p.numel() for p in empty.network.parameters())
    if not weights or (pick_device().type == "cpu" and parameters > MAX_CPU_PARAMETERS):
        return empty
    return random_model(recipe, source)


def _add_probe(
    estimate: CostEstimate, own: Recipe | None, accelerator: Any, startup: float, watch: Watcher
) -> None:
    """Measure steps on this machine, and the times that follow from them."""
    from accelerate.utils import broadcast_object_list

    planned, counts = estimate.planned, estimate.counts
    if planned.recipe.data.name is None:
        estimate.notes.append("probed on noise images: reading and decoding are not included")
    # All processes take the decision of the first: a probe needs every one of them.
    too_large = broadcast_object_list([_too_large(estimate)])[0]
    if too_large is not None:
        estimate.notes.append(too_large)
        return
    with watch.progress("probe", 1) as bar:
        began = time.monotonic()
        loop = unsaved_loop(planned, accelerator, watch)
        startup += time.monotonic() - began
        measured: ProbeResult = probe(planned, loop, PROBE_SECONDS, startup)
        bar.advance()
    estimate.probe = measured
    estimate.time = run_time(planned.recipe, counts, measured)
    estimate.seconds = estimate.time.seconds
    if own is not None:
        steps = own.train.total_steps(planned.images)
        estimate.full_time = run_time(own, counts, measured, steps)


def _too_large(estimate: CostEstimate) -> str | None:
    """The reason against a probe on this machine, or None."""
    if any(p.is_meta for p in estimate.planned.model.network.parameters()):
        return (
            f"not probed: {estimate.counts.parameters:,} parameters are too many for this machine; "
            "`--device all` estimates other machines"
        )
    needed, available = estimate.memory - (estimate.base or 0), system_memory()[1]
    if pick_device().type == "cpu" and needed > MAX_MEMORY_SHARE * available:
        return (
            f"not probed: the run needs {estimate.memory / GIB:.1f} GiB of memory, "
            f"{available / GIB:.1f} GiB are available"
        )
    return None


def _add_devices(estimate: CostEstimate, hardware: list[Any], here: bool) -> None:
    """The table of other devices. Without this machine, the first device gives the time."""
    estimate.device = _describe_device() if here else hardware[0].name
    estimate.devices = device_rows(estimate, hardware)
    if not here and estimate.devices:
        first = estimate.devices[0]
        estimate.seconds = first["seconds"]
        if first["steps"] is not None and estimate.counts.steps is None:
            estimate.time = RunTime(first["steps"], first["seconds"])


def _describe_device() -> str:
    device = pick_device()
    if device.type == "cuda":
        return str(torch.cuda.get_device_name())
    threads = torch.get_num_threads()
    return f"this machine ({device.type}, {threads} thread{'s' * (threads > 1)})"
