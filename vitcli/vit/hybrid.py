"""The ResNet stem of a hybrid model (section 3.1), as in the official code.

Source: vit_jax/models_resnet.py. Its unit is the bottleneck of the first ResNet, with the ReLU
after the sum. `resnet.py` holds another network: the pre-activation ResNet of the BiT baselines.
Shape letters: see `model.py`; F is the number of feature maps.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitcli.config.choices import StemArithmetic

if TYPE_CHECKING:
    from vitcli.vit.config import ViTConfig

GROUPS = 32  # of every GroupNorm; BiT and the hybrids use 32 at every width
MAX_WIDTH = 100  # a wider ResNet comes from a damaged file
# GroupNorm epsilon: the default of flax and of torch.
NORM_EPS = {"google": 1e-6, "timm": 1e-5}


def standardize(weight: Tensor, eps: float, *, of_variance: bool) -> Tensor:
    """(F, C, Y, X) -> (F, C, Y, X): a kernel with mean 0 and variance 1 in each output channel.

    Weight standardisation (Qiao et al., 2019). `of_variance` adds `eps` to the variance; otherwise
    it is added to the standard deviation, as in vit_jax.
    """
    # Both are population statistics (correction 0), as jnp.var and jnp.std compute them.
    variance, mean = torch.var_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
    scale = torch.sqrt(variance + eps) if of_variance else torch.sqrt(variance) + eps
    return (weight - mean) / scale


def pad_same(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """(B, F, Y, X) -> padded so that the output has ceil(Y / stride) x ceil(X / stride) cells.

    TensorFlow's `SAME` padding: an odd pixel goes to the bottom and to the right.
    """
    rows, cols = (_same_padding(size, kernel, stride) for size in x.shape[2:])
    if not rows and not cols:
        return x
    return F.pad(x, (cols // 2, cols - cols // 2, rows // 2, rows - rows // 2), value=value)


def _same_padding(size: int, kernel: int, stride: int) -> int:
    return max((-(-size // stride) - 1) * stride + kernel - size, 0)


class StdConv2dSame(nn.Conv2d):
    """A weight-standardised convolution without bias, with `SAME` padding."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, arithmetic: StemArithmetic
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride, bias=False)
        self.arithmetic = arithmetic
        self.window = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, Y, X) -> (B, F', Y', X')."""
        # The stored weight is not standardised: training updates it, and files hold it, as it is.
        if self.arithmetic == "google":
            weight = standardize(self.weight, 1e-5, of_variance=False)
        else:  # timm's layer of the same name
            weight = standardize(self.weight, 1e-8, of_variance=True)
        return F.conv2d(pad_same(x, *self.window), weight, stride=self.stride)


class NormedDownsample(nn.Module):
    """The shortcut of a bottleneck that changes the number or the size of the feature maps."""

    def __init__(self, inputs: int, outputs: int, stride: int, arithmetic: StemArithmetic) -> None:
        super().__init__()
        self.conv = StdConv2dSame(inputs, outputs, 1, stride, arithmetic)
        self.norm = nn.GroupNorm(GROUPS, outputs, eps=NORM_EPS[arithmetic])

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, Y, X) -> (B, F', Y', X')."""
        return self.norm(self.conv(x))


class Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3 (with the stride) and 1x1 (to 4 W), each followed by a GroupNorm."""

    def __init__(self, inputs: int, width: int, stride: int, arithmetic: StemArithmetic) -> None:
        super().__init__()
        eps, outputs = NORM_EPS[arithmetic], 4 * width
        changes = inputs != outputs or stride != 1
        self.downsample = NormedDownsample(inputs, outputs, stride, arithmetic) if changes else None
        self.conv1 = StdConv2dSame(inputs, width, 1, 1, arithmetic)
        self.norm1 = nn.GroupNorm(GROUPS, width, eps=eps)
        self.conv2 = StdConv2dSame(width, width, 3, stride, arithmetic)
        self.norm2 = nn.GroupNorm(GROUPS, width, eps=eps)
        self.conv3 = StdConv2dSame(width, outputs, 1, 1, arithmetic)
        self.norm3 = nn.GroupNorm(GROUPS, outputs, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, Y, X) -> (B, 4 W, Y', X')."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        x = self.norm3(self.conv3(x))
        return F.relu(shortcut + x)  # after the sum: the post-activation unit of He et al. (2015)


class StemStage(nn.Module):
    """Bottlenecks at one resolution; the first one has the stride."""

    def __init__(
        self, inputs: int, width: int, depth: int, stride: int, arithmetic: StemArithmetic
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            Bottleneck(inputs, width, stride, arithmetic),
            *(Bottleneck(4 * width, width, 1, arithmetic) for _ in range(depth - 1)),
        )

    def forward(self, x: Tensor, recompute: bool = False) -> Tensor:
        """(B, F, Y, X) -> (B, 4 W, Y', X'); `recompute` checkpoints the activations."""
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x


class StemRoot(nn.Module):
    """7x7 convolution with stride 2, GroupNorm, ReLU, 3x3 max-pool with stride 2."""

    def __init__(self, num_channels: int, width: int, arithmetic: StemArithmetic) -> None:
        super().__init__()
        self.conv = StdConv2dSame(num_channels, width, 7, 2, arithmetic)
        self.norm = nn.GroupNorm(GROUPS, width, eps=NORM_EPS[arithmetic])

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> (B, F, ceil(Y / 4), ceil(X / 4))."""
        x = F.relu(self.norm(self.conv(images)))
        # Minus infinity: a padded cell must never be the maximum.
        return F.max_pool2d(pad_same(x, 3, 2, -math.inf), 3, stride=2)


class StemBackbone(nn.Module):
    """The root and the stages of the stem; the width doubles from stage to stage."""

    def __init__(
        self,
        num_channels: int,
        layers: tuple[int, ...],
        width: int,
        arithmetic: StemArithmetic = "google",
    ) -> None:
        super().__init__()
        self.stem = StemRoot(num_channels, width, arithmetic)
        self.stages = nn.ModuleList()
        self.num_features = width
        for i, depth in enumerate(layers):
            nmid = width * 2**i
            stride = 1 if i == 0 else 2  # the root has already halved the image twice
            self.stages.append(StemStage(self.num_features, nmid, depth, stride, arithmetic))
            self.num_features = 4 * nmid

    def forward(self, images: Tensor, recompute: bool = False) -> Tensor:
        """(B, C, Y, X) -> (B, F, rows, cols): the feature map."""
        x: Tensor = self.stem(images)
        for stage in self.stages:
            x = stage(x, recompute)
        return x


class HybridEmbed(nn.Module):
    """ResNet stem and patch projection; replaces `PatchEmbed` in a hybrid."""

    def __init__(self, config: "ViTConfig") -> None:
        super().__init__()
        assert config.stem is not None
        self.patch_size = config.patch_size
        width = stem_channels(config.stem_width)
        self.backbone = StemBackbone(
            config.num_channels, config.stem, width, config.stem_arithmetic
        )
        self.proj = nn.Conv2d(
            self.backbone.num_features,
            config.embed_dim,
            config.patch_size,
            stride=config.patch_size,
            bias=config.patch_bias,
        )

    def forward(self, images: Tensor, recompute: bool = False) -> Tensor:
        """(B, C, Y, X) -> (B, N, D); `recompute` checkpoints the activations of the stem."""
        x = self.proj(self.backbone(images, recompute))  # (B, D, rows, cols)
        # Row-major, as `patchify` orders the patches of a plain ViT.
        return x.flatten(2).transpose(1, 2)  # (B, N, D)


def stem_channels(width: float) -> int:
    """Feature maps of the root of a ResNet whose width is multiplied by `width`.

    Raises:
        ValueError: the GroupNorm groups do not divide the number, or the width is out of range.
    """
    if width > MAX_WIDTH:
        raise ValueError(f"the ResNet width {width:g} is above {MAX_WIDTH}")
    channels = int(64 * width)
    if channels < GROUPS or channels % GROUPS:
        raise ValueError(
            f"the ResNet width {width:g} gives {channels} channels, not a multiple of its "
            f"{GROUPS} groups"
        )
    return channels


def lecun_normal(weight: Tensor, generator: torch.Generator | None = None) -> None:
    """Draw a kernel (F, ...) as flax does by default: normal, truncated at two deviations."""
    # Truncation at 2 leaves this fraction of the standard deviation; flax corrects for it.
    std = 1 / math.sqrt(weight[0].numel()) / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)


def init_stem(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw the weights of a ResNet from `generator`, as the official code does.

    Convolutions are LeCun-normal. GroupNorms start with scale 1 and bias 0.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            lecun_normal(part.weight, generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.GroupNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
    # A zero scale at the end makes each unit start as its shortcut (Goyal et al., 2017, sec. 5.1).
    for part in module.modules():
        if isinstance(part, Bottleneck):
            nn.init.zeros_(part.norm3.weight)
