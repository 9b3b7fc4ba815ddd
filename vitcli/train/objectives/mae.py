"""Masked autoencoders (He et al., 2022): see a quarter of the patches, draw the rest."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcli.config.schema import ObjectiveSection
from vitcli.errors import VitcliError
from vitcli.train.objectives.masked_patch import exactly, tokens_of
from vitcli.vit import ViTConfig
from vitcli.vit.blocks import Block
from vitcli.vit.patches import patchify
from vitcli.vit.position import sincos2d
from vitcli.weights.loaded import LoadedModel

MASK_RATE = 0.75
NORM_EPS = 1e-6  # beside the variance of a patch, as in the authors' definition


class Mae(nn.Module):
    """The encoder sees visible patches only; a small decoder predicts the pixels of the others.

    The decoder, its mask token and its predictor belong to the objective and are dropped with it.
    """

    views = 1
    supervised = False

    def __init__(self, model: LoadedModel, section: ObjectiveSection) -> None:
        super().__init__()
        self.model = tokens_of(model.network, "mae")
        config = self.model.config
        check_droppable(config, "objective `mae`")
        self.mask_rate = section.mask_rate or MASK_RATE
        self.norm_pixels = section.norm_pixels
        d, width = config.embed_dim, section.decoder_dim
        if width % section.decoder_heads or width % 4:
            raise VitcliError(
                f"`objective.decoder_dim` = {width} is no multiple of 4 and of "
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

    def forward(
        self, images: Tensor, labels: Tensor, factors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, C, Y, X) -> the mean squared error () over hidden patches, and figures."""
        model, grid = self.model, self.model.grid_of(images)
        rows, cols = grid
        hidden = exactly(len(images), rows * cols, self.mask_rate, images.device)  # (B, N)
        guess = self.decode(self.encode(images, hidden), hidden, grid)  # (B, N, P*P*C)
        wanted = patchify(images.float(), model.config.pixels_per_patch)
        if self.norm_pixels:
            var, mean = torch.var_mean(wanted, dim=-1, keepdim=True)
            wanted = (wanted - mean) / (var + NORM_EPS).sqrt()
        loss = F.mse_loss(guess[hidden].float(), wanted[hidden])
        flat = wanted[hidden].var(dim=0, unbiased=False).mean()
        explained = 1.0 - loss.detach() / flat.clamp(min=1e-12)
        return loss, {"loss": loss.detach(), "explained": explained}

    def encode(self, images: Tensor, hidden: Tensor) -> Tensor:
        """(B, C, Y, X), (B, N) -> (B, V + prefix, D): the tokens of what is visible."""
        model, grid = self.model, self.model.grid_of(images)
        x = model.add_prefix(model.embed_patches(images), grid)  # (B, T, D)
        prefix = model.config.num_prefix_tokens
        b, _, d = x.shape
        visible = x[:, prefix:][~hidden].reshape(b, -1, d)  # (B, V, D)
        return model.encode(torch.cat([x[:, :prefix], visible], dim=1), grid)

    def decode(self, x: Tensor, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, V + prefix, D), (B, N) -> (B, N, P*P*C): pixels of all patches."""
        prefix = self.model.config.num_prefix_tokens
        x = self.entry(x)
        b, n = hidden.shape
        places = self.mask.to(x.dtype).expand(b, n, self.width).clone()  # (B, N, W)
        places[~hidden] = x[:, prefix:].reshape(-1, self.width)
        places = places + sincos2d(grid, self.width).to(places)
        x = torch.cat([x[:, :prefix], places], dim=1)
        for block in self.decoder:
            x = block(x, grid)
        pixels: Tensor = self.exit(self.norm(x[:, prefix:]))
        return pixels


def check_droppable(config: ViTConfig, what: str) -> None:
    """Whether the encoder can go without some of the patches.

    Raises:
        VitcliError: rows, columns or offsets between patches are built into its blocks.
    """
    if config.axial or config.position == "relative" or config.position_at != "stem":
        kind = "axial blocks" if config.axial else "positions inside the blocks"
        raise VitcliError(
            f"{what} leaves patches out, and {kind} need them all",
            "`--set model.position=learned --set model.position_at=stem`, without axial blocks",
        )
