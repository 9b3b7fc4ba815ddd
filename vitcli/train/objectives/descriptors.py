"""Objectives that predict local descriptors: gradient orientations and colours, as in MaskFeat."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcli.config.schema import ObjectiveSection
from vitcli.errors import VitcliError
from vitcli.train.objectives.base import Metrics, Objective, count_macs, main_class
from vitcli.train.objectives.class_losses import CrossEntropy
from vitcli.vit import Network, ResNet, ResNetConfig, ViTConfig
from vitcli.weights.loaded import LoadedModel

NUM_ORIENTATIONS = 8
NUM_LEVELS = 4
CELLS = 4  # per side: each of the four quadrants has 2x2 parts
# Per pixel: unsigned orientations at two scales, signed ones at a third, and a soft histogram of
# three colour channels.
NUM_DESCRIPTORS = 3 * NUM_ORIENTATIONS + 3 * NUM_LEVELS
TARGET_DIM = 4 * NUM_DESCRIPTORS  # a quadrant is described by its 2x2 parts


class Descriptors(Objective):
    """Each image quadrant, through its pooled tokens, predicts its local descriptors.

    The hand-made targets are those of MaskFeat (Wei et al., 2022), but nothing is masked, and the
    prediction is linear in the features that `pool = "quadrants"` returns, so that the ridge
    regression of few-shot can read them. On a few minutes of generated images it is the simplest
    and the best of all objectives that were tried (recipes/LOG.md).
    """

    supervised = False
    scale: Tensor

    def __init__(self, model: LoadedModel, section: ObjectiveSection) -> None:
        super().__init__()
        if isinstance(model.network, ResNet):
            raise VitcliError(
                "objective `descriptors` pools quadrants of patches, and a ResNet has no patches",
                "`--set objective.name=softmax`, or use a Vision Transformer",
            )
        config, preprocess = model.network.config, model.preprocess
        if config.pool != "quadrants" or config.representation_size:
            raise VitcliError(
                f"objective `descriptors` needs pool `quadrants`, not `{config.pool}`",
                "`--set model.pool=quadrants`, without `model.representation_size`",
            )
        if any(side % 4 for side in config.image_size):
            raise VitcliError(
                f"objective `descriptors` needs an image size that 4 divides: {config.image_size}",
                "use another `--image-size`, such as 32",
            )
        assert preprocess is not None
        self.model = model.network
        self.decoder = nn.Linear(config.embed_dim, TARGET_DIM)
        scale = torch.tensor([preprocess.mean, preprocess.std])  # (2, C)
        self.register_buffer("scale", scale[:, :, None, None], persistent=False)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Metrics]:
        """(B, C, Y, X) -> the mean squared error () of standardised descriptors, and metrics."""
        loss = self.error(self.model.features(images), images)
        return loss, {"loss": loss.detach(), "explained": 1.0 - loss.detach()}

    def error(self, features: Tensor, images: Tensor) -> Tensor:
        """(B, 4 D), (B, C, Y, X) -> the mean squared error () of standardised descriptors."""
        mean, std = self.scale.unbind()
        # Targets in fp32: bf16 has too few bits for differences of neighbouring pixels.
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            targets = quadrant_targets(images.float() * std + mean)  # (B, 4, 144)
        quadrants = features.reshape(len(images), 4, -1)  # (B, 4, D)
        return F.mse_loss(self.decoder(quadrants).float(), targets)

    def extra_macs(self, config: ViTConfig | ResNetConfig) -> int:
        """The linear decoder, once per quadrant."""
        assert isinstance(config, ViTConfig)
        return count_macs(self.decoder, (4, config.embed_dim))


class Guided(Objective):
    """Cross-entropy plus descriptors.

    In a few minutes on a small labelled set, the dense targets teach the first blocks what labels
    alone would take many epochs to teach (recipes/LOG.md).
    """

    encoder_prefix = "descriptors.model."
    supervised = True
    settings = CrossEntropy.settings | {"descriptor_weight"}

    def __init__(self, model: LoadedModel, section: ObjectiveSection) -> None:
        super().__init__()
        self.descriptors = Descriptors(model, section)
        self.class_loss = CrossEntropy(model, section)
        self.weight = section.descriptor_weight

    @property
    def model(self) -> Network:
        """The network; a property, because a submodule must be registered once only."""
        network: Network = self.descriptors.model
        return network

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Metrics]:
        """(B, C, Y, X), (B,) or (B, K) -> the weighted sum of both losses (), and metrics."""
        features = self.model.features(images)  # (B, 4 D)
        logits = self.model.classify(features).float()  # (B, K)
        loss = self.class_loss(logits, labels)
        error = self.descriptors.error(features, images)
        accuracy = (logits.argmax(dim=1) == main_class(labels)).float().mean()
        total = loss + self.weight * error
        metrics = {
            "loss": loss.detach(),
            "objective": total.detach(),
            "accuracy": accuracy,
            "explained": 1.0 - error.detach(),
        }
        return total, metrics

    def extra_macs(self, config: ViTConfig | ResNetConfig) -> int:
        """Those of the descriptors."""
        return self.descriptors.extra_macs(config)


def strongest_gradient(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, C, Y, X) -> differences in x and in y and their squared norm, each (B, Y, X).

    As in HOG (Dalal and Triggs, 2005), the channel with the largest gradient counts.
    """
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    dx = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    dy = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    squares = dx * dx + dy * dy
    x, y, largest = dx[:, 0], dy[:, 0], squares[:, 0]
    # `argmax` and `gather` of three channels take ten times as long on a CPU.
    for channel in range(1, images.shape[1]):
        larger = squares[:, channel] > largest
        x, y = torch.where(larger, dx[:, channel], x), torch.where(larger, dy[:, channel], y)
        largest = torch.maximum(largest, squares[:, channel])
    return x, y, largest


