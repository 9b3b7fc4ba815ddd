"""ReaL: all classes that people saw in ImageNet's validation images (Beyer et al., 2020)."""

import json
import os
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitcli.data.image_set import ImageSet
from vitcli.errors import VitcliError
from vitcli.evals.scoring import filled_up

NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})", re.IGNORECASE)
CLASSES = 1000
REAL_HINT = (
    "`real.json` of google-research/reassessed-imagenet: a list with the classes of each image; "
    "timm carries it as `timm/data/_info/imagenet_real_labels.json`"
)


def read_real(path: str | os.PathLike[str]) -> list[list[int]]:
    """The classes (0 to 999) of the validation images, in the order of their numbers.

    Raises:
        VitcliError: it cannot be read, or is something else.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VitcliError(f"cannot read `{path}`: {error}", REAL_HINT) from error
    fits = isinstance(values, list) and bool(values)
    for one in values if fits else []:
        fits = fits and isinstance(one, list)
        fits = fits and all(type(c) is int and 0 <= c < CLASSES for c in one)
    if not fits:
        raise VitcliError(f"`{path}` is no list of lists of classes from 0 to 999", REAL_HINT)
    return values


def real_answers(
    images: ImageSet, indices: NDArray[np.int64], real: list[list[int]], outputs: NDArray[np.int64]
) -> NDArray[np.int64]:
    """(n, M) the right outputs of images by ReaL, filled up with -1; all -1 where there are none.

    Args:
        indices: (n,) which images of the set; each is known by the number in its file's name.
        outputs: (1000,) the output of each class.

    Raises:
        VitcliError: no name has such a number, or there are fewer lists.
    """
    sets: list[list[int]] = []
    named = 0
    for index in indices.tolist():
        found = NUMBER.search(_name(images, index))
        number = int(found[1]) if found else 0
        named += found is not None
        if number > len(real):
            raise VitcliError(
                f"`{images.describe(index)}` is image {number}, and the labels are those of "
                f"{len(real)}",
                REAL_HINT,
            )
        sets.append([int(outputs[c]) for c in real[number - 1]] if number else [])
    if not named:
        raise VitcliError(
            f"no image has a name such as ILSVRC2012_val_00000293.JPEG: the first is "
            f"`{_name(images, int(indices[0]))}`",
            "`--real` is for ImageNet's validation images under their own names",
        )
    if not any(sets):
        raise VitcliError(f"none of {len(sets):,} images has a label by ReaL", REAL_HINT)
    return filled_up(sets)


def _name(images: ImageSet, index: int) -> str:
    """The name of the file, else what errors call the image; drawn ones have no file."""
    named = getattr(images, "file_name", None)
    return (named and named(index)) or images.describe(index)
