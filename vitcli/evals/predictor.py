"""From paths of images to rows: names, probabilities, doubts; decoded ahead, in order."""

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
from vitcli.evals.ood import Reference
from vitcli.evals.writers import Row
from vitcli.progress import Bar, QuietBar
from vitcli.weights.loaded import LoadedModel

MAX_THREADS = 16


@dataclass(frozen=True)
class Doubts:
    """When a model says nothing rather than something wrong.

    Attributes:
        threshold: the least probability of an answer, 0..1; None answers always.
        reference: features of images that are like those the model learned from; None does not
            look for outliers.
        ood_threshold: the largest share of such images, 0..1, that may lie nearer than an image
            that is answered; None only tells the share.

    Raises:
        VitcliError: a share that is none.
    """

    threshold: float | None = None
    reference: Reference | None = None
    ood_threshold: float | None = None

    def __post_init__(self) -> None:
        for flag, value in (
            ("--threshold", self.threshold),
            ("--ood-threshold", self.ood_threshold),
        ):
            if value is not None and not 0 <= value <= 1:
                raise VitcliError(f"`{flag}` is {value}", "it lies between 0 and 1")

    @property
    def abstains(self) -> bool:
        """Whether there may be images without an answer."""
        return self.threshold is not None or self.ood_threshold is not None

    @property
    def columns(self) -> list[str]:
        """What a row has besides the usual."""
        found = ["abstained"] if self.abstains else []
        return found + (["ood", "ood_distance"] if self.reference is not None else [])

    def noted(self, row: Row, ood: float | None, distance: float | None) -> Row:
        """The row with what is doubtful about it; without its label where that is too much.

        The guesses stay in `top`, and `error` stays null: that alone tells an image that could not
        be read. Not a number, a probability is no answer either.
        """
        if self.abstains and row["error"] is None:
            unsure = self.threshold is not None and not row["probability"] >= self.threshold
            far = self.ood_threshold is not None and not (ood or 0.0) <= self.ood_threshold
            row["abstained"] = unsure or far
            row["label"] = None if row["abstained"] else row["label"]
        elif self.abstains:
            row["abstained"] = False
        if self.reference is not None:
            row |= {"ood": ood, "ood_distance": distance}
        return row


@dataclass(frozen=True)
class Answers:
    """Makes rows of images.

    Args:
        net: a classifier, in eval mode.
        views: what it is shown of each image; their probabilities are averaged.
        doubts: when it abstains.
        top: how many classes in `top`.
        batch_size: images of one forward pass; as many more are decoded meanwhile.
        precision: `auto` is fp32.
    """

    net: LoadedModel
    views: TTATransform
    doubts: Doubts
    top: int = 5
    batch_size: int = 32
    precision: str = "auto"

    def rows(self, files: Iterable[str], bar: Bar | None = None) -> Generator[Row, None, None]:
        """One row a file, in order; an image that cannot be read has its reason in `error`.

        Which images share a batch depends on their places alone: from a place that the batch size
        divides, a part of the files gives the rows that all of them give.
        """
        bar = bar or QuietBar()
        for batch in self._decoded(files):
            pixels = [image for _, image in batch if isinstance(image, Tensor)]
            known = iter(self._batch(torch.stack(pixels)) if pixels else [])
            for file, image in batch:
                if isinstance(image, Tensor):
                    yield self._row(file, *next(known))
                else:
                    yield self.doubts.noted(_unread(file, image), None, None)
            bar.advance(len(batch))

    def _row(
        self, path: str, top: list[dict[str, Any]], ood: float | None, distance: float | None
    ) -> Row:
        row: Row = {"path": path, **top[0], "top": top, "error": None}
        return self.doubts.noted(row, ood, distance)

    def _batch(
        self, pixels: Tensor
    ) -> list[tuple[list[dict[str, Any]], float | None, float | None]]:
        """(B, crops, C, Y, X) uint8 -> for each image its best classes, and how far off it lies."""
        device = pick_device()
        preprocess, net = self.views.preprocess, self.net
        shares: Tensor | None = None
        distances = None
        for view in self.views.views(pixels.to(device)):  # (B, C, Y, X)
            with torch.inference_mode(), autocast(self.precision, device):
                features = net.features(preprocess.normalize(view))  # (B, F)
                logits = net.network.classify(features)  # (B, K)
                found = net.probabilities(logits)  # (B, K)
            if shares is None and self.doubts.reference is not None:
                distances = self.doubts.reference.distances(features)
            shares = found if shares is None else shares + found
        assert shares is not None
        values, order = (shares / self.views.count).cpu().topk(self.top, dim=1)
        check_finite(bool(values.isfinite().all()), net)
        names = net.labels or tuple(str(i) for i in range(net.config.num_classes))
        best = [
            [{"label": names[i], "probability": p} for i, p in zip(*pair, strict=True)]
            for pair in zip(order.tolist(), values.tolist(), strict=True)
        ]
        if distances is None or self.doubts.reference is None:
            return [(top, None, None) for top in best]
        far = self.doubts.reference.shares(distances).tolist()
        return list(zip(best, far, distances.tolist(), strict=True))

    def _decoded(self, files: Iterable[str]) -> Iterator[list[tuple[str, Tensor | str]]]:
        """Batches of (path, (crops, C, Y, X) uint8 or the reason why not), decoded ahead."""

        def read(file: str) -> Tensor | str:
            try:
                return self.views.pixels(file)
            except ImageError as error:
                return error.reason

        waiting: deque[tuple[str, Future[Tensor | str]]] = deque()
        rest = iter(files)
        with ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_THREADS)) as pool:
            try:
                while True:
                    while len(waiting) < 2 * self.batch_size:
                        if (file := next(rest, None)) is None:
                            break
                        waiting.append((file, pool.submit(read, file)))
                    if not waiting:
                        return
                    count = min(self.batch_size, len(waiting))
                    ready = [waiting.popleft() for _ in range(count)]
                    yield [(name, future.result()) for name, future in ready]
            finally:
                pool.shutdown(cancel_futures=True)


def _unread(path: str, reason: str) -> Row:
    return {"path": path, "label": None, "probability": None, "top": [], "error": reason}
