"""What a run will cost, before it starts: the numbers of `vitcli plan`.

All figures of a plan, and what they are called.
"""

from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import torch

from vitcli.config.schema import Recipe, parse_duration
from vitcli.cost.flops import Config, Stage, stages_of
from vitcli.cost.machine import Hardware
from vitcli.cost.memory import Memory, Step, evaluation_memory, size_of, step_memory, tensors_of
from vitcli.data.augment.mixing import mixes_pairs
from vitcli.data.augment.transform import resolve_augment
from vitcli.data.source import Source
from vitcli.errors import VitcliError
from vitcli.train.build import held_out_images
from vitcli.train.loop import CHECKPOINT_SECONDS
from vitcli.train.lora import ADAPTER, freeze_and_adapt
from vitcli.train.objectives import build_objective
from vitcli.train.objectives.base import Objective
from vitcli.train.validate import EVAL_BATCH_SIZE
from vitcli.vit import from_config
from vitcli.vit.macs import macs, parts
from vitcli.weights.loaded import LoadedModel

EVALUATIONS = 5  # of a run that does not say how often, see `train.session`
DAY = 86_400.0


@dataclass(frozen=True)
class Subject:
    """A run that is planned: its recipe, its data, and a model of the right shape.

    Attributes:
        model: with or without weights; only its shape and what belongs to it are read.
        images: of the training set.
    """

    recipe: Recipe
    source: Source
    model: LoadedModel
    images: int
    processes: int = 1
    precision: str = "fp32"

    @property
    def config(self) -> Config:
        """Of the model."""
        return self.model.config

    @property
    def per_process(self) -> int:
        """Images of a step on one process."""
        return self.recipe.train.batch_size // self.processes

    @property
    def micro(self) -> int:
        """Images of one forward pass."""
        return min(self.recipe.train.micro_batch_size or self.per_process, self.per_process)

    def objective(self) -> Objective:
        """The objective around a model without weights, on the meta device; a teacher has its own.

        Raises:
            VitcliError: it does not suit model or data.
        """
        recipe = self.recipe
        with torch.device("meta"):
            empty = from_config(self.config)
            freeze_and_adapt(empty, recipe.lora, recipe.train.freeze, recipe.train.seed)
        # What a head starts from is no matter here.
        section = recipe.objective.model_copy(update={"head_bias": None})
        return build_objective(
            replace(self.model, network=empty), section, recipe.train.seed, self.source.multi_label
        )


@dataclass(frozen=True)
class Count:
    """What is known without a clock: exact numbers of the model and of the run.

    Attributes:
        steps: None where only a time is given and no speed is known.
        memory, checkpointed: of the chosen micro-batch, and with activation checkpointing the other
            way round (`memory` is what the recipe says).
    """

    parameters: int
    trained: int
    parts: dict[str, int]
    macs: int
    stages: tuple[Stage, ...]
    steps: int | None
    memory: Memory
    other: Memory
    evaluation: int

    @property
    def training_macs(self) -> float:
        """Multiply-adds of a training step's forward and backward pass, an image, on average."""
        return sum(stage.share * stage.training_macs for stage in self.stages)

    @property
    def tokens(self) -> float:
        """Tokens of an image, on average over the run."""
        return sum(stage.share * stage.tokens for stage in self.stages)


def count(subject: Subject) -> Count:
    """Parameters, operations, tokens and memory of a run.

    Raises:
        VitcliError: the objective does not suit the model or the data.
    """
    objective = subject.objective()
    model: Any = objective.model
    config = subject.config
    checkpointing = subject.recipe.train.activation_checkpointing
    stages = stages_of(subject.recipe, config, objective)
    return Count(
        parameters=sum(p.numel() for n, p in model.named_parameters() if not n.endswith(ADAPTER)),
        trained=sum(p.numel() for p in objective.parameters() if p.requires_grad),
        parts=parts(config),
        macs=macs(config),
        stages=tuple(stages),
        steps=subject.recipe.train.total_steps(subject.images),
        memory=memory_of(subject, stages, checkpointing),
        other=memory_of(subject, stages, not checkpointing),
        evaluation=_evaluation(subject),
    )


def memory_of(
    subject: Subject,
    stages: list[Stage],
    checkpointing: bool,
    micro: int | None = None,
    on_gpu: bool = False,
    precision: str | None = None,
) -> Memory:
    """The memory of the stage of the run that needs most."""
    recipe, (y, x) = subject.recipe, subject.config.image_size
    several = subject.source.multi_label or mixes_pairs(resolve_augment(recipe.augment))
    largest = max(stages, key=lambda stage: stage.macs)
    micro = micro or subject.micro
    step = Step(
        size=(subject.config.num_channels, y, x),
        batch=max(micro, subject.per_process),
        micro=micro,
        precision=precision or subject.precision,
        side=largest.side,
        classes=subject.config.num_classes if several else 0,
        patch_drop_rate=largest.patch_drop_rate if recipe.train.patch_drop_rate else 0.0,
        checkpointing=checkpointing,
        on_gpu=on_gpu,
    )
    return step_memory(subject.objective, recipe, step)