def orientations(images: Tensor, signed: bool) -> Tensor:
    """(B, C, Y, X) -> (B, 8, Y, X): the square root of the gradient, split over directions.

    Unsigned directions do not distinguish light on dark from dark on light.
    """
    dx, dy, square = strongest_gradient(images)
    divisor = torch.where(square > 0, square, 1.0)
    # Sine and cosine of the direction, or of twice the direction, without an angle.
    if signed:
        scale = divisor.rsqrt()
        cosine, sine = dx * scale, dy * scale
    else:
        cosine, sine = (dx * dx - dy * dy) / divisor, 2 * dx * dy / divisor
    cosine = torch.where(square > 0, cosine, 1.0)  # no gradient counts as direction 0
    steps = torch.arange(NUM_ORIENTATIONS, device=images.device)
    centres = steps * (2 * math.pi / NUM_ORIENTATIONS)
    basis = torch.stack([centres.cos(), centres.sin()], dim=1)  # (8, 2)
    direction = torch.stack([cosine, sine], dim=1).flatten(2)  # (B, 2, Y*X)
    # The softmax of NUM_ORIENTATIONS / 2 * cos(angle - centre): at most e^4, so nothing overflows.
    near = (NUM_ORIENTATIONS / 2 * basis @ direction).exp()  # (B, 8, Y*X)
    strength = (square + 1e-12).pow(0.25).flatten(1) / near.sum(dim=1)  # (B, Y*X)
    return (near * strength[:, None]).reshape(len(near), -1, *images.shape[2:])


def cells_of(maps: Tensor, factor: int) -> Tensor:
    """(B, F, Y, X) -> (B, F, 4, 4): means of the cells of an image `factor` times as large."""
    rows, columns = maps.shape[2:]
    if rows % CELLS == 0 and columns % CELLS == 0:
        return F.avg_pool2d(maps, (rows // CELLS, columns // CELLS))
    whole = F.interpolate(maps, scale_factor=float(factor))  # cells end between pixels of `maps`
    return F.adaptive_avg_pool2d(whole, CELLS)


def describe(images: Tensor) -> Tensor:
    """(B, C, Y, X) in 0..1 -> (B, 36, 4, 4): orientations at three scales, and colours.

    Sides must be multiples of 4. A grey image counts as one with three equal channels.
    """
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    half, quarter = F.avg_pool2d(images, 2), F.avg_pool2d(images, 4)
    levels = torch.linspace(0, 1, NUM_LEVELS, device=images.device)
    colours = torch.exp(-(((images[:, :, None] - levels[:, None, None]) * NUM_LEVELS) ** 2))
    return torch.cat(
        [
            cells_of(orientations(images, signed=False), 1),
            cells_of(orientations(half, signed=False), 2),
            cells_of(orientations(quarter, signed=True), 4),
            cells_of(colours.flatten(1, 2), 1),
        ],
        dim=1,
    )


def quadrant_targets(images: Tensor) -> Tensor:
    """(B, C, Y, X) in 0..1 -> (B, 4, 144): the descriptors of each quadrant's 2x2 parts.

    Each value is standardised over the batch and the quadrants: mean 0, standard deviation 1. The
    batch is the micro-batch of a process, so its size changes the targets, as in BatchNorm.
    """
    cells = describe(images)  # (B, 36, 4, 4)
    parts = cells.reshape(*cells.shape[:2], 2, 2, 2, 2)  # (B, 36, 2, 2, 2, 2)
    targets = parts.permute(0, 2, 4, 1, 3, 5).reshape(len(images), 4, -1)  # (B, 4, 144)
    mean, std = targets.mean(dim=(0, 1)), targets.std(dim=(0, 1))
    return (targets - mean) / (std + 1e-4)
