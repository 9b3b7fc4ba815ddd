"""`vitcli plan`: what a run would cost, before it starts."""

import tomllib
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch

from vitcli.config import Recipe, Settings, lay_over, load_recipe, nest, parse_duration, recipe_path
from vitcli.cost.changes import Change, changes_of
from vitcli.cost.hardware import HERE, Hardware, find_hardware
from vitcli.cost.plan import (
    DAY,
    Count,
    Span,
    Speed,
    Subject,
    count,
    fits_on,
    span_here,
    span_on,
    training_flops,
)
from vitcli.cost.probe import base_memory, free_memory, loop_of, probe, step_times
from vitcli.cost.stated import Stated, blank_source
from vitcli.cost.work import stages_of
from vitcli.data.sources import Source
from vitcli.devices import pick_device
from vitcli.errors import VitcliError
from vitcli.run import check_free
from vitcli.train.assemble import start_accelerator
from vitcli.train.setup import open_source
from vitcli.train.starting import (
    finetune_recipe,
    newest_pretrained,
    pretrain_recipe,
    pretrained_model,
    random_model,
)
from vitcli.vit import Model
from vitcli.watch import Quiet, Watcher

PROBE_SECONDS, CHANGE_SECONDS = 4.0, 1.0
LARGE = 300_000_000  # parameters: a step of more takes minutes on a CPU


@dataclass(frozen=True)
class Prices:
    """What is asked about money; None where it is not."""

    watts: float | None = None
    kwh_price: float | None = None
    hour_price: float | None = None

    def __post_init__(self) -> None:
        if self.kwh_price is not None and self.watts is None:
            raise VitcliError("`--kwh-price` needs the power that the machine draws", "`--watts W`")

    def of(self, seconds: float | None) -> dict[str, float]:
        """Energy and price of so many seconds."""
        if seconds is None:
            return {}
        hours, found = seconds / 3600, {}
        if self.watts is not None:
            found["kwh"] = self.watts * hours / 1000
            if self.kwh_price is not None:
                found["electricity"] = found["kwh"] * self.kwh_price
        if self.hour_price is not None:
            found["rent"] = self.hour_price * hours
        return found


@dataclass
class Plan:
    """All figures; see `to_json` for their names and units."""

    subject: Subject
    name: str
    count: Count
    base: int | None
    speed: Speed | None
    span: Span | None
    own: Span | None
    budget: float | None
    devices: list[dict[str, Any]]
    changes: list[dict[str, Any]]
    device: str
    prices: Prices
    seconds: float | None
    notes: list[str] = field(default_factory=list)

    @property
    def memory(self) -> int:
        """Bytes of one process as the recipe has it; without a process around it on a GPU."""
        return self._memory(self.count.memory.peak, self.count.memory.heap)

    def _memory(self, peak: int, heap: int | None) -> int:
        if self.base is None:
            return peak
        lasting = self.count.memory.lasting - self.count.memory.gradients
        return self.base + max(heap or peak, lasting + self.count.evaluation)

    def to_json(self) -> dict[str, Any]:
        """Plain values; bytes, seconds, images; operations are two a multiply-add."""
        subject, counted, train = self.subject, self.count, self.subject.recipe.train
        steps = self.span.steps if self.span else counted.steps
        images = None if steps is None else steps * train.batch_size
        own, other = counted.memory, counted.other
        flops = None if steps is None else training_flops(subject, counted, steps)
        speed, span = self.speed, self.span
        rate = None if images is None or not self.seconds else images / self.seconds
        if speed is not None and span is not None:
            rate = images / span.train if images and span.train else None
        return {
            "recipe": self.name,
            "command": subject.recipe.command,
            "data": subject.recipe.data.name,
            "model": subject.recipe.model.name,
            "objective": subject.recipe.objective.name,
            "optimizer": subject.recipe.optim.name,
            "precision": subject.precision,
            "processes": subject.processes,
            "parameters": counted.parameters,
            "trained_parameters": counted.trained,
            "macs_per_image": counted.macs,
            "flops_per_image": 2 * counted.macs,
            "parts": counted.parts,
            "training_flops_per_image": 2.0 * counted.training_macs,
            "training_flops": flops,
            "tokens_per_image": counted.tokens,
            "tokens": None if images is None else counted.tokens * images,
            "train_images": subject.images,
            "steps": steps,
            "images": images,
            "epochs": None if images is None else images / subject.images,
            "batch_size": train.batch_size,
            "micro_batch_size": subject.micro,
            "image_size": list(subject.config.image_size),
            "memory_bytes": self.memory,
            "memory": {
                "weights": own.weights,
                "gradients": own.gradients,
                "optimizer": own.optimizer,
                "average": own.average,
                "activations": own.activations,
                "step_peak": own.peak,
                "heap_peak": own.heap,
                "evaluation": counted.evaluation,
                "process": self.base,
                "activation_checkpointing": train.activation_checkpointing,
                "otherwise": {
                    "activation_checkpointing": not train.activation_checkpointing,
                    "activations": other.activations,
                    "memory_bytes": self._memory(other.peak, other.heap),
                },
                "measured": speed.memory if speed else None,
            },
            "images_per_second": rate,
            "seconds": self.seconds,
            "time": _times(span) if speed and span else None,
            "stages": [
                {
                    "share": stage.share,
                    "side": stage.side,
                    "patch_drop_rate": stage.patch_drop_rate,
                    "tokens_per_image": stage.tokens,
                    "macs_per_image": stage.macs,
                    "seconds_per_step": speed.steps[i] if speed else None,
                }
                for i, stage in enumerate(counted.stages)
            ],
            "mfu": self.mfu,
            "peak_flops": speed.peak_flops if speed else None,
            "ends_at": _ends(self.seconds) if speed else None,
            "device": self.device,
            "measured": speed is not None,
            "devices": self.devices,
            "budget": None if self.budget is None else self._budget(steps),
            "changes": self.changes,
            **self.prices.of(self.seconds),
            "notes": self.notes,
        }

    @property
    def mfu(self) -> float | None:
        """The share of this machine's peak that the model's operations get."""
        if self.speed is None or self.span is None or not self.span.train:
            return None
        flops = training_flops(self.subject, self.count, self.span.steps)
        return flops / self.span.train / self.speed.peak_flops

    def _budget(self, steps: int | None) -> dict[str, Any]:
        whole = self.own
        return {
            "seconds": self.budget,
            "steps": steps,
            "whole_steps": whole.steps if whole else None,
            "whole_seconds": whole.seconds if whole else None,
            "share": steps / whole.steps if whole and steps is not None else None,
        }


