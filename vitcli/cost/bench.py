"""Speed and memory of a model, next to models of other libraries: `vitcli bench`."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitcli.config.recipe import check
from vitcli.config.schema import Recipe
from vitcli.cost.memory import (
    AUTOCAST_DTYPES,
    MALLOC_OVERHEAD,
    StepMemory,
    StepShape,
    all_tensors,
    evaluation_memory,
    step_memory,
    storage_bytes,
)
from vitcli.devices import free_memory, is_out_of_memory, synchronize
from vitcli.errors import VitcliError, unknown
from vitcli.progress import Watcher
from vitcli.vit import ViTConfig
from vitcli.vit.blocks import forced_attention

AttentionKind = Literal["auto", "fused", "explicit"]
PERCENTILES = (50, 90, 99)
MIN_ROUNDS, MIN_LATENCIES = 3, 20
DEFAULT_CLASSES = 1000  # for a model without a head

BuildModel = Callable[[], nn.Module]


@dataclass(frozen=True)
class BenchCase:
    """One setting in which all libraries are measured.

    Attributes:
        size: (C, Y, X).
        seconds: per measurement and library.
    """

    size: tuple[int, int, int]
    batch: int
    precision: str
    attention: AttentionKind
    device: torch.device
    seconds: float

    def forced_attention(self) -> Any:
        """A context in which the models use this kind of attention."""
        return forced_attention(None if self.attention == "auto" else self.attention)

    def autocast(self) -> Any:
        """A context in which the models use this precision."""
        dtype = AUTOCAST_DTYPES.get(self.precision, torch.bfloat16)
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "fp32")


@dataclass(frozen=True)
class BenchResult:
    """The measurements of one library.

    Attributes:
        forward, training: images/s of each round.
        latency: milliseconds of single images.
        forward_bytes, training_bytes: peak memory at the batch size, weights included.
        largest_forward, largest_training: the largest batches within the memory limit.
    """

    forward: tuple[float, ...]
    training: tuple[float, ...]
    latency: tuple[float, ...]
    forward_bytes: int
    training_bytes: int
    largest_forward: int
    largest_training: int


def run_bench(
    builders: Mapping[str, BuildModel], case: BenchCase, memory: int, watch: Watcher
) -> dict[str, BenchResult]:
    """Measure each library; rounds alternate (A B A B), so that other load affects all equally.

    Args:
        builders: library -> builds its model; vitcli comes first.
        memory: limit in bytes for the largest batches.
    """
    models = {name: build().to(case.device) for name, build in builders.items()}
    images = torch.randn(case.batch, *case.size, device=case.device)
    with watch.progress("bench", 3) as bar, case.forced_attention():
        forward = _time_rounds({k: _forward(m, images, case) for k, m in models.items()}, case)
        bar.advance()
        single = {k: _forward(m, images[:1], case) for k, m in models.items()}
        latency = _time_rounds(single, case, MIN_LATENCIES)
        bar.advance()
        training = _time_rounds({k: _training(m, images, case) for k, m in models.items()}, case)
        bar.advance()
    del models
    return {
        name: BenchResult(
            forward=tuple(case.batch / s for s in forward[name]),
            training=tuple(case.batch / s for s in training[name]),
            latency=tuple(1000 * s for s in latency[name]),
            **_memory(build, case, memory),
        )
        for name, build in builders.items()
    }


def _time_rounds(
    work: Mapping[str, Callable[[], None]], case: BenchCase, min_rounds: int = MIN_ROUNDS
) -> dict[str, list[float]]:
    """Seconds of each piece of work, in turn, after one warm-up call each."""
    for call in work.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in work}
    end = time.perf_counter() + case.seconds * len(work)
    while time.perf_counter() < end or len(next(iter(found.values()))) < min_rounds:
        for name, call in work.items():
            start = time.perf_counter()
            call()
            found[name].append(time.perf_counter() - start)
    return found


def _forward(model: nn.Module, images: Tensor, case: BenchCase) -> Callable[[], None]:
    def call() -> None:
        model.eval()
        with torch.inference_mode(), case.autocast():
            model(images)
        synchronize(case.device)

    return call


def _training(model: nn.Module, images: Tensor, case: BenchCase) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)

    def call() -> None:
        model.train()
        with case.autocast():
            logits = model(images)
        loss: Any = nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(case.device)

    return call


class ClassificationStep(nn.Module):
    """Cross-entropy around any model that returns logits, called like an objective."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, C, Y, X), (B,) -> the mean loss (), and no metrics."""
        return nn.functional.cross_entropy(self.model(images).float(), labels), {}


