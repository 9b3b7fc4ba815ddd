"""`vitcli bench`: throughput, latency, memory and largest batch, next to other libraries."""

import statistics
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from vitcli.config.recipe import load_inference
from vitcli.config.schema import Inference, Settings
from vitcli.cost.bench import (
    DEFAULT_CLASSES,
    PERCENTILES,
    AttentionKind,
    BenchCase,
    BenchResult,
    BuildModel,
    build_baseline,
    round_ratios,
    run_bench,
)
from vitcli.cost.machine import system_memory
from vitcli.devices import matrix_peak, pick_device, resolve_precision
from vitcli.errors import VitcliError, printable, unknown
from vitcli.progress import Quiet, Watcher
from vitcli.report.charts import BLUE, ORANGE, new_figure, save_atomically
from vitcli.vit import Config, Network, from_config, parse_variant
from vitcli.vit.macs import macs
from vitcli.weights.load import load_model, newest_run

DEFAULT_MODEL = "S/16"
OURS = "vitcli"
USABLE_MEMORY = 0.8  # of the free memory, without `--memory`


@dataclass(frozen=True)
class BenchRow:
    """One library in one setting.

    Attributes:
        macs: of a forward pass of one image.
        peak: FLOP/s of large matrix products on this device.
    """

    library: str
    model: str
    parameters: int
    macs: int
    case: BenchCase
    result: BenchResult
    peak: float

    def to_json(self) -> dict[str, Any]:
        """Plain values in images/s, milliseconds and bytes; `mfu` are fractions of the peak."""
        case, result = self.case, self.result
        per_flop = self.macs / self.peak
        return {
            "library": self.library,
            "model": self.model,
            "parameters": self.parameters,
            "macs_per_image": self.macs,
            "image_size": list(case.size[1:]),
            "batch_size": case.batch,
            "precision": case.precision,
            "attention": case.attention,
            "forward_images_per_second": statistics.median(result.forward),
            "training_images_per_second": statistics.median(result.training),
            "peak_flops": self.peak,
            # Two operations per multiply-add, and a backward pass takes twice a forward pass.
            "forward_mfu": 2 * per_flop * statistics.median(result.forward),
            "training_mfu": 6 * per_flop * statistics.median(result.training),
            "rounds": {"forward": len(result.forward), "training": len(result.training)},
            "latency_ms": {f"p{p}": float(np.percentile(result.latency, p)) for p in PERCENTILES},
            "latency_samples": len(result.latency),
            "forward_memory_bytes": result.forward_bytes,
            "training_memory_bytes": result.training_bytes,
            "largest_forward_batch": result.largest_forward,
            "largest_training_batch": result.largest_training,
        }

    @property
    def label(self) -> str:
        """The setting and the library in a few words."""
        attention = "" if self.case.attention == "auto" else f" {self.case.attention}"
        side = self.case.size[1]
        return f"{self.library} {self.model} {side} px {self.case.precision}{attention}"


