"""`vitcli export`: write a model in another format, read it back, and compare the outputs."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor

from vitcli.config.recipe import load_inference
from vitcli.config.schema import Settings
from vitcli.errors import VitcliError, unknown
from vitcli.files import claimed, release_unused, replacing, take_first, temporary_path
from vitcli.progress import Quiet, Watcher
from vitcli.run import check_free, new_output, run_stem
from vitcli.vit import ViTConfig
from vitcli.weights.edit import fold_target_scale, fold_temperature
from vitcli.weights.formats import FORMATS
from vitcli.weights.load import load_model, load_settings, newest_run
from vitcli.weights.load_report import note_load_report
from vitcli.weights.loaded import LoadedModel
from vitcli.weights.onnx import data_file, run_onnx
from vitcli.weights.store import record_file, write_split_record

LARGEST_DIFFERENCE = 1e-4  # relative to the largest output
OUTPUTS = ("logits", "values")  # of a classifier and of a regression
NUM_IMAGES = 3  # random images for the comparison


@dataclass(frozen=True)
class Exported:
    """An export and its verification.

    Attributes:
        files: file name -> bytes.
        facts: classes, image size, mean, std, epsilon and GELU of the exported model.
        notes: what the format cannot store, one line each.
        compared: `logits`, `values` of a regression, or `features` of a model without a head.
        difference: the largest difference after reading it back; None if not verified.
        scale: the largest magnitude of the compared outputs.
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
        """The JSON of `export --json`."""
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
    """Export a model, read it back, and compare the outputs of both.

    Args:
        to: a key of `FORMATS`.
        model: MODEL. None: the newest run with a trained head, or the newest run.
        settings: nested settings such as `model.image_size`, `model.gelu`, `preprocess.mean`.
        labels: class names, or a file with one class name per line.
        out: folder or file. None: a new one under `runs/`, named after the model.
        verbose: list how each tensor of the weights was loaded.

    Raises:
        VitcliError: unknown format or model, existing `out`, a model that the format cannot
            express, or different outputs after reading back. Nothing is kept then.
    """
    watch = watch or Quiet()
    if to not in FORMATS:
        raise unknown("format", to, FORMATS)
    if out is not None:
        _check_place(out, to)
    inference = load_inference(settings)
    model = inference.model.name if model is None else model
    if model is None:
        model = _newest()
        watch.note(f"no `--model` given: using {model}")
    said = load_settings(inference.model, inference.preprocess)
    suffix, stem = FORMATS[to].suffix, run_stem(model)
    stem = stem if suffix is not None else f"{stem}-{to}"
    with new_output(out, stem, suffix=suffix or "") as path:
        if out is None:
            watch.note(f"no `--out` given: writing to {path}")
        net = load_model(model, labels=labels, watch=watch, **said)
        note_load_report(net, watch, verbose=verbose)
        with _place_taken(path, is_new=out is not None, is_file=suffix is not None):
            return _export(net, model, to, path)


def _export(net: LoadedModel, model: str, to: str, out: Path) -> Exported:
    """Write the model, read it back, and compare; `out` appears when both agree."""
    temperature, folded = net.temperature, net.target_scale
    fold_temperature(net)
    fold_target_scale(net)
    with _workspace(out) as written:
        notes = resolve_name(f"vitcli.weights.{FORMATS[to].write}")(net, written)
        if to != "onnx":  # not a MODEL of any command
            weights = written / "model.safetensors" if written.is_dir() else written
            write_split_record(net, weights)
        again, difference, scale = _compare(net, to, written)
        # The file itself comes last: a killed export leaves no `out`, or a whole and checked one.
        for path_of in (data_file, record_file):
            if path_of(written).is_file():
                path_of(written).replace(path_of(out))
        with replacing(out) as temporary:
            written.rename(temporary)
    if temperature != 1.0:
        notes = [*notes, f"the temperature {temperature:.4g} is folded into the head"]
    if net.thresholds is not None:
        notes = [*notes, "the thresholds of the classes are left out: the layout has no place"]
    if net.is_regression:
        name = f"`{net.labels[0]}`" if net.labels else "the number"
        notes = [
            *notes,
            f"the output is {name} in its unit: mean {folded.mean:.6g} and standard "
            f"deviation {folded.std:.6g} are folded into the head",
        ]
    if difference is None:
        notes = [*notes, "not verified: onnxruntime is not installed"]
    return Exported(
        model=model,
        format=to,
        path=str(out),
        files=_files(out),
        facts=_facts(again),
        notes=tuple(notes),
        compared=OUTPUTS[net.is_regression] if net.config.num_classes else "features",
        difference=difference,
        scale=scale,
        head_trained=net.head_trained,
    )


