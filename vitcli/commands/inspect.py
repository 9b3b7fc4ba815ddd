"""`vitcli inspect`: the paper's figures for a model, as numbers and pictures."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from vitcli.config.recipe import load_inference
from vitcli.config.schema import Inference, Settings
from vitcli.data.formula.dataset import FormulaSet
from vitcli.data.image_paths import find_images
from vitcli.data.image_set import ImageSet
from vitcli.data.loader import eval_batches
from vitcli.data.readers import is_dataset
from vitcli.data.readers.builtin import sklearn_photographs
from vitcli.data.readers.folder import image_list
from vitcli.data.source import load_data, open_data
from vitcli.devices import pick_device
from vitcli.errors import VitcliError, printable
from vitcli.files import check_folder
from vitcli.inspection import inductive_bias, report
from vitcli.inspection.attention import (
    AttentionStatistics,
    layer_names,
    max_batch_size,
    measure_attention,
)
from vitcli.inspection.inductive_bias import BiasRow, cell_size, default_shifts
from vitcli.inspection.report import Report, ReportImage
from vitcli.inspection.rollout import rollout_source
from vitcli.progress import Quiet, Watcher
from vitcli.run import new_output, run_stem
from vitcli.vit import ResNet, VisionTransformer, ViTConfig
from vitcli.weights.edit import match_classes
from vitcli.weights.load import load_model, load_settings, newest_run, require_preprocess
from vitcli.weights.load_report import note_load_report
from vitcli.weights.loaded import LoadedModel

MAX_IMAGES = 128  # as in appendix D.7
MAX_PICTURED = 8  # images with pictures of their own
TOP = 5
NUM_BUILTIN = 32  # built-in digits or formula images, if the user gives none
MAX_DIGIT_SIDE = 16  # px; models of at most this input size get digits
MIN_PHOTOGRAPH_SIDE = 48  # px; models of at least this input size get photographs


@dataclass
class Inspection:
    """The result of `inspect`.

    Attributes:
        model: the MODEL that was inspected.
        out: the folder with all files.
        facts: the object of `inspect --json`.
        report: the content of the folder.
        bias_rows: the table of inductive bias; empty with `--no-bias`.
        broken: one error for each image that cannot be read.
    """

    model: str
    out: Path
    facts: dict[str, Any]
    report: Report = field(default_factory=Report)
    bias_rows: list[BiasRow] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The object of `inspect --json`."""
        return self.facts


@dataclass(frozen=True)
class NamedImages:
    """The images to inspect, and their name for the user."""

    images: ImageSet
    name: str


def run(
    paths: Sequence[str] = (),
    *,
    model: str | None = None,
    settings: Settings | None = None,
    labels: str | os.PathLike[str] | Sequence[str] | None = None,
    out: Path | None = None,
    limit: int = MAX_IMAGES,
    with_bias: bool = True,
    resnet: str | None = None,
    verbose: bool = False,
    watch: Watcher | None = None,
) -> Inspection:
    """Inspect a model: filters, positions, attention distance, rollout, inductive bias.

    Args:
        paths: images, folders, globs, or one DATA; built-in images if empty.
        model: MODEL; None takes the newest run.
        settings: nested settings: `model.image_size`, `preprocess.mean`, `data.test_split` …
        labels: class names of the model, or a file with one name per line.
        out: the folder to write; None makes `runs/MODEL-inspect`.
        limit: maximum number of images, spread evenly over those given.
        with_bias: also measure equivariance and locality, and compare with other networks.
        resnet: MODEL of the ResNet to compare with; None takes random weights of the same size.
        verbose: report how each tensor of the weights was loaded.

    Raises:
        VitcliError: bad input, no readable image, or a ResNet with `with_bias=False`.
    """
    watch = watch or Quiet()
    if limit < 1:
        raise VitcliError(f"`--limit` is {limit}", "give a positive number, for example 128")
    if out is not None:
        check_folder(out)
    inference = load_inference(settings)
    model = model or inference.model.name
    if model is None:
        model = newest_run(classifier=False)
        watch.note(f"no `--model` given: using {model}")
    loaded = load_model(
        model, labels=labels, watch=watch, **load_settings(inference.model, inference.preprocess)
    )
    _check_finite(loaded, str(model))
    baseline = _load_resnet(resnet, loaded, watch)
    if isinstance(loaded.network, ResNet):
        _check_resnet(model, with_bias, watch)
    chosen = _choose_images(paths, loaded, inference, watch)
    note_load_report(loaded, watch, verbose=verbose)
    loaded = loaded.to(pick_device()).eval()
    network = loaded.network

    with new_output(out, f"{run_stem(model)}-inspect") as folder:
        result = Inspection(model, folder, _describe(model, loaded, chosen))
        result.facts["filters"] = report.add_filters(result.report, network)
        result.facts |= dict.fromkeys(
            ("positions", "attention_distance", "rollout", "inductive_bias")
        )
        if isinstance(network, VisionTransformer):
            _add_attention(result, loaded, network, chosen.images, limit, watch)
        if with_bias:
            _add_bias(result, loaded, chosen, baseline, watch)
        facts = result.facts
        facts |= {
            "unreadable": result.broken,
            "out": printable(folder),
            "files": result.report.files(),
        }
        summary = f"{facts['images']} images: {chosen.name}" if facts["images"] else chosen.name
        result.report.write(folder, facts, f"Inspection of {printable(model)}", summary)
        return result


