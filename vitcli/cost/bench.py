"""How fast a model is and how much memory it takes: the measurements of `vitcli bench`."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitcli.config.recipe import check
from vitcli.config.schema import Recipe
from vitcli.cost.memory import DTYPES, Step, evaluation_memory, step_memory
from vitcli.devices import is_out_of_memory
from vitcli.progress import Watcher
from vitcli.vit.blocks import forced_attention

Kind = Literal["auto", "fused", "explicit"]
PERCENTILES = (50, 90, 99)
LEAST_ROUNDS, LEAST_LATENCIES = 3, 20
CLASSES = 1000  # of a model without a head


@dataclass(frozen=True)
class Case:
    """One setting in which contenders are measured.

    Attributes:
        size: (C, Y, X).
        seconds: for each figure of each contender.
    """

    size: tuple[int, int, int]
    batch: int
    precision: str
    attention: Kind
    device: torch.device
    seconds: float


@dataclass(frozen=True)
class Figures:
    """What was measured of one contender.

    Attributes:
        forward, training: images a second, each round's.
        latency: milliseconds of single images.
        forward_bytes, training_bytes: at most alive at `batch`, weights included.
        largest_forward, largest_training: the batches that fit into the memory there is.
    """

    forward: tuple[float, ...]
    training: tuple[float, ...]
    latency: tuple[float, ...]
    forward_bytes: int
    training_bytes: int
    largest_forward: int
    largest_training: int


class Classify(nn.Module):
    """Cross-entropy around any model that gives logits, with an objective's interface."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, images: Tensor, labels: Tensor, factors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, C, Y, X), (B,) -> the mean loss (), and no figures."""
        return nn.functional.cross_entropy(self.model(images).float(), labels), {}


def measure(
    make: Mapping[str, Callable[[], nn.Module]], case: Case, memory: int, watch: Watcher
) -> dict[str, Figures]:
    """Figures of each contender, measured in turn (A B A B) so that a busy machine is fair to all.

    Args:
        make: name -> builds it; the first is ours.
        memory: bytes that there are.
    """
    models = {name: build().to(case.device) for name, build in make.items()}
    images = torch.randn(case.batch, *case.size, device=case.device)
    with watch.progress("bench", 3) as bar, _forced(case):
        forward = _rounds({k: _forward(m, images, case) for k, m in models.items()}, case)
        bar.advance()
        one = {k: _forward(m, images[:1], case) for k, m in models.items()}
        latency = _rounds(one, case, LEAST_LATENCIES)
        bar.advance()
        training = _rounds({k: _training(m, images, case) for k, m in models.items()}, case)
        bar.advance()
    del models
    found = {}
    for name, build in make.items():
        sizes = _sizes(build, case, memory)
        found[name] = Figures(
            forward=tuple(case.batch / s for s in forward[name]),
            training=tuple(case.batch / s for s in training[name]),
            latency=tuple(1000 * s for s in latency[name]),
            **sizes,
        )
    return found


def _forced(case: Case) -> Any:
    return forced_attention(None if case.attention == "auto" else case.attention)


def _rounds(
    work: Mapping[str, Callable[[], None]], case: Case, least: int = LEAST_ROUNDS
) -> dict[str, list[float]]:
    """Seconds of each piece of work, done in turn until each has had its time."""
    for once in work.values():
        once()
    found: dict[str, list[float]] = {name: [] for name in work}
    end = time.perf_counter() + case.seconds * len(work)
    while time.perf_counter() < end or len(next(iter(found.values()))) < least:
        for name, once in work.items():
            start = time.perf_counter()
            once()
            found[name].append(time.perf_counter() - start)
    return found


def _autocast(case: Case) -> Any:
    dtype = DTYPES.get(case.precision, torch.bfloat16)
    return torch.autocast(case.device.type, dtype, enabled=case.precision != "fp32")


def _wait(case: Case) -> None:
    if case.device.type == "cuda":
        torch.cuda.synchronize(case.device)


def _forward(model: nn.Module, images: Tensor, case: Case) -> Callable[[], None]:
    def once() -> None:
        model.eval()
        with torch.inference_mode(), _autocast(case):
            model(images)
        _wait(case)

    return once


def _training(model: nn.Module, images: Tensor, case: Case) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)

    def once() -> None:
        model.train()
        with _autocast(case):
            logits = model(images)
        loss: Any = nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _wait(case)

    return once


def _sizes(build: Callable[[], nn.Module], case: Case, memory: int) -> dict[str, int]:
    """Bytes at the batch, and the batches that fit: each a straight line through two sizes.

    On a GPU the larger ones are then tried, and made smaller until they do fit.
    """
    recipe = _recipe()
    gpu = case.device.type == "cuda"

    def training(batch: int) -> int:
        step = Step(case.size, batch, batch, case.precision, on_gpu=gpu)
        with _forced(case):
            memory = step_memory(lambda: Classify(build()), recipe, step)
        return (None if gpu else memory.heap) or memory.peak

    def forward(batch: int) -> int:
        with _forced(case):
            return evaluation_memory(build(), case.size, batch, case.precision)

    used, largest = {}, {}
    for name, bytes_of in (("forward", forward), ("training", training)):
        few, many = max(1, case.batch // 2), max(2, case.batch)
        low, high = bytes_of(few), bytes_of(many)
        each = max(1.0, (high - low) / (many - few))
        used[name] = high if case.batch > 1 else low
        largest[name] = max(0, int((memory - high) / each) + many)
        if gpu:
            largest[name] = _tried(build, case, largest[name], name == "training")
    return {
        "forward_bytes": used["forward"],
        "training_bytes": used["training"],
        "largest_forward": largest["forward"],
        "largest_training": largest["training"],
    }


def _tried(build: Callable[[], nn.Module], case: Case, batch: int, training: bool) -> int:
    """The largest batch up to `batch` that a GPU really takes, to a tenth."""
    model = build().to(case.device)
    while batch > 0:
        try:
            images = torch.randn(batch, *case.size, device=case.device)
            with _forced(case):
                (_training if training else _forward)(model, images, case)()
            return batch
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        for p in model.parameters():
            p.grad = None
        with suppress(UnboundLocalError):
            del images
        torch.cuda.empty_cache()
        batch = int(batch * 0.9)
    return 0


def _recipe() -> Recipe:
    sections = {"command": "pretrain", "train": {"steps": 1}, "optim": {"name": "adamw"}}
    return check(Recipe, sections, "bench")


def percentile(values: Sequence[float], percent: int) -> float:
    """Of a sample, interpolated between its members."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Ours over theirs, round by round: the median, the least and the largest."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(ratios), "least": min(ratios), "largest": max(ratios)}
