"""`vitcli evaluate`: models on a whole labelled set: accuracy, calibration, confusion."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vitcli.config.recipe import load_inference
from vitcli.config.schema import Inference, Settings
from vitcli.data.image_set import ImageSet, Source
from vitcli.errors import VitcliError
from vitcli.evals.class_matching import ClassMap, Matching, imagenet_outputs, match, read_class_map
from vitcli.evals.comparison import Evaluations, beside
from vitcli.evals.evaluate import Evaluation, choose_images, evaluate_images
from vitcli.evals.features import Extracted, extract, processes
from vitcli.evals.multilabel import LabelsEvaluation, evaluate_labels
from vitcli.evals.plots import files_of, write_files
from vitcli.evals.real_labels import read_real, real_answers
from vitcli.evals.temperature import (
    check_kind,
    compared,
    fit,
    hold_out,
    place_of,
    store,
    warn_of_fitted,
)
from vitcli.files import check_folder, make_folder
from vitcli.progress import Quiet, Watcher
from vitcli.run import new_path, run_stem
from vitcli.vit import Model
from vitcli.weights.load import load_model, load_settings, newest_run
from vitcli.weights.load_report import tell_load

DEFAULT_DATA = "builtin:digits"

Labels = str | os.PathLike[str] | Sequence[str] | None


@dataclass(frozen=True)
class Asked:
    """What holds for every model of one command line."""

    data: str
    inference: Inference
    labels: Labels
    real: list[list[int]] | None
    class_map: ClassMap | None
    calibrate: bool
    batch_size: int
    precision: str
    seed: int
    verbose: bool
    watch: Watcher


def run(
    data: str | None = None,
    *,
    model: str | Sequence[str] | None = None,
    settings: Settings | None = None,
    labels: Labels = None,
    out: Path | None = None,
    real: Path | None = None,
    class_map: Path | None = None,
    calibrate: bool = False,
    batch_size: int = 128,
    precision: str = "auto",
    seed: int = 0,
    verbose: bool = False,
    watch: Watcher | None = None,
) -> Evaluation | LabelsEvaluation | Evaluations:
    """Run one or several models over a labelled set.

    Args:
        data: DATA; its `test` images, else its `validation` images, else all. None takes
            `builtin:digits`.
        model: MODEL with a trained head, or several; None takes the newest run that has one.
        settings: nested settings: `model.num_heads`, `preprocess.mean`, `data.label_column` …
        labels: class names of the model, or a file with one a line.
        out: a folder for the CSV and the pictures; None makes `runs/MODEL-evaluate`. Of several
            models each has a folder in it.
        real: the ReaL labels of ImageNet's validation images, as published.
        class_map: a file that says which classes of the model stand for which of the data.
        calibrate: fit a temperature on the validation images, or on half of the images where there
            are none, report the others, and store it with the weights: in a file of ours, else in
            a copy in `out`.
        batch_size: images of one forward pass.
        precision: `auto` is fp32, so that the figure is the same everywhere.
        seed: of the resampling, and of the half.
        verbose: tell what became of every tensor of the weights.

    Raises:
        VitcliError: bad input; a head that is not trained; classes that do not match.
    """
    watch = watch or Quiet()
    if out is not None:
        check_folder(out)
    inference = load_inference(settings)
    data = inference.data.name if data is None else data
    if data is None:
        data = DEFAULT_DATA
        watch.note(f"no DATA given: {data}")
    asked = Asked(
        data=data,
        inference=inference,
        labels=labels,
        real=None if real is None else read_real(real),
        class_map=None if class_map is None else read_class_map(class_map),
        calibrate=calibrate,
        batch_size=batch_size,
        precision=precision,
        seed=seed,
        verbose=verbose,
        watch=watch,
    )
    models = [model] if isinstance(model, str) else list(model or ())
    if not models:
        named = inference.model.name or newest_run(classifier=True)
        if inference.model.name is None:
            watch.note(f"no `--model` given: {named}")
        models = [named]
    folders = _folders(models, out)
    opened = [_open(name, asked, place) for name, place in zip(models, folders, strict=True)]
    if len(models) == 1:
        return _evaluate(opened[0], asked)
    found = []
    while opened:
        found.append(_evaluate(opened.pop(0), asked))  # popped: its weights go
    return beside(data, found, seed)


def _folders(models: Sequence[str], out: Path | None) -> list[Path]:
    """Where the files of each go: `out`, of several models folders in it, all different."""
    if len(models) == 1:
        return [out or new_path(f"{run_stem(models[0])}-evaluate")]
    root = out or new_path("evaluate")
    folders: list[Path] = []
    for stem in map(run_stem, models):
        number, folder = 1, root / stem
        while folder in folders:
            number += 1
            folder = root / f"{stem}-{number}"
        folders.append(folder)
    return folders


@dataclass
class Opened:
    """A model and the images that it is asked about, before the work.

    Attributes:
        folder: of its files.
        place: of its temperature, where one is fitted.
    """

    model: str
    net: Model
    source: Source
    images: ImageSet
    matching: Matching
    folder: Path
    place: Path | None


def _open(model: str, asked: Asked, folder: Path) -> Opened:
    """Everything about one model that can be refused."""
    watch = asked.watch
    arguments = load_settings(asked.inference.model, asked.inference.preprocess)
    net = load_model(model, labels=asked.labels, watch=watch, **arguments)
    if not net.head_trained:
        raise VitcliError(
            f"`{model}` has no trained head to evaluate",
            hint="train one with `vitcli finetune` or `vitcli fewshot`",
        )
    source, images = choose_images(asked.data, model, asked.inference, watch)
    for line in source.notes:
        watch.note(line)
    tell_load(net, watch, verbose=asked.verbose)
    matching = match(net, source.classes, asked.data, watch, asked.class_map)
    if images.targets is not None:
        _check_several(matching, source, asked)
    elif asked.real is not None:
        imagenet_outputs(net)
    place = None
    if asked.calibrate:
        check_kind(net, images, model)
        place = place_of(model, not arguments and asked.labels is None, folder)
    return Opened(model, net, source, matching.select(images), matching, folder, place)


def _evaluate(one: Opened, asked: Asked) -> Evaluation | LabelsEvaluation:
    """One model, and its files."""
    net, images, matching = one.net, one.images, one.matching
    fitted = None
    if asked.calibrate:
        parts = hold_out(one.source, images, matching, asked.seed)
        seen = _logits(net, parts.held, asked, "images for the temperature")
        fitted, images = fit(net, seen, matching, parts), parts.reported
        asked.watch.note(
            f"temperature {net.temperature:.4g}, fitted on {len(seen.labels):,} images: "
            f"{parts.said}"
        )
    else:
        warn_of_fitted(one.model, one.source, images, asked.watch)
    asked.watch.note(f"{len(images):,} {images.name} images of {asked.data}")
    found = _logits(net, images, asked, "images")
    result = _judge(one, found, images, asked)
    if isinstance(result, Evaluation):
        result = replace(result, files=files_of(result, one.folder))
    if fitted is not None and one.place is not None:
        calibration, before = compared(net, found, matching, fitted, one.place)
        result = replace(result, calibration=calibration)
        if isinstance(result, Evaluation):
            result = replace(result, uncalibrated=before)
    if processes()[0] == 0:
        if isinstance(result, Evaluation):
            make_folder(one.folder)
            write_files(result, images)
        if fitted is not None and one.place is not None:  # last: all else is there
            make_folder(one.place.parent)
            store(net, one.model, one.place, fitted.parts.fitted_on)
    return result


def _logits(net: Model, images: ImageSet, asked: Asked, label: str) -> Extracted:
    return extract(
        net,
        images,
        what="logits",
        batch_size=asked.batch_size,
        precision=asked.precision,
        watch=asked.watch,
        label=label,
    )


def _judge(
    one: Opened, found: Extracted, images: ImageSet, asked: Asked
) -> Evaluation | LabelsEvaluation:
    about = {
        "model": one.model,
        "data": asked.data,
        "identity": f"{one.source.fingerprint}/{images.name}/{len(images)}",
    }
    if images.targets is not None:
        return evaluate_labels(
            one.net,
            found,
            one.matching.firsts,
            images,
            seed=asked.seed,
            watch=asked.watch,
            **about,
        )
    if one.net.head_activation == "sigmoid":
        asked.watch.note(
            "loss and calibration are those of a softmax over the model's sigmoid outputs"
        )
    real = None
    if asked.real is not None:
        real = real_answers(images, found.indices, asked.real, imagenet_outputs(one.net))
    return evaluate_images(
        one.net,
        found,
        one.matching,
        images,
        real=real,
        seed=asked.seed,
        watch=asked.watch,
        **about,
    )


def _check_several(matching: Matching, source: Source, asked: Asked) -> None:
    """Raises a VitcliError for what images with any number of labels cannot be asked."""
    if asked.real is not None:
        raise VitcliError(
            f"the images of `{asked.data}` have any number of labels, and `--real` replaces one",
            "leave it out",
        )
    if len(matching.classes) < len(source.classes) or any(len(o) > 1 for o in matching.outputs):
        raise VitcliError(
            f"the images of `{asked.data}` have any number of labels: each class needs one of the "
            "model's",
            "name all of them in `--class-map`, one for each",
        )
