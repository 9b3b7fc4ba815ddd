"""All figures of a plan, and what they are called."""

from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from vitcli.cost.plan import Count, Span, Speed, Subject, training_flops
from vitcli.errors import VitcliError


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
