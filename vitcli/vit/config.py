"""ViTConfig, the checked settings of a Vision Transformer."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, cast, get_args, get_origin

from vitcli.config.choices import (
    Gelu,
    MlpKind,
    NormKind,
    Pool,
    Position,
    PositionAt,
    PositionBias,
    Rope,
    RopeDtype,
    RopePairs,
    StemArithmetic,
)
from vitcli.vit.config_checks import LARGEST, check_count, check_rope
from vitcli.vit.conv_stem import MAX_STAGES
from vitcli.vit.hybrid import stem_channels
from vitcli.vit.patches import grid_size

# 512x512 patches: a side of 8192 px at patch size 16. `depth` costs time even without memory.
LARGEST_OF = {"depth": 1000, "num_heads": 10**4, "num_registers": 1000}
MAX_PATCHES = 512**2
MAY_BE_ZERO = ("num_classes", "num_registers")  # the other counts are at least 1

# Names of the poolings in Hugging Face, DeiT, timm and big_vision.
POOL_ALIASES = {"cls": "token", "tok": "token", "avg": "mean", "gap": "mean", "grid": "quadrants"}


@dataclass(frozen=True)
class ViTConfig:
    """All settings that change the outputs of a Vision Transformer.

    The defaults are the ViT-B/16 of the paper with timm's exact GELU and LayerNorm epsilon 1e-6.

    Attributes:
        image_size: (Y, X) in pixels.
        patch_size: side of a patch in pixels; in a hybrid, in cells of the feature map.
        num_channels: channels of an image.
        embed_dim: width of a token.
        depth: number of blocks.
        num_heads: attention heads per block.
        mlp_dim: hidden width of the MLP.
        num_classes: outputs of the head; 0 for a backbone without a head.
        pool: the input of the head. `token`: the class token. `mean`: the mean of the patches.
            `quadrants`: the means of the four quarters of the image, concatenated (4 D wide).
            `map`: one learned query attends to the patches (big_vision).
            `token_mean`: class token and mean of the patches, concatenated (DINOv2, 2 D wide).
            `distilled`: class token and distillation token, concatenated (DeiT, 2 D wide).
        pool_blocks: pool the outputs of this many last blocks, each after the final LayerNorm, and
            concatenate them, the last block at the end (linear evaluation of DINO).
        class_token: prepend a learned class token.
        distillation_token: add a second learned token after the class token (DeiT).
        distillation_head: with pool `distilled`, each of the two tokens has a head, and the logits
            are their mean. Without it one head reads both tokens.
        num_registers: learned tokens that nothing reads (Darcet et al., 2024).
        position: `learned`: one table over the row-major sequence ("1-D"). `learned2d`: a table for
            columns and a table for rows, each of half the width. `relative`: an attention bias by
            offset in the sequence. `sincos2d`: fixed. `none`. (Appendix D.4.)
        position_at: `stem`: add positions once, to the embedded patches. `every`: add them at the
            input of every block, from a table per block. `shared`: the same with one table. (Table
            8.)
        position_bias: add a learned number per head and 2-D offset to the attention scores (BEiT),
            from a table per block (`every`) or from one (`shared`). It goes with any `position`.
        position_covers_prefix: add positions to the prefix tokens too, as the paper does.
            big_vision and timm's `no_embed_class` do not.
        representation_size: width of the tanh layer before the head ("pre-logits", used in
            pre-training); None for no such layer.
        qkv_bias: the projection to queries, keys and values has a bias.
        qk_norm: apply a LayerNorm to queries and keys.
        layer_scale: initial value of LayerScale; None for no LayerScale.
        mlp: `gelu`, or `swiglu`: silu(x1) * x2, where one projection of width 2 * mlp_dim gives
            both halves (DINOv2).
        gelu: `exact`, `tanh` for the approximation in the official code, or `quick` for
            x * sigmoid(1.702 x) (OpenAI's CLIP).
        norm: `layer` for LayerNorm, or `rms` for RMSNorm (AIMv2), in all places.
        norm_eps: epsilon of all norms.
        norm_before_blocks: a LayerNorm between the positions and the first block (CLIP; timm's
            `norm_pre`).
        norm_after_pool: apply the final LayerNorm to the pooled vector (timm's `fc_norm`).
        final_norm: a norm between the last block and the pooling; the classifiers of CLIP in
            transformers have none.
        patch_bias: the patch projection has a bias.
        pixel_norm: a LayerNorm of the pixels of a patch before their projection. With `patch_norm`
            it is Dual PatchNorm (Kumar et al., 2023), which vit-pytorch has.
        patch_norm: a norm between the patch projection and the positions (AIMv2).
        projection_size: width of a projection without bias between the features and the head, into
            the space of text embeddings (CLIP); None for no such projection. Without a head,
            nothing reads it.
        head_norm: divide the input of the head by its L2 norm, so that logits are cosines of the
            rows of the head (zero-shot heads).
        crop_to_patches: images may have another size than whole patches: the rest at the right and
            at the bottom is cut off, as by a convolution (SigLIP So400m/14 at 384 px).
        axial: each block attends along the rows, then along the columns (appendix D.6).
        stem: units in each stage of a ResNet in front of the patches (hybrids); `()` for its root
            alone, None for no ResNet.
        stem_width: factor on the width of the ResNet, which starts with 64 channels.
        stem_arithmetic: weight standardisation and GroupNorm epsilon of `google` or of `timm`.
        conv_stem: feature maps of each stage of a convolutional stem in front of the patches. Each
            stage halves the image; those before the last two are one strided convolution each.
            None for no such stem.
        dropout_rate: dropout after the positions, the attention projection and both MLP layers.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        key_bias: with `qkv_bias`, the keys have a bias too. EVA-02 and DINOv3 have none.
        attention_norm: a LayerNorm before the last projection of the attention (EVA-02-CLIP).
        mlp_norm: a LayerNorm before the last layer of the MLP (EVA-02).
        rope: rotary positions of the patches in queries and keys (`vit/rope.py`), in addition to
            `position`. `centred`: the coordinates of an image go from -1 to 1 (DINOv3). `index`:
            they count patches (EVA-02). None: no rotary positions.
        rope_theta: ratio of the longest period to the shortest: 100 in DINOv3, 10,000 in EVA-02.
        rope_pairs: the channels that are rotated together. `halves`: i and i + E/2 (DINOv3).
            `neighbours`: 2 i and 2 i + 1 (EVA-02).
        rope_grid: with `index`, the rows and columns to which every grid is scaled; None counts
            patches.
        rope_dtype: dtype to which the periods are rounded, because the weights were trained so.
        rope_shift, rope_jitter, rope_rescale: in training, shift the coordinates by at most this
            number, scale each axis, and scale both, by at most this factor or its inverse.

    Raises:
        ValueError: the network cannot be built with these settings.
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
    pool_blocks: int = 1
    class_token: bool = True
    distillation_token: bool = False
    distillation_head: bool = False
    num_registers: int = 0
    position: Position = "learned"
    position_at: PositionAt = "stem"
    position_bias: PositionBias = "none"
    position_covers_prefix: bool = True
    representation_size: int | None = None
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: float | None = None
    mlp: MlpKind = "gelu"
    gelu: Gelu = "exact"
    norm: NormKind = "layer"
    norm_eps: float = 1e-6
    norm_before_blocks: bool = False
    norm_after_pool: bool = False
    final_norm: bool = True
    patch_bias: bool = True
    pixel_norm: bool = False
    patch_norm: bool = False
    projection_size: int | None = None
    head_norm: bool = False
    crop_to_patches: bool = False
    axial: bool = False
    stem: tuple[int, ...] | None = None
    stem_width: float = 1.0
    stem_arithmetic: StemArithmetic = "google"
    conv_stem: tuple[int, ...] | None = None
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    key_bias: bool = True
    attention_norm: bool = False
    mlp_norm: bool = False
    rope: Rope | None = None
    rope_theta: float = 100.0
    rope_pairs: RopePairs = "halves"
    rope_grid: tuple[int, int] | None = None
    rope_dtype: RopeDtype = "fp32"
    rope_shift: float | None = None
    rope_jitter: float | None = None
    rope_rescale: float | None = None

    def __post_init__(self) -> None:
        self._check_values()
        if self.embed_dim % self.num_heads:
            raise ValueError(f"width {self.embed_dim} is not a multiple of {self.num_heads} heads")
        self._check_stem()
        self._check_tokens(*self.grid)
        self._check_positions()
        check_rope(self)

    def _check_values(self) -> None:
        """Check each setting by itself, because it may come from a damaged file."""
        for field in fields(self):
            key, kind, value = field.name, field.type, getattr(self, field.name)
            if get_origin(kind) is Literal and value not in get_args(kind):
                known = ", ".join(f"`{choice}`" for choice in get_args(kind))
                raise ValueError(f"unknown {key} `{value}`; use one of {known}")
            if kind is int:
                least, largest = int(key not in MAY_BE_ZERO), LARGEST_OF.get(key, LARGEST)
                check_count(key, value, least, largest)
            if kind is bool and not isinstance(value, bool):
                raise ValueError(f"{key} is {value!r}, not true or false")
        for side in self.image_size:
            check_count("image_size", side, 1)
        for key in ("representation_size", "projection_size"):
            if getattr(self, key) is not None:
                check_count(key, getattr(self, key), 1)
        for key in ("dropout_rate", "drop_path_rate"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}, not a share from 0 on, below 1")
        if not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps is {self.norm_eps}, not a small number above 0")
        if self.layer_scale is not None and not math.isfinite(self.layer_scale):
            raise ValueError(f"layer_scale is {self.layer_scale}")

    def _check_stem(self) -> None:
        if self.is_hybrid and (self.pixel_norm or self.patch_norm):
            raise ValueError("a stem has norms of its own: no `pixel_norm` and no `patch_norm`")
        if self.is_hybrid and self.crop_to_patches:
            raise ValueError("a stem rounds up: `crop_to_patches = false`")
        if self.stem is not None and (len(self.stem) > 4 or any(n < 1 for n in self.stem)):
            raise ValueError(
                f"stem {self.stem}: up to four stages, each of one block or more; `()` is the root "
                "alone"
            )
        stem_channels(self.stem_width)  # complains of a width that cannot be built
        if self.conv_stem is None:
            return
        if self.stem is not None:
            raise ValueError("a model has `stem` (a ResNet) or `conv_stem`, not both")
        if not 1 <= len(self.conv_stem) <= MAX_STAGES:
            raise ValueError(f"conv_stem {self.conv_stem}: one to {MAX_STAGES} stages")
        for channels in self.conv_stem:
            check_count("conv_stem", channels, 1)

    def _check_tokens(self, rows: int, cols: int) -> None:
        """Check that the tokens exist that the pooling and the blocks read."""
        pool = self.pool
        if rows * cols > MAX_PATCHES:
            raise ValueError(f"{rows}x{cols} patches per image are more than {MAX_PATCHES:,}")
        if pool in ("token", "token_mean", "distilled") and not self.class_token:
            raise ValueError(f"pool `{pool}` needs the class token (`class_token = true`)")
        if pool == "quadrants" and min(rows, cols) < 2:
            raise ValueError(f"pool `quadrants` needs a grid of 2x2 patches, not {rows}x{cols}")
        if pool == "distilled" and not self.distillation_token:
            raise ValueError("pool `distilled` needs `distillation_token = true`")
        if self.pool_blocks > 1:
            self._check_pool_blocks()
        if self.distillation_token and not self.class_token:
            raise ValueError("the distillation token stands beside a class token")
        if self.distillation_head and pool != "distilled":
            raise ValueError(f"a distillation head needs pool `distilled`, not `{pool}`")
        if self.distillation_head and (self.representation_size or self.projection_size):
            raise ValueError("a distillation head has no pre-logits and no projection before it")
        if self.distillation_head and self.head_norm:
            raise ValueError("a distillation head reads its token as it is: `head_norm = false`")
        if self.norm_after_pool and not self.final_norm:
            raise ValueError("`norm_after_pool = true` needs the final norm (`final_norm = true`)")
        if self.axial and self.num_prefix_tokens:
            raise ValueError(
                "axial blocks have rows and columns of patches only: `class_token = false`, no "
                "registers, no distillation token, pool `mean`, `quadrants` or `map`"
            )

    def _check_pool_blocks(self) -> None:
        """Check that the pooling has no weights: they would be trained for the last block only."""
        if self.pool_blocks > self.depth:
            raise ValueError(
                f"pool_blocks is {self.pool_blocks}, but there are {self.depth} blocks"
            )
        if self.pool in ("map", "distilled") or self.representation_size:
            raise ValueError(
                f"pool_blocks = {self.pool_blocks} goes with pool `token`, `mean`, `quadrants` or "
                "`token_mean`, and without `representation_size`"
            )

    def _check_positions(self) -> None:
        kind, at, d = self.position, self.position_at, self.embed_dim
        if kind == "sincos2d" and d % 4:
            raise ValueError(f"sin-cos positions need a width that 4 divides, not {d}")
        if kind == "learned2d" and d % 2:
            raise ValueError(f"learned 2-D positions need an even width, not {d}")
        if at != "stem" and kind in ("none", "relative"):
            raise ValueError(f"position `{kind}` is added nowhere: `position_at` must be `stem`")
        if at == "every" and kind == "sincos2d":
            raise ValueError("fixed positions are the same in every block: `position_at = shared`")
        if self.position_bias != "none" and self.axial:
            raise ValueError("axial blocks have no 2-D offsets: `position_bias = none`")

        if not (self.key_bias or self.qkv_bias):
            raise ValueError("`key_bias = false` goes with `qkv_bias = true`")

    @property
    def is_hybrid(self) -> bool:
        """True if a stem makes a feature map, and the patches are cut from it."""
        return self.stem is not None or self.conv_stem is not None

    @property
    def stem_stride(self) -> int:
        """Side in pixels of a cell of the stem's feature map; 1 without a stem."""
        if self.conv_stem is not None:
            return int(2 ** len(self.conv_stem))
        # The root halves the image twice, and each stage after the first halves it once more.
        return 1 if self.stem is None else int(4 * 2 ** max(len(self.stem) - 1, 0))

    @property
    def pixels_per_patch(self) -> int:
        """Side of a patch in image pixels: the patch size times the stride of the stem."""
        return self.patch_size * self.stem_stride

    def grid_of(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches in an image of (Y, X) pixels.

        Raises:
            ValueError: the patch size does not divide the image, or the feature map of the stem.
        """
        if not self.is_hybrid:
            return grid_size(self.cropped_size(image_size), self.patch_size)
        # The `SAME` padding of the official code rounds up in each halving, and so do max-pools.
        rows, cols = (-(-side // self.stem_stride) for side in image_size)
        if rows % self.patch_size or cols % self.patch_size:
            raise ValueError(
                f"image size {image_size[0]}x{image_size[1]} gives a feature map of {rows}x{cols} "
                f"cells, which is not a multiple of patch size {self.patch_size}"
            )
        return rows // self.patch_size, cols // self.patch_size

    def cropped_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(Y, X) of the pixels that the patches cover; smaller with `crop_to_patches` only."""
        rows, cols = (side - side % self.patch_size for side in image_size)
        return (rows, cols) if self.crop_to_patches and rows and cols else image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.grid_of(self.image_size)

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before the patches: class token, distillation token and registers."""
        return int(self.class_token) + int(self.distillation_token) + self.num_registers

    @property
    def num_covered_tokens(self) -> int:
        """Number of prefix tokens with an entry in the position table, at its start."""
        covered = self.position_covers_prefix and self.position in ("learned", "sincos2d")
        return self.num_prefix_tokens if covered else 0

    @property
    def num_tokens(self) -> int:
        """T: number of prefix tokens and patches."""
        return self.num_prefix_tokens + self.grid[0] * self.grid[1]

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled output of one block."""
        return self.embed_dim * {"quadrants": 4, "token_mean": 2, "distilled": 2}.get(self.pool, 1)

    @property
    def feature_dim(self) -> int:
        """F: width of the features. With two distilled heads each head reads one half."""
        return self.representation_size or self.pooled_dim * self.pool_blocks

    @property
    def head_dim(self) -> int:
        """Input width of `head`, and of `head_dist` if it exists."""
        width = self.projection_size or self.feature_dim
        return width // 2 if self.distillation_head else width

    @property
    def min_parameters(self) -> int:
        """A lower bound on the number of parameters, without building the network."""
        block = 4 * self.embed_dim**2 + 2 * self.embed_dim * self.mlp_dim
        return self.depth * block + self.head_dim * self.num_classes

    def to_dict(self) -> dict[str, Any]:
        """JSON values for the header of a weights file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from `to_dict`'s values; raises a ValueError that names unknown keys."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown model settings: {', '.join(unknown)}")
        values = dict(values)
        if "image_size" in values:
            y, x = values["image_size"]
            values["image_size"] = (int(y), int(x))
        for key in ("stem", "conv_stem", "rope_grid"):  # JSON has no tuples
            if values.get(key) is not None:
                values[key] = tuple(int(number) for number in values[key])
        return cls(**values)


def canonical_pool(name: str) -> Pool:
    """Our name of a pooling, for any of the spellings in use; raises a ValueError if unknown."""
    name = POOL_ALIASES.get(name, name)
    if name not in get_args(Pool):
        known = ", ".join(f"`{pool}`" for pool in get_args(Pool))
        raise ValueError(f"unknown pooling `{name}`; use one of {known}")
    return cast(Pool, name)
