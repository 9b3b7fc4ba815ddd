"""`vitcli predict`: images, folders, globs -> class names and probabilities."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any

from vitcli.config.recipe import load_inference
from vitcli.config.schema import Inference, Settings
from vitcli.data.augment.test_time import TTATransform
from vitcli.data.image_paths import Listing, find_images
from vitcli.devices import pick_device
from vitcli.errors import VitcliError
from vitcli.evals.predictor import Answers, Doubts
from vitcli.evals.resume_log import Journal, Tally, finished, journal
from vitcli.evals.writers import COLUMNS, Row, Tables
from vitcli.progress import Bar, Quiet, Watcher
from vitcli.weights.hashing import model_hash
from vitcli.weights.load import load_model, load_settings, newest_run, require_preprocess
from vitcli.weights.load_report import tell_load
from vitcli.weights.loaded import LoadedModel


class Predictions:
    """The rows, computed while one iterates over them, in the order of the images.

    Attributes:
        tally: what there was so far, with the rows of an interrupted run that is gone on with.
    """

    def __init__(self, rows: Iterator[Row], tally: Tally) -> None:
        self._rows = rows
        self.tally = tally

    def __iter__(self) -> Iterator[Row]:
        return self._rows

    @property
    def failed(self) -> int:
        """How many images could not be read, so far."""
        return self.tally.failed

    @property
    def exit_code(self) -> int:
        """3 when some images could not be read."""
        return 3 if self.failed else 0


def predict(
    images: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
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
    labels: str | os.PathLike[str] | Sequence[str] | None = None,
    settings: Settings | None = None,
) -> list[Row]:
    """Class names and probabilities of images: the rows of `vitcli predict --json`.

    Args:
        images: paths of images, folders or globs.
        model: MODEL, or one that is loaded; None takes the newest run with a trained head.
        top: how many classes in `top`.
        batch_size, precision, threshold, ood, ood_threshold, reference, tta, labels, settings: as
            in `run`.

    Returns:
        A dict for each image: `path`, `label`, `probability`, `top`, `error`; with a threshold
        `abstained`, with `ood` the keys `ood` and `ood_distance`.

    Raises:
        VitcliError: no such model, no trained head, or none of the images exists.
    """
    paths = [images] if isinstance(images, (str, os.PathLike)) else list(images)
    rows = run(
        paths,
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


def run(
    paths: Sequence[str | os.PathLike[str]],
    *,
    source: str | os.PathLike[str] | None = None,
    model: str | os.PathLike[str] | LoadedModel | None = None,
    settings: Settings | None = None,
    labels: str | os.PathLike[str] | Sequence[str] | None = None,
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
        paths: images, folders (with what lies in them), globs.
        source: a file with more of them, one a line or ended by NUL; `-` is stdin.
        model: MODEL, or one that is loaded; None takes the newest run with a trained head.
        settings: nested settings: `model.num_heads`, `preprocess.mean` …
        labels: class names of the model, or a file with one a line.
        top: how many classes in `top`; more than there are gives all.
        batch_size: images of one forward pass; as many more are decoded meanwhile.
        precision: `auto` is fp32.
        threshold: an image whose best probability lies below it gets no label: the row says
            `abstained`, and the guesses stay in `top`.
        ood: how strange an image is: the share of held-out training images whose features lie
            nearer to what the model knows (`vitcli.evals.ood`).
        ood_threshold: abstain from images with a larger share; implies `ood`.
        reference: DATA that is usual; implies `ood`. None takes what was kept of the last time,
            else the data that the run learned from.
        tta: average the probabilities of several views: `flip`, `crops:5` or `crops:10`, which
            take 2, 5 and 10 times as long.
        csv_file, jsonl_file, parquet_file: where the same table is written to, when the last row
            is taken; until then the rows are kept beside it, in a file that ends in `.part`.
        resume: go on with the rows of an interrupted run; these do not come again.
        verbose: tell what became of every tensor of the weights.

    Raises:
        VitcliError: no such model, no trained head, none of `paths` exists, a share that is none.
    """
    watch = watch or Quiet()
    if top < 1 or batch_size < 1:
        raise VitcliError(
            f"`--top` is {top}, `--batch-size` {batch_size}", "both are 1 or more, usually 5 and 32"
        )
    doubts = Doubts(threshold=threshold, ood_threshold=ood_threshold)
    tables = Tables(csv_file, jsonl_file, parquet_file)
    if resume and not tables.paths:
        raise VitcliError(
            "`--resume` goes on with a table, and none is given",
            "the first command again, with its `--csv`, `--jsonl` or `--parquet`",
        )
    if resume and finished(tables):
        watch.note(f"`{tables.paths[0]}`: already finished; without `--resume` it is made anew")
        return Predictions(iter(()), Tally())
    files = find_images(paths, source)
    inference = load_inference(settings)
    net, name = _classifier(model, inference, labels, watch, verbose)
    views = TTATransform(require_preprocess(net), tta)
    if ood or ood_threshold is not None or reference is not None:
        from vitcli.evals.ood import References  # loads what reads data sets

        references = References(net, name, inference.data, batch_size, precision, watch)
        found = references.get(None if reference is None else os.fspath(reference))
        doubts = replace(doubts, reference=found.to(pick_device()))
        _tell_few(doubts, watch)
    settled = {
        "model": model_hash(net) if tables.paths else None,
        "reference": dict(doubts.reference.facts) if doubts.reference else None,
        "top": top,
        "batch_size": batch_size,
        "precision": precision,
        "threshold": threshold,
        "ood_threshold": ood_threshold,
        "tta": tta,
    }
    net = net.to(pick_device())
    top = min(top, net.config.num_classes)
    answers = Answers(net, views, doubts, top, batch_size, precision)
    tally = Tally()
    return Predictions(_rows(answers, files, tables, settled, resume, tally, watch), tally)


