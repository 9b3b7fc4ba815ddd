"""`vitcli fewshot`: a frozen representation -> n-shot accuracy, and a classifier for predict."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from torch import nn

from vitcli.config.recipe import load_inference
from vitcli.config.schema import FewshotSection, Inference, Settings
from vitcli.data.image_set import Source
from vitcli.data.source import open_data
from vitcli.errors import VitcliError
from vitcli.evals.feature_cache import Features
from vitcli.evals.features import Extracted, rank_and_world_size
from vitcli.evals.fewshot.classifiers import Head, Shots, draw_all, fit_all
from vitcli.evals.fewshot.protocol import Choice
from vitcli.progress import Quiet, Watcher
from vitcli.run import check_free, create_run, new_path, run_stem
from vitcli.weights.edit import replace_head
from vitcli.weights.feature_layers import represent
from vitcli.weights.load import load_model, load_settings, newest_run
from vitcli.weights.load_report import tell_load
from vitcli.weights.loaded import LoadedModel
from vitcli.weights.store import save_model

DEFAULT_DATA = "builtin:digits"
# Beyond so many images to test, or to learn from, the raw-pixel baseline would need gigabytes, or
# longer than the model.
MANY_TEST_IMAGES = 20_000
MANY_IMAGES = 2_000


@dataclass(frozen=True)
class Fewshot:
    """Accuracies in 0..1, one for each seed.

    Attributes:
        accuracies: shots -> accuracy of each seed; one where all images are taken.
        raw_pixels: the same protocol on the pixels that the model gets, or None where too large.
        raw_size: rows and columns of these pixels.
        l2: what was asked for: a strength, `auto` or `path`; None where the method has none.
        strengths: shots -> strength of each seed.
        choices: shots -> how each seed chose its strength; empty where it was given.
        paths: shots -> accuracy of each strength, a list with one for each seed; for `path`.
        run: the directory that holds the classifier of seed 0 and the most shots; None of a method
            that makes none.
        broken: images that could not be read.
    """

    model: str
    data: str
    method: str
    representation: str
    accuracies: dict[Shots, list[float]]
    raw_pixels: dict[Shots, list[float]] | None
    raw_size: tuple[int, int]
    l2: float | str | None
    dim: int
    classes: int
    test_images: int
    run: str | None
    strengths: dict[Shots, list[float]] = field(default_factory=dict)
    choices: dict[Shots, list[Choice]] = field(default_factory=dict)
    paths: dict[Shots, list[list[float]]] = field(default_factory=dict)
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
            "method": self.method,
            "representation": self.representation,
            "shots": {
                str(shots): {
                    "accuracy": _spread(seeds),
                    "l2": self.strengths[shots] if isinstance(self.l2, str) else self.l2,
                    **({"path": self._path(shots)} if shots in self.choices else {}),
                }
                for shots, seeds in self.accuracies.items()
            },
            "dim": self.dim,
            "classes": self.classes,
            "test_images": self.test_images,
            "raw_pixels": self._raw(),
            "raw_pixels_size": list(self.raw_size),
            "run": self.run,
            "unreadable": list(self.broken),
        }

    def _raw(self) -> dict[str, Any] | None:
        if self.raw_pixels is None:
            return None
        return {
            str(shots): {"accuracy": _spread(seeds), "l2": self.l2}
            for shots, seeds in self.raw_pixels.items()
        }

    def _path(self, shots: Shots) -> dict[str, Any]:
        """Of each strength the accuracy on images left out, by seed, and for `path` on the test."""
        choices = self.choices[shots]
        left_out = [c.accuracies for c in choices]
        return {
            "l2": list(choices[0].strengths),
            "left_out_accuracy": [None if a is None else a.tolist() for a in left_out],
            "left_out_images": [c.images for c in choices],
            "accuracy": [_spread(seeds) for seeds in self.paths.get(shots, [])],
        }


def _spread(seeds: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": float(np.mean(seeds)),
        "std": float(np.std(seeds, ddof=1)) if len(seeds) > 1 else 0.0,
        "seeds": list(seeds),
    }


def run(
    data: str | None = None,
    *,
    model: str | None = None,
    settings: Settings | None = None,
    out: Path | None = None,
    batch_size: int = 128,
    precision: str = "auto",
    cache: bool = True,
    verbose: bool = False,
    watch: Watcher | None = None,
) -> Fewshot:
    """Measure a frozen model with few labelled images a class, and keep the classifier.

    big_vision's protocol (section 4.1 of the paper), or another method; see `FewshotSection`.

    Args:
        data: DATA with training and test images; None takes `builtin:digits`.
        model: MODEL; None takes the newest finished run.
        settings: nested settings: `fewshot.shots`, `.method`, `.l2`, `.representation` …,
            `model.pool`, `preprocess.…`.
        out: the new run directory; None makes `runs/MODEL-fewshot`.
        batch_size: images of one forward pass.
        precision: `auto` is fp32.
        cache: whether features that were computed before are used, and new ones kept.
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
    path = _place(out, model, inference.fewshot)
    source = _load(data, inference, watch)
    net = load_model(model, watch=watch, **load_settings(inference.model, inference.preprocess))
    represent(net, inference.fewshot.representation)
    for line in source.notes:
        watch.note(line)
    tell_load(net, watch, verbose=verbose)
    about = {"model": model, "representation": inference.fewshot.representation, "of": data}
    features = Features(net, source.fingerprint, about, batch_size, precision, cache, watch)
    result, head = _measure(features, source, inference.fewshot, watch)
    result = replace(result, model=model, data=data, run=None if path is None else str(path))
    if path is not None and head is not None and rank_and_world_size()[0] == 0:
        _keep(net, source, head, inference, path, result)
    return result


