"""Masked autoencoders (He et al., 2022): encode a quarter of the patches, predict the rest."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcli.config.schema import ObjectiveSection
from vitcli.errors import VitcliError
from vitcli.train.objectives.base import Metrics, Objective, count_macs
from vitcli.train.objectives.masked_patch import maskable, num_masked, positions, random_mask, take
from vitcli.vit import ResNetConfig, ViTConfig
from vitcli.vit.blocks import Block
from vitcli.vit.patches import patchify
from vitcli.vit.position import sincos2d
from vitcli.weights.loaded import LoadedModel

MASK_RATE = 0.75
NORM_EPS = 1e-6  # added to the variance of a patch, as in the code of the authors


class Mae(Objective):
    """The encoder sees visible patches only; a small decoder predicts the pixels of the others.

    The decoder belongs to the objective: checkpoints contain it, the final model does not.
    """

    supervised = False
    settings = frozenset(
        {"mask_rate", "decoder_depth", "decoder_dim", "decoder_heads", "norm_pixels"}
    )
    masks_patches = True

    def __init__(self, model: LoadedModel, section: ObjectiveSection) -> None:
        super().__init__()
        self.model = maskable(model.network, "mae")
        config = self.model.config
        check_droppable(config, "objective `mae`")
        self.mask_rate = section.mask_rate or MASK_RATE
        self.norm_pixels = section.norm_pixels
        d, width = config.embed_dim, section.decoder_dim
        if width % section.decoder_heads or width % 4:
            raise VitcliError(
                f"`objective.decoder_dim` = {width} is not a multiple of 4 and of "
                f"{section.decoder_heads} heads",
                "`--set objective.decoder_dim=` a multiple of both",
            )
        self.entry = nn.Linear(d, width)
        self.mask = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.mask, std=0.02)
        shape = ViTConfig(
            depth=section.decoder_depth,
            embed_dim=width,
            mlp_dim=4 * width,
            num_heads=section.decoder_heads,
            patch_size=config.patch_size,
            image_size=config.image_size,
            num_channels=config.num_channels,
        )
        self.decoder = nn.ModuleList(Block(shape, 0.0) for _ in range(section.decoder_depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        side = config.pixels_per_patch
        self.exit = nn.Linear(width, side**2 * config.num_channels)
        self.width = width

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Metrics]:
        """(B, C, Y, X) -> the mean squared error () over hidden patches, and metrics."""
        model, grid = self.model, self.model.grid_of(images)
        rows, cols = grid
        hidden = random_mask(len(images), rows * cols, self.mask_rate, images.device)  # (B, N)
        predicted = self.decode(self.encode(images, hidden), hidden, grid)  # (B, N, P*P*C)
        targets = patchify(images.float(), model.config.pixels_per_patch)
        if self.norm_pixels:  # without the mean and contrast of each patch (table 1d of the paper)
            var, mean = torch.var_mean(targets, dim=-1, keepdim=True)
            targets = (targets - mean) / (var + NORM_EPS).sqrt()
        places = positions(hidden, num_masked(rows * cols, self.mask_rate))  # (B, m)
        targets = take(targets, places)  # (B * m, P*P*C)
        loss = F.mse_loss(take(predicted, places).float(), targets)
        # The error of always predicting the mean patch: `explained` is the gain over it.
        baseline = targets.var(dim=0, unbiased=False).mean()
        explained = 1.0 - loss.detach() / baseline.clamp(min=1e-12)
        return loss, {"loss": loss.detach(), "explained": explained}

    def encode(self, images: Tensor, hidden: Tensor) -> Tensor:
        """(B, C, Y, X), (B, N) -> (B, V + prefix, D): the tokens of the visible patches."""
        model, grid = self.model, self.model.grid_of(images)
        x = model.add_prefix(model.embed_patches(images), grid)  # (B, T, D)
        prefix = model.config.num_prefix_tokens
        b, _, d = x.shape
        kept = self.visible(hidden)  # (B, V)
        visible = take(x[:, prefix:], kept).view(b, -1, d)  # (B, V, D)
        return model.encode(torch.cat([x[:, :prefix], visible], dim=1), grid, kept)

    def decode(self, x: Tensor, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, V + prefix, D), (B, N) -> (B, N, P*P*C): pixels of all patches."""
        prefix = self.model.config.num_prefix_tokens
        x = self.entry(x)
        b, n = hidden.shape
        tokens = self.mask.to(x.dtype).expand(b, n, self.width)  # (B, N, W)
        places = self.visible(hidden)[..., None].expand(-1, -1, self.width)  # (B, V, W)
        tokens = tokens.scatter(1, places, x[:, prefix:])
        tokens = tokens + sincos2d(grid, self.width).to(tokens)
        x = torch.cat([x[:, :prefix], tokens], dim=1)
        for block in self.decoder:
            x = block(x, grid)
        pixels: Tensor = self.exit(self.norm(x[:, prefix:]))
        return pixels

    def visible(self, hidden: Tensor) -> Tensor:
        """(B, N) hidden patches -> (B, V): the positions of the others, in order."""
        n = hidden.shape[1]
        return positions(~hidden, n - num_masked(n, self.mask_rate))

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
