"""`vitcli fewshot`: a frozen representation -> n-shot accuracy, and a classifier for predict."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from numpy.typing import NDArray
from torch import nn

from vitcli.config import Inference, Settings, load_inference
from vitcli.data.sets import ImageSet, Source
from vitcli.data.sources import open_data
from vitcli.errors import VitcliError
from vitcli.evals.features import Extracted, extract, processes
from vitcli.evals.fewshot import draw, fit, fit_head
from vitcli.run import check_free, create_run, new_path, run_stem
from vitcli.vit import Model
from vitcli.watch import Quiet, Watcher
from vitcli.weights.fates import tell_load
from vitcli.weights.load import load_model, load_settings, newest_run
from vitcli.weights.store import save_model
from vitcli.weights.surgery import replace_head

DEFAULT_DATA = "builtin:digits"
MANY_TEST_IMAGES = 20_000  # beyond this the raw-pixel baseline would need gigabytes


@dataclass(frozen=True)
class Fewshot:
    """Accuracies in 0..1, one for each seed.

    Attributes:
        accuracies: shots -> accuracy of each seed.
        raw_pixels: the same protocol on the pixels that the model gets, or None where too large.
        raw_size: rows and columns of these pixels.
        run: the directory that holds the classifier of seed 0 and the most shots.
        broken: images that could not be read.
    """

    model: str
    data: str
    accuracies: dict[int, list[float]]
    raw_pixels: dict[int, list[float]] | None
    raw_size: tuple[int, int]
    l2: float
    dim: int
    classes: int
    test_images: int
    run: str
    broken: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """3 when some images could not be read."""
        return 3 if self.broken else 0

    def to_json(self) -> dict[str, Any]:
        """The object of `fewshot --json`; `std` is that of a sample."""
        return {
            "model": self.model,
            "data": self.data,
            "shots": _by_shots(self.accuracies, self.l2),
            "dim": self.dim,
            "classes": self.classes,
            "test_images": self.test_images,
            "raw_pixels": _by_shots(self.raw_pixels, self.l2) if self.raw_pixels else None,
            "raw_pixels_size": list(self.raw_size),
            "run": self.run,
            "unreadable": list(self.broken),
        }


def _by_shots(accuracies: dict[int, list[float]], l2: float) -> dict[str, Any]:
    return {
        str(shots): {
            "accuracy": {
                "mean": float(np.mean(seeds)),
                "std": float(np.std(seeds, ddof=1)) if len(seeds) > 1 else 0.0,
                "seeds": seeds,
            },
            "l2": l2,
        }
        for shots, seeds in accuracies.items()
    }


def run(
    data: str | None = None,
    *,
    model: str | None = None,
    settings: Settings | None = None,
    out: Path | None = None,
    batch_size: int = 128,
    precision: str = "auto",
    verbose: bool = False,
    watch: Watcher | None = None,
) -> Fewshot:
    """Measure a frozen model with few labelled images a class, and keep the classifier.

    big_vision's protocol (section 4.1 of the paper); see `vitcli.evals.fewshot`.

    Args:
        data: DATA with training and test images; None takes `builtin:digits`.
        model: MODEL; None takes the newest finished run.
        settings: nested settings: `fewshot.shots`, `.seeds`, `.l2`, `model.pool`, `preprocess.…`.
        out: the new run directory; None makes `runs/MODEL-fewshot`.
        batch_size: images of one forward pass.
        precision: `auto` is fp32.
        verbose: tell what became of every tensor of the weights.

    Raises:
        VitcliError: bad input; nothing is left half-written.
    """
    watch = watch or Quiet()
    inference = load_inference(settings)
    data = inference.data.name if data is None else data
    if data is None:
        data = DEFAULT_DATA
        watch.note(f"no DATA given: {data}")
    model = inference.model.name if model is None else model
    if model is None:
        model = newest_run(classifier=False)
        watch.note(f"no `--model` given: {model}")
    path = out or new_path(f"{run_stem(model)}-fewshot")
    check_free(path)
    source = _load(data, inference, watch)
    net = load_model(model, watch=watch, **load_settings(inference.model, inference.preprocess))
    for line in source.notes:
        watch.note(line)
    tell_load(net, watch, verbose=verbose)
    result = _measure(net, source, inference, path, batch_size, precision, watch)
    return replace(result, model=model, data=data)


def _load(data: str, inference: Inference, watch: Watcher) -> Source:
    source = open_data(inference.data, data, watch=watch)
    if source.multi_label:
        raise VitcliError(
            f"`fewshot` draws so many images of each class, and those of `{data}` have several",
            "`vitcli finetune` learns several labels an image",
        )
    source.split("train")
    source.split("test", "validation")
    return source


def _measure(
    net: Model,
    source: Source,
    inference: Inference,
    path: Path,
    batch_size: int,
    precision: str,
    watch: Watcher,
) -> Fewshot:
    section = inference.fewshot
    train, test = source.split("train"), source.split("test", "validation")
    num_classes, most = len(source.classes), max(section.shots)
    draws = {s: draw(train.labels, most, s, num_classes) for s in range(section.seeds)}
    _tell_short_classes(train, most, watch)
    # Only images that some seed draws are looked at; the draws are nested, so these are all.
    needed = np.unique(np.concatenate(list(draws.values())))

    def features(images: ImageSet, label: str) -> Extracted:
        return extract(
            net,
            images,
            batch_size=batch_size,
            precision=precision,
            with_pixels=len(test) <= MANY_TEST_IMAGES,
            watch=watch,
            label=label,
        )

    support = features(train.subset(needed), "images to learn from")
    tested = features(test, "test images")
    place = {int(needed[i]): row for row, i in enumerate(support.indices)}
    rows = {
        (shots, s): _rows(draw(train.labels, shots, s, num_classes), place)
        for shots in section.shots
        for s in draws
    }
    accuracies = _accuracies(support, tested, rows, num_classes, section.l2, pixels=False)
    raw = None
    if support.pixels is not None:
        raw = _accuracies(support, tested, rows, num_classes, section.l2, pixels=True)
    size = net.config.image_size
    result = Fewshot(
        model="",
        data=source.notation,
        accuracies=accuracies,
        raw_pixels=raw,
        raw_size=(min(size[0], 32), min(size[1], 32)),
        l2=section.l2,
        dim=support.outputs.shape[1],
        classes=num_classes,
        test_images=len(tested.labels),
        run=str(path),
        broken=support.broken + tested.broken,
    )
    chosen = rows[most, 0]
    weight, bias = fit_head(
        support.outputs[chosen], support.labels[chosen], num_classes, section.l2
    )
    if processes()[0] == 0:
        _keep(net, source, (weight, bias), inference, path, result)
    return result


def _tell_short_classes(train: ImageSet, most: int, watch: Watcher) -> None:
    counts = np.bincount(train.labels, minlength=len(train.classes))
    if short := [name for name, n in zip(train.classes, counts, strict=True) if n < most]:
        shown = ", ".join(short[:3]) + (" …" if len(short) > 3 else "")
        watch.warn(f"{len(short)} classes have fewer than {most} images; all are used: {shown}")


def _rows(chosen: NDArray[np.int64], place: dict[int, int]) -> list[int]:
    """Where the features of the drawn images stand; those that could not be read are left out."""
    return [place[int(i)] for i in chosen if int(i) in place]


def _accuracies(
    support: Extracted,
    tested: Extracted,
    rows: dict[tuple[int, int], list[int]],
    num_classes: int,
    l2: float,
    *,
    pixels: bool,
) -> dict[int, list[float]]:
    x, test_x = support.outputs, tested.outputs
    if pixels and support.pixels is not None and tested.pixels is not None:
        x, test_x = support.pixels, tested.pixels
    found: dict[int, list[float]] = {}
    for (shots, _), chosen in rows.items():
        ridge = fit(x[chosen], support.labels[chosen], num_classes, l2)
        correct = ridge.scores(test_x).argmax(axis=1) == tested.labels
        found.setdefault(shots, []).append(float(correct.mean()))
    return found


def _keep(
    net: Model,
    source: Source,
    head: Sequence[NDArray[np.float64]],
    inference: Inference,
    path: Path,
    result: Fewshot,
) -> None:
    """Write the classifier as a model with an ordinary head, in a run directory."""
    replace_head(net, source.classes, keep_pre_logits=True)
    assert isinstance(net.head, nn.Linear)
    with torch.no_grad():
        for parameter, value in zip((net.head.weight, net.head.bias), head, strict=True):
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(value)))
    net.head_trained = True
    recipe = {"command": "fewshot", **inference.model_dump(mode="json", exclude_none=True)}
    recipe["model"]["name"] = net.load_report.source if net.load_report else result.model
    recipe["data"]["name"] = source.notation
    made = create_run(path, tomli_w.dumps(recipe))
    made.write_provenance(
        {
            "model": net.load_report.provenance() if net.load_report else None,
            "data": {"name": source.notation, "fingerprint": source.fingerprint},
        }
    )
    save_model(made.weights_file, net.cpu())
    named = replace(result, model=recipe["model"]["name"])
    made.finish({"command": "fewshot", **named.to_json()})
