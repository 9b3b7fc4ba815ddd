"""Pictures of the patch grid, statistics of the patches, and the cost of each patch size."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vitcli.inspection.drawing import hstack_images
from vitcli.vit import VARIANTS

PICTURE_SIDE = 448  # px
COMMON_PATCH_SIZES = (8, 16, 32)
LEVELS = 256
COST_VARIANT = "B"  # the model size whose cost is reported


def draw_grid(image: Image.Image, patch_size: int) -> Image.Image:
    """The image with lines between its patches; small images are enlarged."""
    scale = max(1, round(PICTURE_SIDE / max(image.size)))
    width, height = image.width * scale, image.height * scale
    picture = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    step = patch_size * scale
    # White inside black is visible on every image.
    strokes = ((3, "black"), (1, "white")) if step >= 12 else ((1, "white"),)
    for thickness, colour in strokes:
        for x in range(step, width, step):
            draw.line([(x, 0), (x, height)], fill=colour, width=thickness)
        for y in range(step, height, step):
            draw.line([(0, y), (width, y)], fill=colour, width=thickness)
    return picture


def draw_patch_sizes(image: Image.Image, sizes: Sequence[int]) -> Image.Image:
    """The grids of several patch sizes side by side, each with its number of tokens."""
    grids = [draw_grid(image, size) for size in sizes]
    row = hstack_images(grids, gap=8)
    sheet = Image.new("RGB", (row.width, row.height + 18), (255, 255, 255))
    sheet.paste(row, (0, 0))
    draw, x = ImageDraw.Draw(sheet), 0
    for size, picture in zip(sizes, grids, strict=True):
        rows, cols = image.height // size, image.width // size
        text = f"patches of {size}x{size}: {rows} x {cols} = {rows * cols} tokens"
        draw.text((x, row.height + 3), text, fill=(0, 0, 0))
        x += picture.width + 8
    return sheet


def dividing_patch_sizes(image_size: tuple[int, int], patch_size: int) -> list[int]:
    """`patch_size` and those of 8, 16 and 32 that divide the image.

    If only one is left, half and twice `patch_size` are added where they divide the image.
    """

    def divides(size: int) -> bool:
        return size > 0 and all(side % size == 0 for side in image_size)

    found = {size for size in (*COMMON_PATCH_SIZES, patch_size) if divides(size)}
    if len(found) == 1:
        halves = (patch_size // 2, 2 * patch_size) if patch_size % 2 == 0 else (2 * patch_size,)
        found |= {size for size in halves if divides(size)}
    return sorted(found)


@dataclass(frozen=True)
class PatchStatistics:
    """Statistics of N patches, each over all pixels and channels.

    Attributes:
        mean, std: (N,) of the values 0 to 255.
        entropy: (N,) in bits, of the histogram of the values. A patch of one value has 0 bits, the
            maximum is 8. A flat patch carries little information.
    """

    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    entropy: NDArray[np.float64]

    def to_json(self) -> dict[str, Any]:
        """Minimum, median and maximum of each statistic, and all values in patch order."""
        return {
            name: {
                "min": float(values.min()),
                "median": float(np.median(values)),
                "max": float(values.max()),
                "patches": values.tolist(),
            }
            for name, values in vars(self).items()
        }


def patch_statistics(patches: NDArray[np.uint8]) -> PatchStatistics:
    """(N, P*P*C) uint8 -> mean, standard deviation and entropy of each patch."""
    n, values = patches.shape
    # One histogram for all patches: patch i counts in the bins from i * LEVELS on.
    bins = patches.astype(np.int64) + LEVELS * np.arange(n)[:, None]
    counts = np.bincount(bins.ravel(), minlength=n * LEVELS).reshape(n, LEVELS)
    share = counts / values
    logs = np.log2(share, out=np.zeros_like(share), where=share > 0)
    entropy = -(share * logs).sum(axis=1)
    # `abs` turns the -0.0 of a patch of one value into 0.0.
    return PatchStatistics(patches.mean(axis=1), patches.std(axis=1), np.abs(entropy))


def patch_size_costs(
    image_size: tuple[int, int], sizes: Sequence[int], num_channels: int = 3
) -> list[dict[str, Any]]:
    """The cost of each patch size in a ViT-B without a head, as plain numbers.

    `tokens` are the patches, `token_pairs` the pairs in attention (T^2 with the class token),
    `attention_macs` the multiply-adds per image of these pairs, and `forward_macs` of all.
    """
    size_b = VARIANTS[COST_VARIANT]
    d, depth = size_b.embed_dim, size_b.depth
    rows = []
    for size in sizes:
        patches = (image_size[0] // size) * (image_size[1] // size)
        values, t = size**2 * num_channels, patches + 1
        attention = 2 * t**2 * d * depth
        projections = t * (4 * d**2 + 2 * d * size_b.mlp_dim) * depth
        rows.append(
            {
                "patch_size": size,
                "tokens": patches,
                "token_values": values,
                "token_pairs": t**2,
                "attention_macs": attention,
                "forward_macs": attention + projections + patches * values * d,
            }
        )
    return rows
