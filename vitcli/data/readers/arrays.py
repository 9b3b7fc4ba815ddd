"""NumPy archives of images and labels, as MedMNIST and Keras write them."""

import re
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
from numpy.typing import NDArray

from vitcli.data.image_set import ArrayStore, ImageSet, Integers, Pixels
from vitcli.data.labels import encode_labels, multi_hot
from vitcli.data.source import DataRequest, Source, make_source
from vitcli.errors import VitcliError, quoted
from vitcli.hub.split_names import SPLIT_ALIASES, SPLITS

IMAGE_WORDS = frozenset({"image", "images", "img", "imgs", "x", "data", "pixels"})
LABEL_WORDS = frozenset({"label", "labels", "y", "target", "targets"})
NAME_KEYS = ("class_names", "label_names")
CHANNELS = (1, 3, 4)
EXPECTED = "expected `train_images` and `train_labels`, or `x_train` and `y_train`"

Arrays = dict[str, NDArray[Any]]


def load_arrays(request: DataRequest) -> Source:
    """A `.npz` file with `train_images`, `train_labels`, `val_images` …, or `x_train`, `y_train` …

    Images are (n, Y, X), (n, Y, X, C) or (n, C, Y, X); grey ones may have any range.
    Labels are (n,), (n, 1), or (n, K) of zeros and ones: one-hot, or several labels per image.
    `class_names` names the classes.

    Raises:
        VitcliError: the file is damaged, holds objects, or an array has another shape or range.
    """
    shown = request.shown
    notes: list[str] = []
    images, labels, names = _read(request.path, shown)
    scaled = _as_pixels({k: _channels_last(shown, k, v) for k, v in images.items()}, shown, notes)
    for split, pixels in scaled.items():
        if len(labels[split]) != len(pixels):
            raise VitcliError(
                f"`{shown}` has {len(pixels):,} {split} images, but {len(labels[split]):,} labels",
                "store one label per image, in the same order",
            )
    one_hot = all(_is_one_hot(array) for array in labels.values())
    splits = {}
    for split in (name for name in SPLITS if name in scaled):
        if request.numeric and labels[split].size == len(labels[split]):
            classes, indices = encode_labels(labels[split].ravel().tolist())
            targets = None
        else:
            classes, indices, targets = _encode(shown, labels[split], names, one_hot)
        store = ArrayStore(f"{split} of {shown}", scaled[split])
        splits[split] = ImageSet(split, classes, indices, store, targets=targets)
    with ZipFile(request.path) as archive:  # the checksums of all arrays
        parts = [f"{info.filename} {info.CRC}".encode() for info in archive.infolist()]
    return make_source(request, splits, parts, notes)


def _read(path: Path, shown: str) -> tuple[Arrays, Arrays, list[str] | None]:
    """(split -> images, split -> labels, class names or None)."""
    try:
        # Opened here, because NumPy leaves a damaged archive open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files if _meaning(key) is not None}
            names = next((archive[key] for key in NAME_KEYS if key in archive.files), None)
            present = quoted(archive.files, 8) or "nothing"
    except Exception as error:  # a damaged archive may raise anything
        objects = "pickle" in str(error)
        raise VitcliError(
            f"cannot read `{shown}`: " + ("it holds Python objects" if objects else str(error)),
            "save plain arrays with `numpy.savez`",
        ) from None
    images: Arrays = {}
    labels: Arrays = {}
    for key, array in arrays.items():
        split, is_label = _meaning(key) or ("", False)
        found = labels if is_label else images
        if split in found:
            raise VitcliError(f"`{shown}` has two arrays for {split} images: {present}", EXPECTED)
        found[split] = array
    if not images or set(images) - set(labels):
        raise VitcliError(
            f"`{shown}` has no arrays of images with their labels; it has {present}",
            f"{EXPECTED}; weights in a .npz file are given with `--model`",
        )
    return images, labels, None if names is None else [str(name) for name in names.ravel()]


def _meaning(key: str) -> tuple[str, bool] | None:
    """(the split, True for labels) of `train_images`, `y_test`, `images`; None for other keys."""
    words = re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", key).lower())
    splits = [SPLIT_ALIASES[word] for word in words if word in SPLIT_ALIASES]
    rest = [word for word in words if word not in SPLIT_ALIASES]
    if len(splits) > 1 or len(rest) != 1 or rest[0] not in IMAGE_WORDS | LABEL_WORDS:
        return None
    return (splits[0] if splits else "train"), rest[0] in LABEL_WORDS