@contextmanager
def _workspace(out: Path) -> Iterator[Path]:
    """Yield a path with the name of `out` in a temporary folder beside it."""
    folder = temporary_path(out)
    written = folder / out.name
    try:
        folder.mkdir()
    except OSError as error:
        raise VitcliError(
            f"cannot write `{out}`: {error.strerror}", "choose another path with `--out`"
        ) from error
    try:
        yield written
    except VitcliError as error:
        raise VitcliError(error.message.replace(str(written), str(out)), error.hint) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _newest() -> str:
    """The newest run with a trained head, or else the newest run."""
    with suppress(VitcliError):
        return newest_run(classifier=True)
    return newest_run(classifier=False)


def _check_place(out: Path, to: str) -> None:
    """Check that `out` is free and has the suffix of the format."""
    suffix = FORMATS[to].suffix
    if suffix is not None and out.suffix != suffix:
        raise VitcliError(
            f"`--out {out}` does not end in {suffix}",
            f"`--to {to}` writes one file; use for example `--out model{suffix}`",
        )
    if suffix is not None and out.is_dir():
        raise VitcliError(
            f"`{out}` is a folder",
            f"`--to {to}` writes a file; use for example `--out {out / 'model'}{suffix}`",
        )
    if suffix is None or not _is_empty_file(out):
        for path in (out, data_file(out)) if to == "onnx" else (out,):
            check_free(path)


def _is_empty_file(path: Path) -> bool:
    """True for a name that an export took, which still runs or was killed."""
    return path.is_file() and path.stat().st_size == 0


@contextmanager
def _place_taken(out: Path, *, is_new: bool, is_file: bool) -> Iterator[None]:
    """Make the parent folders of `out`, and take the name of a new file; undo it on failure.

    One export at a time writes to a given `out`. It removes what a killed one has left.
    """
    missing = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VitcliError(
            f"cannot make `{out.parent}`: {error.strerror}", "choose another path with `--out`"
        ) from error
    try:
        with claimed(out, partial(_busy, out)) if is_new else nullcontext():
            if is_new and is_file and not _is_empty_file(out):
                take_first([out], as_file=True)
            try:
                yield
            except BaseException:
                if is_new and is_file:
                    release_unused(out)
                raise
    except BaseException:
        with suppress(OSError):  # another process may have written there
            for folder in missing:
                folder.rmdir()
        raise


def _busy(out: Path) -> VitcliError:
    return VitcliError(
        f"`{out}` exists already: another export writes it",
        "wait for it, or choose another path with `--out`",
    )


def _compare(net: LoadedModel, to: str, out: Path) -> tuple[LoadedModel, float | None, float]:
    """Read `out` back: (model, largest difference, largest magnitude of the outputs).

    Features are compared too, because an untrained (zero) head hides them. ONNX is run by
    onnxruntime and not read back as a model; without onnxruntime the difference is None.
    """
    generator = torch.Generator().manual_seed(0)
    size = (net.config.num_channels, *net.config.image_size)
    images = torch.randn(NUM_IMAGES, *size, generator=generator)
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
    return again, *_demand_equal(found, wanted, OUTPUTS[net.is_regression], to)


def _demand_equal(found: Tensor, wanted: Tensor, what: str, to: str) -> tuple[float, float]:
    """(largest difference, largest magnitude) of outputs that must agree."""
    shapes = tuple(found.shape), tuple(wanted.shape)
    if shapes[0] != shapes[1]:
        raise VitcliError(f"the {to} export has {what} of shape {shapes[0]} instead of {shapes[1]}")
    difference, scale = float((found - wanted).abs().max()), float(wanted.abs().max())
    if not difference <= LARGEST_DIFFERENCE * scale:  # also true for NaN
        raise VitcliError(
            f"the {what} of the {to} export differ by {difference:.2g} (values up to {scale:.2g})",
            "nothing was kept; check the weights for NaN, otherwise report this as a bug",
        )
    return difference, scale


def _files(out: Path) -> dict[str, int]:
    """File name -> bytes of the export."""
    if out.is_dir():
        return {p.name: p.stat().st_size for p in sorted(out.iterdir())}
    paths = (out, data_file(out), record_file(out))
    return {p.name: p.stat().st_size for p in paths if p.is_file()}


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
