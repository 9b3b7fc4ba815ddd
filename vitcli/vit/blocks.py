"""The pre-norm encoder: equations 2 and 3 of the paper."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcli.vit.config import ViTConfig
from vitcli.vit.position import Grid, OffsetBias, resample_offsets
from vitcli.vit.rope import Rotation, rotate

# Up to this many tokens the (T, T) scores of a CPU batch are small compared with the activations.
MAX_EXPLICIT_TOKENS = 1024

Axis = Literal["row", "column"]
# Measurements force one implementation for every device and length; None means no force.
_forced: Literal["fused", "explicit"] | None = None


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """3 x (B, H, T, E) -> (B, H, T, E): softmax(q k^T / sqrt(E) + bias) v (appendix A, eq. 6 to 7).

    Uses torch's fused kernel or the explicit products; both agree within rounding.
    """
    # The backward pass of the fused kernel is slow on a CPU in bf16: a training step takes 1.1 to
    # 1.8 times as long at 16 to 197 tokens (recipes/LOG.md). In fp32 both are equally fast, and the
    # fused kernel needs less memory.
    if uses_explicit_attention(q):
        return attend_explicit(q, k, v, bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def uses_explicit_attention(q: Tensor) -> bool:
    """True if `attend` computes queries (..., T, E) of this dtype and device explicitly."""
    if _forced is not None:
        return _forced == "explicit"
    half = q.dtype in (torch.bfloat16, torch.float16)
    return half and q.device.type == "cpu" and q.shape[-2] <= MAX_EXPLICIT_TOKENS


@contextmanager
def forced_attention(kind: Literal["fused", "explicit"] | None) -> Iterator[None]:
    """Force one implementation of attention inside a `with` block, for measurements.

    None changes nothing.
    """
    global _forced
    before, _forced = _forced, kind or _forced
    try:
        yield
    finally:
        _forced = before


def attend_explicit(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """`attend` as two batched matrix products around a softmax; bias (B or 1, H, T, T)."""
    b, h, t, e = q.shape
    s = k.shape[2]
    # Scaling q touches T x E numbers; scaling the scores would touch T x T.
    q = (q * e**-0.5).reshape(b * h, t, e)  # (B*H, T, E)
    scores = torch.bmm(q, k.reshape(b * h, s, e).transpose(1, 2))  # (B*H, T, T)
    if bias is not None:
        scores = (scores.reshape(b, h, t, s) + bias).flatten(0, 1)
    # Keep the dtype: autocast would copy the scores, the largest tensor of the block, to fp32.
    with torch.autocast(q.device.type, enabled=False):
        weights = scores.softmax(dim=-1)
    return torch.bmm(weights, v.reshape(b * h, s, e)).reshape(b, h, t, e)


def build_norm(config: ViTConfig, width: int) -> nn.Module:
    """The norm over the last dimension, as configured."""
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(width, eps=config.norm_eps)


class QuickGelu(nn.Module):
    """x * sigmoid(1.702 x): OpenAI's CLIP was trained with this approximation of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention (appendix A) with one fused projection to q, k and v.

    Args:
        num_patches: number of patches that attend to each other at the configured image size.
            Relative positions have an embedding for each of the 2 N - 1 offsets.
    """

    def __init__(self, config: ViTConfig, num_patches: int) -> None:
        super().__init__()
        d = config.embed_dim
        self.num_heads = config.num_heads
        self.num_prefix_tokens = config.num_prefix_tokens
        head_dim = d // config.num_heads
        self.has_rope = config.rope is not None
        self.qkv = nn.Linear(d, 3 * d, bias=config.qkv_bias and config.key_bias)
        # Without a key bias the other two have timm's names in EVA-02, DINOv3 and BEiT.
        apart = config.qkv_bias and not config.key_bias
        self.q_bias = nn.Parameter(torch.zeros(d)) if apart else None
        self.v_bias = nn.Parameter(torch.zeros(d)) if apart else None
        # Normalised queries and keys keep the attention logits bounded (ViT-22B, Dehghani 2023).
        self.q_norm = build_norm(config, head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = build_norm(config, head_dim) if config.qk_norm else nn.Identity()
        relative = config.position == "relative"
        offsets = 2 * num_patches - 1
        self.rel_pos = nn.Parameter(torch.zeros(offsets, head_dim)) if relative else None
        self.rel_pos_bias = OffsetBias(config) if config.position_bias == "every" else None
        self.norm = build_norm(config, d) if config.attention_norm else nn.Identity()
        self.proj = nn.Linear(d, d)
        self.proj_drop = nn.Dropout(config.dropout_rate)

    def heads(
        self, x: Tensor, grid: Grid, bias: Tensor | None = None, turn: Rotation | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(B, T, D) -> queries, keys, values (B, H, T, E), and the whole bias or None.

        Args:
            bias: (1, H, T, T), added to the scores by all blocks.
            turn: rotates queries and keys; a model with rotary positions needs it.
        """
        assert (turn is not None) == self.has_rope
        b, t, d = x.shape
        qkv = self.qkv(x)
        if self.q_bias is not None and self.v_bias is not None:
            qkv = qkv + torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = qkv.reshape(b, t, 3, self.num_heads, d // self.num_heads)  # (B, T, 3, H, E)
        # Views: the fused kernel takes strides, and returns gradients in the layout (B, T, H, E).
        # `unbind` of this axis joins the three in one copy; of a permuted tensor it needs two.
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, H, T, E)
        if uses_explicit_attention(q):
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        # Under autocast norms return fp32; the kernels want one dtype for q, k and v.
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        biases = [] if bias is None else [bias]
        if self.rel_pos is not None:
            biases.append(relative_bias(q, self.rel_pos, self.num_prefix_tokens))
        if self.rel_pos_bias is not None:
            biases.append(self.rel_pos_bias(grid))
        return q, k, v, sum(biases[1:], biases[0]).to(q.dtype) if biases else None

    def forward(
        self, x: Tensor, grid: Grid, bias: Tensor | None = None, turn: Rotation | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, T, D); see `heads`."""
        b, t, d = x.shape
        x = attend(*self.heads(x, grid, bias, turn))  # (B, H, T, E)
        x = x.transpose(1, 2).reshape(b, t, d)  # (B, T, D)
        x = self.proj_drop(self.proj(self.norm(x)))
        return x


def relative_bias(q: Tensor, table: Tensor, num_prefix_tokens: int) -> Tensor:
    """(B, H, T, E), (2 N - 1, E) -> (B, H, T, T): bias of the scores before the softmax.

    Appendix D.4: "extra attention, where we use the original query (the content of query), but use
    relative positional embeddings as keys". The table has one embedding for each offset p_q - p_k
    in the row-major sequence, from 1 - N to N - 1. Prefix tokens have no position: their bias is 0.
    """
    q = q[:, :, num_prefix_tokens:]  # (B, H, N, E)
    n = q.shape[2]
    place = torch.arange(n, device=q.device)
    offset = place[:, None] - place + n - 1  # (N, N), 0 .. 2 N - 2
    keys = resample_offsets(table, n)[offset].to(q.dtype)  # (N, N, E)
    bias = torch.einsum("bhie,ije->bhij", q * q.shape[-1] ** -0.5, keys)  # (B, H, N, N)
    return F.pad(bias, (num_prefix_tokens, 0, num_prefix_tokens, 0))  # (B, H, T, T)


class Mlp(nn.Module):
    """Two dense layers with a GELU between them, and dropout after each (section 3.1, B.1).

    `norm_eps` adds a LayerNorm before the second layer.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        gelu: str,
        dropout_rate: float = 0.0,
        norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        approximate = "tanh" if gelu == "tanh" else "none"
        self.act = QuickGelu() if gelu == "quick" else nn.GELU(approximate=approximate)
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(hidden, eps=norm_eps)
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        x = self.norm(self.drop(self.act(self.fc1(x))))
        x = self.drop(self.fc2(x))
        return x


