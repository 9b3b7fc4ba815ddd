"""Masked autoencoders (He et al., 2022): encode a quarter of the patches, predict the rest."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcli.config.schema import ObjectiveSection
from vitcli.errors import VitcliError
from vitcli.train.objectives.base import Metrics, Objective, count_macs
from vitcli.train.objectives.masked_patch import (
    chosen_positions,
    maskable,
    num_masked,
    random_mask,
    take,
)
from vitcli.vit import ResNetConfig, ViTConfig
from vitcli.vit.blocks import Block
from vitcli.vit.patches import patchify
from vitcli.vit.position import Grid, resample, sincos2d
from vitcli.weights.from_checkpoint import check_shapes
from vitcli.weights.loaded import LoadedModel

MASK_RATE = 0.75
NORM_EPS = 1e-6  # added to the variance of a patch, as in the code of the authors


class Mae(Objective):
    """The encoder sees visible patches only; a small decoder predicts the pixels of the others.

    The decoder belongs to the objective: checkpoints contain it, the final model does not. Weights
    that bring a decoder (transformers' `ViTMAEForPreTraining`) go on with it and with its targets;
    the settings `decoder_*` and `norm_pixels` are for a new decoder.
    """

    supervised = False
    settings = frozenset(
        {"mask_rate", "decoder_depth", "decoder_dim", "decoder_heads", "norm_pixels"}
    )
    masks_patches = True
    positions: Tensor | None

    def __init__(self, model: LoadedModel, section: ObjectiveSection) -> None:
        super().__init__()
        self.model = maskable(model.network, "mae")
        config = self.model.config
        check_droppable(config, "objective `mae`")
        self.mask_rate = section.mask_rate or MASK_RATE
        stored = model.decoder
        self.norm_pixels = section.norm_pixels if stored is None else stored.norm_pixels
        shape = _decoder_shape(section, config) if stored is None else stored.config
        width, eps = shape.embed_dim, shape.norm_eps
        self.entry = nn.Linear(config.embed_dim, width)
        self.mask = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.mask, std=0.02)
        self.decoder = nn.ModuleList(Block(shape, 0.0) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(width, eps=eps)
        side = config.pixels_per_patch
        self.exit = nn.Linear(width, side**2 * config.num_channels)
        self.width, self.grid = width, shape.grid
        # Those of a stored decoder, which are fixed; `None` computes them.
        self.register_buffer("positions", None, persistent=False)
        if stored is not None:
            self._load(stored.tensors)

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the decoder of weights that were trained as a masked autoencoder."""
        found = {name.replace("blocks.", "decoder."): t.float() for name, t in tensors.items()}
        own = {k: v for k, v in self.state_dict().items() if not k.startswith("model.")}
        expected = {name: tuple(t.shape) for name, t in own.items()}
        expected["mask"] = (1, 1, self.width)
        prefix = self.model.config.num_prefix_tokens
        expected["positions"] = (1, prefix + self.grid[0] * self.grid[1], self.width)
        shapes = {name: tuple(t.shape) for name, t in found.items()}
        check_shapes(shapes, expected, "its decoder", what="the decoder that config.json describes")
        self.positions = found.pop("positions")
        found["mask"] = found["mask"].flatten()
        self.load_state_dict(found, strict=False)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Metrics]:
        """(B, C, Y, X) -> the mean squared error () over hidden patches, and metrics."""
        rows, cols = self.model.grid_of(images)
        hidden = random_mask(len(images), rows * cols, self.mask_rate, images.device)  # (B, N)
        predicted, targets = self.reconstruct(images, hidden)
        places = chosen_positions(hidden, num_masked(rows * cols, self.mask_rate))  # (B, m)
        targets = take(targets, places)  # (B * m, P*P*C)
        loss = F.mse_loss(take(predicted, places).float(), targets)
        # The error of always predicting the mean patch: `explained` is the gain over it.
        baseline = targets.var(dim=0, unbiased=False).mean()
        explained = 1.0 - loss.detach() / baseline.clamp(min=1e-12)
        return loss, {"loss": loss.detach(), "explained": explained}

    def reconstruct(self, images: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, Y, X), (B, N) hidden patches -> (B, N, P*P*C): predicted pixels, and the targets.

        With `norm_pixels` both are standardised in each patch.
        """
        grid = self.model.grid_of(images)
        predicted = self.decode(self.encode(images, hidden), hidden, grid)  # (B, N, P*P*C)
        targets = patchify(images.float(), self.model.config.pixels_per_patch)
        if self.norm_pixels:  # without the mean and contrast of each patch (table 1d of the paper)
            var, mean = torch.var_mean(targets, dim=-1, keepdim=True)
            targets = (targets - mean) / (var + NORM_EPS).sqrt()
        return predicted, targets

    def encode(self, images: Tensor, hidden: Tensor) -> Tensor:
        """(B, C, Y, X), (B, N) -> (B, V + prefix, D): the tokens of the visible patches.

        `hidden` hides the fraction `mask_rate` of each image.
        """
        model, grid = self.model, self.model.grid_of(images)
        x = model.add_prefix(model.embed_patches(images), grid)  # (B, T, D)
        prefix = model.config.num_prefix_tokens
        b, _, d = x.shape
        n = hidden.shape[1]
        kept = chosen_positions(~hidden, n - num_masked(n, self.mask_rate))  # (B, V)
        visible = take(x[:, prefix:], kept).view(b, -1, d)  # (B, V, D)
        return model.encode(torch.cat([x[:, :prefix], visible], dim=1), grid, kept)

    def decode(self, x: Tensor, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, V + prefix, D), (B, N) -> (B, N, P*P*C): pixels of all patches."""
        prefix = self.model.config.num_prefix_tokens
        x = self.entry(x)
        b, n = hidden.shape
        tokens = self.mask.to(x.dtype).expand(b, n, self.width)  # (B, N, W)
        places = chosen_positions(~hidden, x.shape[1] - prefix)  # (B, V)
        tokens = tokens.scatter(1, places[..., None].expand(-1, -1, self.width), x[:, prefix:])
        x = self._add_positions(torch.cat([x[:, :prefix], tokens], dim=1), grid)
        for block in self.decoder:
            x = block(x, grid)
        pixels: Tensor = self.exit(self.norm(x[:, prefix:]))
        return pixels

    def _add_positions(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, prefix + N, W) -> (B, prefix + N, W)."""
        if self.positions is None:
            places = sincos2d(grid, self.width).to(x)
            return x + F.pad(places, (0, 0, x.shape[1] - places.shape[1], 0))
        prefix, patches = self.positions.tensor_split([self.model.config.num_prefix_tokens], dim=1)
        places = resample(patches, self.grid, grid, "bicubic_plain")
        return x + torch.cat([prefix, places], dim=1).to(x)

    @property
    def hidden_rate(self) -> float:
        """The fraction of masked patches."""
        return self.mask_rate

    def extra_macs(self, config: ViTConfig | ResNetConfig) -> int:
        """The decoder, and the linear layers before and after it."""
        assert isinstance(config, ViTConfig)
        grid, n = config.grid, config.grid[0] * config.grid[1]
        visible = config.num_prefix_tokens + n - num_masked(n, self.mask_rate)
        tokens = (1, n + config.num_prefix_tokens, self.width)
        return (
            count_macs(self.entry, (1, visible, config.embed_dim))
            + sum(count_macs(block, tokens, grid) for block in self.decoder)
            + count_macs(self.exit, (1, n, self.width))
        )


def _decoder_shape(section: ObjectiveSection, config: ViTConfig) -> ViTConfig:
    """The settings of a new decoder's blocks."""
    width = section.decoder_dim
    if width % section.decoder_heads or width % 4:
        raise VitcliError(
            f"`objective.decoder_dim` = {width} is not a multiple of 4 and of "
            f"{section.decoder_heads} heads",
            "`--set objective.decoder_dim=` a multiple of both",
        )
    return ViTConfig(
        depth=section.decoder_depth,
        embed_dim=width,
        mlp_dim=4 * width,
        num_heads=section.decoder_heads,
        patch_size=config.patch_size,
        image_size=config.image_size,
        num_channels=config.num_channels,
    )


def check_droppable(config: ViTConfig, what: str) -> None:
    """Check that the encoder works without some of the patches."""
    inside = config.position == "relative" or config.position_at != "stem"
    if config.axial or inside or config.position_bias != "none":
        kind = "axial blocks" if config.axial else "positions inside the blocks"
        raise VitcliError(
            f"{what} drops patches, and {kind} need all of them",
            "`--set model.position=learned --set model.position_at=stem`, without `model.axial` "
            "and `model.position_bias`",
        )
