"""Predict classes or numbers of images: decode ahead, run the model in batches, keep the order."""

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitcli.data.augment.test_time import TTATransform
from vitcli.decode import ImageError
from vitcli.devices import pick_device
from vitcli.errors import VitcliError
from vitcli.evals.features import autocast, check_finite
from vitcli.evals.ood import OODReference
from vitcli.evals.writers import LABELS_COLUMN, PredictionRow
from vitcli.preprocess import AnyImage
from vitcli.progress import Bar, QuietBar
from vitcli.weights.loaded import LoadedModel

MAX_THREADS = 16  # limits the memory of images that are being decoded

TopClasses = list[dict[str, Any]]


@dataclass(frozen=True)
class AbstainRules:
    """When an image gets no label.

    Attributes:
        threshold: lowest probability of a label, 0..1; None always gives a label.
        reference: in-distribution features; None computes no OOD score.
        ood_threshold: highest OOD score of a labelled image, 0..1; None only reports the score.
    """

    threshold: float | None = None
    reference: OODReference | None = None
    ood_threshold: float | None = None

    def __post_init__(self) -> None:
        for flag, value in (
            ("--threshold", self.threshold),
            ("--ood-threshold", self.ood_threshold),
        ):
            if value is not None and not 0 <= value <= 1:
                raise VitcliError(f"`{flag}` is {value}", "give a number from 0 to 1")

    @property
    def can_abstain(self) -> bool:
        """True if an image may get no label."""
        return self.threshold is not None or self.ood_threshold is not None

    @property
    def columns(self) -> list[str]:
        """The columns that these rules add to a row."""
        columns = ["abstained"] if self.can_abstain else []
        return columns + (["ood", "ood_distance"] if self.reference is not None else [])

    def apply(self, row: PredictionRow, ood: float | None, distance: float | None) -> PredictionRow:
        """Add the columns to a row, and remove its label if the image is rejected.

        The classes stay in `top`. `error` stays None: only unreadable images have an error.
        """
        if self.can_abstain and row["error"] is None:
            # `not >=` and not `<`: a probability that is NaN must not become a label.
            unsure = self.threshold is not None and not row["probability"] >= self.threshold
            far = self.ood_threshold is not None and not (ood or 0.0) <= self.ood_threshold
            row["abstained"] = unsure or far
            row["label"] = None if row["abstained"] else row["label"]
        elif self.can_abstain:
            row["abstained"] = False
        if self.reference is not None:
            row |= {"ood": ood, "ood_distance": distance}
        return row


