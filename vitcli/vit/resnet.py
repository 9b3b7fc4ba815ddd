"""The BiT ResNet, the baseline of the paper (section 4.1).

It has pre-activation units, weight-standardised convolutions and GroupNorm (Kolesnikov et al.,
2020).
Source: big_vision/models/bit_paper.py. The file bit.py there is another, post-activation network.
AxialResNet is the same network with the attention of `axial_resnet.py`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitcli.config.choices import StemArithmetic
from vitcli.vit.axial_resnet import WIDENING, AxialAttention, AxialReplacement
from vitcli.vit.config_checks import check_count
from vitcli.vit.hybrid import GROUPS, init_stem, standardize, stem_channels
from vitcli.vit.position import Grid

NORM_EPS = 1e-5
# Weight standardisation adds this number to the variance of a kernel.
WEIGHT_EPS = {"google": 1e-10, "timm": 1e-8}


@dataclass(frozen=True)
class ResNetConfig:
    """All settings that change the outputs of a BiT ResNet.

    Attributes:
        image_size: (Y, X) in pixels. The network accepts other sizes too.
        num_channels: channels of an image.
        layers: number of units in each stage.
        width: factor on all widths; the smallest one is 64 times this factor.
        num_classes: outputs of the head; 0 for a backbone without a head.
        arithmetic: `google` follows big_vision. `timm` uses epsilon 1e-8 instead of 1e-10 in the
            weight standardisation. It pads the max-pool with zeros, as the first BiT release did.
        axial: axial attention replaces the 3x3 convolutions (AxialResNet, appendix D.6).

    Raises:
        ValueError: the network cannot be built with these settings.
    """

    image_size: tuple[int, int] = (224, 224)
    num_channels: int = 3
    layers: tuple[int, ...] = (3, 4, 6, 3)
    width: float = 1.0
    num_classes: int = 0
    arithmetic: StemArithmetic = "google"
    axial: bool = False

    def __post_init__(self) -> None:
        stem_channels(self.width)
        for side in self.image_size:
            check_count("image_size", side, 1)
        check_count("num_channels", self.num_channels, 1)
        check_count("num_classes", self.num_classes, 0)
        if not self.layers or min(self.layers) < 1:
            raise ValueError(f"a ResNet needs a unit in every stage, not {list(self.layers)}")
        if not isinstance(self.axial, bool):
            raise ValueError(f"axial is {self.axial!r}, not true or false")
        if self.arithmetic not in WEIGHT_EPS:
            known = ", ".join(f"`{name}`" for name in WEIGHT_EPS)
            raise ValueError(f"no arithmetic `{self.arithmetic}`; there are {known}")

    @property
    def depth(self) -> int:
        """Number of weight layers, as in the name: the root, three per unit, the head."""
        return 3 * sum(self.layers) + 2

    @property
    def feature_dim(self) -> int:
        """F: width of the features that the head reads."""
        return stem_channels(self.width) * 4 * 2 ** (len(self.layers) - 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON values for the header of a weights file."""
        return {"kind": "resnet", **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from `to_dict`'s values; raises a ValueError that names unknown keys."""
        values = {key: value for key, value in values.items() if key != "kind"}
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown settings of a ResNet: {', '.join(unknown)}")
        if "image_size" in values:
            y, x = values["image_size"]
            values["image_size"] = (int(y), int(x))
        if "layers" in values:
            values["layers"] = tuple(int(n) for n in values["layers"])
        return cls(**values)


class StdConv(nn.Conv2d):
    """A weight-standardised convolution without bias, padded equally on all sides."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, arithmetic: StemArithmetic
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.weight_eps = WEIGHT_EPS[arithmetic]

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, Y, X) -> (B, F', Y', X')."""
        weight = standardize(self.weight, self.weight_eps, of_variance=True)
        return F.conv2d(x, weight, stride=self.stride, padding=self.padding)


class DownsampleConv(nn.Module):
    """The shortcut of a unit that changes the number or the size of the feature maps."""

    def __init__(self, inputs: int, outputs: int, stride: int, arithmetic: StemArithmetic) -> None:
        super().__init__()
        self.conv = StdConv(inputs, outputs, 1, stride, arithmetic)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, Y, X) -> (B, F', Y', X')."""
        x = self.conv(x)  # (B, F', Y', X')
        return x


class PreActBottleneck(nn.Module):
    """Convolutions 1x1, 3x3 (with the stride) and 1x1 (to 4 W), each after a GroupNorm and a ReLU.

    Source: ResidualUnit in big_vision/models/bit_paper.py.

    Args:
        grid: rows and columns of the input of a unit with axial attention; None for a convolution.
    """

    def __init__(
        self, inputs: int, width: int, stride: int, arithmetic: StemArithmetic, grid: Grid | None
    ) -> None:
        super().__init__()
        outputs = 4 * width
        width = width if grid is None else WIDENING * width
        changes = inputs != outputs or stride != 1
        self.downsample = DownsampleConv(inputs, outputs, stride, arithmetic) if changes else None
        self.norm1 = nn.GroupNorm(GROUPS, inputs, eps=NORM_EPS)
        self.conv1 = StdConv(inputs, width, 1, 1, arithmetic)
        self.norm2 = nn.GroupNorm(GROUPS, width, eps=NORM_EPS)
        self.conv2: nn.Module
        self.norm3: nn.Module
        if grid is None:
            self.conv2 = StdConv(width, width, 3, stride, arithmetic)
            self.norm3 = nn.GroupNorm(GROUPS, width, eps=NORM_EPS)
        else:
            self.conv2 = AxialReplacement(width, stride, grid)
            self.norm3 = nn.Identity()  # the attention ends with a norm
        self.conv3 = StdConv(width, outputs, 1, 1, arithmetic)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, Y, X) -> (B, 4 W, Y', X')."""
        shortcut = x
        x = F.relu(self.norm1(x))
        # As in the source: only a projected shortcut branches off after the activation.
        if self.downsample is not None:
            shortcut = self.downsample(x)
        x = self.conv1(x)
        x = self.conv2(F.relu(self.norm2(x)))
        x = self.conv3(F.relu(self.norm3(x)))
        return x + shortcut


class BiTRoot(nn.Module):
    """The 7x7 convolution and the max-pool in front of the stages."""

    def __init__(self, num_channels: int, width: int, arithmetic: StemArithmetic) -> None:
        super().__init__()
        self.conv = StdConv(num_channels, width, 7, 2, arithmetic)
        self.zero_padding = arithmetic == "timm"

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> (B, F, Y', X'): convolution and 3x3 max-pool, each with stride 2."""
        x = self.conv(images)
        if self.zero_padding:
            # This differs from below: the pool sees values of both signs, so a zero can win.
            return F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, stride=2)
        return F.max_pool2d(x, 3, stride=2, padding=1)  # pads with minus infinity


