"""The Vision Transformer, from pixels to logits (section 3.1 of the paper).

Shape letters, used in every file:

    B  images in a batch            N  patches of an image      H  attention heads
    C  channels of an image         T  tokens: prefix + N       E  width of a head, D / H
    Y  pixel rows                   D  width of a token         F  width of the features
    X  pixel columns                P  side of a patch, pixels  K  classes

The prefix tokens are the class token, the distillation token and the registers, in this order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitcli.config.choices import Resize
from vitcli.vit.blocks import build_blocks, build_norm
from vitcli.vit.config import ViTConfig
from vitcli.vit.conv_stem import ConvEmbed
from vitcli.vit.hybrid import HybridEmbed, init_stem, lecun_normal
from vitcli.vit.patches import PatchEmbed
from vitcli.vit.pool import AttentionPool, PreLogits, pool_tokens
from vitcli.vit.position import (
    DEFAULT_RESIZE,
    Grid,
    OffsetBias,
    concatenate_axes,
    fixed_table,
    is_position,
    resample_table,
    table_shapes,
)
from vitcli.vit.rope import Rotation, rotation


class VisionTransformer(nn.Module):
    """The ViT of Dosovitskiy et al. (2020); the tensor names are timm's.

    Attributes:
        config: the settings that it was built from.
        position_resize: method that resamples the positions for images of another size.
        checkpoint_activations: in training, store only the input of each block (of each unit in a
            hybrid's ResNet, of each stage of a convolutional stem) and recompute the rest in the
            backward pass. This takes one more forward pass and a fraction of the memory, and gives
            the same gradients.
        patch_drop_rate: fraction of the patches that training drops from each image at random
            (PatchDropout, Liu et al., 2022).
    """

    def __init__(self, config: ViTConfig, position_resize: Resize = DEFAULT_RESIZE) -> None:
        super().__init__()
        self.config = config
        self.position_resize = position_resize
        self.checkpoint_activations = False
        self.patch_drop_rate = 0.0
        d = config.embed_dim
        self.patch_embed = embedding(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d)) if config.class_token else None
        self.dist_token = nn.Parameter(torch.zeros(1, 1, d)) if config.distillation_token else None
        registers = config.num_registers
        self.reg_token = nn.Parameter(torch.zeros(1, registers, d)) if registers else None
        for name, shape in table_shapes(config).items():
            if config.position == "sincos2d":  # a buffer: stored with the weights, never trained
                # On the meta device the values come from a file later, so nothing is computed.
                empty = torch.zeros(shape)
                self.register_buffer(name, empty if empty.is_meta else fixed_table(config))
            else:
                self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.pos_drop = nn.Dropout(config.dropout_rate)
        self.norm_pre = build_norm(config, d) if config.norm_before_blocks else nn.Identity()
        self.rel_pos_bias = OffsetBias(config) if config.position_bias == "shared" else None
        self.blocks = build_blocks(config)
        after = config.norm_after_pool
        final = config.final_norm and not after
        self.norm = build_norm(config, d) if final else nn.Identity()
        self.attn_pool = AttentionPool(config) if config.pool == "map" else None
        self.fc_norm = build_norm(config, config.pooled_dim) if after else nn.Identity()
        size = config.representation_size
        self.pre_logits = PreLogits(config.pooled_dim, size) if size else nn.Identity()
        classes, width, shared = config.num_classes, config.head_dim, config.projection_size
        project = nn.Linear(config.feature_dim, shared, bias=False) if shared else nn.Identity()
        self.projection = project
        self.head = nn.Linear(width, classes) if classes else nn.Identity()
        two = classes and config.distillation_head
        self.head_dist = nn.Linear(width, classes) if two else None

    def init_weights(self, generator: torch.Generator | None = None) -> "VisionTransformer":
        """Draw new weights from `generator`, as the official code does; returns self.

        Patch projection and pre-logits are LeCun-normal, flax's default; the kernels of blocks and
        of MAP and its query are Xavier-uniform; MLP biases N(0, 1e-6); positions and additional
        tokens N(0, 0.02); class token and heads zero. Sources: vit_jax/models_vit.py, and MAPHead
        in big_vision/models/vit.py.
        """
        if isinstance(self.patch_embed, HybridEmbed):
            init_stem(self.patch_embed.backbone, generator)
        for name, p in self.named_parameters():
            if name.startswith("patch_embed.backbone."):
                continue  # `init_stem` has drawn it
            if name.endswith(("qkv.weight", "attn_pool.kv.weight", "mlp.fc1.weight")):
                # Xavier's bound depends on the shape, so each fused matrix is drawn by itself:
                # query, key and value, or both halves of a SwiGLU.
                out = self.config.mlp_dim if name.endswith("fc1.weight") else p.shape[1]
                for part in p.data.chunk(p.shape[0] // out):
                    nn.init.xavier_uniform_(part, generator=generator)
            elif name == "attn_pool.latent":  # flax's fans of a (1, 1, D) kernel are 1 and D
                nn.init.xavier_uniform_(p.data[0], generator=generator)
            elif p.ndim == 4 or name == "pre_logits.fc.weight":
                lecun_normal(p.data, generator)
            # The distillation token is not zero: it would stay equal to the class token for ever.
            elif is_position(name) or name in ("dist_token", "reg_token"):
                nn.init.normal_(p, std=0.02, generator=generator)
            elif name.startswith(("head.", "head_dist.")) or name == "cls_token":
                nn.init.zeros_(p)  # a zero head makes the first loss that of a uniform guess, ln K
            elif p.ndim == 2:
                nn.init.xavier_uniform_(p, generator=generator)
            elif ".mlp." in name and name.endswith("bias"):
                nn.init.normal_(p, std=1e-6, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        return self

    def grid_of(self, images: Tensor) -> Grid:
        """(B, C, Y, X) -> rows and columns of patches."""
        return self.config.grid_of((images.shape[2], images.shape[3]))

    def positions(self, grid: Grid, block: int = 0) -> Tensor | None:
        """(1, n, D) positions to add to the last n tokens before block `block`, or None.

        n is N, or T if the table has entries for the prefix tokens. For another grid than the
        configured one the table is resampled (section 3.2). Gradients pass through it, so that
        training may use several image sizes.
        """
        config = self.config
        if not table_shapes(config) or (block and config.position_at == "stem"):
            return None
        own = block > 0 and config.position_at == "every"  # table 8: one table for each block

        def table(name: str) -> Tensor:
            stored: Tensor = getattr(self, f"block_{name}" if own else name)
            stored = stored[block - 1 : block] if own else stored
            return resample_table(name, stored, config, grid, self.position_resize)

        if config.position == "learned2d":
            return concatenate_axes(table("pos_embed_x"), table("pos_embed_y"))
        return table("pos_embed")

    def add_positions(self, x: Tensor, grid: Grid, block: int = 0) -> Tensor:
        """(B, T, D) -> (B, T, D): with the positions for the input of block `block` added."""
        positions = self.positions(grid, block)
        if positions is None:
            return x
        # Prefix tokens without an entry in the table get zero.
        uncovered = x.shape[1] - positions.shape[1]
        return x + nn.functional.pad(positions, (0, 0, uncovered, 0))

    def shared_bias(self, grid: Grid) -> Tensor | None:
        """(1, H, T, T), added to the scores of every attention; None without shared biases."""
        return None if self.rel_pos_bias is None else self.rel_pos_bias(grid)

    def embed_patches(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> (B, N, D): projected patches of the image, or of the feature map."""
        hybrid = self.config.is_hybrid
        if self.config.crop_to_patches:
            rows, cols = self.config.cropped_size((images.shape[2], images.shape[3]))
            images = images[:, :, :rows, :cols]
        x: Tensor = (
            self.patch_embed(images, self._recompute()) if hybrid else self.patch_embed(images)
        )
        return x

    def embed(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> (B, T, D): class token, patches and positions (equation 1)."""
        return self.add_prefix(self.embed_patches(images), self.grid_of(images))

    def drop_patches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D) -> (B, V, D): each image loses a random `patch_drop_rate` of its patches.

        The second result is the index of each kept patch, (B, V - prefix).
        """
        # Positions are already added, so the order of the kept patches does not matter.
        prefix = self.config.num_prefix_tokens
        b, n, d = x.shape[0], x.shape[1] - prefix, x.shape[2]
        kept = max(1, n - round(self.patch_drop_rate * n))
        order = torch.rand(b, n, device=x.device).argsort(dim=1)[:, :kept]  # (B, kept)
        patches = x[:, prefix:].gather(1, order[..., None].expand(-1, -1, d))  # (B, kept, D)
        return torch.cat([x[:, :prefix], patches], dim=1), order

    def rotation(self, grid: Grid, kept: Tensor | None = None) -> Rotation | None:
        """The rotary positions of a forward pass, or None; `kept` (B, V) are the patches left."""
        device = next(self.parameters()).device
        return rotation(self.config, grid, device, training=self.training, kept=kept)

    def add_prefix(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, D) -> (B, T, D): patches with prefix tokens and positions (equation 1)."""
        tokens = [t for t in (self.cls_token, self.dist_token, self.reg_token) if t is not None]
        # The paper adds positions to the class token too. big_vision and timm's `no_embed_class`
        # add them before they prepend the tokens.
        covered = self.config.num_covered_tokens > 0
        if not covered:
            x = self.add_positions(x, grid)
        if tokens:
            x = torch.cat([*(t.expand(x.shape[0], -1, -1).to(x.dtype) for t in tokens), x], dim=1)
        if covered:
            x = self.add_positions(x, grid)
        x = self.pos_drop(x)
        return x

    def _recompute(self) -> bool:
        return self.checkpoint_activations and self.training and torch.is_grad_enabled()

    def encode(self, x: Tensor, grid: Grid, kept: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D): the blocks and the final norm (equations 2 to 4).

        `kept` (B, V) are the indices of the patches in `x`, if it has not all of them.
        """
        return self.encode_last(x, grid, 1, kept)[0]

    def encode_last(
        self, x: Tensor, grid: Grid, count: int, kept: Tensor | None = None
    ) -> list[Tensor]:
        """(B, T, D) -> `count` x (B, T, D): outputs of the last blocks, after the final norm."""
        x = self.norm_pre(x)
        turn = self.rotation(grid, kept)
        recompute, found = self._recompute(), []
        bias = self.shared_bias(grid)
        for i, block in enumerate(self.blocks):
            if i:
                x = self.add_positions(x, grid, i)
            if recompute:
                x = checkpoint(block, x, grid, bias, turn, use_reentrant=False)
            else:
                x = block(x, grid, bias, turn)
            if i >= len(self.blocks) - count:
                found.append(self.norm(x))
        return found

    def tokens(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> (B, T, D): all tokens after the final norm."""
        return self.tokens_last(images, 1)[0]

    def tokens_last(self, images: Tensor, count: int) -> list[Tensor]:
        """(B, C, Y, X) -> `count` x (B, T, D): the tokens after each of the last blocks."""
        x, kept = self.embed(images), None
        if self.training and self.patch_drop_rate:
            x, kept = self.drop_patches(x)
        return self.encode_last(x, self.grid_of(images), count, kept)

    def pool(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, T, D) -> (B, F / pool_blocks): pooled output of one block, with pre-logits."""
        if self.attn_pool is not None:
            x = self.attn_pool(x[:, self.config.num_prefix_tokens :])  # (B, D)
        else:
            x = pool_tokens(x, self.config, grid)
        x = self.pre_logits(self.fc_norm(x))
        return x

    def pool_last(self, tokens: Sequence[Tensor], grid: Grid) -> Tensor:
        """`pool_blocks` x (B, T, D) -> (B, F): each is pooled; the results are concatenated."""
        pooled = [self.pool(x, grid) for x in tokens]
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)  # (B, F)

    def features(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> (B, F): the representation that the head reads."""
        tokens = self.tokens_last(images, self.config.pool_blocks)
        return self.pool_last(tokens, self.grid_of(images))

    def classify(self, features: Tensor) -> Tensor:
        """(B, F) -> (B, K): logits, or the features if there is no head."""
        if not self.config.num_classes:
            return features
        if self.head_dist is None:
            x = self.projection(features)  # (B, E)
            x = nn.functional.normalize(x, dim=-1) if self.config.head_norm else x
            logits: Tensor = self.head(x)
            return logits
        # DeiT (Touvron et al., 2021, section 3): each head reads its token; the mean classifies.
        token, distilled = features.chunk(2, dim=-1)  # (B, D) each
        return (self.head(token) + self.head_dist(distilled)) / 2

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> (B, K): logits, or the features if there is no head."""
        return self.classify(self.features(images))


def embedding(config: ViTConfig) -> nn.Module:
    """The module (B, C, Y, X) -> (B, N, D): a patch projection, with a stem in hybrids."""
    if config.conv_stem is not None:
        return ConvEmbed(config)
    if config.stem is not None:
        return HybridEmbed(config)
    embed = PatchEmbed(config.num_channels, config.patch_size, config.embed_dim, config.patch_bias)
    if config.pixel_norm:
        values = config.num_channels * config.patch_size**2
        embed.norm_pixels = nn.LayerNorm(values, eps=config.norm_eps)
    if config.patch_norm:
        embed.norm = build_norm(config, config.embed_dim)
    return embed
