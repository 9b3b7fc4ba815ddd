"""`vitcli patchify`: cut a picture, or a whole set, into the patches that a ViT reads."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vitcli.data.decode import read_image
from vitcli.data.folders import IMAGE_SUFFIXES
from vitcli.data.loader import eval_batches
from vitcli.data.sets import ImageSet
from vitcli.data.sources import SUFFIXES, load_data
from vitcli.data.storing import Stored, store_set
from vitcli.data.transforms import Preprocess, ResizeMode
from vitcli.errors import VitcliError, printable
from vitcli.files import replacing
from vitcli.vit.patches import patchify
from vitcli.watch import Quiet, Watcher
from vitcli.weights.store import save_tensors

DEFAULT_IMAGE_SIZE = 224
BATCH_SIZE = 64
# The token set is put together in memory before it is written.
LARGEST_TOKEN_SET = 4 * 2**30
PICTURE_SIDE = 448
# What is stored for crops of 224 has a shorter side of 256, the usual room around a crop.
STORED_CROP = 0.875


@dataclass(frozen=True)
class PatchifyResult:
    """What `patchify` found and wrote.

    Args:
        source: the picture or the data.
        kind: "image" or "data".
        image_size: (Y, X) pixels after preprocessing.
        patch_size: P.
        num_channels: C.
        splits: for data, split -> number of images.
        classes: for data, their names.
        picture_size: for an image, (Y, X) pixels of the file, upright.
        image: for an image, what is cut, of `image_size`.
        picture: for an image, the same enlarged, with the grid over it.
        picture_path: where `picture` was written.
        out: where the patches, or the images, were written.
        stored_bytes: for data whose images were stored, of the folder.
        broken: a line for each image of the data that could not be read.
        notes: what the user should know.
    """

    source: str
    kind: str
    image_size: tuple[int, int]
    patch_size: int
    num_channels: int
    splits: dict[str, int] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    picture_size: tuple[int, int] | None = None
    image: Image.Image | None = None
    picture: Image.Image | None = None
    picture_path: Path | None = None
    out: Path | None = None
    stored_bytes: int | None = None
    broken: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        """N, the tokens of one image."""
        return self.grid[0] * self.grid[1]

    @property
    def patch_dim(self) -> int:
        """P*P*C, the values of one token."""
        return self.patch_size**2 * self.num_channels

    def to_json(self) -> dict[str, Any]:
        """Everything but the pictures, in plain values."""
        values: dict[str, Any] = {
            "source": self.source,
            "kind": self.kind,
            "image_size": list(self.image_size),
            "patch_size": self.patch_size,
            "channels": self.num_channels,
            "grid": list(self.grid),
            "tokens": self.num_patches,
            "token_values": self.patch_dim,
            "out": None if self.out is None else printable(self.out),
        }
        if self.kind == "image":
            values["picture_size"] = list(self.picture_size or ())
            values["picture"] = None if self.picture_path is None else printable(self.picture_path)
        else:
            values["images"] = dict(self.splits)
            values["classes"] = list(self.classes)
            values["unreadable"] = list(self.broken)
            if self.stored_bytes is not None:
                values["stored_bytes"] = self.stored_bytes
        return values


def run(
    source: str,
    *,
    patch_size: int = 16,
    image_size: int | tuple[int, int] | None = None,
    out: str | None = None,
    num_channels: int = 3,
    resize_mode: ResizeMode = "crop",
    image_column: str | None = None,
    label_column: str | None = None,
    workers: int | None = None,
    watch: Watcher | None = None,
) -> PatchifyResult:
    """Cut `source` into patches of `patch_size` x `patch_size` pixels.

    A picture is drawn with its grid into `NAME-patches.png`, beside `out` or in the current folder.
    `out` ending in .safetensors takes the patches as uint8: `patches` (N, P*P*C) of a picture,
    `SPLIT.patches` (n, N, P*P*C) and `SPLIT.labels` (n,) of data; ending in .png it is where the
    drawing goes. Without an ending it is a folder that takes the images of data, decoded and
    shrunk, as DATA for later commands (`data/stored.py`).

    Args:
        source: a picture, or DATA.
        patch_size: P, in pixels.
        image_size: side, or (Y, X), that pictures are brought to; by default 224, or the multiple
            of `patch_size` next to it.
        out: a file, or for data a folder, to write.
        num_channels: 3, or 1 for grey.
        resize_mode: how a picture is brought to `image_size`; see `Preprocess`.
        image_column, label_column: of tables; see `load_data`.
        workers: threads that read data.
        watch: hears of progress.

    Raises:
        VitcliError: the patches do not divide the image, or `source` cannot be read.
    """
    size = checked_size(image_size, patch_size)
    notes = []
    if image_size is None and size[0] != DEFAULT_IMAGE_SIZE:
        notes.append(f"image size {size[0]}, the multiple of {patch_size} nearest to 224")
    target = Path(out) if out else None
    is_image = _is_image(source)
    endings = (".safetensors", ".png") if is_image else (".safetensors", "")
    if target is not None and target.suffix.lower() not in endings:
        raise VitcliError(
            f"`--out {printable(target)}` does not end in {' or '.join(filter(None, endings))}",
            "patches are stored as .safetensors"
            + ("" if is_image else ", images in a folder, named without an ending"),
        )
    preprocess = Preprocess(size, resize_mode, num_channels=num_channels)
    if is_image:
        return _patchify_image(source, patch_size, preprocess, target, tuple(notes))
    data = load_data(
        source,
        image_column=image_column,
        label_column=label_column,
        test_fraction=0.0,
        labelled=False,
        watch=watch,
    )
    broken: tuple[str, ...] = ()
    stored: Stored | None = None
    if target is not None and not target.suffix:
        side = round(max(size) / STORED_CROP)
        stored = store_set(data, target, side=side, workers=workers, watch=watch)
        broken = stored.broken
        notes.append(f"shorter sides of at most {side} pixels: enough for crops of {size[0]}")
    elif target is not None:
        broken = _store_set(
            data.splits, data.classes, source, patch_size, preprocess, target, workers, watch
        )
    return PatchifyResult(
        source=printable(source),
        kind="data",
        image_size=size,
        patch_size=patch_size,
        num_channels=num_channels,
        splits={name: len(images) for name, images in data.splits.items()},
        classes=data.classes,
        out=target,
        stored_bytes=stored.bytes if stored else None,
        broken=broken,
        notes=(*notes, *data.notes),
    )


def checked_size(image_size: int | tuple[int, int] | None, patch_size: int) -> tuple[int, int]:
    """(Y, X) that `patch_size` divides.

    Raises:
        VitcliError: it does not divide the size that was asked for; names the nearest sizes.
    """
    if patch_size < 1:
        raise VitcliError(f"patch size {patch_size} is not positive", "16 is usual")
    if image_size is None:
        side = max(1, round(DEFAULT_IMAGE_SIZE / patch_size)) * patch_size
        return side, side
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    for side in size:
        if side % patch_size or side < patch_size:
            below = side // patch_size * patch_size
            near = [str(n) for n in (below, below + patch_size) if n > 0]
            raise VitcliError(
                f"image size {side} is not a multiple of patch size {patch_size}",
                f"the nearest that {'is' if len(near) == 1 else 'are'}: {' and '.join(near)}",
            )
    return size


def draw_grid(image: Image.Image, patch_size: int) -> Image.Image:
    """The picture, enlarged where it is small, with lines between its patches."""
    scale = max(1, round(PICTURE_SIDE / max(image.size)))
    width, height = image.width * scale, image.height * scale
    drawn = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(drawn)
    step = patch_size * scale
    # White in black, so that the line is seen on any picture.
    widths = ((3, "black"), (1, "white")) if step >= 12 else ((1, "white"),)
    for thickness, colour in widths:
        for x in range(step, width, step):
            draw.line([(x, 0), (x, height)], fill=colour, width=thickness)
        for y in range(step, height, step):
            draw.line([(0, y), (width, y)], fill=colour, width=thickness)
    return drawn


def _is_image(source: str) -> bool:
    path = Path(source)
    if path.is_dir() or source.startswith("builtin:"):
        return False
    suffix = path.suffix.lower()
    return suffix in IMAGE_SUFFIXES or (path.is_file() and suffix not in SUFFIXES)


def _patchify_image(
    source: str,
    patch_size: int,
    preprocess: Preprocess,
    target: Path | None,
    notes: tuple[str, ...],
) -> PatchifyResult:
    original = read_image(source, preprocess.mode)
    image = preprocess.fit(original)
    picture = draw_grid(image, patch_size)
    stem = printable(Path(source).stem)
    drawn = target is not None and target.suffix.lower() == ".png"
    beside = target.parent if target is not None else Path()
    picture_path = target if drawn and target else beside / f"{stem}-patches.png"
    with replacing(picture_path) as temporary:
        picture.save(temporary, format="PNG")
    out = None if drawn else target
    if out is not None:
        patches = patchify(preprocess.pixels(original)[None], patch_size)[0]  # (N, P*P*C)
        metadata = _metadata(source, patch_size, preprocess)
        save_tensors(out, {"patches": patches}, metadata)
    return PatchifyResult(
        source=printable(source),
        kind="image",
        image_size=preprocess.image_size,
        patch_size=patch_size,
        num_channels=preprocess.num_channels,
        picture_size=(original.height, original.width),
        image=image,
        picture=picture,
        picture_path=picture_path,
        out=out,
        notes=notes,
    )


def _store_set(
    splits: Any,
    classes: tuple[str, ...],
    source: str,
    patch_size: int,
    preprocess: Preprocess,
    target: Path,
    workers: int | None,
    watch: Watcher | None,
) -> tuple[str, ...]:
    """Write the patches of all images that can be read; a line for each that cannot."""
    total = sum(map(len, splits.values()))
    rows, columns = preprocess.image_size
    size = total * rows * columns * preprocess.num_channels
    if size > LARGEST_TOKEN_SET:
        raise VitcliError(
            f"the patches of {total:,} images of {rows}x{columns} take {size / 2**30:.1f} GiB",
            f"the limit is {LARGEST_TOKEN_SET // 2**30} GiB: give a smaller `--image-size`",
        )
    tensors: dict[str, Tensor] = {}
    broken: list[str] = []
    with (watch or Quiet()).progress("patchify", total) as bar:
        for name, images in splits.items():
            patches, labels = [], []
            for batch in _read(images, preprocess, workers):
                patches.append(patchify(batch.images, patch_size))  # (B, N, P*P*C)
                labels.append(batch.labels)
                broken += batch.broken
                bar.advance(len(batch) + len(batch.broken))
            tensors[f"{name}.patches"] = torch.cat(patches)  # (n, N, P*P*C)
            tensors[f"{name}.labels"] = torch.cat(labels)
    metadata = _metadata(source, patch_size, preprocess)
    metadata["classes"] = json.dumps(classes)
    save_tensors(target, tensors, metadata)
    return tuple(broken)


def _read(images: ImageSet, preprocess: Preprocess, workers: int | None) -> Any:
    return eval_batches(images, preprocess, batch_size=BATCH_SIZE, workers=workers)


def _metadata(source: str, patch_size: int, preprocess: Preprocess) -> dict[str, str]:
    rows, columns = preprocess.image_size
    return {
        "source": printable(source),
        "patch_size": str(patch_size),
        "image_size": f"{rows}x{columns}",
        "grid": f"{rows // patch_size}x{columns // patch_size}",
        "channels": str(preprocess.num_channels),
        "layout": "patches row by row; inside one: rows, columns, channels; uint8 pixels",
    }
