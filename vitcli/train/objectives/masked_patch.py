"""Masked patch prediction: the self-supervision of the paper (sections 4.6 and B.1.2).

The authors never released code. What they leave open is decided here, and said where it is: how
many patches are masked is exact, not drawn; a "random other embedding" is that of any patch of the
batch; the colour range 0..1 is cut into eight equal bins a channel.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcli.config.schema import ObjectiveSection
from vitcli.errors import VitcliError
from vitcli.vit import Network, ResNet, VisionTransformer
from vitcli.vit.patches import patchify
from vitcli.weights.loaded import LoadedModel

BINS = 8  # a channel; 3 bits
SMALL = 4  # side of a patch in the second form
MASK_RATE = 0.5
MASKED, OTHER = 0.8, 0.1  # of the corrupted patches; the rest stay as they are


class MaskedPatch(nn.Module):
    """Half of the patch embeddings are corrupted, and their tokens predict the patches' colours.

    Of the corrupted ones 80 % become a learned mask embedding, 10 % another patch's, 10 % stay.
    The mask and the predictor belong to the objective: checkpoints hold them, the model does not.
    """

    views = 1
    supervised = False
    scale: Tensor

    def __init__(self, model: LoadedModel, section: ObjectiveSection) -> None:
        super().__init__()
        self.model = tokens_of(model.network, "masked_patch")
        config = self.model.config
        self.target, self.mask_rate = section.target, section.mask_rate or MASK_RATE
        side, channels = config.pixels_per_patch, config.num_channels
        if self.target == "small_patch" and side % SMALL:
            raise VitcliError(
                f"target `small_patch` cuts a patch into {SMALL}x{SMALL}, and a side of {side} "
                "pixels does not divide so",
                "`--set objective.target=mean_color`, or another patch size",
            )
        d, colours = config.embed_dim, BINS**channels
        width = {
            "mean_color": colours,
            "small_patch": SMALL**2 * colours,
            "pixels": side**2 * channels,
        }[self.target]
        self.mask = nn.Parameter(torch.empty(d))
        nn.init.normal_(self.mask, std=0.02)
        self.predict = nn.Linear(d, width)
        self.register_buffer("scale", pixel_scale(model), persistent=False)

    def forward(
        self, images: Tensor, labels: Tensor, factors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, C, Y, X) -> the mean loss () over corrupted patches, and figures to show."""
        model, grid = self.model, self.model.grid_of(images)
        x = model.embed_patches(images)  # (B, N, D)
        chosen = exactly(x.shape[0], x.shape[1], self.mask_rate, x.device)  # (B, N)
        x = model.encode(model.add_prefix(self.corrupt(x, chosen), grid), grid)  # (B, T, D)
        x = x[:, model.config.num_prefix_tokens :][chosen]  # (M, D)
        guess = self.predict(x).float()
        side = model.config.pixels_per_patch
        if self.target == "pixels":
            wanted = patchify(images, side)[chosen].float()  # (M, P*P*C)
            loss = F.mse_loss(guess, wanted)
            flat = ((wanted - wanted.mean(0)) ** 2).mean()
            explained = 1.0 - loss.detach() / flat.clamp(min=1e-12)
            return loss, {"loss": loss.detach(), "explained": explained}
        mean, std = self.scale.unbind()
        pixels = images.float() * std + mean
        cells = side if self.target == "mean_color" else side // SMALL
        classes = color_classes(pixels, side, cells)[chosen]  # (M, cells of a patch)
        guess = guess.reshape(-1, BINS ** images.shape[1])  # (M * cells, 8^C)
        loss = F.cross_entropy(guess, classes.flatten())
        accuracy = (guess.argmax(dim=1) == classes.flatten()).float().mean()
        figures = {"loss": loss.detach(), "accuracy": accuracy, "chance": commonest(classes)}
        return loss, figures

    def corrupt(self, x: Tensor, chosen: Tensor) -> Tensor:
        """(B, N, D) embeddings and (B, N) which of them -> (B, N, D), those corrupted."""
        b, n, d = x.shape
        luck = torch.rand(b, n, device=x.device)
        masked = chosen & (luck < MASKED)
        other = chosen & (luck >= MASKED) & (luck < MASKED + OTHER)
        others = x.reshape(b * n, d)[torch.randint(b * n, (b, n), device=x.device)]  # (B, N, D)
        x = torch.where(other[..., None], others, x)
        return torch.where(masked[..., None], self.mask.to(x.dtype), x)


def tokens_of(model: Network, objective: str) -> VisionTransformer:
    """`model`, which must have tokens that learn; what only its pooling needs is put to rest.

    Raises:
        VitcliError: a ResNet; a pooling with weights, which would stay as they were drawn.
    """
    if isinstance(model, ResNet):
        raise VitcliError(
            f"objective `{objective}` masks patches, which a ResNet has not",
            "take a Vision Transformer, such as `--set model.name=S/16`",
        )
    config = model.config
    if config.pool == "map" or config.representation_size:
        what = "pool `map`" if config.pool == "map" else "`model.representation_size`"
        raise VitcliError(
            f"objective `{objective}` trains tokens, and {what} has weights that it would not",
            "`--set model.pool=mean`, without `model.representation_size`",
        )
    model.fc_norm.requires_grad_(False)
    return model


def pixel_scale(model: LoadedModel) -> Tensor:
    """(2, C, 1, 1): mean and std that images were normalised with."""
    assert model.preprocess is not None
    channels = model.config.num_channels
    rows = [torch.tensor(v).expand(channels) for v in (model.preprocess.mean, model.preprocess.std)]
    return torch.stack(rows)[:, :, None, None]


def exactly(b: int, n: int, rate: float, device: torch.device) -> Tensor:
    """(B, N) booleans, in each row `rate` of them true, at least one, drawn at random."""
    count = min(n, max(1, round(rate * n)))
    order = torch.rand(b, n, device=device).argsort(dim=1)
    return order.argsort(dim=1) < count


def color_classes(pixels: Tensor, side: int, cell: int) -> Tensor:
    """(B, C, Y, X) in 0..1 -> (B, N, (side / cell)^2): the class of each cell's mean colour.

    Three bits a channel, the first channel's the most significant, 8^C classes: in the paper 512.

    Args:
        side: of a patch, in pixels.
        cell: side of the squares whose colours are averaged; `side` for one a patch.
    """
    means = F.avg_pool2d(pixels, cell)  # (B, C, Y/cell, X/cell)
    bins = (means * BINS).long().clamp(0, BINS - 1)
    place = BINS ** torch.arange(bins.shape[1] - 1, -1, -1, device=bins.device)
    classes = (bins * place[:, None, None]).sum(dim=1, keepdim=True)  # (B, 1, Y/cell, X/cell)
    return patchify(classes, side // cell)


def commonest(classes: Tensor) -> Tensor:
    """Any shape of class numbers -> (): what always guessing the commonest of them would get."""
    return classes.flatten().bincount().max().float() / classes.numel()