def _check_resnet(model: str, with_bias: bool, watch: Watcher) -> None:
    if not with_bias:
        raise VitcliError(
            f"`{model}` is a ResNet: it has no attention and no positions to inspect",
            "remove `--no-bias`: the inductive bias of a ResNet can be measured",
        )
    watch.warn(f"`{model}` is a ResNet, without patches: only filters and equivariance")


def _check_finite(model: LoadedModel, name: str) -> None:
    """Raise a VitcliError if a weight is NaN or infinite: singular values need numbers."""
    for key, weight in model.network.named_parameters():
        if not torch.isfinite(weight).all():
            raise VitcliError(
                f"`{printable(name)}`: a value of `{printable(key)}` is not a number, or infinite",
                "name other weights with `--model`, such as an earlier checkpoint of the run",
            )


def _load_resnet(
    resnet: str | None, model: LoadedModel, watch: Watcher
) -> tuple[str, LoadedModel] | None:
    """The ResNet of `--resnet` and its name."""
    if resnet is None:
        return None
    found = load_model(resnet, watch=watch)
    _check_finite(found, resnet)
    if not isinstance(found.network, ResNet):
        raise VitcliError(
            f"`--resnet {resnet}` is not a ResNet", "give `R50x1`, or weights of a ResNet"
        )
    if found.config.num_channels != model.config.num_channels:
        raise VitcliError(
            f"`--resnet {resnet}` reads {found.config.num_channels} channels, the model reads "
            f"{model.config.num_channels}",
            "choose a ResNet with the same number of channels",
        )
    return printable(resnet), found


def _describe(model: str, loaded: LoadedModel, chosen: NamedImages) -> dict[str, Any]:
    config = loaded.config
    facts: dict[str, Any] = {
        "model": printable(model),
        "kind": "resnet",
        "parameters": sum(p.numel() for p in loaded.network.parameters()),
        "image_size": list(config.image_size),
        "cell_pixels": cell_size(config),
        "images": 0,
        "data": chosen.name,
        "source": None,
    }
    if isinstance(config, ViTConfig):
        kind = "axial" if config.axial else "hybrid" if config.is_hybrid else "vit"
        facts |= {"kind": kind, "grid": list(config.grid), "heads": config.num_heads}
    return facts


def _choose_images(
    paths: Sequence[str], model: LoadedModel, inference: Inference, watch: Watcher
) -> NamedImages:
    """The images that the user names, else built-in images, with a note."""
    data = inference.data.name
    if not paths and data is None:
        chosen = _builtin_images(model)
        watch.note(f"no IMAGE given: using {chosen.name}")
        return chosen
    given = list(paths) or [data or ""]
    name = " ".join(printable(path) for path in given[:3]) + (" …" if len(given) > 3 else "")
    if len(given) == 1 and is_dataset(given[0]):
        source = open_data(inference.data, given[0], whole=True, labelled=False, watch=watch)
        source.tell(watch)
        splits = [split for split in ("test", "validation", "train") if split in source.splits]
        return NamedImages(source.split(*splits), name)
    return NamedImages(image_list(list(find_images(given))), name)


def _builtin_images(model: LoadedModel) -> NamedImages:
    """Images that suit the input size: digits, formula images, or photographs."""
    side = min(model.config.image_size)
    if model.config.num_channels == 1 or side <= MAX_DIGIT_SIDE:
        digits = load_data("builtin:digits").split("test").subset(np.arange(NUM_BUILTIN))
        return NamedImages(digits, f"{NUM_BUILTIN} of builtin:digits")
    found = sklearn_photographs() if side >= MIN_PHOTOGRAPH_SIDE else None
    if found is not None:
        return NamedImages(found, "halves of two photographs from scikit-learn")
    drawn = FormulaSet("test", 1, NUM_BUILTIN, (side, side))
    return NamedImages(cast(ImageSet, drawn), f"{NUM_BUILTIN} of builtin:formula")


def _add_attention(
    result: Inspection,
    model: LoadedModel,
    network: VisionTransformer,
    images: ImageSet,
    limit: int,
    watch: Watcher,
) -> None:
    """Positions, attention distance and rollout."""
    facts, names, source = result.facts, layer_names(network), rollout_source(network.config)
    facts["positions"] = report.add_positions(result.report, network)
    statistics, pictured = _measure(result, model, network, images, limit, watch)
    facts["images"], facts["source"] = len(statistics), source
    facts["attention_distance"] = report.add_attention_distance(
        result.report, network, statistics, names
    )
    facts["rollout"] = report.add_rollout(
        result.report, network, statistics, pictured, source, names
    )


