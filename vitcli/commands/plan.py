"""`vitcli plan`: what a run would cost, before it starts."""

import time
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from vitcli import distributed as launch
from vitcli.config.recipe import lay_over, load_recipe, nest, recipe_path
from vitcli.config.schema import Recipe, Settings, parse_duration
from vitcli.cost.alternatives import cheaper, devices
from vitcli.cost.machine import HERE, find_hardware
from vitcli.cost.plan import Plan, Prices, Span, Speed, Subject, count, span_here
from vitcli.cost.probe import base_memory, free_memory, loop_of, probe
from vitcli.cost.recipe_header import Stated, blank_source
from vitcli.data.source import Source
from vitcli.devices import pick_device
from vitcli.errors import VitcliError
from vitcli.progress import Quiet, Watcher
from vitcli.run import check_free
from vitcli.train.build import open_source, start_accelerator
from vitcli.train.resolve import (
    finetune_recipe,
    newest_pretrained,
    pretrain_recipe,
    pretrained_model,
    random_model,
)
from vitcli.weights.loaded import LoadedModel

__all__ = ["Plan", "Prices", "run"]

PROBE_SECONDS = 4.0
LARGE = 300_000_000  # parameters: a step of more takes minutes on a CPU


def run(
    target: str | None = None,
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
) -> Plan:
    """Say what a run would cost; nothing is written.

    Args:
        target: a recipe's name or file, or a run directory; None takes what `command` would.
        data: DATA; None takes the recipe's, and where there is none what its header says.
        command: `pretrain` or `finetune`, for `--dry-run`; None goes by the recipe.
        model: MODEL of a recipe of `finetune`.
        settings: nested settings laid over the recipe.
        out, resume: of the command line that is tried.
        images, classes: of the training set, where there are no data.
        probing: make a few steps on this machine.
        device: names of the table, with commas, or `all`; None is this machine.
        prices: what to say of energy and money.
        compare: work out what changes would save.

    Raises:
        VitcliError: bad input.
    """
    from accelerate.utils import broadcast_object_list

    began = launch.started_at or time.monotonic()
    watch, prices = watch or Quiet(), prices or Prices()
    if out is not None and not resume:
        check_free(out)
    hardware = find_hardware(device) if device else []
    here = device is None or device.lower() == "all" or any(h in device.lower() for h in HERE)
    probing = probing and here
    name, recipe, stated = _resolve(target, data, command, model, settings, watch)
    own = _without_budget(target, data, command, model, settings)
    kind = pick_device()
    accelerator, precision = start_accelerator(recipe)
    blank = recipe.data.name is None
    channels = recipe.model.num_channels or 3
    source = (
        blank_source(name, stated, images, classes, channels, watch)
        if blank
        else open_source(recipe, watch)
    )
    told = images if images is not None else _images(recipe, source)
    torch.manual_seed(recipe.train.seed)
    base = base_memory() if kind.type == "cpu" else None
    made = _model(recipe, source, probing, watch)
    ready = time.monotonic() - began
    subject = Subject(recipe, source, made, told, accelerator.num_processes, precision)
    counted = count(subject)
    plan = Plan(subject, name, counted, base, None, None, None, None, [], [], "", prices, None)
    notes = plan.notes
    if blank and probing:
        notes.append("probed on random images: reading and decoding of data are not included")
    why = broadcast_object_list([_too_large(plan, kind) if probing else None])[0]
    if why is not None:
        notes.append(why)
        probing = False
    if recipe.train.budget is not None:
        plan.budget = parse_duration(recipe.train.budget)
    if probing:
        plan.speed = _probe(plan, accelerator, ready, watch)
        plan.span = span_here(recipe, counted, plan.speed)
        if own is not None and own.train.budget is None:
            steps = own.train.total_steps(told)
            plan.own = span_here(own, counted, plan.speed, steps)
        plan.seconds = plan.span.seconds
    plan.device = _describe(kind) if here else hardware[0].name
    plan.devices = devices(plan, hardware)
    if not here and plan.devices:
        plan.seconds = plan.devices[0]["seconds"]
        if plan.devices[0]["steps"] is not None and plan.count.steps is None:
            plan.span = Span(plan.devices[0]["steps"], plan.devices[0]["seconds"])
    if compare:
        plan.changes = cheaper(
            plan,
            own or recipe,
            lambda other: _model(other, source, probing, Quiet()),
            accelerator,
            probing,
            watch,
        )
    return plan


