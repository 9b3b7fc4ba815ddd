"""The Vision Transformer, from pixels to logits.

Shape letters, used in every file: B images, C channels, Y X pixel rows and columns, P patch side,
N patches, T tokens, D width, H heads, E head width, K classes.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vitcli.vit.encoder import Block, Mlp, attend, drop_path_rates
from vitcli.vit.patches import PatchEmbed, grid_size
from vitcli.vit.position import resample, sincos2d
from vitcli.vit.variants import ViTConfig, parse_variant

if TYPE_CHECKING:
    from vitcli.data.transforms import Preprocess
    from vitcli.weights.surgery import LoadReport


class AttentionPool(nn.Module):
    """One learned query attends to the tokens, then an MLP (MAPHead of big_vision)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        d = config.embed_dim
        self.num_heads = config.num_heads
        self.latent = nn.Parameter(torch.zeros(1, 1, d))
        self.q = nn.Linear(d, d)
        self.kv = nn.Linear(d, 2 * d)
        self.proj = nn.Linear(d, d)
        self.norm = nn.LayerNorm(d, eps=config.norm_eps)
        self.mlp = Mlp(d, config.mlp_dim, config.gelu)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, D)."""
        b, n, d = x.shape
        heads = self.num_heads, d // self.num_heads
        q = self.q(self.latent.expand(b, -1, -1)).reshape(b, 1, *heads).transpose(1, 2)
        k, v = self.kv(x).reshape(b, n, 2, *heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = attend(q, k, v).transpose(1, 2).reshape(b, 1, d)  # (B, 1, D)
        x = self.proj(x)
        x = x + self.mlp(self.norm(x))
        return x[:, 0]


class PreLogits(nn.Module):
    """The hidden layer of the pre-training head: one dense layer and a tanh (section 3.2)."""

    def __init__(self, width: int, representation_size: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, representation_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, R)."""
        return torch.tanh(self.fc(x))


