"""The convolutional stem of a hybrid: a few 3x3 convolutions in place of a patch projection.

Early convolutions make a small ViT learn faster (Xiao et al., 2021; Hassani et al., 2021). The
whitening first layer and the order inside a stage are those of airbench (Jordan, 2024), with one
group of GroupNorm in place of BatchNorm, so that an image does not depend on the others of its
batch.
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


def default_channels(embed_dim: int, stride: int) -> tuple[int, ...]:
    """Feature maps of each stage for a stem of `stride` pixels: half of the next stage's.

    The last stage has `embed_dim`. The others are multiples of 32, because that fills the vector
    registers of a CPU. Thirds were worse (recipes/LOG.md).
    """
    stages = stride.bit_length() - 1
    earlier = [max(32, round(embed_dim / 2**i / 32) * 32) for i in range(1, stages)]
    return (*reversed(earlier), embed_dim)


def whitening_kernel(num_channels: int) -> Tensor:
    """(F, C, 3, 3): the whitening filters of the largest variance, and their negatives.

    GELU removes negative values, so each filter is there with both signs.
    """
    kernel = whitening_filters(num_channels, KERNEL)[:MAX_COMPONENTS]
    return torch.cat([kernel, -kernel])


class WhiteningConv(nn.Module):
    """The first layer: fixed filters that decorrelate the pixels.

    Without a bias it has no weights to train. So nothing is computed backwards through the largest
    maps of the stem, neither here nor towards the input of the next convolution.
    """

    weight: Tensor

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.out_channels = 2 * min(MAX_COMPONENTS, num_channels * KERNEL**2)
        empty = torch.zeros(self.out_channels, num_channels, KERNEL, KERNEL)
        # On the meta device the values come from a file later, so nothing is computed.
        kernel = empty if empty.is_meta else whitening_kernel(num_channels)
        self.register_buffer("weight", kernel)  # stored with the weights

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> (B, F, Y, X)."""
        return F.conv2d(images, self.weight, padding=KERNEL // 2)


class StdConv2d(nn.Conv2d):
    """A weight-standardised 3x3 convolution without bias; stride 1 keeps the size of the map."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, KERNEL, stride, padding=KERNEL // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, Y, X) -> (B, F', ceil(Y / stride), ceil(X / stride))."""
        weight = standardize(self.weight, 1e-8, of_variance=True)
        return F.conv2d(x, weight, stride=self.stride, padding=self.padding)


def stem_norm(channels: int, eps: float) -> nn.GroupNorm:
    """The norm over all channels and cells of an image, with a scale and a shift per channel.

    LayerNorm over the channels of each cell was as accurate and takes longer on a CPU
    (recipes/LOG.md).
    """
    return nn.GroupNorm(1, channels, eps=eps)


class ConvStage(nn.Module):
    """Convolution, 2x2 max-pool, norm and GELU; then a residual convolution, norm and GELU."""

    def __init__(self, inputs: int, outputs: int, eps: float) -> None:
        super().__init__()
        self.conv1 = StdConv2d(inputs, outputs)
        self.norm1 = stem_norm(outputs, eps)
        self.conv2 = StdConv2d(outputs, outputs)
        self.norm2 = stem_norm(outputs, eps)

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
        self.norm1 = stem_norm(outputs, eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, Y, X) -> (B, F', ceil(Y / 2), ceil(X / 2))."""
        return F.gelu(self.norm1(self.conv1(x)))


class ConvEmbed(nn.Module):
    """Convolutional stem and patch projection; replaces `PatchEmbed` in a hybrid."""

    def __init__(self, config: "ViTConfig") -> None:
        super().__init__()
        assert config.conv_stem is not None
        self.root = WhiteningConv(config.num_channels)
        channels = (self.root.out_channels, *config.conv_stem)
        # A whole stage on large maps would take most of the time of a small model.
        early = len(config.conv_stem) - WHOLE_STAGES
        self.stages = nn.ModuleList(
            (StridedStage if i < early else ConvStage)(inputs, outputs, config.norm_eps)
            for i, (inputs, outputs) in enumerate(pairwise(channels))
        )
        size, d = config.patch_size, config.embed_dim
        self.proj = nn.Conv2d(channels[-1], d, size, stride=size, bias=config.patch_bias)

    def forward(self, images: Tensor, recompute: bool = False) -> Tensor:
        """(B, C, Y, X) -> (B, N, D); `recompute` checkpoints the activations of the stages."""
        # The layout in which the convolutions of a CPU are fastest.
        x = F.gelu(self.root(images.contiguous(memory_format=torch.channels_last)))
        for stage in self.stages:
            x = checkpoint(stage, x, use_reentrant=False) if recompute else stage(x)
        # Row-major, as `patchify` orders the patches of a plain ViT.
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, N, D)
