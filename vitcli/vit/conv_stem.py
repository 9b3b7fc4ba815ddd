"""The convolutional stem of a hybrid: a few 3x3 convolutions in place of a patch projection.

Early convolutions make a small ViT learn faster (Xiao et al., 2021; Hassani et al., 2021). The
whitening first layer and the order inside a stage are those of airbench (Jordan, 2024), with
LayerNorm in place of BatchNorm, so that an image does not depend on the others of its batch.
Shape letters: see `model.py`; F is the number of feature maps.
"""

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitcli.vit.hybrid import standardize
from vitcli.vit.whitening import whitening_filters

if TYPE_CHECKING:
    from vitcli.vit.config import ViTConfig

MAX_STAGES = 6  # 64 px per token
WHOLE_STAGES = 2  # the last ones; those before them are strided convolutions
KERNEL = 3
MAX_COMPONENTS = 16  # of the 27 of a 3x3 patch in colour; the others are mostly noise
PATCH, PATCH_STRIDE = 4, 2  # of the whitening layer that is the first stage of a longer stem


def default_channels(embed_dim: int, stride: int) -> tuple[int, ...]:
    """Feature maps of each stage for a stem of `stride` pixels: half of the next stage's.

    The last stage has `embed_dim`. The others are multiples of 32, because that fills the vector
    registers of a CPU. Thirds were worse (recipes/LOG.md).
    """
    stages = stride.bit_length() - 1
    earlier = [max(32, round(embed_dim / 2**i / 32) * 32) for i in range(1, stages)]
    return (*reversed(earlier), embed_dim)


def whitening_kernel(num_channels: int, size: int, components: int) -> Tensor:
    """(F, C, size, size): the whitening filters of the largest variance, and their negatives.

    GELU removes negative values, so each filter is there with both signs. F is twice `components`,
    or twice the C * size**2 values of a patch if these are fewer.
    """
    kernel = whitening_filters(num_channels, size)[:components]
    return torch.cat([kernel, -kernel])


class WhiteningConv(nn.Module):
    """The first layer: fixed filters that decorrelate the pixels, and a learned bias."""

    weight: Tensor

    def __init__(self, num_channels: int, size: int, stride: int, components: int) -> None:
        super().__init__()
        self.stride = stride
        components = min(components, num_channels * size**2)
        self.out_channels = 2 * components
        # A buffer: stored with the weights, never trained. So no gradient of it is computed, which
        # would be the most expensive one of the stem.
        empty = torch.zeros(self.out_channels, num_channels, size, size)
        # On the meta device the values come from a file later, so nothing is computed.
        kernel = empty if empty.is_meta else whitening_kernel(num_channels, size, components)
        self.register_buffer("weight", kernel)
        self.bias = nn.Parameter(torch.zeros(self.out_channels))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> (B, F, ceil(Y / stride), ceil(X / stride))."""
        rows, columns = (side % self.stride for side in images.shape[2:])
        if rows or columns:  # the last cell is half outside
            images = F.pad(images, (0, columns, 0, rows))
        border = (self.weight.shape[-1] - 1) // 2
        x = F.conv2d(images, self.weight, stride=self.stride, padding=border)
        # In the channels-last layout a sum over the last axis, which a CPU computes in half of the
        # time that the gradient of a convolution's bias takes.
        return (x.permute(0, 2, 3, 1) + self.bias.to(x.dtype)).permute(0, 3, 1, 2)


class StdConv2d(nn.Conv2d):
    """A weight-standardised 3x3 convolution without bias; stride 1 keeps the size of the map."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, KERNEL, stride, padding=KERNEL // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, Y, X) -> (B, F', ceil(Y / stride), ceil(X / stride))."""
        weight = standardize(self.weight, 1e-8, of_variance=True)
        return F.conv2d(x, weight, stride=self.stride, padding=self.padding)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of each cell."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, Y, X) -> (B, F, Y, X)."""
        # In the channels-last layout both permutations are views.
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvStage(nn.Module):
    """Convolution, 2x2 max-pool, norm and GELU; then a residual convolution, norm and GELU."""

    def __init__(self, inputs: int, outputs: int, eps: float) -> None:
        super().__init__()
        self.conv1 = StdConv2d(inputs, outputs)
        self.norm1 = LayerNorm2d(outputs, eps=eps)
        self.conv2 = StdConv2d(outputs, outputs)
        self.norm2 = LayerNorm2d(outputs, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, Y, X) -> (B, F', ceil(Y / 2), ceil(X / 2))."""
        x = F.max_pool2d(self.conv1(x), 2, ceil_mode=True)
        x = F.gelu(self.norm1(x))
        return x + F.gelu(self.norm2(self.conv2(x)))


class StridedStage(nn.Module):
    """A convolution of stride 2, norm and GELU: an early stage, whose map is large."""

    def __init__(self, inputs: int, outputs: int, eps: float) -> None:
        super().__init__()
        self.conv1 = StdConv2d(inputs, outputs, stride=2)
        self.norm1 = LayerNorm2d(outputs, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, Y, X) -> (B, F', ceil(Y / 2), ceil(X / 2))."""
        return F.gelu(self.norm1(self.conv1(x)))


class ConvEmbed(nn.Module):
    """Convolutional stem and patch projection; replaces `PatchEmbed` in a hybrid."""

    def __init__(self, config: "ViTConfig") -> None:
        super().__init__()
        assert config.conv_stem is not None
        colors, stages = config.num_channels, config.conv_stem
        # At full size the first layer and a strided convolution took a sixth of a training step,
        # so a longer stem whitens at half size. A whole stage on large maps would take most of one.
        if len(stages) > WHOLE_STAGES:
            self.root = WhiteningConv(colors, PATCH, PATCH_STRIDE, stages[0] // 2)
            channels = (self.root.out_channels, *stages[1:])
        else:
            self.root = WhiteningConv(colors, KERNEL, 1, MAX_COMPONENTS)
            channels = (self.root.out_channels, *stages)
        early = len(channels) - 1 - WHOLE_STAGES
        self.stages = nn.ModuleList(
            (StridedStage if i < early else ConvStage)(inputs, outputs, config.norm_eps)
            for i, (inputs, outputs) in enumerate(pairwise(channels))
        )
        size, d = config.patch_size, config.embed_dim
        self.proj = nn.Conv2d(channels[-1], d, size, stride=size, bias=config.patch_bias)

    def forward(self, images: Tensor, recompute: bool = False) -> Tensor:
        """(B, C, Y, X) -> (B, N, D); `recompute` checkpoints the activations of the stages."""
        # The layout in which both the convolutions and the LayerNorms of a CPU are fastest.
        x = F.gelu(self.root(images.contiguous(memory_format=torch.channels_last)))
        for stage in self.stages:
            x = checkpoint(stage, x, use_reentrant=False) if recompute else stage(x)
        # Row-major, as `patchify` orders the patches of a plain ViT.
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, N, D)
