"""`vitcli inspect`: the paper's figures for a model, as numbers and pictures."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
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
from vitcli.inspection import inductive_bias as bias
from vitcli.inspection import report as chapters
from vitcli.inspection.attention import Looked, batch_size, join, layer_names, look
from vitcli.inspection.inductive_bias import cell_size, shifts_of
from vitcli.inspection.report import Album
from vitcli.inspection.rollout import source_name
from vitcli.progress import Quiet, Watcher
from vitcli.run import new_path, run_stem
from vitcli.vit import ResNet, VisionTransformer, ViTConfig
from vitcli.weights.edit import match_classes
from vitcli.weights.load import load_model, load_settings, newest_run, require_preprocess
from vitcli.weights.load_report import tell_load
from vitcli.weights.loaded import LoadedModel

MOST_IMAGES = 128  # as in appendix D.7
MOST_SHOWN = 8  # images with pictures of their own
TOP = 5
DRAWN = 32  # formula images, where no others are given
DIGIT_SIDE = 16  # pixels a side of a model that is shown digits, at most
PHOTOGRAPH_SIDE = 48  # of one that is shown photographs, at least


@dataclass(frozen=True)
class Inspection:
    """What was found and written.

    Attributes:
        model: what was looked at.
        out: the folder with all files.
        facts: the object of `inspect --json`.
        album: what the folder holds.
        bias_rows: the table of inductive bias; empty where it was not asked for.
        broken: images that could not be read.
    """

    model: str
    out: Path
    facts: dict[str, Any]
    album: Album
    bias_rows: tuple[bias.BiasRow, ...]
    broken: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The object of `inspect --json`."""
        return self.facts


@dataclass(frozen=True)
class Chosen:
    """Images to look at, and what they are called."""

    images: ImageSet
    name: str


def run(
    paths: Sequence[str] = (),
    *,
    model: str | None = None,
    settings: Settings | None = None,
    labels: str | os.PathLike[str] | Sequence[str] | None = None,
    out: Path | None = None,
    limit: int = MOST_IMAGES,
    with_bias: bool = True,
    resnet: str | None = None,
    verbose: bool = False,
    watch: Watcher | None = None,
) -> Inspection:
    """Look into a model: filters, positions, attention distance, rollout, inductive bias.

    Args:
        paths: images, folders, globs, or one DATA; with none, pictures that are built in.
        model: MODEL; None takes the newest run.
        settings: nested settings: `model.image_size`, `preprocess.mean`, `data.test_split` …
        labels: class names of the model, or a file with one a line.
        out: the folder to write; None makes `runs/MODEL-inspect`.
        limit: at most so many images, spread evenly over those given.
        with_bias: also measure equivariance and locality beside random weights and a ResNet.
        resnet: MODEL of that ResNet; None takes random weights of the same budget.
        verbose: tell what became of every tensor of the weights.

    Raises:
        VitcliError: bad input, no image that can be read, or a ResNet without `with_bias`.
    """
    watch = watch or Quiet()
    if limit < 1:
        raise VitcliError(f"`--limit` is {limit}", "the most images to look at, usually 128")
    if out is not None:
        check_folder(out)
    inference = load_inference(settings)
    model = model or inference.model.name
    if model is None:
        model = newest_run(classifier=False)
        watch.note(f"no `--model` given: {model}")
    arguments = load_settings(inference.model, inference.preprocess)
    net = load_model(model, labels=labels, watch=watch, **arguments)
    other = _resnet(resnet, net, watch)
    if isinstance(net.network, ResNet):
        if not with_bias:
            raise VitcliError(
                f"`{model}` is a ResNet: it has no attention and no positions to look at",
                hint="its inductive bias can be measured: leave out `--no-bias`",
            )
        watch.warn(f"`{model}` is a ResNet: filters and equivariance only, there is no attention")
    preprocess = require_preprocess(net)
    chosen = choose(paths, net, inference, watch)
    tell_load(net, watch, verbose=verbose)
    net = net.to(pick_device()).eval()
    album, facts = Album(), _describe(model, net, chosen)
    broken: list[str] = []
    facts["filters"] = chapters.filters(album, net.network)
    facts |= dict.fromkeys(("positions", "attention_distance", "rollout", "inductive_bias"))
    if isinstance(net.network, VisionTransformer):
        facts["positions"] = chapters.positions(album, net.network)
        looked, shown, broken = look_at(net, net.network, chosen.images, limit, watch)
        names, source = layer_names(net.network), source_name(net.network.config)
        facts["images"], facts["source"] = len(looked), source
        facts["attention_distance"] = chapters.distance(album, net.network, looked, names)
        facts["rollout"] = chapters.rollout(album, net.network, looked, shown, source, names)
    rows: list[bias.BiasRow] = []
    if with_bias:
        pictured, read, unread = _pictures(chosen, net)
        broken += [line for line in unread if line not in broken]
        with watch.progress("this network", 1) as bar:
            shifts = shifts_of(cell_size(net.config))
            rows.append(bias.row("this model", net.network, read, preprocess, shifts, bar))
        config, parameters = net.config, rows[0].parameters
        random_itself = net.load_report is not None and net.load_report.layout == "variant"
        del net  # two of them need not fit into memory
        rows += bias.others(
            config,
            parameters,
            read,
            preprocess,
            random_itself=random_itself,
            resnet=other,
            watch=watch,
        )
        facts["inductive_bias"] = chapters.inductive_bias(album, rows, pictured.name)
    folder = out or new_path(f"{run_stem(model)}-inspect")
    facts |= {"unreadable": broken, "out": printable(folder), "files": album.files()}
    lead = f"{facts['images']} images: {chosen.name}" if facts["images"] else chosen.name
    album.write(folder, facts, f"Inside {printable(model)}", lead)
    return Inspection(model, folder, facts, album, tuple(rows), tuple(broken))