@dataclass(frozen=True)
class ImagePredictor:
    """Makes one row for each image file.

    Args:
        net: a classifier or a regression in eval mode.
        transform: makes the views of each image; their probabilities or numbers are averaged.
        rules: when an image gets no label.
        top: number of classes in `top`.
        batch_size: images per forward pass.
        precision: `auto` is fp32.
    """

    net: LoadedModel
    transform: TTATransform
    rules: AbstainRules
    top: int = 5
    batch_size: int = 32
    precision: str = "auto"

    def rows(
        self, files: Iterable[AnyImage], bar: Bar | None = None
    ) -> Generator[PredictionRow, None, None]:
        """One row per file, in order; an unreadable image has its reason in `error`.

        The composition of a batch depends only on positions. A part of the files that starts at
        a multiple of the batch size gives the same rows as all files do.
        """
        bar = bar or QuietBar()
        for batch in self._decoded_batches(files):
            pixels = [image for _, image in batch if isinstance(image, Tensor)]
            if self.net.is_regression:
                yield from self._number_rows(batch, pixels)
                bar.advance(len(batch))
                continue
            predicted = iter(self._predict_batch(torch.stack(pixels)) if pixels else [])
            for path, image in batch:
                if isinstance(image, Tensor):
                    top, labels, ood, distance = next(predicted)
                    row: PredictionRow = {"path": path, **top[0], "top": top, "error": None}
                    row |= {} if labels is None else {LABELS_COLUMN: labels}
                    yield self.rules.apply(row, ood, distance)
                else:
                    empty: PredictionRow = {
                        "path": path,
                        "label": None,
                        "probability": None,
                        "top": [],
                        **({} if self.net.thresholds is None else {LABELS_COLUMN: None}),
                    }
                    yield self.rules.apply({**empty, "error": image}, None, None)
            bar.advance(len(batch))

    def _number_rows(
        self, batch: list[tuple[str | None, Tensor | str]], pixels: list[Tensor]
    ) -> Iterator[PredictionRow]:
        """A row with `value` for each image: the mean of its views."""
        values = iter(self._predict_numbers(torch.stack(pixels)) if pixels else [])
        for path, image in batch:
            readable = isinstance(image, Tensor)
            value = next(values) if readable else None
            yield {"path": path, "value": value, "error": None if readable else image}

    def _predict_numbers(self, pixels: Tensor) -> list[float]:
        """(B, crops, C, Y, X) uint8 -> the number of each image."""
        device, net = pick_device(), self.net
        total = torch.zeros(len(pixels), dtype=torch.float64)
        for view in self.transform.views(pixels.to(device)):  # (B, C, Y, X)
            with torch.inference_mode(), autocast(self.precision, device):
                outputs = net.network(self.transform.preprocess.normalize(view))  # (B, 1)
            total += net.target_scale.restore(outputs)[:, 0].cpu()
        check_finite(bool(total.isfinite().all()), net)
        values: list[float] = (total / self.transform.count).tolist()
        return values

    def _predict_batch(
        self, pixels: Tensor
    ) -> list[tuple[TopClasses, list[str] | None, float | None, float | None]]:
        """(B, crops, C, Y, X) uint8 -> top classes, labels, OOD score and distance of each image.

        The labels are the classes that reach their threshold; None for a model without thresholds.
        """
        device = pick_device()
        preprocess, net, reference = self.transform.preprocess, self.net, self.rules.reference
        total: Tensor | None = None
        distances = None
        for view in self.transform.views(pixels.to(device)):  # (B, C, Y, X)
            with torch.inference_mode(), autocast(self.precision, device):
                features = net.features(preprocess.normalize(view))  # (B, F)
                probabilities = net.probabilities(net.network.classify(features))  # (B, K)
            if total is None and reference is not None:
                # The first view is the plain one, as for the features of the reference.
                distances = reference.distances(features)
            total = probabilities if total is None else total + probabilities
        assert total is not None
        # Average probabilities, not logits: a view with large logits would decide alone.
        mean = (total / self.transform.count).cpu()  # (B, K)
        values, order = mean.topk(self.top, dim=1)
        check_finite(bool(values.isfinite().all()), net)
        names = net.labels or tuple(str(i) for i in range(net.config.num_classes))
        top_classes = [
            [{"label": names[i], "probability": p} for i, p in zip(*pair, strict=True)]
            for pair in zip(order.tolist(), values.tolist(), strict=True)
        ]
        nothing: list[Any] = [None] * len(mean)
        labels, scores, far = nothing, nothing, nothing
        # In float64, as in the fit: a threshold lies midway between two probabilities.
        if net.thresholds is not None:
            reached = mean >= torch.tensor(net.thresholds, dtype=mean.dtype)
            labels = [[names[i] for i in row.nonzero()[:, 0].tolist()] for row in reached]
        if distances is not None and reference is not None:
            scores, far = reference.scores(distances).tolist(), distances.tolist()
        return list(zip(top_classes, labels, scores, far, strict=True))

    def _decoded_batches(
        self, files: Iterable[AnyImage]
    ) -> Iterator[list[tuple[str | None, Tensor | str]]]:
        """Batches of (path, (crops, C, Y, X) uint8 or the reason why it cannot be read)."""

        def read(file: AnyImage) -> Tensor | str:
            try:
                return self.transform.pixels(file)
            except ImageError as error:
                return error.reason

        # Threads decode the next batch while the model runs: PIL releases the GIL. Two batches
        # are the limit, so that memory does not grow with the number of files.
        waiting: deque[tuple[str | None, Future[Tensor | str]]] = deque()
        rest = iter(files)
        with ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_THREADS)) as pool:
            try:
                while True:
                    while len(waiting) < 2 * self.batch_size:
                        if (file := next(rest, None)) is None:
                            break
                        waiting.append((_path_of(file), pool.submit(read, file)))
                    if not waiting:
                        return
                    count = min(self.batch_size, len(waiting))
                    ready = [waiting.popleft() for _ in range(count)]
                    yield [(name, future.result()) for name, future in ready]
            finally:
                pool.shutdown(cancel_futures=True)


def _path_of(image: AnyImage) -> str | None:
    """The path or URL of an image; None for one in memory that has none."""
    if isinstance(image, str):
        return image
    name = getattr(image, "filename", None) or getattr(image, "name", None)
    return name if isinstance(name, str) else None
