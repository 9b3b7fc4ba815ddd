"""Axial attention in place of the 3x3 convolutions of a ResNet: AxialResNet (appendix D.6).

Source: Wang et al., Axial-DeepLab (2020), equation 4, and lib/models/axialnet.py in the repository
csrhddlam/axial-deeplab, which D.6 names as its base. That code decides what D.6 leaves open: eight
heads, queries and keys of half the width of the values, norms in place of the scale 1 / sqrt(E),
columns before rows, units twice as wide inside as those of a ResNet. GroupNorm replaces its
BatchNorm, and the unit is that of BiT, as in all ResNets of the paper (section 4.1).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcli.vit.blocks import Axis
from vitcli.vit.hybrid import GROUPS
from vitcli.vit.position import Grid, resample_offsets

NUM_HEADS = 8
WIDENING = 2  # a unit is that much wider inside than the same unit of a plain ResNet


class AxialAttention(nn.Module):
    """Attention within each row or column of a feature map, with relative positions.

    A cell o reads the cells p of its line:
    y_o = sum_p softmax_p(q_o k_p + q_o r_q + k_p r_k) (v_p + r_v).
    r_q, r_k and r_v are learned embeddings of the offset p - o. Queries, keys and values, the three
    terms of the scores, and both terms of the output are normalised.

    Args:
        width: F, the number of feature maps.
        length: cells of a line at the configured image size; other lengths resample the embeddings.
    """

    def __init__(self, width: int, length: int, along: Axis) -> None:
        super().__init__()
        self.along = along
        self.value_dim = width // NUM_HEADS
        self.qkv = nn.Conv2d(width, 2 * width, 1, bias=False)
        self.norm_qkv = nn.GroupNorm(GROUPS, 2 * width)
        # BatchNorm keeps statistics of each head and term, so each is a group of its own here.
        self.norm_scores = nn.GroupNorm(3 * NUM_HEADS, 3 * NUM_HEADS)
        self.norm_out = nn.GroupNorm(GROUPS, 2 * width)
        self.rel_pos = nn.Parameter(torch.zeros(2 * length - 1, 2 * self.value_dim))

    def init_positions(self, generator: torch.Generator | None = None) -> None:
        """Draw the embeddings as the source does."""
        nn.init.normal_(self.rel_pos, std=self.value_dim**-0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, Y, X) -> (B, F, Y, X)."""
        if self.along == "column":
            return self._within_rows(x.transpose(2, 3)).transpose(2, 3)
        return self._within_rows(x)

    def _within_rows(self, x: Tensor) -> Tensor:
        b, f, lines, n = x.shape
        e = self.value_dim
        qkv = self.norm_qkv(self.qkv(x)).reshape(b, NUM_HEADS, 2 * e, lines, n)
        q, k, v = torch.split(qkv, [e // 2, e // 2, e], dim=2)  # (B, H, E, lines, n)
        place = torch.arange(n, device=x.device)
        offset = place - place[:, None] + n - 1  # (n, n): p - o, from 0 on
        table = resample_offsets(self.rel_pos, n)[offset].to(q.dtype)  # (n, n, 2 E)
        r_q, r_k, r_v = torch.split(table, [e // 2, e // 2, e], dim=2)
        terms = [
            torch.einsum("bhelo,bhelp->bhlop", q, k),
            torch.einsum("bhelo,ope->bhlop", q, r_q),
            torch.einsum("bhelp,ope->bhlop", k, r_k),
        ]
        scores = self.norm_scores(torch.cat(terms, dim=1).flatten(3))  # (B, 3 H, lines, n n)
        scores = scores.reshape(b, 3, NUM_HEADS, lines, n, n).sum(dim=1)
        weights = scores.softmax(dim=-1).to(v.dtype)  # (B, H, lines, n, n)
        content = torch.einsum("bhlop,bhelp->bhelo", weights, v).reshape(b, f, lines, n)
        position = torch.einsum("bhlop,ope->bhelo", weights, r_v).reshape(b, f, lines, n)
        content, position = self.norm_out(torch.cat([content, position], dim=1)).chunk(2, dim=1)
        return content + position


class AxialReplacement(nn.Module):
    """Attention along columns, then rows, and an average pool with the stride.

    It stands where a ResNet has a 3x3 convolution.

    Args:
        grid: rows and columns of the input at the configured image size.
    """

    def __init__(self, width: int, stride: int, grid: Grid) -> None:
        super().__init__()
        self.stride = stride
        self.column = AxialAttention(width, grid[0], "column")
        self.row = AxialAttention(width, grid[1], "row")

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, Y, X) -> (B, F, ceil(Y / stride), ceil(X / stride))."""
        x = self.row(self.column(x))
        if self.stride == 1:
            return x
        return F.avg_pool2d(x, self.stride, ceil_mode=True)  # rounds up, as the shortcut does