def _pictures(chosen: Chosen, net: LoadedModel) -> tuple[Chosen, list[torch.Tensor], list[str]]:
    """What equivariance is measured on: whose, the pictures with a margin, and the unreadable."""
    if len(chosen.images) < bias.LEAST_PICTURES:
        chosen = built_in(net)
    margin = max(shifts_of(cell_size(net.config)))
    read, unread = bias.read_pictures(chosen.images, require_preprocess(net), margin)
    if len(read) < 2:
        raise VitcliError(
            "equivariance needs two images that can be read", "give more, or `--no-bias`"
        )
    device = next(net.network.parameters()).device
    return chosen, [picture.to(device) for picture in read], unread


def _resnet(resnet: str | None, net: LoadedModel, watch: Watcher) -> tuple[str, LoadedModel] | None:
    """The ResNet to compare with, loaded."""
    if resnet is None:
        return None
    found = load_model(resnet, watch=watch)
    if not isinstance(found.network, ResNet):
        raise VitcliError(f"`--resnet {resnet}` is no ResNet", "`R50x1`, or weights of one")
    if found.config.num_channels != net.config.num_channels:
        raise VitcliError(
            f"`--resnet {resnet}` reads {found.config.num_channels} channels, the model "
            f"{net.config.num_channels}",
            "compare networks that read the same pictures",
        )
    return printable(resnet), found


def _describe(model: str, net: LoadedModel, chosen: Chosen) -> dict[str, Any]:
    config = net.config
    facts: dict[str, Any] = {
        "model": printable(model),
        "kind": "resnet",
        "parameters": sum(p.numel() for p in net.network.parameters()),
        "image_size": list(config.image_size),
        "cell_pixels": cell_size(config),
        "images": 0,
        "data": chosen.name,
        "source": None,
    }
    if isinstance(config, ViTConfig):
        kind = "axial" if config.axial else "hybrid" if config.stem is not None else "vit"
        facts |= {"kind": kind, "grid": list(config.grid), "heads": config.num_heads}
    return facts


