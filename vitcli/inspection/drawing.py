"""The numbers as pictures; Pillow draws, matplotlib gives colour maps and axes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Numbers = NDArray[Any]
SMALLEST = 224  # pixels a side, to which small pictures are enlarged
GAP = 2
PAPER = 255  # between tiles: white


def mask(rollout: Numbers, size: tuple[int, int], patch: float) -> Image.Image:
    """(rows, cols) -> grey picture of `size` (Y, X), 0 to 255: where the model looks.

    As the authors draw figure 6 (google-research/vision_transformer#27): divided by the maximum,
    enlarged with LANCZOS, blurred over a patch, spread to the whole range.
    """
    rows, cols = size
    scaled = (rollout / max(float(rollout.max()), 1e-30) * 255).astype(np.float32)
    large = Image.fromarray(scaled).resize((cols, rows), Image.Resampling.LANCZOS).convert("L")
    blurred = np.asarray(large.filter(ImageFilter.GaussianBlur(radius=patch)), dtype=np.float64)
    blurred = blurred - blurred.min()
    spread = blurred * (255 / blurred.max()) if blurred.max() > 0 else np.full(size, 255.0)
    return Image.fromarray(np.rint(spread).astype(np.uint8))


def overlay(image: Image.Image, rollout: Numbers, patch: int) -> Image.Image:
    """The picture, dark where the model does not look."""
    scale = image.width / (rollout.shape[1] * patch)
    shade = mask(rollout, (image.height, image.width), patch * scale)
    return Image.composite(image, Image.new("RGB", image.size), shade)


def enlarged(image: Image.Image, smallest: int = SMALLEST) -> Image.Image:
    """In RGB, whole times as large, so that no side is far below `smallest`."""
    times = max(1, round(smallest / max(image.size)))
    size = image.width * times, image.height * times
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST)


def beside(images: Sequence[Image.Image], gap: int = 4) -> Image.Image:
    """Pictures in a row."""
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    sheet = Image.new("RGB", (width, max(image.height for image in images)), (PAPER,) * 3)
    x = 0
    for image in images:
        sheet.paste(image, (x, 0))
        x += image.width + gap
    return sheet


def coloured(values: Numbers, low: float, high: float, name: str = "viridis") -> Numbers:
    """(..., ) -> (..., 3) uint8: `low` and below the first colour of the map, `high` the last."""
    import matplotlib

    span = high - low if high > low else 1.0
    picked = matplotlib.colormaps[name](np.clip((values - low) / span, 0.0, 1.0))
    return np.rint(picked[..., :3] * 255).astype(np.uint8)


def sheet(tiles: Numbers, columns: int, scale: int, names: Sequence[str] = ()) -> Image.Image:
    """(n, rows, cols, 3) uint8 -> the tiles, each `scale` times as large, named below."""
    n, rows, cols, _ = tiles.shape
    caption = 12 if names else 0
    wide, high = cols * scale + GAP, rows * scale + GAP + caption
    lines = -(-n // columns)
    whole = Image.new("RGB", (columns * wide - GAP, lines * high - GAP), (PAPER,) * 3)
    draw = ImageDraw.Draw(whole)
    for number, tile in enumerate(tiles):
        x, y = number % columns * wide, number // columns * high
        picture = Image.fromarray(np.ascontiguousarray(tile))
        whole.paste(picture.resize((cols * scale, rows * scale), Image.Resampling.NEAREST), (x, y))
        if names:
            draw.text((x, y + rows * scale), names[number], fill=(60, 60, 60))
    return whole


def scale_for(side: int, wanted: int) -> int:
    """How many times as large a tile of `side` pixels is drawn to be about `wanted` wide."""
    return max(1, round(wanted / side))


def filter_tiles(filters: Numbers, wanted: int = 64) -> Image.Image:
    """(n, C, P, P) -> the components in rows of seven, zero grey, each at full contrast."""
    peak = np.abs(filters).max(axis=(1, 2, 3), keepdims=True)
    levels = np.rint(127.5 + 127.5 * filters / np.maximum(peak, 1e-30)).astype(np.uint8)
    tiles = levels.transpose(0, 2, 3, 1)  # (n, P, P, C)
    if tiles.shape[3] != 3:  # grey, or channels that are no colours: the first
        tiles = np.repeat(tiles[..., :1], 3, axis=3)
    return sheet(tiles, min(7, len(tiles)), scale_for(tiles.shape[1], wanted))


def similarity_tiles(similarity: Numbers, grid: tuple[int, int], most: int = 16) -> Image.Image:
    """(N, N) -> one tile a position, in its place; at most `most` rows and columns of tiles.

    Inside a tile each point is one other position; dark is -1, bright 1, as in figure 10.
    """
    rows, cols = grid
    chosen = [spread_out(side, most) for side in grid]
    tiles = similarity.reshape(rows, cols, rows, cols)[np.ix_(*chosen)]
    tiles = tiles.reshape(-1, rows, cols)
    return sheet(coloured(tiles, -1, 1), len(chosen[1]), scale_for(max(grid), 42))


def spread_out(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(place) for place in np.linspace(0, count - 1, most)})


def map_tiles(maps: Numbers, names: Sequence[str], columns: int = 6) -> Image.Image:
    """(n, rows, cols) -> one tile a map, each divided by its maximum."""
    peak = maps.max(axis=(1, 2), keepdims=True)
    tiles = coloured(maps / np.maximum(peak, 1e-30), 0, 1, "inferno")
    scale = scale_for(max(maps.shape[1:]), 98)
    return sheet(tiles, min(columns, len(tiles)), scale, names)


def distance_blocks(distance: Numbers, farthest: float) -> Image.Image:
    """(L, H) -> a small picture: a row a layer, heads from near to far; dark is 0."""
    tiles = coloured(np.sort(distance, axis=1), 0, farthest)
    return Image.fromarray(tiles)


def distance_plot(distance: Numbers, uniform: float, names: Sequence[str]) -> Any:
    """(L, H) in pixels -> a matplotlib figure: figure 11 of the paper."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    layers, heads = distance.shape
    for head, line in enumerate(np.sort(distance, axis=1).T):
        colour = matplotlib_colour(head, heads)
        axes.scatter(np.arange(layers), line, s=14, color=colour)
    axes.axhline(uniform, color="0.6", linewidth=1, linestyle="--", label="uniform attention")
    step = max(1, layers // 12)
    axes.set_xticks(range(0, layers, step), [names[i] for i in range(0, layers, step)])
    axes.set_xlabel("layer (a point a head)")
    axes.set_ylabel("mean attention distance (pixels)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="lower right")
    return figure


def matplotlib_colour(number: int, count: int) -> tuple[float, float, float, float]:
    """The colour of one of `count` series."""
    import matplotlib

    colour: tuple[float, float, float, float] = matplotlib.colormaps["viridis"](
        number / max(count, 2)
    )
    return colour
