"""`vitcli predict`: class names and probabilities, or numbers, of images, folders and globs."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any, cast

import numpy as np
from PIL import Image
from torch import Tensor

from vitcli.config.recipe import load_inference
from vitcli.config.schema import Inference, Settings
from vitcli.data.augment.test_time import TTATransform
from vitcli.data.image_paths import ImagePaths, find_images
from vitcli.data.split_record import trained_on
from vitcli.devices import pick_device
from vitcli.errors import VitcliError, counted
from vitcli.evals.finished_tables import ImageDigest, check_finished, is_recorded, record_tables
from vitcli.evals.ood import ReferenceStore
from vitcli.evals.predictor import AbstainRules, ImagePredictor
from vitcli.evals.resume_log import PredictionCounts, ResumeLog, is_finished, open_resume_log
from vitcli.evals.writers import COLUMNS, LABELS_COLUMN, NUMBER_COLUMNS, OutputFiles, PredictionRow
from vitcli.preprocess import AnyImage
from vitcli.progress import Bar, Quiet, Watcher
from vitcli.weights.load import (
    load_model,
    load_settings,
    newest_run,
    require_one_number,
    require_preprocess,
)
from vitcli.weights.load_report import note_load_report
from vitcli.weights.loaded import LoadedModel, model_hash

Labels = str | os.PathLike[str] | Sequence[str] | None


class Predictions:
    """Rows that are computed while one iterates over them, in the order of the images.

    Attributes:
        counts: numbers so far; with `resume`, they include the rows of the interrupted run.
    """

    def __init__(self, rows: Iterator[PredictionRow], counts: PredictionCounts) -> None:
        self._rows = rows
        self.counts = counts

    def __iter__(self) -> Iterator[PredictionRow]:
        return self._rows

    @property
    def failed(self) -> int:
        """Number of images so far that could not be read."""
        return self.counts.failed


def predict(
    images: AnyImage | Iterable[AnyImage],
    model: str | os.PathLike[str] | LoadedModel | None = None,
    *,
    top: int = 5,
    batch_size: int = 32,
    precision: str = "auto",
    threshold: float | None = None,
    ood: bool = False,
    ood_threshold: float | None = None,
    reference: str | os.PathLike[str] | None = None,
    tta: str | None = None,
    labels: Labels = None,
    settings: Settings | None = None,
) -> list[PredictionRow]:
    """Class names and probabilities of images: the rows of `vitcli predict --json`.

    Args:
        images: one image or several: paths, folders, globs, URLs, Pillow images, bytes, file
            objects, arrays (Y, X) or (Y, X, C), tensors (Y, X) or (C, Y, X), or a batch of them
            with one dimension more. Integers are 0..255, floats are 0..1.
        model: MODEL, or a loaded model; None uses the newest run with a trained head.
        top: number of classes in `top`.
        batch_size, precision, threshold, ood, ood_threshold, reference, tta, labels, settings: as
            in `run`.

    Returns:
        A dict for each image: `path`, `label`, `probability`, `top`, `error`; `labels` if the
        model has a threshold per class (`vitcli evaluate --thresholds`); with a threshold also
        `abstained`; with `ood` also `ood` and `ood_distance`. After a regression the keys are
        `path`, `value` and `error`. `path` is None for an image in memory without a file name.

    Raises:
        VitcliError: no such model, no trained head, or no such image.
    """
    rows = run(
        _as_list(images),
        model=model,
        settings=settings,
        labels=labels,
        top=top,
        batch_size=batch_size,
        precision=precision,
        threshold=threshold,
        ood=ood,
        ood_threshold=ood_threshold,
        reference=reference,
        tta=tta,
    )
    return list(rows)


def _as_list(images: AnyImage | Iterable[AnyImage]) -> list[AnyImage]:
    """One image, several, or a batch in one array -> a list of images."""
    if isinstance(images, np.ndarray | Tensor):
        return list(images) if images.ndim == 4 else [images]
    single = isinstance(images, str | bytes | bytearray | os.PathLike) or hasattr(images, "read")
    if single or isinstance(images, Image.Image):
        return [cast(AnyImage, images)]
    return list(cast(Iterable[AnyImage], images))


def run(
    paths: Sequence[AnyImage],
    *,
    source: str | os.PathLike[str] | None = None,
    model: str | os.PathLike[str] | LoadedModel | None = None,
    settings: Settings | None = None,
    labels: Labels = None,
    top: int = 5,
    batch_size: int = 32,
    precision: str = "auto",
    threshold: float | None = None,
    ood: bool = False,
    ood_threshold: float | None = None,
    reference: str | os.PathLike[str] | None = None,
    tta: str | None = None,
    csv_file: Path | None = None,
    jsonl_file: Path | None = None,
    parquet_file: Path | None = None,
    resume: bool = False,
    verbose: bool = False,
    watch: Watcher | None = None,
) -> Predictions:
    """Predict the classes of images.

    Args:
        paths: images, folders (with everything in them), globs, URLs, images in memory.
        source: a file with further paths, one per line or separated by NUL; `-` is stdin.
        model: MODEL, or a loaded model; None uses the newest run with a trained head.
        settings: nested settings: `model.num_heads`, `preprocess.mean` …
        labels: class names of the model, or a file with one name per line.
        top: number of classes in `top`; more than the model has give all classes.
        batch_size, precision: images per forward pass; `auto` is fp32.
        threshold: an image whose highest probability is lower gets no label: `abstained` is true.
        ood: report the out-of-distribution score: the share of held-out in-distribution images
            whose features are nearer to the training images (`vitcli.evals.ood`).
        ood_threshold: an image with a higher OOD score gets no label; implies `ood`.
        reference: in-distribution DATA; implies `ood`. None uses the stored reference, else the
            data that the run was trained on.
        tta: average the probabilities of several views: `flip`, `shifts`, `crops:5` or `crops:10`,
            at 2, 6, 5 or 10 times the cost.
        csv_file, jsonl_file, parquet_file: output files, written after the last row. Until then
            the rows are in a file beside the first one, with the suffix `.part`.
        resume: continue after the rows of an interrupted run, which are not returned again. A
            finished file must have been made of the same images, model and settings.
        verbose: report how each tensor was loaded.

    Raises:
        VitcliError: no such model, no trained head, no such image, or an invalid option.
    """
    watch = watch or Quiet()
    rules = AbstainRules(threshold=threshold, ood_threshold=ood_threshold)
    outputs = OutputFiles(csv_file, jsonl_file, parquet_file)
    counts = PredictionCounts()
    _check_options(top, batch_size, outputs, resume)
    finished = resume and _is_finished(outputs, watch)
    files = find_images(paths, source)
    inference = load_inference(settings)
    net, name = _load_classifier(model, inference, labels, watch, verbose)
    if net.is_regression:
        _check_regression(net, name, rules, ood=ood or reference is not None)
    transform = TTATransform(require_preprocess(net), tta)
    transform.preprocess.check_batch(min(batch_size, files.total or batch_size))
    if ood or ood_threshold is not None or reference is not None:
        store = ReferenceStore(net, name, inference.data, batch_size, precision, watch)
        rules = _with_reference(rules, store, reference, watch)
    # The settings that decide a row: rows of a resumed run must have the same.
    given = {"top": top, "batch_size": batch_size, "precision": precision, "tta": tta}
    decisive = given | {
        "model": model_hash(net) if outputs.paths else None,
        "reference": dict(rules.reference.facts) if rules.reference else None,
        "threshold": threshold,
        "ood_threshold": ood_threshold,
    }
    if finished:
        _check_finished(outputs, decisive, files, watch)
        return Predictions(iter(()), counts)
    net, top = net.to(pick_device()), min(top, net.config.num_classes)
    predictor = ImagePredictor(net, transform, rules, top, batch_size, precision)
    rows = _rows(predictor, name, files, outputs, decisive, resume, counts, watch)
    return Predictions(rows, counts)


def _with_reference(
    rules: AbstainRules,
    store: ReferenceStore,
    reference: str | os.PathLike[str] | None,
    watch: Watcher,
) -> AbstainRules:
    """The rules with the in-distribution features of `reference`, or of the stored default."""
    found = store.get(None if reference is None else os.fspath(reference))
    rules = replace(rules, reference=found.to(pick_device()))
    _warn_if_too_few(rules, watch)
    return rules


def _is_finished(outputs: OutputFiles, watch: Watcher) -> bool:
    """True if the output files are finished, and a record says how they were made."""
    if not is_finished(outputs):
        return False
    if not is_recorded(outputs.paths):
        watch.note(f"no record says how `{outputs.paths[0]}` was made, so it is made again")
        return False
    return True


def _check_finished(
    outputs: OutputFiles, settings: Settings, files: Iterable[AnyImage], watch: Watcher
) -> None:
    """Raise a VitcliError if finished files were made of other images, model or settings."""
    images = ImageDigest()
    for image in files:
        images.add(image)
    check_finished(outputs.paths, settings, images.hexdigest())
    watch.note(f"`{outputs.paths[0]}` is already finished; without `--resume` it is replaced")


def _check_regression(net: LoadedModel, name: str, rules: AbstainRules, *, ood: bool) -> None:
    """Raise a VitcliError for options that need classes."""
    require_one_number(net, name)
    if rules.can_abstain or ood:
        flag = "--threshold" if rules.threshold is not None else "--ood"
        raise VitcliError(
            f"`{flag}` needs classes, and `{name}` predicts a number (regression)",
            f"remove `{flag}`",
        )


def _check_options(top: int, batch_size: int, outputs: OutputFiles, resume: bool) -> None:
    if top < 1 or batch_size < 1:
        raise VitcliError(
            f"`--top` is {top} and `--batch-size` is {batch_size}", "both must be 1 or more"
        )
    if resume and not outputs.paths:
        raise VitcliError(
            "`--resume` continues an output file, and none is given",
            "repeat the first command with its `--csv`, `--jsonl` or `--parquet`",
        )


def _rows(
    predictor: ImagePredictor,
    name: str,
    files: ImagePaths,
    outputs: OutputFiles,
    decisive: Mapping[str, Any],
    resume: bool,
    counts: PredictionCounts,
    watch: Watcher,
) -> Iterator[PredictionRow]:
    """The rows that are not in the log yet; each is logged before it is yielded."""
    with ExitStack() as stack:
        images = ImageDigest()
        todo, repeated, log = images.watching(files), 0, None
        if outputs.paths:
            opened = open_resume_log(outputs.paths[0], decisive, counts, resume=resume)
            log = stack.enter_context(opened)
            todo, repeated = log.remaining(todo, predictor.batch_size)
            stack.push(partial(_note_interruption, log, counts, watch))
            if log.num_damaged:
                watch.warn(
                    f"`{log.path}` is damaged from row {counts.count + 1} on: {log.num_damaged:,} "
                    "rows are predicted again"
                )
            if resume:
                watch.note(f"`{log.path}` already has {counts.count:,} rows")
        done = counts.count - repeated
        bar = stack.enter_context(watch.progress("images", files.total, done))
        if files.total is None and files.repeatable:
            # Count the files of a large folder in the background; predict the first meanwhile.
            Thread(target=_count_files, args=(files, bar), daemon=True).start()
        made = predictor.rows(todo, bar)
        stack.callback(made.close)
        is_known, trained = trained_on(predictor.net.split_record), 0
        for row in islice(made, repeated, None):
            trained += is_known(row["path"])
            if log is not None:
                log.add(row)
            counts.add(row)
            yield row
        for line in files.skipped.values():
            watch.note(line)
        if trained:
            one, more = "images is a training image", "images are training images"
            watch.note(
                f"{counted(trained, one, more, counts.count)} of `{name}`: predictions of them are "
                "better than of new images; `vitcli evaluate` measures held-out images"
            )
        if log is not None:
            columns = NUMBER_COLUMNS if predictor.net.is_regression else COLUMNS
            labels = [LABELS_COLUMN] if predictor.net.thresholds is not None else []
            top = 1 if predictor.net.is_regression else predictor.top
            outputs.write(log.rows, [*columns, *labels, *predictor.rules.columns], top)
            log.remove()
            record_tables(outputs.paths, decisive, images.hexdigest())


def _warn_if_too_few(rules: AbstainRules, watch: Watcher) -> None:
    """Warn of an OOD threshold that needs more held-out images than the reference has."""
    share = rules.ood_threshold
    if rules.reference is None or share is None or share == 1:
        return
    # A new in-distribution image is farther than all n held-out ones once in n + 1 times.
    count = len(rules.reference.held_out)
    if count * (1 - share) < 1 - 1e-9:
        watch.warn(
            f"{count} held-out images are too few for `--ood-threshold {share:g}`: about one in "
            f"{count + 1} in-distribution images will get no label"
        )


def _count_files(files: ImagePaths, bar: Bar) -> None:
    with suppress(OSError, VitcliError):
        bar.extend(sum(1 for _ in files))


def _note_interruption(
    log: ResumeLog,
    counts: PredictionCounts,
    watch: Watcher,
    kind: type[BaseException] | None,
    *_: object,
) -> None:
    """After an exception, say where the rows are."""
    if kind is not None and counts.count:
        watch.note(
            f"{counted(counts.count, 'row is', 'rows are')} in `{log.path}`; repeat the command "
            "with `--resume` to continue"
        )


def _load_classifier(
    model: str | os.PathLike[str] | LoadedModel | None,
    inference: Inference,
    labels: Labels,
    watch: Watcher,
    verbose: bool,
) -> tuple[LoadedModel, str]:
    """The model in eval mode, and its name."""
    if isinstance(model, LoadedModel):
        net = model.eval()
        name = net.load_report.source if net.load_report else "the model"
    else:
        if model is None and inference.model.name is None:
            model = newest_run(classifier=True)
            watch.note(f"no `--model` given: using {model}")
        name = os.fspath(model if model is not None else inference.model.name or "")
        arguments = load_settings(inference.model, inference.preprocess)
        net = load_model(name, labels=labels, watch=watch, **arguments)
        note_load_report(net, watch, verbose=verbose)
    if not net.head_trained:
        raise VitcliError(
            f"`{name}` has no trained head, so it cannot predict classes",
            hint="train a head with `vitcli fewshot DATA` (seconds) or `vitcli finetune DATA` "
            "(minutes)",
        )
    if net.labels is None and not net.is_regression:
        watch.warn(
            f"`{name}` has no class names, so output numbers are used; name them with "
            "`--labels FILE`"
        )
    return net, name