def _rows(
    answers: Answers,
    files: Listing,
    tables: Tables,
    settled: Mapping[str, Any],
    resume: bool,
    tally: Tally,
    watch: Watcher,
) -> Iterator[Row]:
    """The rows that are not written yet, each written down before it is handed on."""
    with ExitStack() as stack:
        todo, again, book = iter(files), 0, None
        if tables.paths:
            book = stack.enter_context(journal(tables.paths[0], settled, tally, resume=resume))
            todo, again = book.after(files, answers.batch_size)
            stack.push(partial(_tell_kept, book, tally, watch))
            if resume:
                watch.note(f"{tally.count:,} rows are in `{book.path}` already")
        done = tally.count - again
        bar = stack.enter_context(watch.progress("images", files.total, done))
        if files.total is None and files.repeats:
            Thread(target=_count, args=(files, bar), daemon=True).start()
        made = answers.rows(todo, bar)
        stack.callback(made.close)
        for row in islice(made, again, None):
            if book is not None:
                book.add(row)
            tally.add(row)
            yield row
        if book is not None:
            tables.write(book.rows, [*COLUMNS, *answers.doubts.columns])
            book.remove()


def _tell_few(doubts: Doubts, watch: Watcher) -> None:
    """Warn of a share that too few images cannot tell: the largest of n lies nearer than a new
    one of the same kind once in n + 1 times.
    """
    share = doubts.ood_threshold
    if doubts.reference is None or share is None or share == 1:
        return
    count = len(doubts.reference.held_out)
    if count * (1 - share) < 1 - 1e-9:
        watch.warn(
            f"{count} held-out images are too few for `--ood-threshold {share:g}`: about one usual "
            f"image in {count + 1} will have no answer"
        )


def _count(files: Listing, bar: Bar) -> None:
    """Tell the bar how many there are; meanwhile the first ones are predicted."""
    with suppress(OSError, VitcliError):
        bar.extend(sum(1 for _ in files))


def _tell_kept(
    book: Journal, tally: Tally, watch: Watcher, kind: type[BaseException] | None, *_: object
) -> None:
    """On the way out of what was broken off: that nothing is lost."""
    if kind is not None and tally.count:
        watch.note(
            f"{tally.count:,} rows are kept in `{book.path}`; the same command with `--resume` "
            "goes on"
        )


def _classifier(
    model: str | os.PathLike[str] | LoadedModel | None,
    inference: Inference,
    labels: str | os.PathLike[str] | Sequence[str] | None,
    watch: Watcher,
    verbose: bool,
) -> tuple[LoadedModel, str]:
    """The model, in eval mode, and what it was called."""
    if isinstance(model, LoadedModel):
        net, name = model.eval(), "the model"
        name = net.load_report.source if net.load_report else name
    else:
        if model is None and inference.model.name is None:
            model = newest_run(classifier=True)
            watch.note(f"no `--model` given: {model}")
        name = os.fspath(model if model is not None else inference.model.name or "")
        arguments = load_settings(inference.model, inference.preprocess)
        net = load_model(name, labels=labels, watch=watch, **arguments)
        tell_load(net, watch, verbose=verbose)
    if not net.head_trained:
        raise VitcliError(
            f"`{name}` has no trained head, so there is nothing to predict",
            hint="give it one: `vitcli fewshot DATA` in seconds, `vitcli finetune DATA` in minutes",
        )
    if net.labels is None:
        watch.warn(f"`{name}` has no class names, so numbers stand for them; see `--labels FILE`")
    return net, name
