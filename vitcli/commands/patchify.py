"""`vitcli patchify`: cut an image, or every image of a dataset, into the patches of a ViT."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from vitcli.config.choices import ResizeMode
from vitcli.data.decoded_cache import write_decoded
from vitcli.data.readers import DATA_SUFFIXES
from vitcli.data.sample_range import with_window
from vitcli.data.source import load_data
from vitcli.decode import IMAGE_SUFFIXES, read_image
from vitcli.errors import VitcliError, printable
from vitcli.files import writing
from vitcli.inspection.patch_files import read_patches, save_patches, store_token_set
from vitcli.inspection.patch_grids import (
    PatchStatistics,
    dividing_patch_sizes,
    draw_grid,
    draw_patch_sizes,
    patch_size_costs,
    patch_statistics,
)
from vitcli.preprocess import Preprocess
from vitcli.progress import Quiet, Watcher
from vitcli.vit.patches import patchify, unpatchify

DEFAULT_IMAGE_SIZE = 224
DEFAULT_PATCH_SIZE = 16
# Images stored for crops of 224 px have a shorter side of 256 px, the common resize before a crop.
STORED_CROP = 0.875


@dataclass(frozen=True)
class PatchifyResult:
    """The result of `patchify`.

    Attributes:
        kind: "image" or "data".
        image_size: (Y, X) in pixels after preprocessing.
        patch_size: P.
        num_channels: C.
        splits: for data, split -> number of images.
        classes: for data, the class names.
        picture_size: for an image, (Y, X) in pixels of the file.
        image: for an image, the model input of `image_size`.
        picture: for an image, the same with the grid, enlarged; written to `picture_path`.
        out: file or folder of the patches or the images.
        statistics: for an image, of its patches.
        comparison: file with the grids of all patch sizes of `costs`.
        reconstruction: file with the image rebuilt from its patches.
        stored_bytes: for data in a folder, its size.
        broken: for data, one error for each image that cannot be read.
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

    @property
    def costs(self) -> list[dict[str, Any]]:
        """The cost of each patch size that divides the image."""
        sizes = dividing_patch_sizes(self.image_size, self.patch_size)
        return patch_size_costs(self.image_size, sizes, self.num_channels)

    def to_json(self) -> dict[str, Any]:
        """All values except the pictures."""
        values: dict[str, Any] = {
            "source": self.source,
            "kind": self.kind,
            "image_size": list(self.image_size),
            "patch_size": self.patch_size,
            "channels": self.num_channels,
            "grid": list(self.grid),
            "tokens": self.num_patches,
            "token_values": self.patch_dim,
            "out": _path_text(self.out),
            "cost": self.costs,
        }
        if self.kind == "image":
            values["picture_size"] = list(self.picture_size or ())
            values["picture"] = _path_text(self.picture_path)
            values["statistics"] = self.statistics.to_json() if self.statistics else None
            values["comparison"] = _path_text(self.comparison)
            values["reconstruction"] = _path_text(self.reconstruction)
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
    patch_size: int = DEFAULT_PATCH_SIZE,
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

    For an image, the grid is drawn into `NAME-patches.png`, next to `out` or in the current folder.

    Args:
        source: an image, DATA, or a .safetensors file of an earlier call.
        image_size: side, or (Y, X), in pixels; None takes the multiple of `patch_size` nearest 224.
        out: `x.safetensors` for the patches as uint8: `patches` (N, P*P*C) of an image,
            `SPLIT.patches` (n, N, P*P*C) and `SPLIT.labels` (n,) of data. `x.png` for the grid of
            an image. A folder for the decoded, smaller images of data; later commands take it as
            DATA.
        compare: a .png file for the grids of several patch sizes side by side.
        reconstruct: a .png file for the image rebuilt from its patches.
        num_channels: 3, or 1 for grey.
        resize_mode: see `Preprocess`.
        image_column, label_column: of tables; see `load_data`.
        workers: threads that read data.

    Raises:
        VitcliError: `patch_size` does not divide the image, or `source` cannot be read.
    """
    if Path(source).suffix.lower() == ".safetensors":
        if reconstruct is None or patch_size != DEFAULT_PATCH_SIZE or image_size or out or compare:
            shown = printable(source)
            raise VitcliError(
                f"`{shown}` already contains patches",
                f"`vitcli patchify {shown} --reconstruct x.png` rebuilds the image from them",
            )
        _check_picture("--reconstruct", reconstruct, True)
        return _rebuild(source, Path(reconstruct))
    size = resolve_image_size(image_size, patch_size)
    notes = []
    if image_size is None and size[0] != DEFAULT_IMAGE_SIZE:
        notes.append(f"image size {size[0]} px, the multiple of {patch_size} nearest to 224")
    target = Path(out) if out else None
    is_image = _is_image(source)
    _check_out(source, target, is_image)
    _check_picture("--compare", compare, is_image)
    _check_picture("--reconstruct", reconstruct, is_image)
    preprocess = Preprocess(size, resize_mode, num_channels=num_channels)
    if is_image:
        return _patchify_image(
            source, patch_size, preprocess, target, compare, reconstruct, tuple(notes)
        )
    columns: dict[str, Any] = {"image_column": image_column, "label_column": label_column}
    return _patchify_data(
        source, patch_size, preprocess, target, tuple(notes), columns, workers, watch
    )


def _path_text(path: Path | None) -> str | None:
    return None if path is None else printable(path)


def _check_out(source: str, target: Path | None, is_image: bool) -> None:
    endings = (".safetensors", ".png") if is_image else (".safetensors", "")
    if target is not None and target.suffix.lower() == ".png" and not is_image:
        raise VitcliError(
            f"`--out {printable(target)}` needs one image, and `{printable(source)}` is a dataset",
            "give one image, or a folder name without an ending for the decoded dataset",
        )
    if target is not None and target.suffix.lower() not in endings:
        raise VitcliError(
            f"`--out {printable(target)}` does not end in {' or '.join(filter(None, endings))}",
            "give x.safetensors for patches, or "
            + ("x.png for the grid" if is_image else "a folder name without an ending for images"),
        )


def _check_picture(option: str, path: str | None, is_image: bool) -> None:
    if path is not None and not is_image:
        raise VitcliError(f"`{option}` needs an image, not a dataset", "give one image of it")
    if path is not None and Path(path).suffix.lower() != ".png":
        raise VitcliError(f"`{option} {printable(path)}` does not end in .png", "for example x.png")


def resolve_image_size(
    image_size: int | tuple[int, int] | None, patch_size: int
) -> tuple[int, int]:
    """(Y, X) that `patch_size` divides; None takes the multiple nearest to 224.

    Raises:
        VitcliError: `patch_size` does not divide the given size; the hint has the nearest sizes.
    """
    if patch_size < 1:
        raise VitcliError(f"patch size {patch_size} is not positive", "16 is a common patch size")
    if image_size is None:
        side = max(1, round(DEFAULT_IMAGE_SIZE / patch_size)) * patch_size
        return side, side
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    for side in size:
        if side % patch_size or side < patch_size:
            below = side // patch_size * patch_size
            near = " and ".join(str(n) for n in (below, below + patch_size) if n > 0)
            raise VitcliError(
                f"image size {side} is not a multiple of patch size {patch_size}",
                f"the nearest multiples: {near}",
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
    original = read_image(source, preprocess.pixel_format)
    image = preprocess.fit(original)
    picture = draw_grid(image, patch_size)
    patches = patchify(preprocess.pixels(original)[None], patch_size)[0]  # (N, P*P*C)
    size = preprocess.image_size
    if target is not None and target.suffix.lower() == ".png":
        picture_path, target = target, None
    else:
        folder = target.parent if target is not None else Path()
        picture_path = folder / f"{printable(Path(source).stem)}-patches.png"
    _save(picture, picture_path)
    if compare is not None:
        sizes = dividing_patch_sizes(size, patch_size)
        _save(draw_patch_sizes(image, sizes), Path(compare))
    if reconstruct is not None:
        _save(_unpatchify_image(patches, patch_size, size), Path(reconstruct))
    if target is not None:
        save_patches(target, patches, preprocess, patch_size, source)
    return PatchifyResult(
        source=printable(source),
        kind="image",
        image_size=size,
        patch_size=patch_size,
        num_channels=preprocess.num_channels,
        picture_size=(original.height, original.width),
        image=image,
        picture=picture,
        picture_path=picture_path,
        out=target,
        statistics=patch_statistics(patches.numpy()),
        comparison=None if compare is None else Path(compare),
        reconstruction=None if reconstruct is None else Path(reconstruct),
        notes=notes,
    )


def _patchify_data(
    source: str,
    patch_size: int,
    preprocess: Preprocess,
    target: Path | None,
    notes: tuple[str, ...],
    columns: dict[str, Any],
    workers: int | None,
    watch: Watcher | None,
) -> PatchifyResult:
    data = load_data(source, **columns, whole=True, labelled=False, watch=watch)
    images = data.splits.get("train") or next(iter(data.splits.values()))
    preprocess = with_window(preprocess, images, watch or Quiet())
    result = PatchifyResult(
        source=printable(source),
        kind="data",
        image_size=preprocess.image_size,
        patch_size=patch_size,
        num_channels=preprocess.num_channels,
        splits={name: len(images) for name, images in data.splits.items()},
        classes=data.classes,
        out=target,
        notes=(*notes, *data.notes),
    )
    if target is None:
        return result
    if target.suffix:
        broken = store_token_set(
            data, target, preprocess, patch_size, source=source, workers=workers, watch=watch
        )
        return replace(result, broken=broken)
    side = round(max(preprocess.image_size) / STORED_CROP)
    stored = write_decoded(
        data, target, side=side, window=preprocess.window, workers=workers, watch=watch
    )
    note = (
        f"the shorter side is at most {side} px, enough for crops of {preprocess.image_size[0]} px"
    )
    return replace(
        result, broken=stored.broken, stored_bytes=stored.bytes, notes=(*notes, note, *data.notes)
    )


def _save(picture: Image.Image, path: Path) -> None:
    with writing(path) as temporary:
        picture.save(temporary, format="PNG")


def _unpatchify_image(patches: Tensor, patch_size: int, size: tuple[int, int]) -> Image.Image:
    """(N, P*P*C) uint8 -> the image."""
    pixels = unpatchify(patches[None], patch_size, size)[0].permute(1, 2, 0).numpy()  # (Y, X, C)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _rebuild(source: str, target: Path) -> PatchifyResult:
    """Rebuild the image from stored patches."""
    patches, patch_size, size = read_patches(source)
    picture = _unpatchify_image(patches, patch_size, size)
    _save(picture, target)
    return PatchifyResult(
        source=printable(source),
        kind="image",
        image_size=size,
        patch_size=patch_size,
        num_channels=patches.shape[1] // patch_size**2,
        picture_size=size,
        image=picture,
        picture=picture,
        statistics=patch_statistics(patches.numpy()),
        reconstruction=target,
    )