class SwiGlu(nn.Module):
    """silu(x1) * x2 between two dense layers (Shazeer, 2020); one projection gives x1 and x2.

    `norm_eps` adds a LayerNorm before the second layer (EVA-02).
    """

    def __init__(
        self, width: int, hidden: int, dropout_rate: float = 0.0, norm_eps: float | None = None
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * hidden)
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(hidden, eps=norm_eps)
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        gate, x = self.fc1(x).chunk(2, dim=-1)
        x = self.norm(self.drop(F.silu(gate) * x))
        x = self.drop(self.fc2(x))
        return x


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (CaiT, Touvron et al., 2021)."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), float(start)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: drops the residual branch of whole images (Huang et al., 2016)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D); kept branches are scaled up, so that the mean does not change."""
        if not self.training or self.rate == 0.0:
            return x
        keep = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.rate  # (B, 1, 1)
        return x * keep.to(x.dtype) / (1.0 - self.rate)


class Block(nn.Module):
    """x + MSA(LN(x)), then x + MLP(LN(x)): equations 2 and 3.

    Args:
        along: attend within each `row` or each `column` of patches; None attends to all tokens.
    """

    def __init__(self, config: ViTConfig, drop_path_rate: float, along: Axis | None = None) -> None:
        super().__init__()
        d, scale, (rows, cols) = config.embed_dim, config.layer_scale, config.grid
        self.along = along
        # Patches that attend to each other: a row has one patch for each column.
        num_patches = {"row": cols, "column": rows, None: rows * cols}[along]
        self.norm1 = build_norm(config, d)
        self.attn = Attention(config, num_patches)
        self.ls1 = LayerScale(d, scale) if scale is not None else nn.Identity()
        self.drop_path1 = DropPath(drop_path_rate)
        self.norm2 = build_norm(config, d)
        self.mlp = build_mlp(config)
        self.ls2 = LayerScale(d, scale) if scale is not None else nn.Identity()
        self.drop_path2 = DropPath(drop_path_rate)

    def forward(
        self, x: Tensor, grid: Grid, bias: Tensor | None = None, turn: Rotation | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, T, D); see `Attention.heads` for `bias` and `turn`."""
        branch = self.norm1(x)
        if self.along is None:
            branch = self.attn(branch, grid, bias, turn)
        else:  # each row or column is a sequence of its own in the batch
            branch = self.attn(split_lines(branch, grid, self.along), grid)
            branch = join_lines(branch, grid, self.along)
        x = x + self.drop_path1(self.ls1(branch))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x


def build_mlp(config: ViTConfig) -> nn.Module:
    """The MLP of a block, as configured."""
    width, hidden, dropout = config.embed_dim, config.mlp_dim, config.dropout_rate
    norm_eps = config.norm_eps if config.mlp_norm else None
    if config.mlp == "swiglu":
        return SwiGlu(width, hidden, dropout, norm_eps)
    return Mlp(width, hidden, config.gelu, dropout, norm_eps)


def split_lines(x: Tensor, grid: Grid, along: Axis) -> Tensor:
    """(B, N, D) -> (B*rows, cols, D) for rows, (B*cols, rows, D) for columns."""
    x = x.reshape(-1, *grid, x.shape[-1])  # (B, rows, cols, D)
    return (x if along == "row" else x.transpose(1, 2)).flatten(0, 1)


def join_lines(x: Tensor, grid: Grid, along: Axis) -> Tensor:
    """(B*rows, cols, D) or (B*cols, rows, D) -> (B, N, D): the inverse of `split_lines`."""
    (rows, cols), d = grid, x.shape[-1]
    if along == "column":
        x = x.reshape(-1, cols, rows, d).transpose(1, 2)  # (B, rows, cols, D)
    return x.reshape(-1, rows * cols, d)


class AxialBlock(nn.Module):
    """A block along the rows, then a block along the columns; each has its MLP (appendix D.6)."""

    def __init__(self, config: ViTConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.row = Block(config, drop_path_rate, "row")
        self.column = Block(config, drop_path_rate, "column")

    def forward(self, x: Tensor, grid: Grid, bias: None = None, turn: None = None) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.column(self.row(x, grid), grid)


def build_blocks(config: ViTConfig) -> nn.ModuleList:
    """The blocks of the encoder, from first to last."""
    kind = AxialBlock if config.axial else Block
    return nn.ModuleList(kind(config, rate) for rate in drop_path_rates(config))


def drop_path_rates(config: ViTConfig) -> list[float]:
    """One rate per block; it grows linearly from 0 to the configured rate."""
    # Early features feed all later blocks, so they are dropped least (Huang et al., 2016, sec. 3).
    last = max(config.depth - 1, 1)
    return [config.drop_path_rate * i / last for i in range(config.depth)]
