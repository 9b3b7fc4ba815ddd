"""`vitcli export`: a model in somebody else's layout, read back and compared before it is kept."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitcli.config.recipe import load_inference
from vitcli.config.schema import Settings
from vitcli.errors import VitcliError, nearest
from vitcli.progress import Quiet, Watcher
from vitcli.run import check_free, new_path, run_stem
from vitcli.vit import ViTConfig
from vitcli.weights.edit import fold_temperature
from vitcli.weights.google.write_google import write_google
from vitcli.weights.huggingface.write_huggingface import write_huggingface
from vitcli.weights.load import load_model, load_settings, newest_run
from vitcli.weights.load_report import tell_load
from vitcli.weights.loaded import LoadedModel
from vitcli.weights.onnx import data_file, run_onnx, write_onnx
from vitcli.weights.timm.write_timm import write_timm

LARGEST_DIFFERENCE = 1e-4  # of the outputs' largest magnitude
IMAGES = 3  # of the comparison; drawn from a normal distribution, as normalised images are


@dataclass(frozen=True)
class Format:
    """A layout that can be written.

    Attributes:
        write: model, place -> what could not be carried, one line each.
        suffix: of the file; None where the layout is a folder.
    """

    write: Callable[[LoadedModel, Path], list[str]]
    suffix: str | None = None


FORMATS = {
    "timm": Format(write_timm),
    "huggingface": Format(write_huggingface),
    "google": Format(write_google, ".npz"),
    "onnx": Format(write_onnx, ".onnx"),
}


@dataclass(frozen=True)
class Exported:
    """What was written, and how far what is read back lies from it.

    Attributes:
        files: name -> bytes.
        facts: what came along: classes, image size, mean, std, epsilon, GELU.
        notes: what could not be carried, one line each.
        compared: `logits`, or `features` of a model without a head.
        difference: the largest of the comparison; None where it could not be made.
        scale: the largest magnitude of what was compared.
    """

    model: str
    format: str
    path: str
    files: dict[str, int]
    facts: dict[str, Any]
    notes: tuple[str, ...]
    compared: str
    difference: float | None
    scale: float
    head_trained: bool

    def to_json(self) -> dict[str, Any]:
        """The object of `export --json`."""
        return {
            "model": self.model,
            "format": self.format,
            "path": self.path,
            "files": self.files,
            "bytes": sum(self.files.values()),
            **self.facts,
            "notes": list(self.notes),
            "compared": self.compared,
            "largest_difference": self.difference,
            "largest_magnitude": self.scale,
        }


def run(
    to: str,
    *,
    model: str | None = None,
    settings: Settings | None = None,
    labels: str | os.PathLike[str] | Sequence[str] | None = None,
    out: Path | None = None,
    verbose: bool = False,
    watch: Watcher | None = None,
) -> Exported:
    """Write a model in another layout, read it back, and compare the outputs of both.

    Args:
        to: `timm`, `huggingface`, `google` or `onnx`.
        model: MODEL; None takes the newest run with a trained head, else the newest run.
        settings: nested settings: `model.image_size`, `model.gelu`, `preprocess.mean` …
        labels: class names of the model, or a file with one a line.
        out: a folder for `timm` and `huggingface`, a file for `google` and `onnx`; None makes
            one under `runs/`, named after the model.
        verbose: tell what became of every tensor of the weights.

    Raises:
        VitcliError: no such format or model, a place that is taken, a model that the layout cannot
            express, or other outputs from what was written; nothing is left there then.
    """
    watch = watch or Quiet()
    if to not in FORMATS:
        near = nearest(to, list(FORMATS))
        known = ", ".join(f"`{name}`" for name in FORMATS)
        raise VitcliError(f"no format `{to}`", f"`{near}` may be meant" if near else known)
    if out is not None:
        _check_place(out, to)
    inference = load_inference(settings)
    model = inference.model.name if model is None else model
    if model is None:
        model = _newest()
        watch.note(f"no `--model` given: {model}")
    if out is None:
        out = _default_place(model, to)
        watch.note(f"no `--out` given: {out}")
    said = load_settings(inference.model, inference.preprocess)
    net = load_model(model, labels=labels, watch=watch, **said)
    tell_load(net, watch, verbose=verbose)
    temperature = net.temperature
    fold_temperature(net)
    with _folders_for(out):
        notes = FORMATS[to].write(net, out)
        try:
            again, difference, scale = _compare(net, to, out)
        except BaseException:
            _remove(out)
            raise
    if temperature != 1.0:
        notes = [*notes, f"the head is divided by its temperature, {temperature:.4g}"]
    if difference is None:
        notes = [*notes, "not verified: onnxruntime is not installed"]
    return Exported(
        model=model,
        format=to,
        path=str(out),
        files=_files(out),
        facts=_facts(again),
        notes=tuple(notes),
        compared="logits" if net.config.num_classes else "features",
        difference=difference,
        scale=scale,
        head_trained=net.head_trained,
    )


def _newest() -> str:
    """The newest run with a trained head, else the newest run."""
    with suppress(VitcliError):
        return newest_run(classifier=True)
    return newest_run(classifier=False)


def _default_place(model: str, to: str) -> Path:
    """`runs/MODEL-timm`, `runs/MODEL.onnx`, or the first such name with a number that is free."""
    suffix = FORMATS[to].suffix
    stem = run_stem(model)
    return new_path(f"{stem}-{to}") if suffix is None else new_path(stem, suffix=suffix)


def _check_place(out: Path, to: str) -> None:
    """Raises a VitcliError where something is at `out`, or its name is not one of the format."""
    suffix = FORMATS[to].suffix
    if suffix is not None and out.suffix != suffix:
        raise VitcliError(
            f"`--out {out}` does not end in {suffix}", f"`--to {to}` writes one file with that end"
        )
    if suffix is not None and out.is_dir():
        raise VitcliError(f"`{out}` is a folder", f"`--to {to}` writes a file: give its name too")
    check_free(out)


@contextmanager
def _folders_for(out: Path) -> Iterator[None]:
    """The folders that `out` lies in are there; those made for it go where nothing comes of it."""
    missing = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VitcliError(
            f"cannot make `{out.parent}`: {error.strerror}", "choose another place with `--out`"
        ) from error
    try:
        yield
    except BaseException:
        with suppress(OSError):  # somebody else has put something there meanwhile
            for folder in missing:
                folder.rmdir()
        raise


def _compare(net: LoadedModel, to: str, out: Path) -> tuple[LoadedModel, float | None, float]:
    """What is read back from `out`; the largest difference of the outputs; largest magnitude.

    Features are compared too where they are to be had, since an untrained head hides them. An
    ONNX file is not read back as a model of ours, and without onnxruntime not at all: then it is
    `net` itself, and the difference None.

    Raises:
        VitcliError: what was written gives other outputs, or cannot be read.
    """
    generator = torch.Generator().manual_seed(0)
    size = (net.config.num_channels, *net.config.image_size)
    images = torch.randn(IMAGES, *size, generator=generator)
    with torch.inference_mode():
        wanted = net(images)
        if to == "onnx":
            again, found = net, run_onnx(out, images)
            if found is None:
                return net, None, float(wanted.abs().max())
        else:
            again = load_model(out)
            found = again(images)
            _demand_equal(again.features(images), net.features(images), "features", to)
    return again, *_demand_equal(found, wanted, "logits", to)


def _demand_equal(found: Tensor, wanted: Tensor, what: str, to: str) -> tuple[float, float]:
    """Largest difference and largest magnitude of outputs that agree."""
    shapes = tuple(found.shape), tuple(wanted.shape)
    if shapes[0] != shapes[1]:
        raise VitcliError(f"what `--to {to}` wrote gives {what} of {shapes[0]}, not {shapes[1]}")
    difference, scale = float((found - wanted).abs().max()), float(wanted.abs().max())
    if not difference <= LARGEST_DIFFERENCE * scale:  # also where one is no number
        raise VitcliError(
            f"what `--to {to}` wrote gives other {what}: {difference:.2g} apart, of {scale:.2g}",
            "nothing was kept; weights that are not finite, or a fault of ours that is worth "
            "reporting",
        )
    return difference, scale


def _files(out: Path) -> dict[str, int]:
    """Name -> bytes of what was written."""
    if out.is_dir():
        return {p.name: p.stat().st_size for p in sorted(out.iterdir())}
    return {p.name: p.stat().st_size for p in (out, data_file(out)) if p.is_file()}


def _remove(out: Path) -> None:
    if out.is_dir():
        shutil.rmtree(out, ignore_errors=True)
    else:
        for path in (out, data_file(out)):
            path.unlink(missing_ok=True)


def _facts(net: LoadedModel) -> dict[str, Any]:
    config, preprocess = net.config, net.preprocess
    return {
        "classes": config.num_classes,
        "class_names": net.labels is not None,
        "image_size": list(config.image_size),
        "mean": list(preprocess.mean) if preprocess is not None else None,
        "std": list(preprocess.std) if preprocess is not None else None,
        "norm_eps": config.norm_eps if isinstance(config, ViTConfig) else None,
        "gelu": config.gelu if isinstance(config, ViTConfig) else None,
    }
