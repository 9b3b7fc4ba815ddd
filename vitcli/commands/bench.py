"""`vitcli bench`: throughput, latency, memory, largest batch; beside other libraries in one run."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitcli.config.recipe import load_inference
from vitcli.config.schema import Inference, Settings
from vitcli.cost.baselines import contender
from vitcli.cost.bench import CLASSES, PERCENTILES, Case, Figures, measure, percentile, ratio
from vitcli.cost.probe import free_memory
from vitcli.devices import pick_device, resolve_precision
from vitcli.errors import VitcliError
from vitcli.files import replacing
from vitcli.progress import Quiet, Watcher
from vitcli.vit import ResNetConfig, ViTConfig, from_config, parse_variant
from vitcli.vit.macs import macs
from vitcli.weights.load import load_model, newest_run

DEFAULT_MODEL = "S/16"
OURS = "vitcli"
KINDS = ("auto", "fused", "explicit")
USABLE = 0.8  # of the free memory, where no limit is given


@dataclass(frozen=True)
class Row:
    """One contender in one setting."""

    library: str
    model: str
    parameters: int
    macs: int
    case: Case
    figures: Figures

    def to_json(self) -> dict[str, Any]:
        """Plain values: images a second, milliseconds, bytes."""
        case, found = self.case, self.figures
        return {
            "library": self.library,
            "model": self.model,
            "parameters": self.parameters,
            "macs_per_image": self.macs,
            "image_size": list(case.size[1:]),
            "batch_size": case.batch,
            "precision": case.precision,
            "attention": case.attention,
            "forward_images_per_second": statistics.median(found.forward),
            "training_images_per_second": statistics.median(found.training),
            "rounds": {"forward": len(found.forward), "training": len(found.training)},
            "latency_ms": {f"p{p}": percentile(found.latency, p) for p in PERCENTILES},
            "latency_samples": len(found.latency),
            "forward_memory_bytes": found.forward_bytes,
            "training_memory_bytes": found.training_bytes,
            "largest_forward_batch": found.largest_forward,
            "largest_training_batch": found.largest_training,
        }


@dataclass(frozen=True)
class Bench:
    """All rows, and how ours compare with the others in the same rounds."""

    device: str
    threads: int
    memory_limit: int
    rows: tuple[Row, ...]
    ratios: tuple[dict[str, Any], ...]
    picture: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; `ratios` are ours over theirs."""
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
) -> Bench:
    """Measure models, each alone or in turn with those of other libraries.

    Args:
        models: MODELs with commas; None takes the newest run, else `S/16`.
        image_sizes: pixels; None takes the model's.
        precisions: `fp32`, `bf16`, `fp16` or `auto`.
        attentions: `auto`, `fused` (torch's kernel) or `explicit` (products around a softmax).
        batch_size: images at a time.
        against: `transformers`, `timm`.
        seconds: for each figure of each contender.
        memory: that batches are to fit in, such as `4G`; None takes what is free.
        settings: nested settings: `model.*`.
        out: a .png file for a picture.

    Raises:
        VitcliError: bad input, or a library that is not there.
    """
    watch = watch or Quiet()
    if out is not None and out.suffix.lower() != ".png":
        raise VitcliError(f"`--out {out}` is no .png file", "for example `--out bench.png`")
    for kind in attentions or []:
        if kind not in KINDS:
            raise VitcliError(f"no attention `{kind}`", f"there are {', '.join(KINDS)}")
    device = pick_device()
    limit = memory_limit(memory, device)
    chosen = (models or newest_or_default(watch)).split(",")
    rows: list[Row] = []
    ratios: list[dict[str, Any]] = []
    for name in (name.strip() for name in chosen):
        config = config_of(name, load_inference(settings or {}), watch)
        for size in image_sizes or [None]:  # type: ignore[list-item]
            sized = config if size is None else resized(config, size, name)
            for precision in precisions or ["auto"]:
                for attention in attentions or ["auto"]:
                    case = Case(
                        size=(sized.num_channels, *sized.image_size),
                        batch=batch_size,
                        precision=resolve_precision(precision, device),
                        attention=attention,  # type: ignore[arg-type]
                        device=device,
                        seconds=seconds,
                    )
                    found = _rows(name, sized, case, against or [], limit, watch)
                    rows += found
                    ratios += _ratios(found)
    picture = None
    if out is not None:
        draw(rows, out)
        picture = str(out)
    label = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    return Bench(label, torch.get_num_threads(), limit, tuple(rows), tuple(ratios), picture)


