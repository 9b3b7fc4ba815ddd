"""Pictures of the inspected numbers. Pillow draws; matplotlib provides colour maps and axes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from vitcli.report.charts import BLUE

Array = NDArray[Any]
MIN_SIDE = 224  # px; smaller images are enlarged to about this size
GAP = 2  # px between tiles
# The range of a rollout that is shown, and the brightness of its lowest values.
MASK_PERCENTILES, DARKEST = (5, 80), 0.2
PEAK_PERCENTILE = 95  # of a map of attention: its 5 % brightest patches look the same
CAPTION_SIZE = 20.0  # px, legible on a phone that shows a tile at half of its size
WHITE = (255, 255, 255)


def rollout_mask(rollout: Array, size: tuple[int, int], patch: float) -> Image.Image:
    """(rows, cols) -> a grey picture of `size` (Y, X), 0 to 255, bright where attention is high.

    Drawn as in figure 6 (google-research/vision_transformer#27): divide by the maximum, enlarge
    with LANCZOS, blur by one patch, stretch to the whole range.
    """
    rows, cols = size
    scaled = (rollout / max(float(rollout.max()), 1e-30) * 255).astype(np.float32)
    large = Image.fromarray(scaled).resize((cols, rows), Image.Resampling.LANCZOS).convert("L")
    blurred = np.asarray(large.filter(ImageFilter.GaussianBlur(radius=patch)), dtype=np.float64)
    blurred = blurred - blurred.min()
    # A constant rollout has no range to stretch: the mask is white everywhere.
    stretched = blurred * (255 / blurred.max()) if blurred.max() > 0 else np.full(size, 255.0)
    return Image.fromarray(np.rint(stretched).astype(np.uint8))


def overlay_rollout(image: Image.Image, rollout: Array, patch: int) -> Image.Image:
    """The image, dark where the rollout is low.

    The rollout often has a single high peak, and a mask in proportion to it is nearly black. So the
    range between two percentiles is stretched to `DARKEST` … 1.
    """
    scale = image.width / (rollout.shape[1] * patch)
    mask = np.asarray(rollout_mask(rollout, (image.height, image.width), patch * scale)) / 255
    low, high = np.percentile(mask, MASK_PERCENTILES)
    stretched = np.clip((mask - low) / (high - low), 0, 1) if high > low else mask
    shade = DARKEST + (1 - DARKEST) * stretched  # (Y, X)
    return Image.fromarray(np.rint(np.asarray(image) * shade[..., None]).astype(np.uint8))


def enlarge(image: Image.Image, min_side: int = MIN_SIDE) -> Image.Image:
    """The image in RGB, enlarged by a whole factor to about `min_side` px."""
    factor = max(1, round(min_side / max(image.size)))
    size = image.width * factor, image.height * factor
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST)


def hstack_images(images: Sequence[Image.Image], gap: int = 4) -> Image.Image:
    """The images side by side on white."""
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    row = Image.new("RGB", (width, max(image.height for image in images)), WHITE)
    x = 0
    for image in images:
        row.paste(image, (x, 0))
        x += image.width + gap
    return row


def apply_colormap(values: Array, low: float, high: float, name: str = "viridis") -> Array:
    """(...,) -> (..., 3) uint8; values outside `low` to `high` are clipped."""
    import matplotlib

    span = high - low if high > low else 1.0
    colours = matplotlib.colormaps[name](np.clip((values - low) / span, 0.0, 1.0))
    return np.rint(colours[..., :3] * 255).astype(np.uint8)


def draw_tiles(tiles: Array, columns: int, scale: int, names: Sequence[str] = ()) -> Image.Image:
    """(n, rows, cols, 3) uint8 -> the tiles, each enlarged by `scale`, with its name below."""
    n, rows, cols, _ = tiles.shape
    font = _caption_font(names, cols * scale)
    caption = round(1.3 * font.size) if names else 0
    width, height = cols * scale + GAP, rows * scale + GAP + caption
    lines = -(-n // columns)
    sheet = Image.new("RGB", (columns * width - GAP, lines * height - GAP), WHITE)
    draw = ImageDraw.Draw(sheet)
    for number, tile in enumerate(tiles):
        x, y = number % columns * width, number // columns * height
        picture = Image.fromarray(np.ascontiguousarray(tile))
        sheet.paste(picture.resize((cols * scale, rows * scale), Image.Resampling.NEAREST), (x, y))
        if names:
            draw.text((x, y + rows * scale), names[number], (60, 60, 60), font)
    return sheet


def _caption_font(names: Sequence[str], width: int) -> Any:
    """The font of CAPTION_SIZE, or smaller, so that every name is at most `width` px wide."""
    font: Any = ImageFont.load_default(CAPTION_SIZE)
    longest = max((font.getlength(name) for name in names), default=0.0)
    if longest > width:
        font = ImageFont.load_default(max(8, int(CAPTION_SIZE * width / longest)))
    return font


def tile_scale(side: int, target: int) -> int:
    """The whole factor that enlarges a tile of `side` px to about `target` px."""
    return max(1, round(target / side))


def draw_filters(filters: Array, tile_side: int = 64) -> Image.Image:
    """(n, C, P, P) -> one tile per component, seven per row; zero is grey, full contrast each."""
    peak = np.abs(filters).max(axis=(1, 2, 3), keepdims=True)
    levels = np.rint(127.5 + 127.5 * filters / np.maximum(peak, 1e-30)).astype(np.uint8)
    tiles = levels.transpose(0, 2, 3, 1)  # (n, P, P, C)
    if tiles.shape[3] != 3:  # grey, or channels that are not colours: draw the first channel
        tiles = np.repeat(tiles[..., :1], 3, axis=3)
    return draw_tiles(tiles, min(7, len(tiles)), tile_scale(tiles.shape[1], tile_side))


def draw_similarity(similarity: Array, grid: tuple[int, int], max_tiles: int = 16) -> Image.Image:
    """(N, N) -> one tile per position, arranged as the positions; at most `max_tiles` per side.

    Each point of a tile is one other position, from -1 (dark) to 1 (bright), as in figure 10.
    """
    rows, cols = grid
    places = [tile_positions(side, max_tiles) for side in grid]
    tiles = similarity.reshape(rows, cols, rows, cols)[np.ix_(*places)]
    tiles = tiles.reshape(-1, rows, cols)
    return draw_tiles(apply_colormap(tiles, -1, 1), len(places[1]), tile_scale(max(grid), 42))


def tile_positions(count: int, limit: int) -> list[int]:
    """At most `limit` of the numbers below `count`, with the first and the last."""
    if count <= limit:
        return list(range(count))
    return sorted({round(place) for place in np.linspace(0, count - 1, limit)})


def draw_maps(maps: Array, names: Sequence[str], columns: int = 6) -> Image.Image:
    """(n, rows, cols) -> one tile per map, each divided by its PEAK_PERCENTILE.

    A few patches, often in the corners, can take most of the attention. Divided by the maximum, all
    others are black.
    """
    peak = np.percentile(maps, PEAK_PERCENTILE, axis=(1, 2), keepdims=True)
    peak = np.where(peak > 0, peak, maps.max(axis=(1, 2), keepdims=True))
    tiles = apply_colormap(maps / np.maximum(peak, 1e-30), 0, 1, "inferno")
    return draw_tiles(tiles, min(columns, len(tiles)), tile_scale(max(maps.shape[1:]), 98), names)


def draw_distances(distance: Array, limit: float) -> Image.Image:
    """(L, H) -> one pixel per head, a row per layer, heads sorted by distance; 0 is dark."""
    return Image.fromarray(apply_colormap(np.sort(distance, axis=1), 0, limit))


def plot_distances(distance: Array, uniform: float, names: Sequence[str]) -> Any:
    """(L, H) in px -> a matplotlib figure like figure 11 of the paper."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    layers, heads = distance.shape
    # One colour, which the page makes lighter on a dark background.
    places = np.repeat(np.arange(layers), heads)
    axes.scatter(places, distance.ravel(), s=14, color=BLUE, alpha=0.8)
    axes.axhline(uniform, color="0.6", linewidth=1, linestyle="--", label="uniform attention")
    step = max(1, layers // 12)
    axes.set_xticks(range(0, layers, step), [names[i] for i in range(0, layers, step)])
    axes.set_xlabel("layer (one point per head)")
    axes.set_ylabel("mean attention distance (px)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="lower right")
    return figure