class BiTStage(nn.Module):
    """Units at one resolution; the first one has the stride."""

    def __init__(
        self,
        inputs: int,
        width: int,
        depth: int,
        stride: int,
        arithmetic: StemArithmetic,
        grid: Grid | None,
    ) -> None:
        super().__init__()
        first = PreActBottleneck(inputs, width, stride, arithmetic, grid)
        later = None if grid is None else (-(-grid[0] // stride), -(-grid[1] // stride))
        rest = (PreActBottleneck(4 * width, width, 1, arithmetic, later) for _ in range(depth - 1))
        self.blocks = nn.ModuleList([first, *rest])


class ResNet(nn.Module):
    """BiT ResNet with the interface of `VisionTransformer`; the tensor names are timm's.

    Attributes:
        config: the settings that it was built from.
        checkpoint_activations: recompute each unit in the backward pass instead of storing its
            activations. This takes less memory and more time, and gives the same numbers.
    """

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        channels = stem_channels(config.width)
        self.stem = BiTRoot(config.num_channels, channels, config.arithmetic)
        self.stages = nn.ModuleList()
        inputs = channels
        for i, depth in enumerate(config.layers):
            width = channels * 2**i
            stride = 1 if i == 0 else 2  # the root has already halved the image twice
            shrunk = 4 * 2 ** max(i - 1, 0)
            rows, cols = (-(-side // shrunk) for side in config.image_size)
            grid = (rows, cols) if config.axial else None
            self.stages.append(BiTStage(inputs, width, depth, stride, config.arithmetic, grid))
            inputs = 4 * width
        self.norm = nn.GroupNorm(GROUPS, inputs, eps=NORM_EPS)
        classes = config.num_classes
        self.head = nn.Linear(config.feature_dim, classes) if classes else nn.Identity()

    def init_weights(self, generator: torch.Generator | None = None) -> "ResNet":
        """Draw new weights from `generator`, as big_vision does; returns self."""
        init_stem(self, generator)
        for part in self.modules():
            if isinstance(part, AxialAttention):
                part.init_positions(generator)
        # A zero head makes the first loss that of a uniform guess, ln K.
        if isinstance(self.head, nn.Linear):
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        return self

    def feature_map(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> (B, F, ceil(Y / 32), ceil(X / 32)): after the last norm and ReLU."""
        recompute = self.checkpoint_activations and self.training and torch.is_grad_enabled()
        x: Tensor = self.stem(images)
        for stage in self.stages:
            for unit in stage.blocks:  # type: ignore[union-attr]  # a ModuleList
                x = checkpoint(unit, x, use_reentrant=False) if recompute else unit(x)
        # The units are pre-activated, so the last sum still needs its norm and ReLU.
        return F.relu(self.norm(x))

    def features(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> (B, F): the mean of the feature map, which the head reads."""
        return self.feature_map(images).mean(dim=(2, 3))

    def classify(self, features: Tensor) -> Tensor:
        """(B, F) -> (B, K): logits, or the features if there is no head."""
        logits: Tensor = self.head(features)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> (B, K): logits, or the features if there is no head."""
        return self.classify(self.features(images))