def newest_or_default(watch: Watcher) -> str:
    """The newest run, else a variant; it is told which."""
    try:
        name = newest_run(classifier=False)
    except VitcliError:
        name = DEFAULT_MODEL
    watch.note(f"no MODEL given: {name}")
    return name


def config_of(name: str, given: Inference, watch: Watcher) -> ViTConfig | ResNetConfig:
    """The shape of a MODEL, with a head: weights do not matter for speed.

    Raises:
        VitcliError: it cannot be loaded, or a setting contradicts it.
    """
    architecture = given.model.architecture()
    try:
        config = parse_variant(name, **{"num_classes": CLASSES, **architecture})
    except ValueError as error:
        if "no model variant" not in str(error):
            raise VitcliError(f"this model cannot be built: {error}", "see `--set`") from error
        config = load_model(name, watch=watch).config
        try:
            config = replace(config, **architecture)
        except (TypeError, ValueError) as wrong:
            raise VitcliError(f"`{name}` cannot be so: {wrong}", "see `--set`") from wrong
    return config if config.num_classes else replace(config, num_classes=CLASSES)


def resized(config: Any, size: int, name: str) -> Any:
    """`config` for images of another size.

    Raises:
        VitcliError: the patch does not divide it.
    """
    try:
        return replace(config, image_size=(size, size))
    except ValueError as error:
        raise VitcliError(
            f"`{name}` at {size} pixels: {error}", "an `--image-size` that the patch divides"
        ) from None


def memory_limit(text: str | None, device: torch.device) -> int:
    """`4G`, `800M` -> bytes; None -> what is free.

    Raises:
        VitcliError: not of that form.
    """
    if text is None:
        if device.type == "cuda":
            return int(USABLE * torch.cuda.mem_get_info(device)[0])
        return int(USABLE * (free_memory() or 4 * 2**30))
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    plain = text.strip().upper().removesuffix("B").removesuffix("I")
    try:
        number = float(plain[:-1]) * units[plain[-1]] if plain[-1:] in units else float(plain)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise VitcliError(f"`--memory {text}` is no size", "for example `--memory 4G`")
    return int(number)


def _rows(
    name: str,
    config: Any,
    case: Case,
    against: list[str],
    limit: int,
    watch: Watcher,
) -> list[Row]:
    make: dict[str, Callable[[], nn.Module]] = {OURS: lambda: ours(config)}
    for library in against:
        make[library] = partial(contender, library, config, case.attention)
    counts = {}
    for library, build in make.items():  # also: complains before anything is measured
        counts[library] = sum(p.numel() for p in build().parameters())
    found = measure(make, case, limit, watch)
    return [
        Row(library, name, counts[library], macs(config), case, figures)
        for library, figures in found.items()
    ]


def ours(config: Any) -> nn.Module:
    """A model of ours with random weights."""
    return from_config(config).init_weights(torch.Generator().manual_seed(0))


def _ratios(rows: list[Row]) -> list[dict[str, Any]]:
    first = rows[0]
    return [
        {
            "model": row.model,
            "against": row.library,
            "image_size": list(row.case.size[1:]),
            "precision": row.case.precision,
            "attention": row.case.attention,
            "forward": ratio(first.figures.forward, row.figures.forward),
            "training": ratio(first.figures.training, row.figures.training),
            "latency": ratio(row.figures.latency, first.figures.latency),
        }
        for row in rows[1:]
    ]


def draw(rows: list[Row], path: Path) -> None:
    """Images a second and largest batches as bars; whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    facts = [row.to_json() for row in rows]
    names = [
        f"{f['library']} {f['model']} {f['image_size'][0]} px {f['precision']}"
        + ("" if f["attention"] == "auto" else f" {f['attention']}")
        for f in facts
    ]
    figure = Figure(figsize=(11, 1.2 + 0.55 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("images/s", ("forward_images_per_second", "training_images_per_second")),
        ("largest batch", ("largest_forward_batch", "largest_training_batch")),
    )
    for number, (title, keys) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 2, number)
        for place, (key, label) in enumerate(zip(keys, ("forward", "training"), strict=True)):
            heights = [i + 0.38 * place for i in range(len(facts))]
            axes.barh(heights, [f[key] for f in facts], height=0.36, label=label)
        axes.set_yticks([i + 0.19 for i in range(len(facts))], names if number == 1 else [])
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_title(title)
        axes.grid(alpha=0.3, axis="x")
        axes.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
