"""Patches as safetensors files: the patches of one image, or of every image of a dataset."""

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from vitcli.data.loader import eval_batches
from vitcli.data.source import Source
from vitcli.errors import VitcliError, printable
from vitcli.preprocess import Preprocess
from vitcli.progress import Quiet, Watcher
from vitcli.vit.patches import grid_size, patchify
from vitcli.weights.store import load_weights, read_metadata, save_tensors

BATCH_SIZE = 64
MAX_TOKEN_SET_BYTES = 4 * 2**30  # the whole set is in memory before it is written


def save_patches(
    path: Path, patches: Tensor, preprocess: Preprocess, patch_size: int, source: str
) -> None:
    """Write the patches (N, P*P*C) of one image as the tensor `patches`."""
    save_tensors(path, {"patches": patches}, _metadata(source, patch_size, preprocess))


def read_patches(path: str | os.PathLike[str]) -> tuple[Tensor, int, tuple[int, int]]:
    """Read a file of `save_patches` -> (N, P*P*C) uint8, P, and (Y, X) of the image.

    Raises:
        VitcliError: the file does not exist, or does not hold the patches of one image.
    """
    shown = printable(path)
    metadata = read_metadata(path)
    patches = load_weights(path).get("patches")
    try:
        patch_size, channels = int(metadata["patch_size"]), int(metadata["channels"])
        rows, columns = (int(side) for side in metadata["image_size"].split("x"))
        grid = grid_size((rows, columns), patch_size)
        shape = (grid[0] * grid[1], patch_size**2 * channels)
        if patches is None or patches.dtype != torch.uint8 or tuple(patches.shape) != shape:
            raise ValueError("it has no tensor `patches` of one image")
        if channels not in (1, 3):
            raise ValueError(f"it has {channels} channels instead of 1 or 3")
    except (KeyError, ValueError) as error:
        raise VitcliError(
            f"`{shown}` does not hold the patches of one image: {error}",
            "`vitcli patchify cat.jpg --out cat.safetensors` writes such a file",
        ) from error
    return patches, patch_size, (rows, columns)


def store_token_set(
    data: Source,
    target: Path,
    preprocess: Preprocess,
    patch_size: int,
    *,
    source: str,
    workers: int | None = None,
    watch: Watcher | None = None,
) -> tuple[str, ...]:
    """Write the patches of all readable images; return one error per unreadable image.

    The tensors are `SPLIT.patches` (n, N, P*P*C) and `SPLIT.labels` (n,).

    Raises:
        VitcliError: they need more than `MAX_TOKEN_SET_BYTES`, or cannot be written.
    """
    total = sum(map(len, data.splits.values()))
    rows, columns = preprocess.image_size
    size = total * rows * columns * preprocess.num_channels
    if size > MAX_TOKEN_SET_BYTES:
        raise VitcliError(
            f"the patches of {total:,} images of {rows}x{columns} px need {size / 2**30:.1f} GiB, "
            f"the limit is {MAX_TOKEN_SET_BYTES // 2**30} GiB",
            "choose a smaller `--image-size`",
        )
    tensors: dict[str, Tensor] = {}
    broken: list[str] = []
    with (watch or Quiet()).progress("patchify", total) as bar:
        for name, images in data.splits.items():
            patches, labels = [], []
            for batch in eval_batches(images, preprocess, batch_size=BATCH_SIZE, workers=workers):
                patches.append(patchify(batch.images, patch_size))  # (B, N, P*P*C)
                labels.append(batch.labels)
                broken += batch.errors
                bar.advance(len(batch) + len(batch.broken))
            tensors[f"{name}.patches"] = torch.cat(patches)  # (n, N, P*P*C)
            tensors[f"{name}.labels"] = torch.cat(labels)
    metadata = _metadata(source, patch_size, preprocess)
    metadata["classes"] = json.dumps(data.classes)
    save_tensors(target, tensors, metadata)
    return tuple(broken)


def _metadata(source: str, patch_size: int, preprocess: Preprocess) -> dict[str, str]:
    rows, columns = preprocess.image_size
    window = {"window": json.dumps(preprocess.window)} if preprocess.window else {}
    return {
        **window,
        "source": printable(source),
        "patch_size": str(patch_size),
        "image_size": f"{rows}x{columns}",
        "grid": f"{rows // patch_size}x{columns // patch_size}",
        "channels": str(preprocess.num_channels),
        "layout": "patches row by row; inside one: rows, columns, channels; uint8 pixels",
    }