def _evaluation(subject: Subject) -> int:
    """Bytes that a pass over the held-out split adds; 0 where there is none."""
    images = held_out_images(subject.source)
    if not images or not subject.config.num_classes:
        return 0
    with torch.device("meta"):
        model = from_config(subject.config)
    y, x = subject.config.image_size
    size = (subject.config.num_channels, y, x)
    return evaluation_memory(model, size, min(EVAL_BATCH_SIZE, images)) - size_of(tensors_of(model))


@dataclass(frozen=True)
class Speed:
    """What a few steps on this machine showed.

    Attributes:
        start: seconds from the start of the program to the first step.
        steps: seconds of a step of each stage.
        evaluation: of a pass over the held-out split; 0 where there is none.
        writing: of a checkpoint and of the end.
        peak_flops: of large matrix products here, all processes together.
        memory: bytes that were allocated on a GPU at most; None on a CPU, where the process that
            plans holds other things besides.
    """

    start: float
    steps: tuple[float, ...]
    evaluation: float
    writing: float
    peak_flops: float
    memory: int | None


@dataclass(frozen=True)
class Span:
    """How long a run is on one device, in seconds; on a device of the table least and most."""

    steps: int
    train: float
    evaluate: float = 0.0
    start: float = 0.0
    write: float = 0.0

    @property
    def seconds(self) -> float:
        """The whole command."""
        return self.start + self.train + self.evaluate + self.write


def evaluations(recipe: Recipe, steps: int) -> int:
    """Passes over the held-out split: at intervals, and at the end."""
    train = recipe.train
    often = train.eval_steps or (None if train.budget else max(1, steps // EVALUATIONS))
    return 1 + (steps // often if often else 0)


def span_here(recipe: Recipe, count: Count, speed: Speed, steps: int | None = None) -> Span:
    """The time of a run of so many steps on this machine; of a budget, of those that fit."""
    average = step_seconds(count, speed)
    if steps is None:
        steps = count.steps
    if steps is None:
        steps = fitting_steps(recipe, count, speed, parse_duration(recipe.train.budget or ""))
    passes = evaluations(recipe, steps) if speed.evaluation else 0
    train = steps * average
    saves = 1 + int(train // CHECKPOINT_SECONDS)
    return Span(steps, train, passes * speed.evaluation, speed.start, saves * speed.writing)


def step_seconds(count: Count, speed: Speed) -> float:
    """The mean time of a step over all stages."""
    return sum(s.share * t for s, t in zip(count.stages, speed.steps, strict=True))


def fitting_steps(recipe: Recipe, count: Count, speed: Speed, budget: float) -> int:
    """The steps that a budget has time for, one evaluation at its end included; 0 for none."""
    left = budget - speed.start - speed.evaluation - speed.writing
    saving = 1.0 + speed.writing / CHECKPOINT_SECONDS
    return max(0, int(left / (step_seconds(count, speed) * saving)))


def training_flops(subject: Subject, count: Count, steps: int) -> float:
    """Operations of a run: two a multiply-add."""
    return 2.0 * count.training_macs * steps * subject.recipe.train.batch_size


def span_on(hardware: Hardware, flops: float, mfu: float) -> float:
    """Seconds of so many operations at a share of the device's peak: an estimate."""
    return flops / (hardware.peak_flops * mfu)


def bytes_on(subject: Subject, count: Count, micro: int) -> int:
    """Bytes that a step takes on a GPU, in half precision with fused attention."""
    checkpointing = subject.recipe.train.activation_checkpointing
    stages = list(count.stages)
    return memory_of(subject, stages, checkpointing, micro, on_gpu=True, precision="bf16").peak


def fits_on(subject: Subject, count: Count, hardware: list[Hardware]) -> list[dict[str, Any]]:
    """What each device of the table would make of the run: bytes, and the largest micro-batch.

    Memory is a straight line over the micro-batch, drawn through two sizes.
    """
    small, large = 4, 8
    a, b = bytes_on(subject, count, small), bytes_on(subject, count, large)
    each = max(1, (b - a) // (large - small))
    fixed = a - small * each
    needed = fixed + each * subject.micro
    return [
        {
            "needed": int(needed),
            "fits": needed <= device.memory * USABLE,
            "largest_micro_batch": max(0, int((device.memory * USABLE - fixed) // each)),
        }
        for device in hardware
    ]


USABLE = 0.92  # of a device's memory: context, kernels' own room, fragments


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
