"""The cost of a training run before it starts: the numbers of `vitcli plan`."""

from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from vitcli.config.schema import Recipe, parse_duration
from vitcli.cost.memory import StepMemory
from vitcli.cost.planned_run import PlannedRun, RunCounts
from vitcli.errors import VitcliError
from vitcli.train.loop import CHECKPOINT_SECONDS
from vitcli.train.resuming import NUM_EVALUATIONS


@dataclass(frozen=True)
class ProbeResult:
    """The measurements of a few steps on this machine.

    Attributes:
        startup: seconds from the start of the program to the first step.
        steps: seconds per step in each stage.
        evaluation: seconds of a pass over the held-out split; 0 if there is none.
        last_evaluation: seconds of the test split at the end, if there are validation images too.
        writing: seconds of writing a checkpoint.
        peak_flops: FLOP/s of large matrix products, summed over all processes.
        memory: peak bytes of the allocator of a GPU; None on a CPU.
    """

    startup: float
    steps: tuple[float, ...]
    evaluation: float
    last_evaluation: float
    writing: float
    peak_flops: float
    memory: int | None


@dataclass(frozen=True)
class RunTime:
    """The seconds of a run, by activity."""

    steps: int
    train: float
    evaluate: float = 0.0
    start: float = 0.0
    write: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of the whole command."""
        return self.start + self.train + self.evaluate + self.write

    @property
    def by_activity(self) -> dict[str, float]:
        """Seconds of start, train, evaluate and write."""
        return {name: getattr(self, name) for name in ("start", "train", "evaluate", "write")}


def run_time(
    recipe: Recipe, counts: RunCounts, measured: ProbeResult, steps: int | None = None
) -> RunTime:
    """The time of a run on this machine; without `steps`, of the steps of the recipe or budget."""
    step = step_seconds(counts, measured)
    steps = counts.steps if steps is None else steps
    interval = recipe.train.eval_steps
    if steps is None:
        budget = parse_duration(recipe.train.budget or "")
        steps = steps_in_budget(counts, measured, budget, interval)
    if interval is None and recipe.train.budget is None:
        interval = max(1, steps // NUM_EVALUATIONS)
    evaluations = 1 + (steps // interval if interval else 0)
    train = steps * step
    checkpoints = 1 + int(train // CHECKPOINT_SECONDS)
    return RunTime(
        steps=steps,
        train=train,
        evaluate=evaluations * measured.evaluation + measured.last_evaluation,
        start=measured.startup,
        write=checkpoints * measured.writing,
    )


def step_seconds(counts: RunCounts, measured: ProbeResult) -> float:
    """Seconds per step, averaged over the run."""
    return sum(s.fraction * t for s, t in zip(counts.stages, measured.steps, strict=True))


def steps_in_budget(
    counts: RunCounts, measured: ProbeResult, budget: float, eval_steps: int | None
) -> int:
    """The steps that fit into `budget` seconds.

    So do an evaluation every `eval_steps`, one at the end, and the checkpoints.
    """
    evaluation = measured.evaluation + measured.last_evaluation
    available = budget - measured.startup - evaluation - measured.writing
    step = step_seconds(counts, measured) * (1.0 + measured.writing / CHECKPOINT_SECONDS)
    if eval_steps is not None:
        step += measured.evaluation / eval_steps
    return max(0, int(available / step))


@dataclass(frozen=True)
class Prices:
    """Power and prices of the machine; None if the user gives none."""

    watts: float | None = None
    kwh_price: float | None = None
    hour_price: float | None = None

    def __post_init__(self) -> None:
        if self.kwh_price is not None and self.watts is None:
            raise VitcliError("`--kwh-price` needs the power of the machine", "add `--watts W`")

    def of(self, seconds: float | None) -> dict[str, float]:
        """Energy (kWh) and prices of a time."""
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
class CostEstimate:
    """The result of `plan`; `to_json` gives names and units.

    Attributes:
        base: bytes of Python and libraries in a process on a CPU; None on a GPU.
        probe, time: measured on this machine; None without a probe.
        full_time: of the recipe's own number of steps, if the user gives a budget.
        seconds: of the run on `device`; None if it is unknown.
    """

    planned: PlannedRun
    name: str
    counts: RunCounts
    base: int | None
    prices: Prices
    probe: ProbeResult | None = None
    time: RunTime | None = None
    full_time: RunTime | None = None
    budget: float | None = None
    devices: list[dict[str, Any]] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)
    device: str = ""
    seconds: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def memory(self) -> int:
        """Peak bytes of one process; on a GPU, of its tensors."""
        return self._process_memory(self.counts.memory)

    def _process_memory(self, step: StepMemory) -> int:
        forward = self.counts.evaluation
        if self.base is None:
            return max(step.peak, step.evaluation_peak(forward))
        return self.base + max(step.cpu_peak, step.cpu_evaluation_peak(forward))

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation: the fraction of this machine's peak that the model reaches."""
        if self.probe is None or self.time is None or not self.time.train:
            return None
        flops = self.training_flops_of(self.time.steps)
        return flops / self.time.train / self.probe.peak_flops

    def training_flops_of(self, steps: int) -> float:
        """FLOPs of `steps` optimizer steps: two per multiply-add."""
        return 2.0 * self.counts.training_macs * steps * self.planned.recipe.train.batch_size

    def to_json(self) -> dict[str, Any]:
        """Plain values in bytes, seconds and images; a multiply-add is two FLOPs."""
        planned, counts = self.planned, self.counts
        recipe, train = planned.recipe, planned.recipe.train
        steps = self.time.steps if self.time else counts.steps
        images = None if steps is None else steps * train.batch_size
        rate = None if images is None or not self.seconds else images / self.seconds
        if self.probe is not None and self.time is not None:
            rate = images / self.time.train if images and self.time.train else None
        return {
            "recipe": self.name,
            "command": recipe.command,
            "data": recipe.data.name,
            "model": recipe.model.name,
            "objective": recipe.objective.name,
            "optimizer": recipe.optim.name,
            "precision": planned.precision,
            "processes": planned.processes,
            "parameters": counts.parameters,
            "trained_parameters": counts.trained,
            "macs_per_image": counts.macs,
            "flops_per_image": 2 * counts.macs,
            "parts": counts.parts,
            "training_flops_per_image": 2.0 * counts.training_macs,
            "training_flops": None if steps is None else self.training_flops_of(steps),
            "tokens_per_image": counts.tokens,
            "tokens": None if images is None else counts.tokens * images,
            "train_images": planned.images,
            "steps": steps,
            "images": images,
            "epochs": None if images is None else images / planned.images,
            "batch_size": train.batch_size,
            "micro_batch_size": planned.micro_batch,
            "image_size": list(planned.config.image_size),
            "memory_bytes": self.memory,
            "memory": self._memory_json(),
            "images_per_second": rate,
            "seconds": self.seconds,
            "time": self.time.by_activity if self.probe and self.time else None,
            "stages": self._stages_json(),
            "mfu": self.mfu,
            "peak_flops": self.probe.peak_flops if self.probe else None,
            "ends_at": _end_time(self.seconds) if self.probe else None,
            "device": self.device,
            "measured": self.probe is not None,
            "devices": self.devices,
            "budget": None if self.budget is None else self._budget_json(steps),
            "changes": self.changes,
            **self.prices.of(self.seconds),
            "notes": self.notes,
        }

    def _memory_json(self) -> dict[str, Any]:
        own, other = self.counts.memory, self.counts.other
        checkpointing = self.planned.recipe.train.activation_checkpointing
        sizes = ("weights", "gradients", "optimizer", "average", "activations")
        return {
            **{name: getattr(own, name) for name in sizes},
            "step_peak": own.peak,
            "heap_peak": None if self.base is None else own.cpu_peak,
            "evaluation": self.counts.evaluation.peak,
            "process": self.base,
            "activation_checkpointing": checkpointing,
            "otherwise": {
                "activation_checkpointing": not checkpointing,
                "activations": other.activations,
                "memory_bytes": self._process_memory(other),
            },
            "measured": self.probe.memory if self.probe else None,
        }

    def _stages_json(self) -> list[dict[str, Any]]:
        return [
            {
                "share": stage.fraction,
                "side": stage.image_size,
                "patch_drop_rate": stage.patch_drop_rate,
                "tokens_per_image": stage.tokens,
                "macs_per_image": stage.macs,
                "seconds_per_step": self.probe.steps[i] if self.probe else None,
            }
            for i, stage in enumerate(self.counts.stages)
        ]

    def _budget_json(self, steps: int | None) -> dict[str, Any]:
        full = self.full_time
        return {
            "seconds": self.budget,
            "steps": steps,
            "whole_steps": full.steps if full else None,
            "whole_seconds": full.seconds if full else None,
            "share": steps / full.steps if full and steps is not None else None,
        }


def _end_time(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    with suppress(OverflowError):  # a run that ends after the year 9999
        end = datetime.now().astimezone() + timedelta(seconds=seconds)
        return end.isoformat(timespec="seconds")
    return None