def choose(paths: Sequence[str], net: LoadedModel, inference: Inference, watch: Watcher) -> Chosen:
    """The images that are meant; without any, what suits the model, said in one line."""
    data = inference.data.name
    if not paths and data is None:
        chosen = built_in(net)
        watch.note(f"no IMAGE given: {chosen.name}")
        return chosen
    given = list(paths) or [data or ""]
    name = " ".join(printable(path) for path in given[:3]) + (" …" if len(given) > 3 else "")
    if len(given) == 1 and is_dataset(given[0]):
        source = open_data(inference.data, given[0], whole=True, labelled=False, watch=watch)
        for line in source.notes:
            watch.note(line)
        first = [split for split in ("test", "validation", "train") if split in source.splits]
        return Chosen(source.split(*first), name)
    return Chosen(image_list(list(find_images(given))), name)


def built_in(net: LoadedModel) -> Chosen:
    """Pictures that suit the model: digits, drawn ones, or photographs that scikit-learn has."""
    side = min(net.config.image_size)
    if net.config.num_channels == 1 or side <= DIGIT_SIDE:
        digits = load_data("builtin:digits").split("test")
        return Chosen(digits.subset(np.arange(DRAWN)), f"{DRAWN} of builtin:digits")
    found = sklearn_photographs() if side >= PHOTOGRAPH_SIDE else None
    if found is not None:
        return Chosen(found, "halves of two photographs that scikit-learn carries")
    drawn = FormulaSet("test", 1, DRAWN, (side, side))
    return Chosen(cast(ImageSet, drawn), f"{DRAWN} of builtin:formula")


def look_at(
    net: LoadedModel, network: VisionTransformer, images: ImageSet, limit: int, watch: Watcher
) -> tuple[Looked, list[chapters.Shown], list[str]]:
    """The numbers of up to `limit` images, the first few to show, and what cannot be read.

    Raises:
        VitcliError: none can be read.
    """
    preprocess = require_preprocess(net)
    device = next(network.parameters()).device
    parts: list[Looked] = []
    pixels: list[tuple[int, Image.Image]] = []
    broken: list[str] = []
    total = min(limit, len(images))
    with watch.progress("images", total) as bar:
        for batch in eval_batches(images, preprocess, batch_size=batch_size(network), limit=limit):
            broken += batch.broken
            if len(batch.labels):
                keep = min(MOST_SHOWN - len(pixels), len(batch.images))
                kept = zip(batch.indices[:keep].tolist(), batch.images[:keep], strict=True)
                pixels += [(index, _picture(image)) for index, image in kept]
                parts.append(look(network, preprocess.normalize(batch.images.to(device)), keep))
            bar.advance(len(batch.labels) + len(batch.broken))
    if not parts:
        raise VitcliError(f"none of {total} images can be read: {broken[0]}", "give others")
    looked = join(parts)
    if not np.isfinite(looked.rollout).all():
        raise VitcliError(
            "the attention of this model is not a number", "its weights are damaged, or diverged"
        )
    shown = []
    for number, (index, image) in enumerate(pixels):
        name = printable(images.describe(index))
        stem = re.sub(r"[^\w-]+", "-", Path(name).stem)[:40].strip("-")
        answers = _answers(net, images, index, looked.logits[number])
        shown.append(chapters.Shown(name, f"{number + 1:02d}-{stem}", image, answers))
    return looked, shown, broken


def _picture(pixels: torch.Tensor) -> Image.Image:
    """(C, Y, X) uint8 -> a picture in RGB."""
    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).convert("RGB")


def _answers(net: LoadedModel, images: ImageSet, index: int, logits: Any) -> dict[str, Any]:
    """The likeliest classes with their ranks, and the image's own where its name is known."""
    if not net.head_trained:
        return {"label": None, "probability": None, "top": [], "truth": None}
    shares = net.probabilities(torch.from_numpy(logits)[None])[0].numpy()  # (K,)
    names = net.labels or tuple(str(i) for i in range(len(shares)))
    order = np.argsort(-shares, kind="stable").tolist()

    def entry(label: int) -> dict[str, Any]:
        share = float(shares[label])
        return {"label": names[label], "probability": share, "rank": order.index(label) + 1}

    top = [entry(label) for label in order[:TOP]]
    truth = None
    if images.targets is None and images.labels[index] >= 0:
        found = match_classes([images.label_name(index)], names)
        truth = entry(found[0]) if found else None
    best = {key: top[0][key] for key in ("label", "probability")}
    return {**best, "top": top, "truth": truth}