def _memory(build: BuildModel, case: BenchCase, memory: int) -> dict[str, int]:
    """Bytes at the batch size, and the largest batches, on a straight line through two traces.

    On a GPU the largest batches are also tried, because the trace does not see kernel buffers.
    """
    sections = {"command": "pretrain", "train": {"steps": 1}, "optim": {"name": "adamw"}}
    recipe = check(Recipe, sections, "bench")
    on_gpu = case.device.type == "cuda"

    def training(batch: int) -> StepMemory:
        shape = StepShape(case.size, batch, batch, case.precision, on_gpu=on_gpu)
        with case.forced_attention():
            return step_memory(lambda: ClassificationStep(build()), recipe, shape)

    def forward(batch: int) -> int:
        with case.forced_attention():
            model = build()
            weights = storage_bytes(all_tensors(model))
            return weights + evaluation_memory(model, case.size, batch, case.precision).peak

    few, many = max(1, case.batch // 2), max(2, case.batch)
    low, high = forward(few), forward(many)
    small, large = training(few), training(many)
    factor = 1.0 if on_gpu else MALLOC_OVERHEAD[False]
    peaks = [step.peak if on_gpu else step.cpu_peak for step in (small, large)]
    found = {
        "forward_bytes": high if case.batch > 1 else low,
        "training_bytes": peaks[-1 if case.batch > 1 else 0],
    }
    for name, peak, per_image in (
        ("forward", high, max(1.0, (high - low) / (many - few))),
        ("training", peaks[1], factor * small.growth_per_image(large, many - few)),
    ):
        batch = max(0, int((memory - peak) / per_image) + many)
        if on_gpu:
            batch = _largest_tried(build, case, batch, name == "training")
        found[f"largest_{name}"] = batch
    return found


def _largest_tried(build: BuildModel, case: BenchCase, batch: int, training: bool) -> int:
    """The largest batch up to `batch` that fits into the memory of the GPU, to 10 %."""
    model = build().to(case.device)
    while batch > 0:
        try:
            images = torch.randn(batch, *case.size, device=case.device)
            with case.forced_attention():
                (_training if training else _forward)(model, images, case)()
            return batch
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the handler, whose traceback keeps the failed pass alive.
        for p in model.parameters():
            p.grad = None
        with suppress(UnboundLocalError):
            del images
        free_memory(case.device)
        batch = int(batch * 0.9)
    return 0


def round_ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Ours divided by theirs in each round: median, minimum and maximum."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(ratios), "least": min(ratios), "largest": max(ratios)}


# Models of other libraries in the shape of ours. They are imported only for `--against`.

# `--attention` -> `attn_implementation` of transformers.
TRANSFORMERS_ATTENTION = {"auto": "sdpa", "fused": "sdpa", "explicit": "eager"}


class LogitsOnly(nn.Module):
    """A model of transformers that returns its logits instead of an output object."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> (B, K)."""
        logits: Tensor = self.inner(images).logits
        return logits


def transformers_vit(config: ViTConfig, attention: str) -> nn.Module:
    """`ViTForImageClassification` of transformers."""
    library = _import("transformers")
    theirs = library.ViTConfig(
        hidden_size=config.embed_dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        intermediate_size=config.mlp_dim,
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_channels=config.num_channels,
        num_labels=config.num_classes,
        attn_implementation=TRANSFORMERS_ATTENTION[attention],
    )
    return LogitsOnly(library.ViTForImageClassification(theirs))


def timm_vit(config: ViTConfig, attention: str) -> nn.Module:
    """`VisionTransformer` of timm."""
    models = _import("timm.models.vision_transformer")
    _import("timm.layers").set_fused_attn(attention != "explicit")
    model: nn.Module = models.VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        in_chans=config.num_channels,
        num_classes=config.num_classes,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_dim / config.embed_dim,
        global_pool="token",
    )
    return model


BASELINES = {"transformers": transformers_vit, "timm": timm_vit}


def build_baseline(name: str, config: Any, attention: str) -> nn.Module:
    """The model of library `name` in the shape of `config`, with random weights.

    Raises:
        VitcliError: an unknown library, one that is not installed, or not a plain ViT.
    """
    if name not in BASELINES:
        raise unknown("library", name, BASELINES)
    if not isinstance(config, ViTConfig) or not is_plain_vit(config):
        raise VitcliError(
            f"`--against {name}` compares plain Vision Transformers, and this model is not one",
            "give a variant such as `S/16`",
        )
    return BASELINES[name](config, attention)


def is_plain_vit(config: ViTConfig) -> bool:
    """True for the paper's model: class token, learned positions, no ResNet stem, no extras."""
    sizes = ("image_size", "patch_size", "num_channels", "embed_dim", "depth", "num_heads")
    free = (*sizes, "mlp_dim", "num_classes", "gelu", "norm_eps", "dropout_rate", "drop_path_rate")
    plain = ViTConfig(**{name: getattr(config, name) for name in free})
    return plain == config


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        library = name.partition(".")[0]
        raise VitcliError(
            f"`--against {library}` needs {library}, and its import fails: {error}",
            f"`pip install {library}`, or remove `--against`",
        ) from None
