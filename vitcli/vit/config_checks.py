"""Checks of the settings of a network that need no other setting of it, and those of RoPE."""

import math
from dataclasses import fields
from numbers import Integral
from typing import TYPE_CHECKING, Any, get_args

from vitcli.config.choices import Rope

if TYPE_CHECKING:
    from vitcli.vit.config import ViTConfig

# Above any sensible size, and small enough that torch's 64-bit byte counts do not overflow.
LARGEST = 10**6


def check_count(key: str, value: Any, least: int, largest: int = LARGEST) -> None:
    """Raise a ValueError unless the setting `key` is an integer from `least` to `largest`."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or not least <= value <= largest:
        raise ValueError(f"{key} is {value!r}, not a whole number from {least} to {largest:,}")


def check_rope(config: "ViTConfig") -> None:
    """Raise a ValueError if the settings of rotary positions contradict each other."""
    if config.rope is None:
        for field in fields(config):
            if field.name.startswith("rope_") and getattr(config, field.name) != field.default:
                raise ValueError(f"{field.name} needs rotary positions (`rope`)")
        return
    if config.rope not in get_args(Rope):
        known = ", ".join(f"`{choice}`" for choice in get_args(Rope))
        raise ValueError(f"unknown rope `{config.rope}`; use one of {known}")
    head_dim = config.embed_dim // config.num_heads
    if head_dim % 4:
        raise ValueError(f"rotary positions need heads whose width 4 divides, not {head_dim}")
    if config.axial:
        raise ValueError("axial blocks have no rotary positions: remove `rope` or `axial`")
    if config.rope_grid is not None and config.rope != "index":
        raise ValueError(f"rope_grid goes with `rope = index`, not `{config.rope}`")
    if config.rope_grid is not None and len(config.rope_grid) != 2:
        raise ValueError(f"rope_grid is {list(config.rope_grid)}, not rows and columns")
    for side in config.rope_grid or ():
        check_count("rope_grid", side, 1)
    least = {"rope_theta": 1, "rope_jitter": 1, "rope_rescale": 1, "rope_shift": 0}
    for key, bound in least.items():
        if (value := getattr(config, key)) is not None and not bound <= value < math.inf:
            raise ValueError(f"{key} is {value}, not a number from {bound} on")
