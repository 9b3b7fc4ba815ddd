"""The ResNet before the patches of a hybrid (section 3.1), as in the official code.

Shapes as in `model.py`; F is a number of feature maps. Source: vit_jax/models_resnet.py. The unit
is the bottleneck of the first ResNet, with the ReLU after the sum; the pre-activation network of
the BiT baselines is `resnet.py`.
"""

import math
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from vitcli.vit.config import ViTConfig

StemArithmetic = Literal["google", "timm"]
GROUPS = 32
WIDEST = 100
# Epsilon of the GroupNorms: flax's default, and torch's.
NORM_EPS = {"google": 1e-6, "timm": 1e-5}


def standardize(weight: Tensor, eps: float, *, of_variance: bool) -> Tensor:
    """(F, C, Y, X) -> the same: mean 0 and variance 1 in each output channel.

    Weight standardisation (Qiao et al. 2019). `eps` is added to the variance, or else to the
    standard deviation, as vit_jax does; both are the biased ones.
    """
    variance, mean = torch.var_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
    scale = torch.sqrt(variance + eps) if of_variance else torch.sqrt(variance) + eps
    return (weight - mean) / scale


def pad_same(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """(B, F, Y, X) -> padded for an output of ceil(Y / stride) x ceil(X / stride).

    TensorFlow's `SAME`: what cannot be shared evenly goes to the bottom and the right.
    """
    rows, cols = (_same_padding(size, kernel, stride) for size in x.shape[2:])
    if not rows and not cols:
        return x
    return F.pad(x, (cols // 2, cols - cols // 2, rows // 2, rows - rows // 2), value=value)


def _same_padding(size: int, kernel: int, stride: int) -> int:
    return max((-(-size // stride) - 1) * stride + kernel - size, 0)


class SameStdConv(nn.Conv2d):
    """A convolution without bias, weight-standardised at use, `SAME` padding."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, arithmetic: StemArithmetic
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride, bias=False)
        self.arithmetic = arithmetic
        self.window = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, Y, X) -> (B, F', Y', X')."""
        if self.arithmetic == "google":
            weight = standardize(self.weight, 1e-5, of_variance=False)
        else:  # timm's StdConv2dSame
            weight = standardize(self.weight, 1e-8, of_variance=True)
        return F.conv2d(pad_same(x, *self.window), weight, stride=self.stride)


class Projection(nn.Module):
    """The shortcut of a unit that changes the number of feature maps or their size."""

    def __init__(self, inputs: int, outputs: int, stride: int, arithmetic: StemArithmetic) -> None:
        super().__init__()
        self.conv = SameStdConv(inputs, outputs, 1, stride, arithmetic)
        self.norm = nn.GroupNorm(GROUPS, outputs, eps=NORM_EPS[arithmetic])

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, Y, X) -> (B, F', Y', X')."""
        return self.norm(self.conv(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1 to four times the width; each with a GroupNorm after it."""

    def __init__(self, inputs: int, width: int, stride: int, arithmetic: StemArithmetic) -> None:
        super().__init__()
        eps, outputs = NORM_EPS[arithmetic], 4 * width
        changes = inputs != outputs or stride != 1
        self.downsample = Projection(inputs, outputs, stride, arithmetic) if changes else None
        self.conv1 = SameStdConv(inputs, width, 1, 1, arithmetic)
        self.norm1 = nn.GroupNorm(GROUPS, width, eps=eps)
        self.conv2 = SameStdConv(width, width, 3, stride, arithmetic)
        self.norm2 = nn.GroupNorm(GROUPS, width, eps=eps)
        self.conv3 = SameStdConv(width, outputs, 1, 1, arithmetic)
        self.norm3 = nn.GroupNorm(GROUPS, outputs, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, Y, X) -> (B, 4 W, Y', X')."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        x = self.norm3(self.conv3(x))
        return F.relu(shortcut + x)


class Stage(nn.Module):
    """Units at one resolution; the first has the stride."""

    def __init__(
        self, inputs: int, width: int, depth: int, stride: int, arithmetic: StemArithmetic
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            Bottleneck(inputs, width, stride, arithmetic),
            *(Bottleneck(4 * width, width, 1, arithmetic) for _ in range(depth - 1)),
        )

    def forward(self, x: Tensor, again: bool = False) -> Tensor:
        """(B, F, Y, X) -> (B, 4 W, Y', X'); `again`: compute units again in the backward pass."""
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        return x


class Root(nn.Module):
    """7x7 convolution with stride 2, GroupNorm, ReLU, 3x3 max-pool with stride 2."""

    def __init__(self, num_channels: int, width: int, arithmetic: StemArithmetic) -> None:
        super().__init__()
        self.conv = SameStdConv(num_channels, width, 7, 2, arithmetic)
        self.norm = nn.GroupNorm(GROUPS, width, eps=NORM_EPS[arithmetic])

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> (B, F, ceil(Y / 4), ceil(X / 4))."""
        x = F.relu(self.norm(self.conv(images)))
        return F.max_pool2d(pad_same(x, 3, 2, -math.inf), 3, stride=2)


class Backbone(nn.Module):
    """The root and the stages; `width` doubles from stage to stage, as does the stride."""

    def __init__(
        self,
        num_channels: int,
        layers: tuple[int, ...],
        width: int,
        arithmetic: StemArithmetic = "google",
    ) -> None:
        super().__init__()
        self.stem = Root(num_channels, width, arithmetic)
        self.stages = nn.ModuleList()
        self.num_features = width
        for i, depth in enumerate(layers):
            nmid = width * 2**i
            stride = 1 if i == 0 else 2
            self.stages.append(Stage(self.num_features, nmid, depth, stride, arithmetic))
            self.num_features = 4 * nmid

    def forward(self, images: Tensor, again: bool = False) -> Tensor:
        """(B, C, Y, X) -> (B, F, rows, cols): the feature map."""
        x: Tensor = self.stem(images)
        for stage in self.stages:
            x = stage(x, again)
        return x


class HybridEmbed(nn.Module):
    """ResNet and patch projection: what stands in place of `PatchEmbed` in a hybrid."""

    def __init__(self, config: "ViTConfig") -> None:
        super().__init__()
        assert config.stem is not None
        self.patch_size = config.patch_size
        width = stem_channels(config.stem_width)
        self.backbone = Backbone(config.num_channels, config.stem, width, config.stem_arithmetic)
        self.proj = nn.Conv2d(
            self.backbone.num_features,
            config.embed_dim,
            config.patch_size,
            stride=config.patch_size,
            bias=config.patch_bias,
        )

    def forward(self, images: Tensor, again: bool = False) -> Tensor:
        """(B, C, Y, X) -> (B, N, D); `again`: compute units again in the backward pass."""
        x = self.proj(self.backbone(images, again))  # (B, D, rows, cols)
        return x.flatten(2).transpose(1, 2)  # (B, N, D)


def stem_channels(width: float) -> int:
    """Feature maps of the root of a ResNet that is `width` times as wide as the usual one.

    Raises:
        ValueError: the groups of the GroupNorms do not divide it, or it is beyond any ResNet.
    """
    if width > WIDEST:
        raise ValueError(f"a ResNet of width {width:g}; they are up to {WIDEST} times the usual")
    channels = int(64 * width)
    if channels < GROUPS or channels % GROUPS:
        raise ValueError(
            f"a ResNet of width {width:g} begins with {channels} channels, not a multiple of its "
            f"{GROUPS} groups"
        )
    return channels


def init_stem(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw the weights of a ResNet as the official code does, from `generator`.

    Convolutions from flax's LeCun-normal (truncated at two standard deviations); GroupNorms 1 and
    0, but 0 the scale of the last one in each unit, so that a unit begins as its shortcut.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            fan_in = part.weight[0].numel()
            # Cutting off at 2 leaves this share of the standard deviation; flax makes up for it.
            std = 1 / math.sqrt(fan_in) / 0.87962566103423978
            nn.init.trunc_normal_(part.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.GroupNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
    for part in module.modules():
        if isinstance(part, Bottleneck):
            nn.init.zeros_(part.norm3.weight)