@dataclass(frozen=True)
class BenchReport:
    """The result of `bench`; `ratios` compare our model with the others in the same rounds."""

    device: str
    threads: int
    memory_limit: int
    rows: tuple[BenchRow, ...]
    ratios: tuple[dict[str, Any], ...]
    picture: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; `ratios` are ours divided by theirs."""
        return {
            "device": self.device,
            "threads": self.threads,
            "memory_limit_bytes": self.memory_limit,
            "rows": [row.to_json() for row in self.rows],
            "ratios": list(self.ratios),
            "picture": self.picture,
        }


def run(
    models: str | None = None,
    *,
    image_sizes: list[int] | None = None,
    precisions: list[str] | None = None,
    attentions: list[str] | None = None,
    batch_size: int = 16,
    against: list[str] | None = None,
    seconds: float = 3.0,
    memory: str | None = None,
    settings: Settings | None = None,
    out: Path | None = None,
    watch: Watcher | None = None,
) -> BenchReport:
    """Measure models, alone or in turn with the same models of other libraries.

    Args:
        models: MODELs with commas; None takes the newest run, else `S/16`.
        image_sizes: in pixels; None takes that of the model.
        precisions: `fp32`, `bf16`, `fp16` or `auto`.
        attentions: `auto`, `fused` (torch's kernel) or `explicit` (matrix products and softmax).
        batch_size: images per forward pass.
        against: `transformers`, `timm`.
        seconds: per measurement and library.
        memory: limit for the largest batches, such as `4G`; None takes the free memory.
        settings: nested settings: `model.*`.
        out: a .png file for a bar chart.

    Raises:
        VitcliError: bad input, or a library that is not installed.
    """
    watch = watch or Quiet()
    if out is not None and out.suffix.lower() != ".png":
        raise VitcliError(f"`--out {out}` does not end in .png", "for example `--out bench.png`")
    for kind in attentions or []:
        if kind not in get_args(AttentionKind):
            raise unknown("attention", kind, get_args(AttentionKind))
    device = pick_device()
    limit = parse_memory(memory, device)
    rows: list[BenchRow] = []
    ratios: list[dict[str, Any]] = []
    sizes: list[int | None] = [*image_sizes] if image_sizes else [None]
    for name in (models or _default_model(watch)).split(","):
        name = name.strip()
        config = _model_config(name, load_inference(settings or {}), watch)
        for size, precision, attention in product(
            sizes, precisions or ["auto"], attentions or ["auto"]
        ):
            sized = config if size is None else _resize(config, size, name)
            case = BenchCase(
                size=(sized.num_channels, *sized.image_size),
                batch=batch_size,
                precision=resolve_precision(precision, device),
                attention=attention,  # type: ignore[arg-type]
                device=device,
                seconds=seconds,
            )
            measured = _measure(name, sized, case, against or [], limit, watch)
            rows += measured
            ratios += [_compare(measured[0], row) for row in measured[1:]]
    label, threads = device.type, torch.get_num_threads()
    if device.type == "cuda":
        label = torch.cuda.get_device_name()
    if out is not None:
        _draw_bars(rows, out, f"{label}, {threads} threads" if device.type == "cpu" else label)
    picture = None if out is None else str(out)
    return BenchReport(label, threads, limit, tuple(rows), tuple(ratios), picture)


def _default_model(watch: Watcher) -> str:
    """The newest run, else a variant, with a note."""
    try:
        name = newest_run(classifier=False)
    except VitcliError:
        name = DEFAULT_MODEL
    watch.note(f"no MODEL given: {name}")
    return name


def _model_config(name: str, inference: Inference, watch: Watcher) -> Config:
    """The shape of a MODEL, with a head. Weights do not change the speed.

    Raises:
        VitcliError: the model cannot be loaded, or a setting does not suit it.
    """
    architecture = inference.model.architecture()
    try:
        config = parse_variant(name, **{"num_classes": DEFAULT_CLASSES, **architecture})
    except ValueError as error:
        if "no model variant" not in str(error):
            raise VitcliError(f"cannot build the model: {error}", "check `--set`") from error
        config = load_model(name, watch=watch).config
        try:
            config = replace(config, **architecture)
        except (TypeError, ValueError) as wrong:
            raise VitcliError(f"`{name}` does not allow this: {wrong}", "check `--set`") from wrong
    return config if config.num_classes else replace(config, num_classes=DEFAULT_CLASSES)


def _resize(config: Config, size: int, name: str) -> Config:
    try:
        return replace(config, image_size=(size, size))
    except ValueError as error:
        raise VitcliError(
            f"`{name}` at {size} px: {error}", "give an `--image-size` that the patch size divides"
        ) from None


def parse_memory(text: str | None, device: torch.device) -> int:
    """`4G`, `800M` -> bytes; None -> most of the free memory.

    Raises:
        VitcliError: the text is not a size.
    """
    if text is None:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else system_memory()[1]
        return int(USABLE_MEMORY * free)
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    plain = text.strip().upper().removesuffix("B").removesuffix("I")
    try:
        number = float(plain[:-1]) * units[plain[-1]] if plain[-1:] in units else float(plain)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise VitcliError(f"`--memory {text}` is not a size", "for example `--memory 4G`")
    return int(number)


def _measure(
    name: str, config: Config, case: BenchCase, against: list[str], limit: int, watch: Watcher
) -> list[BenchRow]:
    """One row per library, ours first."""
    builders: dict[str, BuildModel] = {OURS: partial(_build_ours, config)}
    for library in against:
        builders[library] = partial(build_baseline, library, config, case.attention)
    # Building all models first also reports errors before the first measurement.
    counts = {
        library: sum(p.numel() for p in build().parameters()) for library, build in builders.items()
    }
    results = run_bench(builders, case, limit, watch)
    peak = matrix_peak(case.device, case.precision)
    return [
        BenchRow(library, name, counts[library], macs(config), case, result, peak)
        for library, result in results.items()
    ]


def _build_ours(config: Config) -> Network:
    return from_config(config).init_weights(torch.Generator().manual_seed(0))


def _compare(ours: BenchRow, theirs: BenchRow) -> dict[str, Any]:
    """Ratios above 1 mean that our model is faster."""
    return {
        "model": theirs.model,
        "against": theirs.library,
        "image_size": list(theirs.case.size[1:]),
        "precision": theirs.case.precision,
        "attention": theirs.case.attention,
        "forward": round_ratios(ours.result.forward, theirs.result.forward),
        "training": round_ratios(ours.result.training, theirs.result.training),
        "latency": round_ratios(theirs.result.latency, ours.result.latency),
    }


def _draw_bars(rows: list[BenchRow], path: Path, device: str) -> None:
    """Draw images/s and largest batches as bars, with their values."""
    facts = [row.to_json() for row in rows]
    figure = new_figure(11, 1.6 + 0.6 * len(rows))
    figure.suptitle(f"{device}, batch size {rows[0].case.batch}", fontsize=10)
    panels = (
        ("images/s", ("forward_images_per_second", "training_images_per_second")),
        ("largest batch", ("largest_forward_batch", "largest_training_batch")),
    )
    for number, (title, keys) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 2, number)
        series = zip(keys, ("forward", "training"), (BLUE, ORANGE), strict=True)
        for place, (key, label, colour) in enumerate(series):
            heights = [i + 0.38 * place for i in range(len(facts))]
            values = [f[key] for f in facts]
            bars = axes.barh(heights, values, height=0.36, label=label, color=colour)
            texts = [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values]
            axes.bar_label(bars, texts, padding=3, fontsize=8)
        names = [printable(row.label) for row in rows] if number == 1 else []
        axes.set_yticks([i + 0.19 for i in range(len(facts))], names)
        axes.invert_yaxis()
        # Labels of a logarithmic axis overlap where the values span less than a power of ten.
        axes.margins(x=0.15)
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter("{x:,.6g}")
        axes.set_xlabel(title)
        axes.grid(alpha=0.3, axis="x")
        axes.set_axisbelow(True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower right", ncols=2)
    save_atomically(figure, path)
