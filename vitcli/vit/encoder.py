"""The pre-norm encoder: equations 2 and 3 of the paper."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcli.vit.variants import ViTConfig

# Up to this many tokens the (T, T) matrix of a CPU batch is small beside the activations.
LONGEST_EXPLICIT = 1024


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, T, E) three times -> (B, H, T, E): softmax(q k^T / sqrt(E)) v.

    The one place where the implementation is chosen. On a CPU the backward of the fused kernel
    is slow in bf16 (1.1 to 1.8 times the time of a whole training step at 16 to 197 tokens, see
    recipes/LOG.md), so there it is written out; in fp32 both are as fast, and the fused one needs
    less memory. Elsewhere, and for long sequences, it is torch's. Both agree within rounding.
    """
    if is_written_out(q):
        return attend_explicit(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def is_written_out(q: Tensor) -> bool:
    """Whether `attend` takes queries (..., T, E) of this type and place step by step."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    return half and q.device.type == "cpu" and q.shape[-2] <= LONGEST_EXPLICIT


def attend_explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` as two batched matrix products around a softmax."""
    b, h, t, e = q.shape
    s = k.shape[2]
    q = (q * e**-0.5).reshape(b * h, t, e)
    scores = torch.bmm(q, k.reshape(b * h, s, e).transpose(1, 2))  # (B*H, T, T)
    # In the scores' own type: autocast would carry the largest tensor of the block to fp32.
    with torch.autocast(q.device.type, enabled=False):
        weights = scores.softmax(dim=-1)
    return torch.bmm(weights, v.reshape(b * h, s, e)).reshape(b, h, t, e)


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        d = config.embed_dim
        self.num_heads = config.num_heads
        head_dim = d // config.num_heads
        self.qkv = nn.Linear(d, 3 * d, bias=config.qkv_bias)
        eps = config.norm_eps
        self.q_norm = nn.LayerNorm(head_dim, eps=eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim, eps=eps) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(d, d)
        self.proj_drop = nn.Dropout(config.dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        b, t, d = x.shape
        qkv = self.qkv(x).reshape(b, t, 3, self.num_heads, d // self.num_heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, T, E)
        if is_written_out(qkv):
            qkv = qkv.contiguous()  # one copy for all three; the fused kernel needs none
        q, k, v = qkv.unbind(0)
        x = attend(self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v)  # (B, H, T, E)
        x = x.transpose(1, 2).reshape(b, t, d)  # (B, T, D)
        x = self.proj_drop(self.proj(x))
        return x


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
    """x + MSA(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, config: ViTConfig, drop_path_rate: float) -> None:
        super().__init__()
        d, scale = config.embed_dim, config.layer_scale
        self.norm1 = nn.LayerNorm(d, eps=config.norm_eps)
        self.attn = Attention(config)
        self.ls1 = LayerScale(d, scale) if scale is not None else nn.Identity()
        self.drop_path1 = DropPath(drop_path_rate)
        self.norm2 = nn.LayerNorm(d, eps=config.norm_eps)
        self.mlp = Mlp(d, config.mlp_dim, config.gelu, config.dropout_rate)
        self.ls2 = LayerScale(d, scale) if scale is not None else nn.Identity()
        self.drop_path2 = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x


def drop_path_rates(config: ViTConfig) -> list[float]:
    """One rate a block, growing linearly from 0 to the configured one."""
    last = max(config.depth - 1, 1)
    return [config.drop_path_rate * i / last for i in range(config.depth)]
