"""A picture cut into patches: its grid drawn, its patches measured, and what the cut costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vitcli.inspection.drawing import beside
from vitcli.vit import VARIANTS

PICTURE_SIDE = 448
USUAL_SIZES = (8, 16, 32)
LEVELS = 256
COST_MODEL = "B"  # whose arithmetic the cost of a cut is told for


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


def compare_sizes(image: Image.Image, sizes: Sequence[int]) -> Image.Image:
    """The picture once for each patch size, side by side, with the number of tokens below."""
    drawn = [draw_grid(image, size) for size in sizes]
    row = beside(drawn, gap=8)
    whole = Image.new("RGB", (row.width, row.height + 18), (255, 255, 255))
    whole.paste(row, (0, 0))
    draw, x = ImageDraw.Draw(whole), 0
    for size, picture in zip(sizes, drawn, strict=True):
        rows, cols = image.height // size, image.width // size
        text = f"patches of {size}x{size}: {rows} x {cols} = {rows * cols} tokens"
        draw.text((x, row.height + 3), text, fill=(0, 0, 0))
        x += picture.width + 8
    return whole


def fitting_sizes(image_size: tuple[int, int], patch_size: int) -> list[int]:
    """8, 16, 32 and `patch_size`, as far as they divide the image; else half and twice as well."""

    def fits(size: int) -> bool:
        return size > 0 and all(side % size == 0 for side in image_size)

    found = {size for size in (*USUAL_SIZES, patch_size) if fits(size)}
    if len(found) == 1:
        halves = (patch_size // 2, 2 * patch_size) if patch_size % 2 == 0 else (2 * patch_size,)
        found |= {size for size in halves if fits(size)}
    return sorted(found)


@dataclass(frozen=True)
class PatchStatistics:
    """Of each of N patches, over all its values in all channels.

    Attributes:
        mean, std: (N,) of the values 0 to 255.
        entropy: (N,) in bits, of the histogram of the values: 0 for a patch of one value, 8 at
            most. What is flat tells a model little.
    """

    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    entropy: NDArray[np.float64]

    def to_json(self) -> dict[str, Any]:
        """Least, median and largest of each, and all values in the order of the patches."""
        found: dict[str, Any] = {}
        for name, values in (("mean", self.mean), ("std", self.std), ("entropy", self.entropy)):
            found[name] = {
                "min": float(values.min()),
                "median": float(np.median(values)),
                "max": float(values.max()),
                "patches": values.tolist(),
            }
        return found


def patch_statistics(patches: NDArray[np.uint8]) -> PatchStatistics:
    """(N, P*P*C) uint8 -> mean, standard deviation and entropy of each patch."""
    n, values = patches.shape
    places = patches.astype(np.int64) + LEVELS * np.arange(n)[:, None]
    counts = np.bincount(places.ravel(), minlength=n * LEVELS).reshape(n, LEVELS)
    share = counts / values
    surprise = np.log2(share, out=np.zeros_like(share), where=share > 0)
    entropy = -(share * surprise).sum(axis=1)
    # A patch of one value comes out as -0.
    return PatchStatistics(patches.mean(axis=1), patches.std(axis=1), np.abs(entropy))


def cut_costs(
    image_size: tuple[int, int], sizes: Sequence[int], num_channels: int = 3
) -> list[dict[str, Any]]:
    """What each patch size costs a ViT-B without a head: a dict of plain numbers a size.

    `tokens` are the patches, `token_pairs` what attention compares (T^2 with the class token),
    `attention_macs` the multiply-adds that grow with these, and `forward_macs` all.
    """
    size_b = VARIANTS[COST_MODEL]
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
