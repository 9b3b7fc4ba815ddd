"""What a model is made of, and the sizes that have names."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Self, cast

from vitcli.vit.patches import grid_size

Pool = Literal["token", "mean", "quadrants", "map"]
Position = Literal["learned", "sincos2d", "none"]
Gelu = Literal["exact", "tanh"]

# Other people's words for the same thing: Hugging Face and DeiT, timm, big_vision.
POOL_ALIASES = {"cls": "token", "tok": "token", "avg": "mean", "gap": "mean", "grid": "quadrants"}


@dataclass(frozen=True)
class ViTConfig:
    """Everything that decides the computation of a Vision Transformer, and nothing else.

    Sizes are in pixels, widths in numbers. The defaults are ViT-B/16 of the paper in timm's
    arithmetic: exact GELU, LayerNorm epsilon 1e-6.

    Attributes:
        num_classes: outputs of the head; 0 is a backbone without one.
        pool: what the head reads. `token`: the class token. `mean`: the mean of the patch tokens.
            `quadrants`: the means of the four quarters of the image, concatenated (4 D wide).
            `map`: one learned query attends to the patch tokens (big_vision).
        position_covers_prefix: positions are also added to class token and registers (the paper);
            big_vision and `no_embed_class` of timm leave these without.
        representation_size: width of the tanh layer before the head ("pre-logits", used in
            pre-training); None for none.
        layer_scale: starting value of LayerScale, or None for none.
        norm_after_pool: the final LayerNorm acts on the pooled vector (timm's `fc_norm`).
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.

    Raises:
        ValueError: a combination that cannot be built, said in words.
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    num_channels: int = 3
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    num_classes: int = 0
    pool: Pool = "token"
    class_token: bool = True
    num_registers: int = 0
    position: Position = "learned"
    position_covers_prefix: bool = True
    representation_size: int | None = None
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: float | None = None
    gelu: Gelu = "exact"
    norm_eps: float = 1e-6
    norm_after_pool: bool = False
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        rows, cols = self.grid
        if self.embed_dim % self.num_heads:
            raise ValueError(f"width {self.embed_dim} is not a multiple of {self.num_heads} heads")
        if self.pool == "token" and not self.class_token:
            raise ValueError("pool `token` needs the class token (`class_token = true`)")
        if self.pool == "quadrants" and min(rows, cols) < 2:
            raise ValueError(f"pool `quadrants` needs a grid of 2x2 patches, not {rows}x{cols}")
        if self.position == "sincos2d" and self.embed_dim % 4:
            raise ValueError(f"sin-cos positions need a width that 4 divides, not {self.embed_dim}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return grid_size(self.image_size, self.patch_size)

    @property
    def num_prefix_tokens(self) -> int:
        """Class token and registers, which stand before the patches."""
        return int(self.class_token) + self.num_registers

    @property
    def num_tokens(self) -> int:
        """T: prefix tokens and patches."""
        return self.num_prefix_tokens + self.grid[0] * self.grid[1]

    @property
    def pooled_dim(self) -> int:
        """Width of what the pooling gives."""
        return self.embed_dim * (4 if self.pool == "quadrants" else 1)

    @property
    def feature_dim(self) -> int:
        """Width of what the head reads."""
        return self.representation_size or self.pooled_dim

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a file's header."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; an unknown key is a ValueError that names it."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown model settings: {', '.join(unknown)}")
        values = dict(values)
        if "image_size" in values:
            y, x = values["image_size"]
            values["image_size"] = (int(y), int(x))
        return cls(**values)


@dataclass(frozen=True)
class Variant:
    """The four numbers behind a name."""

    embed_dim: int
    depth: int
    mlp_dim: int
    num_heads: int


VARIANTS = {
    # For images of about 32 pixels and an hour of two CPU cores; ours.
    "Pico": Variant(128, 6, 512, 4),
    "Nano": Variant(192, 6, 768, 3),
    # DeiT and AugReg (Ti, S), table 1 of the paper (B, L, H).
    "Ti": Variant(192, 12, 768, 3),
    "S": Variant(384, 12, 1536, 6),
    "B": Variant(768, 12, 3072, 12),
    "L": Variant(1024, 24, 4096, 16),
    "H": Variant(1280, 32, 5120, 16),
}


def is_variant(name: str) -> bool:
    """Whether `name` is spelled like a variant (`B/16`), known or not."""
    return re.fullmatch(r"[A-Za-z0-9+]+/\d+", name) is not None


def parse_variant(name: str, **settings: Any) -> ViTConfig:
    """`B/16` -> its configuration, with `settings` (fields of ViTConfig) laid over it.

    Raises:
        ValueError: there is no such variant, or the settings contradict each other.
    """
    size, _, patch = name.partition("/")
    if size not in VARIANTS or not patch.isdigit():
        known = ", ".join(VARIANTS)
        close = next((v for v in VARIANTS if v.lower() == size.lower()), None)
        meant = f"; `{close}/{patch}` is one" if close and patch.isdigit() else ""
        raise ValueError(f"no model variant `{name}`: a size ({known}), `/`, a patch size{meant}")
    variant = VARIANTS[size]
    values = {"patch_size": int(patch), **asdict(variant), **settings}
    return replace(
        ViTConfig.from_dict({**values, "pool": normal_pool(values.get("pool", "token"))})
    )


def normal_pool(name: str) -> Pool:
    """The pooling that `name` means, in any of the spellings in use.

    Raises:
        ValueError: no such pooling.
    """
    name = POOL_ALIASES.get(name, name)
    if name not in ("token", "mean", "quadrants", "map"):
        raise ValueError(f"no pooling `{name}`: `token`, `mean`, `quadrants` or `map`")
    return cast(Pool, name)
