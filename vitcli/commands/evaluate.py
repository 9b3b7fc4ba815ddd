"""`vitcli evaluate`: measure models on a whole labelled split."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitcli.config.recipe import load_inference
from vitcli.config.schema import Inference, Settings
from vitcli.data.augment.test_time import check_views
from vitcli.data.image_set import ImageSet
from vitcli.data.source import Source
from vitcli.errors import VitcliError
from vitcli.evals.calibration import (
    CalibrationSplit,
    Fit,
    calibrate,
    check_same_kind,
    split_for_calibration,
    store_fit,
    temperature_file,
    warn_if_calibrated_on,
)
from vitcli.evals.class_matching import (
    ClassMap,
    ClassMatching,
    imagenet_outputs,
    match_outputs,
    read_class_map,
)
from vitcli.evals.comparison import ModelComparison, compare_models
from vitcli.evals.evaluate import Evaluation, Evaluator, evaluate_numbers
from vitcli.evals.features import Extracted, extract, rank_and_world_size
from vitcli.evals.held_out import choose_images, open_whole
from vitcli.evals.near_copies import warn_before_evaluation
from vitcli.evals.plots import evaluation_files, write_evaluation_files
from vitcli.evals.real_labels import read_real_labels, real_targets
from vitcli.evals.report import evaluation_page
from vitcli.evals.scoring import THRESHOLD
from vitcli.evals.thresholds import ThresholdRule, fit_thresholds
from vitcli.files import check_folder, make_folder
from vitcli.progress import NoteCollector, Quiet, Watcher
from vitcli.report.page import write_report
from vitcli.run import new_output, run_stem
from vitcli.weights.load import (
    load_model,
    load_settings,
    newest_run,
    require_one_number,
    require_preprocess,
)
from vitcli.weights.load_report import note_load_report
from vitcli.weights.loaded import LoadedModel

DEFAULT_DATA = "builtin:digits"

Labels = str | os.PathLike[str] | Sequence[str] | None


@dataclass(frozen=True)
class EvaluationRequest:
    """Options that hold for every model of one command line."""

    data: str
    inference: Inference
    labels: Labels
    real: list[list[int]] | None
    class_map: ClassMap | None
    calibrate: bool
    thresholds: ThresholdRule | None
    extraction: dict[str, Any]  # batch size, precision and mirror images, as `extract` takes them
    seed: int
    verbose: bool
    watch: NoteCollector
    whole: list[Source] = field(default_factory=list)  # shared by all models, see `opened`

    def opened(self) -> Source:
        """DATA with classes; it is opened once."""
        if not self.whole:
            self.whole.append(open_whole(self.inference.data, self.data, self.watch))
        return self.whole[0]


@dataclass
class LoadedTask:
    """One model and the images that it is measured on, checked but not yet evaluated.

    Attributes:
        matching: None for a regression.
        folder: folder of the files that the evaluation writes.
        weights_file: file that will hold what is fitted; None without `--calibrate` and
            `--thresholds`.
        request: the options, with a watcher that collects the notes about this model.
    """

    model: str
    net: LoadedModel
    source: Source
    images: ImageSet
    matching: ClassMatching | None
    folder: Path
    weights_file: Path | None
    request: EvaluationRequest


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
    thresholds: str | None = None,
    tta: str | None = None,
    batch_size: int = 128,
    precision: str = "auto",
    seed: int = 0,
    check: bool = True,
    verbose: bool = False,
    watch: Watcher | None = None,
) -> Evaluation | ModelComparison:
    """Measure one or several models on a labelled split.

    Args:
        data: DATA (`test`, else `validation`, else all images); None: `builtin:digits`.
        model: MODEL with a trained head, or several; None uses the newest run that has one.
        settings: nested settings: `model.num_heads`, `preprocess.mean`, `data.label_column` …
        labels: class names of the model, or a file with one per line.
        out: folder of the files, with one folder per model if there are several.
        real, class_map: files of ReaL labels, and of the model's classes for the data's classes.
        calibrate: fit a temperature on the validation images (without these: on half of the
            images), report the others, and store it in the weights file, else in a copy in `out`.
        thresholds: the same for a threshold per class: `f1`, `recall=0.95` or `precision=0.9`.
        tta: average the probabilities of several views: `flip` (the image and its mirror image) or
            `shifts` (these, and both moved by a 32nd of the side in two directions).
        batch_size, precision: images per forward pass; `auto` is fp32 on every machine.
        seed: seed of the half that is held out, and of the simulated calibration error.
        check, verbose: look for near copies of training images; report how tensors were loaded.

    Raises:
        VitcliError: bad input, an untrained head, or classes that do not match.
    """
    watch = watch or Quiet()
    if out is not None:
        check_folder(out)
    check_views(tta, calibrate or thresholds is not None)
    inference = load_inference(settings)
    data = inference.data.name if data is None else data
    if data is None:
        watch.note(f"no DATA given: using {(data := DEFAULT_DATA)}")
    request = EvaluationRequest(
        data=data,
        inference=inference,
        labels=labels,
        real=None if real is None else read_real_labels(real),
        class_map=None if class_map is None else read_class_map(class_map),
        calibrate=calibrate,
        thresholds=None if thresholds is None else ThresholdRule.parse(thresholds),
        extraction={"batch_size": batch_size, "precision": precision, "tta": tta},
        seed=seed,
        verbose=verbose,
        watch=NoteCollector(watch),  # each model gets its own
    )
    models = [model] if isinstance(model, str) else list(model or ())
    if not models:
        own_names = labels is None and class_map is None
        classes = (lambda: request.opened().classes) if own_names else None
        name = inference.model.name or newest_run(classifier=True, classes=classes)
        if inference.model.name is None:
            watch.note(f"no `--model` given: using {name}")
        models = [name]
    stem = f"{run_stem(models[0])}-evaluate" if len(models) == 1 else "evaluate"
    with new_output(out, stem) as root:
        # Load and check every model before the first is evaluated: a mistake shows at once.
        tasks = [
            _load(name, replace(request, watch=NoteCollector(watch)), folder)
            for name, folder in zip(models, _output_folders(models, root), strict=True)
        ]
        _check_same_kind(tasks)
        if check:
            warn_before_evaluation((t.model, t.source, t.images, t.request.watch) for t in tasks)
        results = [_evaluate(tasks.pop(0)) for _ in range(len(tasks))]  # pop: frees the weights
    return results[0] if len(results) == 1 else compare_models(data, results)


def _check_same_kind(tasks: Sequence[LoadedTask]) -> None:
    if len({task.net.is_regression for task in tasks}) > 1:
        raise VitcliError(
            "some of these models predict classes and others numbers (regression)",
            "evaluate them in separate commands",
        )


def _output_folders(models: Sequence[str], root: Path) -> list[Path]:
    """The folder of each model: `root` itself, or different folders in it if there are several."""
    if len(models) == 1:
        return [root]
    folders: list[Path] = []
    for stem in map(run_stem, models):
        number, folder = 1, root / stem
        while folder in folders:
            number += 1
            folder = root / f"{stem}-{number}"
        folders.append(folder)
    return folders


def _load(model: str, request: EvaluationRequest, folder: Path) -> LoadedTask:
    """Load the model and the data, and do every check that can fail."""
    watch = request.watch
    arguments = load_settings(request.inference.model, request.inference.preprocess)
    net = load_model(model, labels=request.labels, watch=watch, **arguments)
    if not net.head_trained:
        raise VitcliError(
            f"`{model}` has no trained head to evaluate",
            hint="train one with `vitcli finetune` or `vitcli fewshot`",
        )
    if net.is_regression:
        _check_regression(net, model, request)
    # A stream is read once, and numbers are other data than classes.
    opened = None if net.is_regression or request.inference.data.streaming else request.opened()
    source, images = choose_images(request.data, model, net, request.inference, watch, opened)
    source.tell(watch)
    note_load_report(net, watch, verbose=request.verbose)
    if net.is_regression:
        if net.labels not in (None, source.classes):
            name = (net.labels or ("",))[0]
            watch.warn(f"`{model}` predicts `{name}`, and the data have `{source.classes[0]}`")
        return LoadedTask(model, net, source, images, None, folder, None, request)
    matching = match_outputs(net, source.classes, request.data, watch, request.class_map)
    if images.targets is not None:
        _check_multi_label(matching, source, request)
    elif request.real is not None:
        imagenet_outputs(net)
    file = None
    if request.thresholds is not None and images.targets is None:
        raise VitcliError(
            f"`--thresholds` needs multi-label images, and those of `{request.data}` have one "
            "label each",
            "remove `--thresholds`; `predict --threshold` gives no label to uncertain images",
        )
    if request.calibrate or request.thresholds is not None:
        check_same_kind(net, images, model)
        file = temperature_file(model, not arguments and request.labels is None, folder)
    chosen = matching.select(images)
    return LoadedTask(model, net, source, chosen, matching, folder, file, request)


def _check_regression(net: LoadedModel, model: str, request: EvaluationRequest) -> None:
    """Raise a VitcliError for options that need classes."""
    require_one_number(net, model)
    given = {
        "--real": request.real,
        "--class-map": request.class_map,
        "--calibrate": request.calibrate or None,
        "--thresholds": request.thresholds,
    }
    if flags := [flag for flag, value in given.items() if value is not None]:
        raise VitcliError(
            f"`{flags[0]}` needs classes, and `{model}` predicts a number (regression)",
            f"remove `{flags[0]}`",
        )


def _check_multi_label(matching: ClassMatching, source: Source, request: EvaluationRequest) -> None:
    """Raise a VitcliError for options that multi-label images do not have."""
    if request.real is not None:
        fault = f"`--real` needs single-label images, and `{request.data}` is multi-label"
        raise VitcliError(fault, "remove `--real`")
    matching.check_one_to_one(source.classes, request.data)


def _evaluate(task: LoadedTask) -> Evaluation:
    """Evaluate one model and write its files."""
    net, images, request, watch = task.net, task.images, task.request, task.request.watch
    if task.matching is None:
        return _evaluate_numbers(task)
    fitted, record = None, None
    if task.weights_file is not None:
        split = split_for_calibration(task.source, images, task.matching, request.seed)
        images, record = split.reported, split.record
        fitted = _fit(net, task.matching, split, task.weights_file, request)
    else:
        warn_if_calibrated_on(task.model, task.source, images, watch)
    watch.note(f"evaluating {len(images):,} {images.name} images of {request.data}")
    extracted = _logits(net, images, request, "images")
    if images.targets is None and net.head_activation == "sigmoid":
        watch.note("loss and calibration error use a softmax over the outputs of the sigmoid head")
    real = None
    if images.targets is None and request.real is not None:
        real = real_targets(images, extracted.indices, request.real, imagenet_outputs(net))
    result = Evaluator(
        net=net,
        extracted=extracted,
        matching=task.matching,
        images=images,
        model=task.model,
        data=request.data,
        identity=identity_of(task.source, images),
        real=real,
        fitted=fitted,
        seed=request.seed,
        watch=watch,
    ).run()
    result = replace(result, files=evaluation_files(result, task.folder))
    if rank_and_world_size()[0] == 0:
        _write(result, images, task)
        if fitted is not None and record is not None:
            # Last: if anything above fails, the weights file is unchanged.
            make_folder(fitted.file.parent)
            store_fit(
                net,
                task.model,
                fitted.file,
                record,
                temperature=request.calibrate,
                thresholds=request.thresholds is not None,
            )
    return result


def _write(result: Evaluation, images: ImageSet, task: LoadedTask) -> None:
    """Write the files of an evaluation, and the report, which shows them all."""
    wanted = require_preprocess(task.net).pixel_format
    make_folder(task.folder)
    write_evaluation_files(result, images, wanted)
    page = partial(evaluation_page, result, images, wanted, task.request.watch.lines)
    write_report(Path(result.files["report"]), page, task.request.watch)


def _fit(
    net: LoadedModel,
    matching: ClassMatching,
    split: CalibrationSplit,
    file: Path,
    request: EvaluationRequest,
) -> Fit:
    """Fit the temperature, then the thresholds, on the images that are not reported."""
    held_out = _logits(net, split.held_out, request, "images for the fit")
    fit = Fit(split.description, len(held_out.labels), file, thresholds=net.thresholds)
    where = f"fitted on {fit.images:,} images: {fit.split}"
    if request.calibrate:
        fit = replace(fit, temperature=calibrate(net, held_out, matching))
        request.watch.note(f"temperature {net.temperature:.4g}, {where}")
    if request.thresholds is not None:
        # After the temperature: the thresholds are compared with calibrated probabilities.
        outputs = matching.first_outputs
        p = net.probabilities(torch.from_numpy(held_out.outputs)).numpy()[:, outputs]
        found = fit_thresholds(
            p, held_out.labels, request.thresholds, matching.classes, request.watch
        )
        # Outputs that are no class of the data keep their threshold.
        values = np.array(net.thresholds or [THRESHOLD] * net.config.num_classes)
        values[outputs] = found
        net.thresholds = tuple(values.tolist())
        fit = replace(fit, rule=request.thresholds)
        request.watch.note(f"a threshold per class ({request.thresholds}), {where}")
    return fit


def _evaluate_numbers(task: LoadedTask) -> Evaluation:
    """Evaluate a regression and write its files."""
    images, request = task.images, task.request
    request.watch.note(f"evaluating {len(images):,} {images.name} images of {request.data}")
    result = evaluate_numbers(
        task.net,
        _logits(task.net, images, request, "images"),
        images,
        model=task.model,
        data=request.data,
        identity=identity_of(task.source, images),
        seed=request.seed,
    )
    result = replace(result, files=evaluation_files(result, task.folder))
    if rank_and_world_size()[0] == 0:
        _write(result, images, task)
    return result


def identity_of(source: Source, images: ImageSet) -> str:
    """Identifies the images of an evaluation, see `Evaluation.identity`."""
    return f"{source.fingerprint}/{images.name}/{len(images)}"


def _logits(
    net: LoadedModel, images: ImageSet, request: EvaluationRequest, label: str
) -> Extracted:
    more = {**request.extraction, "watch": request.watch, "label": label}
    return extract(net, images, output="logits", **more)
