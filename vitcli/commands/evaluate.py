"""`vitcli evaluate`: a model on a whole labelled set: accuracy, calibration, confusion."""

import csv
import os
import tomllib
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitcli.config import Inference, Settings, load_inference
from vitcli.data.sets import ImageSet, Source
from vitcli.data.sources import open_data
from vitcli.errors import VitcliError
from vitcli.evals.features import extract, processes
from vitcli.evals.labels import LabelsEvaluation, evaluate_labels
from vitcli.evals.metrics import Metrics, confusion_matrix, measure, per_class
from vitcli.files import check_folder, replacing
from vitcli.run import Run, new_path, run_stem
from vitcli.sections import DataSection
from vitcli.vit import Model
from vitcli.watch import Quiet, Watcher
from vitcli.weights.fates import tell_load
from vitcli.weights.load import load_model, load_settings, newest_run
from vitcli.weights.surgery import match_classes

DEFAULT_DATA = "builtin:digits"
CONFUSION = "confusion.csv"
OTHER = "(another class)"
MOST_DRAWN = 100  # classes; a picture of more could not be read


@dataclass(frozen=True)
class Evaluation:
    """Figures over every readable image, each counted once.

    Attributes:
        metrics: over all classes that the model knows.
        top1_restricted: accuracy when only the data's classes can be answered.
        per_class: class name -> precision, recall, f1, images.
        confusion: (K, K) or (K, K + 1) counts, rows true; the last column of K + 1 is answers
            outside of the data's classes.
        confusion_file: the CSV that holds it; a picture lies beside it.
        broken: images that could not be read.
    """

    model: str
    data: str
    split: str
    metrics: Metrics
    top1_restricted: float
    per_class: dict[str, dict[str, float | int]]
    classes: tuple[str, ...]
    confusion: NDArray[np.int64]
    confusion_file: str
    broken: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """3 when some images could not be read."""
        return 3 if self.broken else 0

    def to_json(self) -> dict[str, Any]:
        """The object of `evaluate --json`."""
        return {
            "model": self.model,
            "data": self.data,
            "split": self.split,
            "images": self.metrics.images,
            "top1": self.metrics.top1,
            "top5": self.metrics.top5,
            "top1_restricted": self.top1_restricted,
            "loss": self.metrics.loss,
            "ece": self.metrics.ece,
            "per_class": self.per_class,
            "confusion": self.confusion_file,
            "unreadable": list(self.broken),
        }


def run(
    data: str | None = None,
    *,
    model: str | None = None,
    settings: Settings | None = None,
    labels: str | os.PathLike[str] | Sequence[str] | None = None,
    out: Path | None = None,
    batch_size: int = 128,
    precision: str = "auto",
    verbose: bool = False,
    watch: Watcher | None = None,
) -> Evaluation | LabelsEvaluation:
    """Run a model over a labelled set.

    Args:
        data: DATA; its `test` images, else its `validation` images, else all. None takes
            `builtin:digits`.
        model: MODEL with a trained head; None takes the newest run that has one.
        settings: nested settings: `model.num_heads`, `preprocess.mean`, `data.label_column` …
        labels: class names of the model, or a file with one a line.
        out: a folder for `confusion.csv` and `confusion.png`; None makes `runs/MODEL-evaluate`.
        batch_size: images of one forward pass.
        precision: `auto` is fp32, so that the figure is the same everywhere.
        verbose: tell what became of every tensor of the weights.

    Raises:
        VitcliError: bad input; a head that is not trained; classes that do not match by name.
    """
    watch = watch or Quiet()
    if out is not None:
        check_folder(out)
    inference = load_inference(settings)
    data = inference.data.name if data is None else data
    if data is None:
        data = DEFAULT_DATA
        watch.note(f"no DATA given: {data}")
    model = inference.model.name if model is None else model
    if model is None:
        model = newest_run(classifier=True)
        watch.note(f"no `--model` given: {model}")
    arguments = load_settings(inference.model, inference.preprocess)
    net = load_model(model, labels=labels, watch=watch, **arguments)
    if not net.head_trained:
        raise VitcliError(
            f"`{model}` has no trained head to evaluate",
            hint="train one with `vitcli finetune` or `vitcli fewshot`",
        )
    source, images = choose_images(data, model, inference, watch)
    for line in source.notes:
        watch.note(line)
    tell_load(net, watch, verbose=verbose)
    indices = align(net, source.classes, data, watch)
    watch.note(f"{len(images):,} {images.name} images of {data}")
    found = extract(
        net,
        images,
        what="logits",
        batch_size=batch_size,
        precision=precision,
        watch=watch,
        label="images",
    )
    known = np.array(indices)
    if images.targets is not None:
        return evaluate_labels(net, found, known, model, data, images, watch)
    if net.head_activation == "sigmoid":
        watch.note("loss and calibration are those of a softmax over the model's sigmoid outputs")
    restricted = found.outputs[:, known].argmax(axis=1) == found.labels
    place = np.full(net.config.num_classes, len(known))
    place[known] = np.arange(len(known))
    predicted = place[found.outputs.argmax(axis=1)]
    more = net.config.num_classes > len(known)
    confusion = confusion_matrix(found.labels, predicted, len(known) + more)[: len(known)]
    folder = out or new_path(f"{run_stem(model)}-evaluate")
    if processes()[0] == 0:
        write_confusion(folder, source.classes, confusion)
    return Evaluation(
        model=model,
        data=data,
        split=images.name,
        metrics=measure(found.outputs, known[found.labels]),
        top1_restricted=float(restricted.mean()),
        per_class=per_class(found.labels, predicted, source.classes),
        classes=source.classes,
        confusion=confusion,
        confusion_file=str(folder / CONFUSION),
        broken=found.broken,
    )