def _place(out: Path | None, model: str, section: FewshotSection) -> Path | None:
    """Where the classifier will be kept; None for a method that makes none."""
    if section.method == "knn":
        if out is not None:
            raise VitcliError(
                "nearest neighbours are no classifier that a model could hold: nothing to keep",
                "leave `--out` out; the methods ridge, logistic and mean make one",
            )
        return None
    path = out or new_path(f"{run_stem(model)}-fewshot")
    check_free(path)
    return path


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
    features: Features, source: Source, section: FewshotSection, watch: Watcher
) -> tuple[Fewshot, Head | None]:
    """The figures, and the head of seed 0 and the most shots."""
    train, test = source.split("train"), source.split("test", "validation")
    draws = draw_all(train, section, len(source.classes), watch)
    # Only images that some seed draws are looked at.
    needed = np.unique(np.concatenate(list(draws.values())))
    with_pixels = _has_baseline(section, len(test), max(map(len, draws.values())))
    support, tested = (
        features.of(images, rows, label=label, with_pixels=with_pixels)
        for images, rows, label in (
            (train, needed, "images to learn from"),
            (test, np.arange(len(test)), "test images"),
        )
    )
    features.tell_kept()
    found = fit_all(support, tested, draws, len(source.classes), section, watch)
    raw: dict[Shots, list[float]] | None = None
    if with_pixels:
        raw = fit_all(
            _pixels(support), _pixels(tested), draws, len(source.classes), section, Quiet()
        ).accuracies
    size = features.model.config.image_size
    result = Fewshot(
        model="",
        data=source.notation,
        method=section.method,
        representation=section.representation,
        accuracies=found.accuracies,
        raw_pixels=raw,
        raw_size=(min(size[0], 32), min(size[1], 32)),
        l2=section.l2 if isinstance(section.l2, str) else found.l2,
        dim=support.outputs.shape[1],
        classes=len(source.classes),
        test_images=len(tested.labels),
        run=None,
        strengths=found.strengths,
        choices=found.choices,
        paths=found.paths,
        broken=support.broken + tested.broken,
    )
    return result, found.head


def _has_baseline(section: FewshotSection, tested: int, learned: int) -> bool:
    few = tested <= MANY_TEST_IMAGES and learned <= MANY_IMAGES
    return few and section.method != "logistic"  # hours, on so many and such numbers


def _pixels(extracted: Extracted) -> Extracted:
    """The same images with their pixels as features."""
    assert extracted.pixels is not None
    return replace(extracted, outputs=extracted.pixels)


def _keep(
    net: LoadedModel,
    source: Source,
    head: Head,
    inference: Inference,
    path: Path,
    result: Fewshot,
) -> None:
    """Write the classifier as a model with an ordinary head, in a run directory."""
    replace_head(net, source.classes, keep_pre_logits=True)
    layer = net.network.head
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        for parameter, value in zip((layer.weight, layer.bias), head, strict=True):
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
    save_model(made.weights_file, net.to("cpu"))
    named = replace(result, model=recipe["model"]["name"])
    made.finish({"command": "fewshot", **named.to_json()})