class VisionTransformer(nn.Module):
    """ViT of Dosovitskiy et al. (2020); tensor names are timm's.

    Attributes:
        config: what it is made of.
        labels: class names in the order of the logits, or None.
        preprocess: the evaluation transform that belongs to the weights, or None.
        head_trained: whether the head has learned something that `predict` may show.
        load_report: what became of each tensor of the file that it was loaded from, or None.
    """

    pos_embed: Tensor | None

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.labels: tuple[str, ...] | None = None
        self.preprocess: Preprocess | None = None
        self.head_trained = False
        self.load_report: LoadReport | None = None
        d, eps = config.embed_dim, config.norm_eps
        self.patch_embed = PatchEmbed(config.num_channels, config.patch_size, d)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d)) if config.class_token else None
        registers = config.num_registers
        self.reg_token = nn.Parameter(torch.zeros(1, registers, d)) if registers else None
        self._build_positions(config)
        self.pos_drop = nn.Dropout(config.dropout_rate)
        self.blocks = nn.ModuleList(Block(config, rate) for rate in drop_path_rates(config))
        after = config.norm_after_pool
        self.norm = nn.Identity() if after else nn.LayerNorm(d, eps=eps)
        self.attn_pool = AttentionPool(config) if config.pool == "map" else None
        self.fc_norm = nn.LayerNorm(config.pooled_dim, eps=eps) if after else nn.Identity()
        size = config.representation_size
        self.pre_logits = PreLogits(config.pooled_dim, size) if size else nn.Identity()
        classes = config.num_classes
        self.head = nn.Linear(config.feature_dim, classes) if classes else nn.Identity()

    def _build_positions(self, config: ViTConfig) -> None:
        """Learned positions are a parameter; fixed ones a buffer, stored with the weights."""
        if config.position == "none":
            self.pos_embed = None
            return
        covered = config.num_prefix_tokens if config.position_covers_prefix else 0
        if config.position == "learned":
            rows, cols = config.grid
            self.pos_embed = nn.Parameter(torch.zeros(1, covered + rows * cols, config.embed_dim))
            return
        table = sincos2d(config.grid, config.embed_dim)
        if covered:
            table = torch.cat([table.new_zeros(1, covered, config.embed_dim), table], dim=1)
        self.register_buffer("pos_embed", table)

    def init_weights(self, generator: torch.Generator | None = None) -> "VisionTransformer":
        """Draw fresh weights as the official code does, from `generator`; returns self.

        Dense and patch kernels Xavier-uniform, each of query, key and value by itself; MLP biases
        N(0, 1e-6); class token and head 0; positions N(0, 0.02). A zero head makes the first
        loss that of a uniform guess.
        """
        for name, p in self.named_parameters():
            if name.endswith("qkv.weight"):
                for part in p.data.chunk(3):
                    nn.init.xavier_uniform_(part, generator=generator)
            elif name.startswith("patch_embed") and p.ndim == 4:
                nn.init.xavier_uniform_(p.data.flatten(1), generator=generator)
            elif name == "pos_embed" or name in ("reg_token", "attn_pool.latent"):
                nn.init.normal_(p, std=0.02, generator=generator)
            elif name.startswith("head.") or name == "cls_token":
                nn.init.zeros_(p)
            elif p.ndim == 2:
                nn.init.xavier_uniform_(p, generator=generator)
            elif ".mlp." in name and name.endswith("bias"):
                nn.init.normal_(p, std=1e-6, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        return self

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """(B, C, Y, X) -> rows and columns of patches."""
        return grid_size((images.shape[2], images.shape[3]), self.config.patch_size)

    def positions(self, grid: tuple[int, int]) -> Tensor | None:
        """(1, N, D) or, where they cover the prefix, (1, T, D): the positions for `grid`.

        Another grid than the configured one gets them resampled, fixed ones too, so that a place
        in the picture keeps its code; differentiably, for training at several sizes.
        """
        if self.pos_embed is None or grid == self.config.grid:
            return self.pos_embed
        covered = self.pos_embed.shape[1] - self.config.grid[0] * self.config.grid[1]
        prefix, table = self.pos_embed[:, :covered], self.pos_embed[:, covered:]
        return torch.cat([prefix, resample(table, self.config.grid, grid)], dim=1)

    def embed(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> (B, T, D): equation 1, patches with class token and positions."""
        return self.add_prefix(self.patch_embed(images), self.grid_of(images))

    def add_prefix(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, N, D) embedded patches -> (B, T, D): class token, registers and positions."""
        tokens = [t for t in (self.cls_token, self.reg_token) if t is not None]
        positions, covers = self.positions(grid), self.config.position_covers_prefix
        if positions is not None and not covers:
            x = x + positions
        if tokens:
            x = torch.cat([*(t.expand(x.shape[0], -1, -1).to(x.dtype) for t in tokens), x], dim=1)
        if positions is not None and covers:
            x = x + positions
        x = self.pos_drop(x)
        return x

    def encode(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D): the blocks and the final norm (equations 2 to 4)."""
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x

    def tokens(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> (B, T, D): all tokens after the final norm."""
        return self.encode(self.embed(images))

    def pool(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, T, D) -> (B, F): pooled as configured (4 D wide for quadrants), with pre-logits."""
        patches = x[:, self.config.num_prefix_tokens :]
        if self.config.pool == "token":
            x = x[:, 0]
        elif self.config.pool == "mean":
            x = patches.mean(dim=1)
        elif self.attn_pool is not None:
            x = self.attn_pool(patches)
        else:
            x = pool_quadrants(patches, grid)
        x = self.pre_logits(self.fc_norm(x))
        return x

    def features(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> (B, F): the representation that the head reads, F = feature_dim."""
        return self.pool(self.tokens(images), self.grid_of(images))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> (B, K): logits; the features where there is no head."""
        x: Tensor = self.head(self.features(images))
        return x


def pool_quadrants(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, N, D) -> (B, 4 D): means of upper left, upper right, lower left, lower right.

    With an odd number of rows or columns the middle one counts on both sides.
    """
    rows, cols = grid
    b, _, d = patches.shape
    x = patches.reshape(b, rows, cols, d)
    up, low = slice(0, (rows + 1) // 2), slice(rows // 2, rows)
    left, right = slice(0, (cols + 1) // 2), slice(cols // 2, cols)
    parts = [x[:, r, c].mean(dim=(1, 2)) for r in (up, low) for c in (left, right)]
    return torch.cat(parts, dim=1)  # (B, 4 D)


def create_model(
    name: str,
    *,
    num_classes: int = 0,
    image_size: int | tuple[int, int] = 224,
    seed: int = 0,
    **settings: Any,
) -> VisionTransformer:
    """A model with random weights: `create_model("B/16", num_classes=1000)`.

    Args:
        name: a variant such as `B/16`.
        num_classes: outputs of the head; 0 for none.
        image_size: pixels, one number or (Y, X).
        seed: of the random weights.
        settings: further fields of `ViTConfig`.

    Raises:
        ValueError: no such variant, or settings that contradict each other.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    config = parse_variant(name, num_classes=num_classes, image_size=size, **settings)
    return VisionTransformer(config).init_weights(torch.Generator().manual_seed(seed)).eval()
