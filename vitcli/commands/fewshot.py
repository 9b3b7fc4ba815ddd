"""`vitcli fewshot`: few-shot accuracy of a frozen model, and a classifier that predict can use."""

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
from vitcli.data.sample_range import with_window
from vitcli.data.source import Source
from vitcli.devices import pick_device
from vitcli.errors import VitcliError
from vitcli.evals.feature_cache import CachedFeatures
from vitcli.evals.features import MAX_PIXEL_SIDE, Extracted, rank_and_world_size
from vitcli.evals.fewshot.classifiers import Head, Shots, draw_all, evaluate_draws
from vitcli.evals.fewshot.methods import METHODS, check_method
from vitcli.evals.fewshot.ridge import L2Choice
from vitcli.evals.held_out import open_known
from vitcli.evals.intervals import wilson_interval
from vitcli.evals.near_copies import warn_of_copies
from vitcli.progress import Quiet, Watcher
from vitcli.run import check_free, new_output, new_run, run_stem
from vitcli.weights.edit import replace_head
from vitcli.weights.feature_layers import set_representation
from vitcli.weights.load import load_model, load_settings, newest_run
from vitcli.weights.load_report import note_load_report
from vitcli.weights.loaded import LoadedModel
from vitcli.weights.store import save_model

DEFAULT_DATA = "builtin:digits"
# With more images, the raw-pixel baseline takes gigabytes, or longer than the model.
MAX_PIXEL_TEST_IMAGES = 20_000
MAX_PIXEL_TRAIN_IMAGES = 2_000


