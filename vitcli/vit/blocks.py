"""The pre-norm encoder: equations 2 and 3 of the paper."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcli.vit.config import ViTConfig
from vitcli.vit.position import Grid, resample_offsets

# Up to this many tokens the (T, T) matrix of a CPU batch is small beside the activations.
LONGEST_EXPLICIT = 1024

Axis = Literal["row", "column"]
# For measurements: which one is taken, whatever device and length; None leaves the choice.
_forced: Literal["fused", "explicit"] | None = None


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, H, T, E) three times -> (B, H, T, E): softmax(q k^T / sqrt(E) + bias) v.

    The one place where the implementation is chosen. On a CPU the backward of the fused kernel
    is slow in bf16 (1.1 to 1.8 times the time of a whole training step at 16 to 197 tokens, see
    recipes/LOG.md), so there it is written out; in fp32 both are as fast, and the fused one needs
    less memory. Elsewhere, and for long sequences, it is torch's. Both agree within rounding.
    """
    if is_written_out(q):
        return attend_explicit(q, k, v, bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def is_written_out(q: Tensor) -> bool:
    """Whether `attend` takes queries (..., T, E) of this type and place step by step."""
    if _forced is not None:
        return _forced == "explicit"
    half = q.dtype in (torch.bfloat16, torch.float16)
    return half and q.device.type == "cpu" and q.shape[-2] <= LONGEST_EXPLICIT


@contextmanager
def forced_attention(kind: Literal["fused", "explicit"] | None) -> Iterator[None]:
    """For the length of a block, all attention is torch's fused one, or the one written out.

    None changes nothing. For measurements: the choice of `attend` is the faster one.
    """
    global _forced
    before, _forced = _forced, kind or _forced
    try:
        yield
    finally:
        _forced = before


def attend_explicit(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """`attend` as two batched matrix products around a softmax; bias (B, H, T, T)."""
    b, h, t, e = q.shape
    s = k.shape[2]
    q = (q * e**-0.5).reshape(b * h, t, e)
    scores = torch.bmm(q, k.reshape(b * h, s, e).transpose(1, 2))  # (B*H, T, T)
    if bias is not None:
        scores = scores + bias.reshape(b * h, t, s)
    # In the scores' own type: autocast would carry the largest tensor of the block to fp32.
    with torch.autocast(q.device.type, enabled=False):
        weights = scores.softmax(dim=-1)
    return torch.bmm(weights, v.reshape(b * h, s, e)).reshape(b, h, t, e)


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values.

    Args:
        num_patches: how many patches attend to each other in an image of the configured size;
            relative positions have a code for each of their 2 N - 1 offsets.
    """

    def __init__(self, config: ViTConfig, num_patches: int) -> None:
        super().__init__()
        d = config.embed_dim
        self.num_heads = config.num_heads
        self.num_prefix_tokens = config.num_prefix_tokens
        head_dim = d // config.num_heads
        self.qkv = nn.Linear(d, 3 * d, bias=config.qkv_bias)
        eps = config.norm_eps
        self.q_norm = nn.LayerNorm(head_dim, eps=eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim, eps=eps) if config.qk_norm else nn.Identity()
        relative = config.position == "relative"
        offsets = 2 * num_patches - 1
        self.rel_pos = nn.Parameter(torch.zeros(offsets, head_dim)) if relative else None
        self.proj = nn.Linear(d, d)
        self.proj_drop = nn.Dropout(config.dropout_rate)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(B, T, D) -> queries, keys, values (B, H, T, E), and the bias (B, H, T, T) or None."""
        b, t, d = x.shape
        qkv = self.qkv(x).reshape(b, t, 3, self.num_heads, d // self.num_heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, T, E)
        if is_written_out(qkv):
            qkv = qkv.contiguous()  # one copy for all three; the fused kernel needs none
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        bias = None
        if self.rel_pos is not None:
            bias = relative_bias(q, self.rel_pos, self.num_prefix_tokens)
        return q, k, v, bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        b, t, d = x.shape
        x = attend(*self.heads(x))  # (B, H, T, E)
        x = x.transpose(1, 2).reshape(b, t, d)  # (B, T, D)
        x = self.proj_drop(self.proj(x))
        return x


def relative_bias(q: Tensor, table: Tensor, num_prefix_tokens: int) -> Tensor:
    """(B, H, T, E), (2 N - 1, E) -> (B, H, T, T): what is added to the scores before the softmax.

    Appendix D.4: "extra attention, where we use the original query (the content of query), but use
    relative positional embeddings as keys". Each offset p_q - p_k in the row-major sequence has an
    embedding, the smallest, 1 - N, the first one. Class token and registers have no place in the
    picture: their rows and columns are 0.
    """
    q = q[:, :, num_prefix_tokens:]  # (B, H, N, E)
    n = q.shape[2]
    place = torch.arange(n, device=q.device)
    offset = place[:, None] - place + n - 1  # (N, N), 0 .. 2 N - 2
    keys = resample_offsets(table, n)[offset].to(q.dtype)  # (N, N, E)
    bias = torch.einsum("bhie,ije->bhij", q * q.shape[-1] ** -0.5, keys)  # (B, H, N, N)
    return F.pad(bias, (num_prefix_tokens, 0, num_prefix_tokens, 0))  # (B, H, T, T)


class Mlp(nn.Module):
    """Two dense layers with a GELU between, and dropout after each (appendix B.1)."""

    def __init__(self, width: int, hidden: int, gelu: str, dropout_rate: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate="tanh" if gelu == "tanh" else "none")
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        x = self.drop(self.act(self.fc1(x)))
        x = self.drop(self.fc2(x))
        return x


class SwiGlu(nn.Module):
    """silu(x1) * x2 between two dense layers (Shazeer, 2020), x1 and x2 from one projection."""

    def __init__(self, width: int, hidden: int, dropout_rate: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        gate, x = self.fc1(x).chunk(2, dim=-1)
        x = self.drop(F.silu(gate) * x)
        x = self.drop(self.fc2(x))
        return x


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (Touvron et al., 2021)."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: drops the residual branch of whole images (Huang et al., 2016)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D); what is kept is scaled so that the mean stays."""
        if not self.training or self.rate == 0.0:
            return x
        keep = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.rate
        return x * keep.to(x.dtype) / (1.0 - self.rate)


class Block(nn.Module):
    """x + MSA(LN(x)), then x + MLP(LN(x)).

    Args:
        along: attention inside each `row` or each `column` of patches; None for all tokens.
    """

    def __init__(self, config: ViTConfig, drop_path_rate: float, along: Axis | None = None) -> None:
        super().__init__()
        d, scale, (rows, cols) = config.embed_dim, config.layer_scale, config.grid
        self.along = along
        num_patches = {"row": cols, "column": rows, None: rows * cols}[along]
        self.norm1 = nn.LayerNorm(d, eps=config.norm_eps)
        self.attn = Attention(config, num_patches)
        self.ls1 = LayerScale(d, scale) if scale is not None else nn.Identity()
        self.drop_path1 = DropPath(drop_path_rate)
        self.norm2 = nn.LayerNorm(d, eps=config.norm_eps)
        self.mlp = build_mlp(config)
        self.ls2 = LayerScale(d, scale) if scale is not None else nn.Identity()
        self.drop_path2 = DropPath(drop_path_rate)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        branch = self.norm1(x)
        if self.along is None:
            branch = self.attn(branch)
        else:
            branch = self.attn(split_lines(branch, grid, self.along))
            branch = join_lines(branch, grid, self.along)
        x = x + self.drop_path1(self.ls1(branch))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x


def build_mlp(config: ViTConfig) -> nn.Module:
    """The MLP of a block."""
    if config.mlp == "swiglu":
        return SwiGlu(config.embed_dim, config.mlp_dim, config.dropout_rate)
    return Mlp(config.embed_dim, config.mlp_dim, config.gelu, config.dropout_rate)


def split_lines(x: Tensor, grid: Grid, along: Axis) -> Tensor:
    """(B, N, D) -> (B*rows, cols, D), or (B*cols, rows, D) along columns."""
    x = x.reshape(-1, *grid, x.shape[-1])  # (B, rows, cols, D)
    return (x if along == "row" else x.transpose(1, 2)).flatten(0, 1)


def join_lines(x: Tensor, grid: Grid, along: Axis) -> Tensor:
    """The inverse of `split_lines`."""
    (rows, cols), d = grid, x.shape[-1]
    if along == "column":
        x = x.reshape(-1, cols, rows, d).transpose(1, 2)  # (B, rows, cols, D)
    return x.reshape(-1, rows * cols, d)


class AxialBlock(nn.Module):
    """A block along the rows, then one along the columns (appendix D.6), each with its MLP."""

    def __init__(self, config: ViTConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.row = Block(config, drop_path_rate, "row")
        self.column = Block(config, drop_path_rate, "column")

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.column(self.row(x, grid), grid)


def build_blocks(config: ViTConfig) -> nn.ModuleList:
    """The blocks of the encoder, first to last."""
    kind = AxialBlock if config.axial else Block
    return nn.ModuleList(kind(config, rate) for rate in drop_path_rates(config))


def drop_path_rates(config: ViTConfig) -> list[float]:
    """One rate a block, growing linearly from 0 to the configured one."""
    last = max(config.depth - 1, 1)
    return [config.drop_path_rate * i / last for i in range(config.depth)]
