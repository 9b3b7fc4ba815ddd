"""ReaL labels: all correct classes of ImageNet's validation images (Beyer et al., 2020)."""

import os
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitcli.data.image_set import ImageSet
from vitcli.errors import VitcliError
from vitcli.evals.scoring import NO_TARGET, pad_targets, score_logits
from vitcli.files import read_json

FILE_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})", re.IGNORECASE)
NUM_CLASSES = 1000
REAL_HINT = (
    "give `real.json` of google-research/reassessed-imagenet (a list of the classes of each "
    "image), or timm's copy `timm/data/_info/imagenet_real_labels.json`"
)


def read_real_labels(path: str | os.PathLike[str]) -> list[list[int]]:
    """Read the classes (0 to 999) of each validation image, in the order of the file numbers."""
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise VitcliError(f"cannot read `{path}`: {error}", REAL_HINT) from error
    valid = isinstance(values, list) and bool(values)
    for one in values if valid else []:
        valid = valid and isinstance(one, list)
        # `type is int`: JSON `true` would pass isinstance as class 1.
        valid = valid and all(type(c) is int and 0 <= c < NUM_CLASSES for c in one)
    if not valid:
        raise VitcliError(f"`{path}` is not a list of lists of classes from 0 to 999", REAL_HINT)
    return values


def real_targets(
    images: ImageSet, indices: NDArray[np.int64], real: list[list[int]], outputs: NDArray[np.int64]
) -> NDArray[np.int64]:
    """(n, M) right outputs of each image by ReaL, as in `pad_targets`; all -1 without a label.

    Args:
        indices: (n,) images of the set; the number in its file name identifies an image.
        outputs: (1000,) output of each class of ImageNet-1k.
    """
    # ReaL has one list per image in the order of the official numbers. The order of the files here
    # may be another one, so the number in the name decides, never the position.
    sets: list[list[int]] = []
    numbered = 0
    for index in indices.tolist():
        found = FILE_NUMBER.search(_file_name(images, index))
        number = int(found[1]) if found else 0
        numbered += found is not None
        if number > len(real):
            raise VitcliError(
                f"`{images.describe(index)}` is image {number}, but the ReaL file has only "
                f"{len(real)} images",
                REAL_HINT,
            )
        sets.append([int(outputs[c]) for c in real[number - 1]] if number else [])
    if not numbered:
        raise VitcliError(
            f"no image has a name such as ILSVRC2012_val_00000293.JPEG; the first is "
            f"`{_file_name(images, int(indices[0]))}`",
            "use `--real` with ImageNet's validation images under their original names",
        )
    if not any(sets):
        raise VitcliError(f"none of {len(sets):,} images has a ReaL label", REAL_HINT)
    return pad_targets(sets)


def _file_name(images: ImageSet, index: int) -> str:
    """The file name; a generated image has none, so what errors call it."""
    file_name = getattr(images, "file_name", None)
    return (file_name and file_name(index)) or images.describe(index)


@dataclass(frozen=True)
class RealAccuracy:
    """Accuracy by the ReaL labels; images without a ReaL label are skipped."""

    images: int
    skipped: int
    top1: float
    top5: float


def real_accuracy(
    logits: NDArray[np.float32], real: NDArray[np.int64]
) -> tuple[RealAccuracy, NDArray[np.float64]]:
    """Accuracy by ReaL, and (n,) correctness of each image, NaN for one without a label."""
    # Beyer et al. (2020), section 2: an image without a label is left out; a prediction is right
    # if it is any of the labels.
    labelled = (real != NO_TARGET).any(axis=1)
    scores = score_logits(logits[labelled], real[labelled])
    correct = np.full(len(real), np.nan)
    correct[labelled] = scores.correct
    top1, top5 = float(scores.correct.mean()), float(scores.top5_correct.mean())
    return RealAccuracy(len(scores), int((~labelled).sum()), top1, top5), correct