def _channels_last(shown: str, split: str, array: NDArray[Any]) -> NDArray[Any]:
    """(n, Y, X) or (n, Y, X, C) from any of the accepted shapes."""
    if array.ndim == 4 and array.shape[3] in CHANNELS:
        return array[..., 0] if array.shape[3] == 1 else array
    if array.ndim == 4 and array.shape[1] in CHANNELS:
        return _channels_last(shown, split, array.transpose(0, 2, 3, 1))
    if array.ndim == 3:
        return array
    shape = " x ".join(map(str, array.shape))
    raise VitcliError(
        f"the {split} images of `{shown}` have the shape {shape}",
        "store (n, height, width) or (n, height, width, channels) with 1, 3 or 4 channels; volumes "
        "are not supported",
    )


def _as_pixels(images: Arrays, shown: str, notes: list[str]) -> Arrays:
    """uint8 images, scaled by the range of all splits; wider samples stay, and need a window.

    Raises:
        VitcliError: coloured images have wider samples, which no window is applied to.
    """
    if all(array.dtype == np.uint8 for array in images.values()):
        return dict(images)
    parts = [array for array in images.values() if array.size]
    low, high = min(float(x.min()) for x in parts), max(float(x.max()) for x in parts)
    kind = next(iter(images.values())).dtype
    if low >= 0 and high <= 255:  # False if a sample is not a number
        factor = 255 if high <= 1 else 1
        notes.append(
            f"{shown}: images are {kind} with values from {low:g} to {high:g}; "
            f"{'1' if factor == 255 else '255'} is taken as white"
        )
        return {name: np.rint(array * factor).astype(np.uint8) for name, array in images.items()}
    if any(array.ndim == 4 for array in images.values()):
        raise VitcliError(
            f"the colour images of `{shown}` are {kind} with values from {low:g} to {high:g}",
            "store uint8 values from 0 to 255, or fractions from 0 to 1",
        )
    wide = _wide_type(kind, low, high)
    return {name: array.astype(wide, copy=False) for name, array in images.items()}


def _wide_type(kind: np.dtype[Any], low: float, high: float) -> type[np.generic]:
    """The type of Pillow's mode `I;16`, `I` or `F` that holds grey samples."""
    if kind.kind == "f" or max(-low, high) > np.iinfo(np.int32).max:
        return np.float32
    return np.uint16 if low >= 0 and high <= 65535 else np.int32


def _is_one_hot(labels: NDArray[Any]) -> bool:
    if labels.ndim != 2 or labels.shape[1] == 1:
        return False
    return bool(np.isin(labels, (0, 1)).all() and (labels.sum(axis=1) == 1).all())


def _encode(
    shown: str, labels: NDArray[Any], names: list[str] | None, one_hot: bool
) -> tuple[tuple[str, ...], Integers, Pixels | None]:
    """(class names, (n,) class indices, (n, K) targets of multi-label images or None)."""
    if labels.ndim == 2 and labels.shape[1] > 1 and np.isin(labels, (0, 1)).all():
        count = labels.shape[1]
        classes = _names(shown, names, count)
        rows, columns = np.nonzero(labels)
        indices, targets = multi_hot(rows, columns, (len(labels), count))
        return classes, indices, None if one_hot else targets
    if labels.ndim > 2 or (labels.ndim == 2 and labels.shape[1] > 1):
        shape = " x ".join(map(str, labels.shape))
        raise VitcliError(
            f"the labels of `{shown}` have the shape {shape}",
            "store one class per image, or a row of zeros and ones per image",
        )
    values = labels.ravel()
    if values.dtype.kind == "f" and not (values == np.rint(values)).all():
        raise VitcliError(
            f"the labels of `{shown}` are fractions, such as {values[values % 1 != 0][0]:g}",
            "store class numbers or names; to predict the number: "
            "`vitcli finetune … --set objective.name=mse`",
        )
    if names is not None and values.dtype.kind in "iuf" and len(values):
        classes = _names(shown, names, int(values.max()) + 1)
        return classes, values.astype(np.int64), None
    return (*encode_labels(values.tolist()), None)


def _names(shown: str, names: list[str] | None, count: int) -> tuple[str, ...]:
    if names is None:
        return tuple(str(number) for number in range(count))
    if len(names) < count:
        raise VitcliError(
            f"`{shown}` names {len(names)} classes, but its labels need {count}",
            f"store one name per class in `{NAME_KEYS[0]}`",
        )
    return tuple(names)
