"""timm's class Beit (BEiT, BEiT v2), and the files of the authors: the bias by 2-D offset."""

import math
from collections.abc import Sequence

from vitcli.config.choices import PositionBias
from vitcli.errors import VitcliError
from vitcli.vit.position import BLOCK_BIAS, SHARED_BIAS, num_offsets
from vitcli.weights.timm.timm_names import TensorShapes


def offset_bias_kind(shape: TensorShapes) -> PositionBias:
    """Return ViTConfig's `position_bias`; `fold_shared_bias` has removed one of two kinds."""
    if SHARED_BIAS in shape:
        return "shared"
    return "every" if any(name.endswith(BLOCK_BIAS) for name in shape) else "none"


def image_size_of_bias(
    shape: TensorShapes,
    pixels: int,
    prefix: int,
    known: Sequence[tuple[int, int] | None],
    source: str,
) -> tuple[int, int]:
    """Return the (Y, X) of the images that the table of offsets is for.

    Args:
        pixels: side of a patch.
        prefix: number of prefix tokens.
        known: sizes to prefer to a square, if they fit.

    Raises:
        VitcliError: no known size fits, and no square.
    """
    name = next(n for n in shape if n == SHARED_BIAS or n.endswith(BLOCK_BIAS))
    count = shape[name][0] - (3 if prefix else 0)
    for size in known:
        grid = (size[0] // pixels, size[1] // pixels) if size else (0, 0)
        if min(grid) > 0 and num_offsets(grid) == count:
            return grid[0] * pixels, grid[1] * pixels
    side = (math.isqrt(max(count, 0)) + 1) // 2
    if side > 0 and num_offsets((side, side)) == count:
        return side * pixels, side * pixels
    raise VitcliError(
        f"`{source}` has an attention bias for {count} offsets, which do not form a square grid",
        hint=f"set `--set model.image_size=[Y,X]` in px; a patch is {pixels}x{pixels} px",
    )
