"""`vitcli patchify`: cut a picture, or a whole set, into the patches that a ViT reads."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from vitcli.data.decoded_cache import DecodedCache, write_decoded
from vitcli.data.readers import DATA_SUFFIXES
from vitcli.data.readers.folder import IMAGE_SUFFIXES
from vitcli.data.source import load_data
from vitcli.decode import read_image
from vitcli.errors import VitcliError, printable
from vitcli.files import replacing
from vitcli.inspection.patch_files import read_patches, save_patches, store_token_set
from vitcli.inspection.patch_grids import (
    PatchStatistics,
    compare_sizes,
    cut_costs,
    draw_grid,
    fitting_sizes,
    patch_statistics,
)
from vitcli.preprocess import Preprocess, ResizeMode
from vitcli.progress import Watcher
from vitcli.vit.patches import patchify, unpatchify

DEFAULT_IMAGE_SIZE = 224
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
        statistics: for an image, of its patches.
        costs: what each patch size that fits would cost; see `cut_costs`.
        comparison: where the picture with the grids of all these sizes was written.
        reconstruction: where the picture was written that was put together of the patches.
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
    statistics: PatchStatistics | None = None
    costs: tuple[dict[str, Any], ...] = ()
    comparison: Path | None = None
    reconstruction: Path | None = None
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
            "out": _shown(self.out),
            "cost": list(self.costs),
        }
        if self.kind == "image":
            values["picture_size"] = list(self.picture_size or ())
            values["picture"] = _shown(self.picture_path)
            values["statistics"] = self.statistics.to_json() if self.statistics else None
            values["comparison"] = _shown(self.comparison)
            values["reconstruction"] = _shown(self.reconstruction)
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
    compare: str | None = None,
    reconstruct: str | None = None,
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
    shrunk, as DATA for later commands (`data/decoded_cache.py`).

    Args:
        source: a picture, or DATA.
        patch_size: P, in pixels.
        compare: a .png for the grids of patches of 8, 16 and 32 pixels side by side.
        reconstruct: a .png for the picture put together of its patches again.
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
    if Path(source).suffix.lower() == ".safetensors":
        alone = patch_size == 16 and not (image_size or out or compare)
        return _put_together(source, reconstruct, alone)
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
    pictures = {"--compare": compare, "--reconstruct": reconstruct}
    for option, place in pictures.items():
        _check_picture(option, place, is_image)
    if is_image:
        return _patchify_image(
            source, patch_size, preprocess, target, compare, reconstruct, tuple(notes)
        )
    data = load_data(
        source,
        image_column=image_column,
        label_column=label_column,
        whole=True,
        labelled=False,
        watch=watch,
    )
    broken: tuple[str, ...] = ()
    stored: DecodedCache | None = None
    if target is not None and not target.suffix:
        side = round(max(size) / STORED_CROP)
        stored = write_decoded(data, target, side=side, workers=workers, watch=watch)
        broken = stored.broken
        notes.append(f"shorter sides of at most {side} pixels: enough for crops of {size[0]}")
    elif target is not None:
        broken = store_token_set(
            data, target, preprocess, patch_size, source=source, workers=workers, watch=watch
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
        costs=_costs(size, patch_size, num_channels),
        notes=(*notes, *data.notes),
    )


def _shown(path: Path | None) -> str | None:
    return None if path is None else printable(path)


def _costs(size: tuple[int, int], patch_size: int, channels: int) -> tuple[dict[str, Any], ...]:
    return tuple(cut_costs(size, fitting_sizes(size, patch_size), channels))


def _check_picture(option: str, place: str | None, is_image: bool) -> None:
    """Raises a VitcliError where the picture of `option` cannot be made or is named otherwise."""
    if place is not None and not is_image:
        raise VitcliError(f"`{option}` needs a picture, not a set", "name one image of it")
    if place is not None and Path(place).suffix.lower() != ".png":
        raise VitcliError(
            f"`{option} {printable(place)}` does not end in .png", "for example x.png"
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


def _is_image(source: str) -> bool:
    path = Path(source)
    if path.is_dir() or source.startswith("builtin:"):
        return False
    suffix = path.suffix.lower()
    return suffix in IMAGE_SUFFIXES or (path.is_file() and suffix not in DATA_SUFFIXES)


def _patchify_image(
    source: str,
    patch_size: int,
    preprocess: Preprocess,
    target: Path | None,
    compare: str | None,
    reconstruct: str | None,
    notes: tuple[str, ...],
) -> PatchifyResult:
    original = read_image(source, preprocess.mode)
    image = preprocess.fit(original)
    picture = draw_grid(image, patch_size)
    stem = printable(Path(source).stem)
    drawn = target is not None and target.suffix.lower() == ".png"
    beside = target.parent if target is not None else Path()
    picture_path = target if drawn and target else beside / f"{stem}-patches.png"
    patches = patchify(preprocess.pixels(original)[None], patch_size)[0]  # (N, P*P*C)
    size, channels = preprocess.image_size, preprocess.num_channels
    _save(picture, picture_path)
    if compare is not None:
        _save(compare_sizes(image, fitting_sizes(size, patch_size)), Path(compare))
    if reconstruct is not None:
        _save(_whole(patches, patch_size, size), Path(reconstruct))
    out = None if drawn else target
    if out is not None:
        save_patches(out, patches, preprocess, patch_size, source)
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
        statistics=patch_statistics(patches.numpy()),
        costs=_costs(size, patch_size, channels),
        comparison=None if compare is None else Path(compare),
        reconstruction=None if reconstruct is None else Path(reconstruct),
        notes=notes,
    )


def _save(picture: Image.Image, path: Path) -> None:
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def _whole(patches: Tensor, patch_size: int, size: tuple[int, int]) -> Image.Image:
    """(N, P*P*C) uint8 -> the picture that they are of."""
    pixels = unpatchify(patches[None], patch_size, size)[0].permute(1, 2, 0).numpy()  # (Y, X, C)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _put_together(source: str, reconstruct: str | None, alone: bool) -> PatchifyResult:
    """The picture of stored patches, written to `reconstruct`."""
    shown = printable(source)
    if reconstruct is None or not alone:
        raise VitcliError(
            f"`{shown}` holds patches that are cut already",
            f"`vitcli patchify {shown} --reconstruct x.png` puts them together again",
        )
    _check_picture("--reconstruct", reconstruct, True)
    patches, patch_size, size = read_patches(source)
    channels = patches.shape[1] // patch_size**2
    picture = _whole(patches, patch_size, size)
    _save(picture, Path(reconstruct))
    return PatchifyResult(
        source=shown,
        kind="image",
        image_size=size,
        patch_size=patch_size,
        num_channels=channels,
        picture_size=size,
        image=picture,
        picture=picture,
        statistics=patch_statistics(patches.numpy()),
        costs=_costs(size, patch_size, channels),
        reconstruction=Path(reconstruct),
    )