@dataclass(frozen=True)
class FewshotResult:
    """Accuracies in 0..1, one for each seed.

    Attributes:
        accuracies: shots -> accuracy of each seed; one accuracy for `all`.
        raw_pixels: the same for raw pixels instead of features; None if that is too large.
        raw_size: rows and columns of the raw pixels.
        l2: the setting: a number, `auto` or `path`; None if the method has none.
        l2_values: shots -> l2 of each seed.
        choices: shots -> how each seed chose l2; empty if l2 was given.
        paths: shots -> accuracies of each candidate of l2, one per seed, for `l2 = path`.
        run: run directory with the classifier of seed 0 and the most shots, or None.
        broken: descriptions of the images that could not be read.
        split: the split of the `test_images`: `test`, or `validation` if the data have no other.
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
    l2_values: dict[Shots, list[float]] = field(default_factory=dict)
    choices: dict[Shots, list[L2Choice]] = field(default_factory=dict)
    paths: dict[Shots, list[list[float]]] = field(default_factory=dict)
    broken: tuple[str, ...] = ()
    split: str = "test"

    def to_json(self) -> dict[str, Any]:
        """The object of `fewshot --json`.

        `std` is the sample standard deviation over the draws of the shots; `interval` is that of
        the mean over test images.
        """
        shots_json: dict[str, Any] = {}
        for shots, seeds in self.accuracies.items():
            l2 = self.l2_values[shots] if isinstance(self.l2, str) else self.l2
            accuracy = self._accuracy_json(seeds)
            shots_json[str(shots)] = {"accuracy": accuracy, "split": self.split, "l2": l2}
            if shots in self.choices:
                shots_json[str(shots)]["path"] = self._path_json(shots)
        raw_json = None
        if self.raw_pixels is not None:
            raw_json = {
                str(shots): {
                    "accuracy": self._accuracy_json(seeds),
                    "split": self.split,
                    "l2": self.l2,
                }
                for shots, seeds in self.raw_pixels.items()
            }
        return {
            "model": self.model,
            "data": self.data,
            "method": self.method,
            "representation": self.representation,
            "shots": shots_json,
            "dim": self.dim,
            "classes": self.classes,
            "split": self.split,
            "test_images": self.test_images,
            "raw_pixels": raw_json,
            "raw_pixels_size": list(self.raw_size),
            "run": self.run,
            "unreadable": list(self.broken),
        }

    def _path_json(self, shots: Shots) -> dict[str, Any]:
        choices = self.choices[shots]
        left_out = [c.accuracies for c in choices]
        return {
            "l2": list(choices[0].candidates),
            "left_out_accuracy": [None if a is None else a.tolist() for a in left_out],
            "left_out_images": [c.images for c in choices],
            "accuracy": [self._accuracy_json(seeds) for seeds in self.paths.get(shots, [])],
        }

    def _accuracy_json(self, seeds: Sequence[float]) -> dict[str, Any]:
        mean = float(np.mean(seeds))
        std = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else 0.0
        interval = list(wilson_interval(mean, self.test_images))
        return {"mean": mean, "std": std, "seeds": list(seeds), "interval": interval}


def run(
    data: str | None = None,
    *,
    model: str | None = None,
    settings: Settings | None = None,
    out: Path | None = None,
    batch_size: int = 128,
    precision: str = "auto",
    cache: bool = True,
    check: bool = True,
    verbose: bool = False,
    watch: Watcher | None = None,
) -> FewshotResult:
    """Measure a frozen model with few labelled images per class, and store the classifier.

    The default is the protocol of section 4.1 of the paper; see `FewshotSection` for others.

    Args:
        data: DATA with training and test images; None uses `builtin:digits`.
        model: MODEL; None uses the newest finished run.
        settings: nested settings: `fewshot.shots`, `.method`, `.l2`, `.representation` …,
            `model.pool`, `preprocess.…`.
        out: new run directory; None makes `runs/MODEL-fewshot`.
        batch_size: images per forward pass.
        precision: `auto` is fp32.
        cache: read and write the feature cache.
        check: look for near copies between the splits, see `warn_of_copies`.
        verbose: report how each tensor was loaded.

    Raises:
        VitcliError: bad input.
    """
    watch = watch or Quiet()
    inference = load_inference(settings)
    check_method(inference.fewshot)
    data = inference.data.name if data is None else data
    if data is None:
        data = DEFAULT_DATA
        watch.note(f"no DATA given: using {data}")
    model = inference.model.name if model is None else model
    if model is None:
        model = newest_run(classifier=False)
        watch.note(f"no `--model` given: using {model}")
    _check_out(out, inference.fewshot)
    net = load_model(model, watch=watch, **load_settings(inference.model, inference.preprocess))
    source = _open(data, net, inference, watch)
    if net.preprocess is not None:
        net.preprocess = with_window(net.preprocess, source.split("train"), watch)
    set_representation(net, inference.fewshot.representation)
    source.tell(watch)
    if check and rank_and_world_size()[0] == 0:
        warn_of_copies(source, watch, cached=cache)
    note_load_report(net, watch, verbose=verbose, new_head=True)
    about = {"model": model, "representation": inference.fewshot.representation, "of": data}
    features = CachedFeatures(net, source.fingerprint, about, batch_size, precision, cache, watch)
    result, head = _measure(features, source, inference.fewshot, watch)
    result = replace(result, model=model, data=data)
    if head is None:
        return result
    with new_output(out, f"{run_stem(model)}-fewshot") as path:
        result = replace(result, run=str(path))
        if rank_and_world_size()[0] == 0:
            _store(net, source, head, inference, path, result)
    return result


def _check_out(out: Path | None, section: FewshotSection) -> None:
    """Check before the work that the classifier can be stored in `out`."""
    if not METHODS[section.method].has_head:
        if out is not None:
            storable = ", ".join(name for name, method in METHODS.items() if method.has_head)
            raise VitcliError(
                f"`--method {section.method}` has no classifier that `--out` could store",
                f"remove `--out`, or use one of the methods {storable}",
            )
    elif out is not None:
        check_free(out)


def _open(data: str, net: LoadedModel, inference: Inference, watch: Watcher) -> Source:
    source = open_known(inference.data, data, net, watch)
    if source.multi_label:
        raise VitcliError(
            f"`fewshot` needs one label per image, and the images of `{data}` are multi-label",
            "train on multi-label images with `vitcli finetune`",
        )
    source.split("train")
    source.split("test", "validation")
    return source


def _measure(
    features: CachedFeatures, source: Source, section: FewshotSection, watch: Watcher
) -> tuple[FewshotResult, Head | None]:
    """The accuracies, and the head of seed 0 and the most shots."""
    train, test = source.split("train"), source.split("test", "validation")
    draws = draw_all(train, section, len(source.classes), watch)
    most = max(map(len, draws.values()))
    with_pixels = METHODS[section.method].pixel_baseline and (
        len(test) <= MAX_PIXEL_TEST_IMAGES and most <= MAX_PIXEL_TRAIN_IMAGES
    )
    needed = np.unique(np.concatenate(list(draws.values())))  # other images are not read
    learned, tested = (
        features.extract(images, rows, label=label, with_pixels=with_pixels)
        for images, rows, label in (
            (train, needed, "training images"),
            (test, np.arange(len(test)), "test images"),
        )
    )
    features.report()
    found = evaluate_draws(learned, tested, draws, len(source.classes), section, watch)
    raw: dict[Shots, list[float]] | None = None
    if with_pixels:
        pixels = _as_features(learned), _as_features(tested)
        raw = evaluate_draws(*pixels, draws, len(source.classes), section, Quiet()).accuracies
    rows, columns = (min(side, MAX_PIXEL_SIDE) for side in features.model.config.image_size)
    result = FewshotResult(
        model="",
        data=source.notation,
        method=section.method,
        representation=section.representation,
        accuracies=found.accuracies,
        raw_pixels=raw,
        raw_size=(rows, columns),
        l2=section.l2 if isinstance(section.l2, str) else found.l2,
        dim=learned.outputs.shape[1],
        classes=len(source.classes),
        test_images=len(tested.labels),
        run=None,
        l2_values=found.l2_values,
        choices=found.choices,
        paths=found.paths,
        broken=learned.broken + tested.broken,
        split=test.name,
    )
    return result, found.head


def _as_features(extracted: Extracted) -> Extracted:
    """The same images with their pixels as features."""
    assert extracted.pixels is not None
    return replace(extracted, outputs=extracted.pixels)


def _store(
    net: LoadedModel,
    source: Source,
    head: Head,
    inference: Inference,
    path: Path,
    result: FewshotResult,
) -> None:
    """Write the model with the classifier as its head into a run directory."""
    # The features already went through the pre-logits layer, so the new head goes behind it.
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
    named = replace(result, model=recipe["model"]["name"])
    # The directory appears with all its files, so that a killed command can be repeated.
    with new_run(path) as run:
        run.write_recipe(tomli_w.dumps(recipe))
        run.write_provenance(
            {
                "model": net.load_report.provenance() if net.load_report else None,
                "data": {"name": source.notation, "fingerprint": source.fingerprint},
                "device": str(pick_device()),
            }
        )
        save_model(run.weights_file, net.to("cpu"))
        run.finish({"command": "fewshot", **named.to_json()})