def _measure(
    result: Inspection,
    model: LoadedModel,
    network: VisionTransformer,
    images: ImageSet,
    limit: int,
    watch: Watcher,
) -> tuple[AttentionStatistics, list[ReportImage]]:
    """The attention of up to `limit` images, and the first few images for pictures."""
    preprocess = require_preprocess(model)
    device = next(network.parameters()).device
    batch_size = max_batch_size(network)
    batches: list[AttentionStatistics] = []
    pixels: list[tuple[int, Image.Image]] = []
    total = min(limit, len(images))
    with watch.progress("images", total) as bar:
        for batch in eval_batches(images, preprocess, batch_size=batch_size, limit=limit):
            result.broken += batch.errors
            if len(batch.labels):
                count = min(MAX_PICTURED - len(pixels), len(batch.images))
                first = zip(batch.indices[:count].tolist(), batch.images[:count], strict=True)
                pixels += [(index, _to_image(image)) for index, image in first]
                normalized = preprocess.normalize(batch.images.to(device))
                batches.append(measure_attention(network, normalized, count))
            bar.advance(len(batch.labels) + len(batch.broken))
    if not batches:
        raise VitcliError(
            f"none of {total} images can be read: {result.broken[0]}", "give other images"
        )
    statistics = AttentionStatistics.concatenate(batches)
    if not np.isfinite(statistics.rollout).all():
        raise VitcliError(
            "the attention of this model is not a number (NaN)",
            "check the weights: they are damaged, or the training diverged",
        )
    pictured = []
    for number, (index, image) in enumerate(pixels):
        name = printable(images.describe(index))
        stem = re.sub(r"[^\w-]+", "-", Path(name).stem)[:40].strip("-")
        classes = _classify(model, images, index, statistics.logits[number])
        pictured.append(ReportImage(name, f"{number + 1:02d}-{stem}", image, classes))
    return statistics, pictured


def _to_image(pixels: torch.Tensor) -> Image.Image:
    """(C, Y, X) uint8 -> a PIL image in RGB."""
    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).convert("RGB")


def _classify(model: LoadedModel, images: ImageSet, index: int, logits: Any) -> dict[str, Any]:
    """The most probable classes, and the rank of the true class if the model knows it."""
    if not model.head_trained:
        return {"label": None, "probability": None, "top": [], "truth": None}
    probabilities = model.probabilities(torch.from_numpy(logits)[None])[0].numpy()  # (K,)
    names = model.labels or tuple(str(i) for i in range(len(probabilities)))
    order = np.argsort(-probabilities, kind="stable").tolist()

    def entry(label: int) -> dict[str, Any]:
        probability = float(probabilities[label])
        return {"label": names[label], "probability": probability, "rank": order.index(label) + 1}

    top = [entry(label) for label in order[:TOP]]
    truth = None
    if images.targets is None and images.labels[index] >= 0:
        found = match_classes([images.label_name(index)], names)
        truth = entry(found[0]) if found else None
    best = {key: top[0][key] for key in ("label", "probability")}
    return {**best, "top": top, "truth": truth}


def _add_bias(
    result: Inspection,
    model: LoadedModel,
    chosen: NamedImages,
    resnet: tuple[str, LoadedModel] | None,
    watch: Watcher,
) -> None:
    """The table of inductive bias: this model, then the networks to compare with."""
    if len(chosen.images) < inductive_bias.MIN_IMAGES:
        chosen = _builtin_images(model)
    preprocess, config, network = require_preprocess(model), model.config, model.network
    cell = cell_size(config)
    margin = max(default_shifts(cell))
    found, broken = inductive_bias.read_with_margin(chosen.images, preprocess, margin)
    result.broken += [line for line in broken if line not in result.broken]
    if len(found) < 2:
        raise VitcliError(
            f"equivariance needs 2 readable images, and there are {len(found)}",
            "give more images, or add `--no-bias`",
        )
    device = next(network.parameters()).device
    images = [image.to(device) for image in found]
    with watch.progress("this model", 1) as bar:
        row = inductive_bias.measure_network("this model", network, images, preprocess, cell, bar)
    is_random = model.load_report is not None and model.load_report.layout == "variant"
    network.to("meta")  # frees the weights: two networks may not fit into memory
    result.bias_rows = [row]
    result.bias_rows += inductive_bias.measure_baselines(
        config,
        row.parameters,
        images,
        preprocess,
        is_random=is_random,
        resnet=resnet,
        watch=watch,
    )
    result.facts["inductive_bias"] = report.add_inductive_bias(
        result.report, result.bias_rows, chosen.name
    )