def _resolve(
    target: str | None,
    data: str | None,
    command: str | None,
    model: str | None,
    settings: Settings | None,
    watch: Watcher,
) -> tuple[str, Recipe, Stated]:
    """The recipe as the training command would resolve it, and what its header says."""
    if target is not None and (Path(target) / "recipe.toml").is_file():
        target = str(Path(target) / "recipe.toml")
    elif target is not None and Path(target).is_dir():
        raise VitcliError(
            f"`{target}` is not a run: it has no recipe.toml",
            "`vitcli plan RECIPE DATA`: the recipe comes first",
        )
    command = command or _command(target)
    text = recipe_path(target).read_text(encoding="utf-8") if target is not None else ""
    stated = Stated.of(text)
    if command == "pretrain":
        if model is not None:
            settings = _with(settings, "model.name", model)
        return *pretrain_recipe(data, target, settings, watch), stated
    if model is None and target is not None and not _names_model(target, settings):
        try:
            model = newest_pretrained()
            watch.note(f"no `--model` given: {model}")
        except VitcliError:
            if stated.model is None:
                raise
            model = stated.model
            watch.note(f"no `--model` given: {model}, for which the recipe states its cost")
    return *finetune_recipe(data, model, target, settings, watch), stated


def _command(target: str | None) -> str:
    """Of which command a recipe is; a default one is of `pretrain`."""
    if target is None:
        return "pretrain"
    try:
        found = tomllib.loads(recipe_path(target).read_text(encoding="utf-8")).get("command")
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        found = None  # said in words when the recipe is loaded
    return "finetune" if found == "finetune" else "pretrain"


def _with(settings: Settings | None, key: str, value: Any) -> Settings:
    changed: Settings = {}
    lay_over(changed, settings or {})
    lay_over(changed, nest(key, value))
    return changed


def _names_model(target: str, settings: Settings | None) -> bool:
    return load_recipe(target, settings or {}).model.name is not None


def _without_budget(
    target: str | None,
    data: str | None,
    command: str | None,
    model: str | None,
    settings: Settings | None,
) -> Recipe | None:
    """The recipe with its own duration, where the command line gives a budget instead."""
    train = (settings or {}).get("train", {})
    if "budget" not in train:
        return None
    rest = {k: v for k, v in (settings or {}).items() if k != "train"}
    rest["train"] = {k: v for k, v in train.items() if k != "budget"}
    with suppress(VitcliError):
        return _resolve(target, data, command, model, rest, Quiet())[1]
    return None


def _images(recipe: Recipe, source: Source) -> int:
    """Training images; a stream does not know how many it has."""
    try:
        return len(source.splits["train"])
    except TypeError:
        if recipe.train.epochs is not None:
            raise VitcliError("a stream does not say how many images it has", "`--steps`") from None
        return 1


def _model(recipe: Recipe, source: Source, weights: bool, watch: Watcher) -> LoadedModel:
    """The model of the run, without weights where no step will be made with it."""
    if recipe.command == "finetune":
        return pretrained_model(recipe, source, watch)
    empty = random_model(recipe, source, empty=True)
    on_cpu = pick_device().type == "cpu"
    if not weights or (on_cpu and sum(p.numel() for p in empty.network.parameters()) > LARGE):
        return empty
    return random_model(recipe, source)


def _too_large(plan: Plan, kind: torch.device) -> str | None:
    """Why no step is made here, if none is."""
    if any(p.is_meta for p in plan.subject.model.network.parameters()):
        return (
            f"not probed here: a model of {plan.count.parameters:,} parameters; "
            "`--device all` estimates other machines"
        )
    free = free_memory()
    if kind.type == "cpu" and free is not None and plan.memory - (plan.base or 0) > 0.8 * free:
        return (
            f"not probed here: a step needs {plan.memory / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} are free"
        )
    return None


def _probe(plan: Plan, accelerator: Any, ready: float, watch: Watcher) -> Speed:
    with watch.progress("probe", 1) as bar:
        began = time.monotonic()
        loop = loop_of(plan.subject, accelerator, watch)
        start = ready + time.monotonic() - began
        speed = probe(plan.subject, loop, PROBE_SECONDS, start)
        bar.advance()
    return speed


def _describe(kind: torch.device) -> str:
    if kind.type == "cuda":
        return str(torch.cuda.get_device_name())
    threads = torch.get_num_threads()
    return f"this machine ({kind.type}, {threads} thread{'s' * (threads > 1)})"