def choose_images(
    data: str, model: str, inference: Inference, watch: Watcher
) -> tuple[Source, ImageSet]:
    """The data's test images, else its validation images, else all of them.

    On a run that was trained on a part of the data: what the run had held out, split as the run's
    recipe says.
    """
    section = inference.data
    whole = open_data(section, data, whole=True, watch=watch, streams=True)
    if section.streaming:
        return whole, whole.split("test", "validation")
    run = Run(Path(model))
    if run.recipe_file.is_file():
        known = run.provenance().get("data", {}).get("fingerprint")
        for split in (section, _trained_on(run)):
            with suppress(VitcliError):  # the run's data may have other columns and splits
                source = open_data(split, data) if split is not None else whole
                if source.fingerprint == known:
                    return source, source.split("test", "validation", "train")
    if set(whole.splits) != {"train"}:
        return whole, whole.split("test", "validation")
    return whole, whole.split("train")


def _trained_on(run: Run) -> DataSection | None:
    """The `[data]` section of a run's recipe; None where it cannot be read."""
    try:
        return DataSection(**tomllib.loads(run.recipe_file.read_text(encoding="utf-8"))["data"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def align(net: Model, classes: tuple[str, ...], data: str, watch: Watcher) -> list[int]:
    """For each class of the data the output of the model that stands for it.

    Raises:
        VitcliError: they cannot be matched by name.
    """
    outputs = net.config.num_classes
    if net.labels is None:
        if outputs == len(classes):
            watch.note(f"the model has no class names: its {outputs} outputs in the data's order")
            return list(range(outputs))
        raise VitcliError(
            f"the model has {outputs} outputs without names, `{data}` has {len(classes)} classes",
            hint="name the outputs with `--labels FILE`, one class a line",
        )
    if (indices := match_classes(classes, net.labels)) is not None:
        return indices
    missing = [name for name in classes if match_classes([name], net.labels) is None]
    shown = ", ".join(f"`{name}`" for name in missing[:3])
    raise VitcliError(
        f"the model lacks {len(missing)} of the {len(classes)} classes of `{data}`: {shown}",
        hint=f"it knows {', '.join(f'`{n}`' for n in net.labels[:3])} …; other names for its "
        "outputs: `--labels FILE`, one class a line",
    )


def write_confusion(out: Path, classes: tuple[str, ...], confusion: NDArray[np.int64]) -> None:
    """`confusion.csv` and, for up to 100 classes, `confusion.png` in the folder `out`.

    Raises:
        VitcliError: they cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VitcliError(
            f"cannot make `{out}`: {error.strerror}", hint="choose another place with `--out`"
        ) from error
    columns = [*classes, OTHER][: confusion.shape[1]]
    path = out / CONFUSION
    with (
        replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *columns])
        for name, row in zip(classes, confusion.tolist(), strict=True):
            writer.writerow([name, *row])
    if len(classes) <= MOST_DRAWN:
        with replacing(out / "confusion.png") as temporary:
            _draw(temporary, classes, columns, confusion)


def _draw(
    path: Path, classes: tuple[str, ...], columns: list[str], confusion: NDArray[np.int64]
) -> None:
    from matplotlib.figure import Figure

    side = max(4.0, 0.35 * len(columns) + 2)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(columns)), columns, rotation=90)
    axes.set_yticks(range(len(classes)), classes)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(columns) <= 20:
        for (i, j), count in np.ndenumerate(confusion):
            if count:
                colour = "white" if shares[i, j] > 0.5 else "black"
                axes.text(j, i, str(count), ha="center", va="center", color=colour, fontsize=7)
    figure.colorbar(picture, ax=axes, label="share of the true class", shrink=0.7)
    with warnings.catch_warnings(action="ignore"):  # a script that the font does not have
        figure.savefig(path, format="png", dpi=120)