def _times(span: Span) -> dict[str, float]:
    return {
        "start": span.start,
        "train": span.train,
        "evaluate": span.evaluate,
        "write": span.write,
    }


def _ends(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    with suppress(OverflowError):
        end = datetime.now().astimezone() + timedelta(seconds=seconds)
        return end.isoformat(timespec="seconds")
    return None


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
    subject = Subject(recipe, source, made, told, accelerator.num_processes, precision)
    counted = count(subject)
    plan = Plan(subject, name, counted, base, None, None, None, None, [], [], "", prices, None)
    notes = plan.notes
    if blank and probing:
        notes.append("probed on random images: reading and decoding of data are not included")
    if probing and (why := _too_large(plan, kind)):
        notes.append(why)
        probing = False
    if recipe.train.budget is not None:
        plan.budget = parse_duration(recipe.train.budget)
    if probing:
        plan.speed = _probe(plan, accelerator, watch)
        plan.span = span_here(recipe, counted, plan.speed)
        if own is not None and own.train.budget is None:
            steps = own.train.total_steps(told)
            plan.own = span_here(own, counted, plan.speed, steps)
        plan.seconds = plan.span.seconds
    plan.device = _describe(kind) if here else hardware[0].name
    plan.devices = _devices(plan, hardware)
    if not here and plan.devices:
        plan.seconds = plan.devices[0]["seconds"]
        if plan.devices[0]["steps"] is not None and plan.count.steps is None:
            plan.span = Span(plan.devices[0]["steps"], plan.devices[0]["seconds"])
    if compare:
        plan.changes = _changes(plan, own or recipe, accelerator, probing, watch)
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


def _model(recipe: Recipe, source: Source, weights: bool, watch: Watcher) -> Model:
    """The model of the run, without weights where no step will be made with it."""
    if recipe.command == "finetune":
        return pretrained_model(recipe, source, watch)
    empty = random_model(recipe, source, empty=True)
    on_cpu = pick_device().type == "cpu"
    if not weights or (on_cpu and sum(p.numel() for p in empty.parameters()) > LARGE):
        return empty
    return random_model(recipe, source)


def _too_large(plan: Plan, kind: torch.device) -> str | None:
    """Why no step is made here, if none is."""
    if any(p.is_meta for p in plan.subject.model.parameters()):
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


def _probe(plan: Plan, accelerator: Any, watch: Watcher) -> Speed:
    with watch.progress("probe", 1) as bar:
        loop = loop_of(plan.subject, accelerator, watch)
        speed = probe(plan.subject, loop, PROBE_SECONDS)
        bar.advance()
    return speed


def _describe(kind: torch.device) -> str:
    if kind.type == "cuda":
        return str(torch.cuda.get_device_name())
    threads = torch.get_num_threads()
    return f"this machine ({kind.type}, {threads} thread{'s' * (threads > 1)})"


def _devices(plan: Plan, hardware: list[Hardware]) -> list[dict[str, Any]]:
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


def _changes(
    plan: Plan, own: Recipe, accelerator: Any, probing: bool, watch: Watcher
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
                row = _changed(plan, change, accelerator, probing, steps, before)
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
    accelerator: Any,
    probing: bool,
    steps: int | None,
    before: Span | None,
) -> dict[str, Any]:
    """One change, counted; and where steps are made here, timed by some of its own."""
    subject = plan.subject
    made = _model(change.recipe, subject.source, probing, Quiet())
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
