"""Masked patch prediction: the self-supervision of the paper (sections 4.6 and B.1.2).

The authors never released code. This module decides what the paper leaves open: the number of
masked patches is exact and not drawn; a "random other embedding" is that of any patch of the batch;
the colour range 0..1 is divided into eight equal bins per channel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcli.config.schema import ObjectiveSection
from vitcli.errors import VitcliError
from vitcli.train.objectives.base import Metrics, Objective, count_macs
from vitcli.vit import Network, ResNet, ResNetConfig, VisionTransformer, ViTConfig
from vitcli.vit.patches import patchify
from vitcli.weights.loaded import LoadedModel

NUM_BINS = 8  # per channel, 3 bits
SMALL_PATCH = 4  # target `small_patch` cuts each patch into 4x4 parts
MASK_RATE = 0.5
MASKED, OTHER = 0.8, 0.1  # fractions of the corrupted patches; the rest does not change


class MaskedPatch(Objective):
    """Half of the patch embeddings are corrupted, and their tokens predict the colours.

    80 % of the corrupted ones become a learned mask embedding, 10 % that of another patch, and 10 %
    do not change. The mask embedding and the predictor belong to the objective: checkpoints contain
    them, the final model does not.
    """

    supervised = False
    settings = frozenset({"target", "mask_rate"})
    masks_patches = True
    scale: Tensor

    def __init__(self, model: LoadedModel, section: ObjectiveSection) -> None:
        super().__init__()
        self.model = maskable(model.network, "masked_patch")
        config = self.model.config
        self.target, self.mask_rate = section.target, section.mask_rate or MASK_RATE
        side, channels = config.pixels_per_patch, config.num_channels
        if self.target == "small_patch" and side % SMALL_PATCH:
            raise VitcliError(
                f"target `small_patch` cuts a patch into {SMALL_PATCH}x{SMALL_PATCH} parts, and "
                f"{SMALL_PATCH} does not divide its side of {side} px",
                "`--set objective.target=mean_color`, or use another patch size",
            )
        d, colours = config.embed_dim, NUM_BINS**channels
        width = {
            "mean_color": colours,
            "small_patch": SMALL_PATCH**2 * colours,
            "pixels": side**2 * channels,
        }[self.target]
        self.mask = nn.Parameter(torch.empty(d))
        nn.init.normal_(self.mask, std=0.02)
        self.predict = nn.Linear(d, width)
        self.register_buffer("scale", pixel_scale(model), persistent=False)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Metrics]:
        """(B, C, Y, X) -> the mean loss () over corrupted patches, and metrics."""
        model, grid = self.model, self.model.grid_of(images)
        x = model.embed_patches(images)  # (B, N, D)
        chosen = random_mask(x.shape[0], x.shape[1], self.mask_rate, x.device)  # (B, N)
        x = model.encode(model.add_prefix(self.corrupt(x, chosen), grid), grid)  # (B, T, D)
        count = num_masked(chosen.shape[1], self.mask_rate)  # m; M is B m
        places = chosen_positions(chosen, count)  # (B, m)
        x = take(x[:, model.config.num_prefix_tokens :], places)  # (M, D)
        predicted = self.predict(x).float()
        side = model.config.pixels_per_patch
        if self.target == "pixels":
            targets = take(patchify(images, side), places).float()  # (M, P*P*C)
            loss = F.mse_loss(predicted, targets)
            # The error of always predicting the mean patch: `explained` is the gain over it.
            baseline = ((targets - targets.mean(0)) ** 2).mean()
            explained = 1.0 - loss.detach() / baseline.clamp(min=1e-12)
            return loss, {"loss": loss.detach(), "explained": explained}
        mean, std = self.scale.unbind()
        pixels = images.float() * std + mean
        cells = side if self.target == "mean_color" else side // SMALL_PATCH
        classes = take(color_classes(pixels, side, cells), places)  # (M, cells of a patch)
        predicted = predicted.reshape(-1, NUM_BINS ** images.shape[1])  # (M * cells, 8^C)
        loss = F.cross_entropy(predicted, classes.flatten())
        accuracy = (predicted.argmax(dim=1) == classes.flatten()).float().mean()
        # Many patches share a colour, so accuracy says little without that of a constant guess.
        chance = most_frequent_fraction(classes, NUM_BINS ** images.shape[1])
        return loss, {"loss": loss.detach(), "accuracy": accuracy, "chance": chance}

    def corrupt(self, x: Tensor, chosen: Tensor) -> Tensor:
        """(B, N, D) embeddings, (B, N) chosen patches -> (B, N, D), the chosen ones corrupted."""
        b, n, d = x.shape
        draw = torch.rand(b, n, device=x.device)
        masked = chosen & (draw < MASKED)
        other = chosen & (draw >= MASKED) & (draw < MASKED + OTHER)
        others = x.reshape(b * n, d)[torch.randint(b * n, (b, n), device=x.device)]  # (B, N, D)
        x = torch.where(other[..., None], others, x)
        return torch.where(masked[..., None], self.mask.to(x.dtype), x)

    def extra_macs(self, config: ViTConfig | ResNetConfig) -> int:
        """The linear predictor, once per corrupted patch."""
        assert isinstance(config, ViTConfig)
        n = config.grid[0] * config.grid[1]
        return count_macs(self.predict, (num_masked(n, self.mask_rate), config.embed_dim))


def maskable(model: Network, objective: str) -> VisionTransformer:
    """Check that `objective` can train the tokens of `model`, and freeze what only pooling uses."""
    if isinstance(model, ResNet):
        raise VitcliError(
            f"objective `{objective}` masks patches, and a ResNet has no patches",
            "use a Vision Transformer, such as `--set model.name=S/16`",
        )
    config = model.config
    side = config.pixels_per_patch
    if any(pixels % side for pixels in config.image_size):  # a hybrid, whose stem pads
        raise VitcliError(
            f"objective `{objective}` predicts whole patches of {side} px, and they do not fill "
            f"an image of {config.image_size[0]}x{config.image_size[1]} px",
            f"`--set model.image_size=` a multiple of {side}",
        )
    if config.pool == "map" or config.representation_size:
        what = "pool `map`" if config.pool == "map" else "`model.representation_size`"
        raise VitcliError(
            f"objective `{objective}` trains the tokens and would not train {what}",
            "`--set model.pool=mean`, without `model.representation_size`",
        )
    model.fc_norm.requires_grad_(False)
    return model


def pixel_scale(model: LoadedModel) -> Tensor:
    """(2, C, 1, 1): the mean and the standard deviation of the normalisation."""
    assert model.preprocess is not None
    channels = model.config.num_channels
    rows = [torch.tensor(v).expand(channels) for v in (model.preprocess.mean, model.preprocess.std)]
    return torch.stack(rows)[:, :, None, None]


def num_masked(n: int, rate: float) -> int:
    """The number of masked patches out of `n`: at least one, and at most all but one."""
    return max(1, min(n - 1, round(rate * n)))


def random_mask(b: int, n: int, rate: float, device: torch.device) -> Tensor:
    """(B, N) random booleans; in each row a fraction `rate` is true."""
    # The rank of a random number is a random permutation: every row gets the exact count.
    order = torch.rand(b, n, device=device).argsort(dim=1)
    return order.argsort(dim=1) < num_masked(n, rate)


def chosen_positions(chosen: Tensor, count: int) -> Tensor:
    """(B, N) booleans, `count` of them true in each row -> (B, count): where, in order."""
    # `nonzero` and boolean indices make the host wait for a GPU, to learn how many there are. Here
    # the number is known, so that shapes are static.
    return chosen.int().argsort(dim=1, descending=True, stable=True)[:, :count]


def take(x: Tensor, places: Tensor) -> Tensor:
    """(B, N, D), (B, m) -> (B * m, D): the rows at `places`."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1])).flatten(0, 1)


def color_classes(pixels: Tensor, side: int, cell: int) -> Tensor:
    """(B, C, Y, X) in 0..1 -> (B, N, (side / cell)^2): the class of each cell's mean colour.

    There are three bits per channel, and those of the first channel are the most significant. RGB
    images have 512 classes, as in the paper.

    Args:
        side: side of a patch in px.
        cell: side in px of the squares whose colours are averaged; `side` for one per patch.
    """
    means = F.avg_pool2d(pixels, cell)  # (B, C, Y/cell, X/cell)
    bins = (means * NUM_BINS).long().clamp(0, NUM_BINS - 1)
    powers = NUM_BINS ** torch.arange(bins.shape[1] - 1, -1, -1, device=bins.device)
    classes = (bins * powers[:, None, None]).sum(dim=1, keepdim=True)  # (B, 1, Y/cell, X/cell)
    return patchify(classes, side // cell)


def most_frequent_fraction(classes: Tensor, num_classes: int) -> Tensor:
    """(any shape) class numbers -> (): the fraction of the most frequent class."""
    flat = classes.flatten()
    counts = flat.new_zeros(num_classes).scatter_add_(0, flat, torch.ones_like(flat))
    return counts.max().float() / classes.numel()
