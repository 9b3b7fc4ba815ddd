"""Vision Transformers of other libraries, written from their published structure.

torchvision and vit-pytorch cannot be installed beside this project's torch (both need torchvision,
whose wheel must match torch's build), so the tests compute with these modules.
"""

import torch
from torch import Tensor, nn


class TorchvisionBlock(nn.Module):
    """`EncoderBlock` of torchvision 0.24, models/vision_transformer.py, without dropout."""

    def __init__(self, width: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_dim),
            nn.GELU(),
            nn.Dropout(0.0),
            nn.Linear(mlp_dim, width),
            nn.Dropout(0.0),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class TorchvisionViT(nn.Module):
    """`VisionTransformer` of torchvision 0.24."""

    def __init__(self, size=32, patch=8, width=48, depth=2, heads=3, mlp_dim=80, latent=None):
        super().__init__()
        self.conv_proj = nn.Conv2d(3, width, patch, stride=patch)
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.encoder = nn.Module()
        self.encoder.pos_embedding = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width))
        blocks = {
            f"encoder_layer_{i}": TorchvisionBlock(width, heads, mlp_dim) for i in range(depth)
        }
        self.encoder.layers = nn.Sequential()
        for name, block in blocks.items():
            self.encoder.layers.add_module(name, block)
        self.encoder.ln = nn.LayerNorm(width, eps=1e-6)
        self.heads = nn.Sequential()
        if latent:
            self.heads.add_module("pre_logits", nn.Linear(width, latent))
            self.heads.add_module("act", nn.Tanh())
        self.heads.add_module("head", nn.Linear(latent or width, 5))

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_proj(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.encoder.ln(self.encoder.layers(x + self.encoder.pos_embedding))
        return self.heads(x[:, 0])


def interpolated(state: dict[str, Tensor], size: int, patch: int) -> dict[str, Tensor]:
    """`interpolate_embeddings` of torchvision 0.24: the state dict for another image size."""
    table = state["encoder.pos_embedding"]
    token, grid = table[:, :1], table[:, 1:].permute(0, 2, 1)
    side, new = int(grid.shape[2] ** 0.5), size // patch
    grid = grid.reshape(1, -1, side, side)
    grid = nn.functional.interpolate(grid, size=new, mode="bicubic", align_corners=True)
    table = torch.cat([token, grid.reshape(1, -1, new * new).permute(0, 2, 1)], dim=1)
    return {**state, "encoder.pos_embedding": table}


class Wrapped(nn.Module):
    """`PreNorm` of vit-pytorch 1.2."""

    def __init__(self, norm: nn.Module, fn: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = norm, fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class VitPytorchAttention(nn.Module):
    def __init__(self, width: int, heads: int, norm: bool, out: nn.Module) -> None:
        super().__init__()
        self.heads = heads
        if norm:
            self.norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = out

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x) if hasattr(self, "norm") else x
        b, n, d = x.shape
        q, k, v = (
            t.reshape(b, n, self.heads, -1).transpose(1, 2) for t in self.to_qkv(x).chunk(3, -1)
        )
        scores = (q @ k.transpose(-1, -2) * (d // self.heads) ** -0.5).softmax(-1)
        return self.to_out((scores @ v).transpose(1, 2).reshape(b, n, d))


class VitPytorchMlp(nn.Module):
    def __init__(self, norm: list[nn.Module], layers: list[nn.Module]) -> None:
        super().__init__()
        self.net = nn.Sequential(*norm, *layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class VitPytorchViT(nn.Module):
    """`ViT` and `SimpleViT` of vit-pytorch in the versions 0.35.8, 1.2.0 and 1.26.14.

    Args:
        simple: SimpleViT: fixed positions, no class token, mean, no biases behind the attention.
        version: 0.35 has no norms around the patch projection. Up to 1.2 the final norm belongs to
            the head, and the blocks of `ViT` have wrappers.
        registers: those of simple_vit_with_register_tokens.py.
        pool: `cls`, or `mean` as in 1.26, which then has no class token.
    """

    def __init__(
        self, size=32, patch=8, width=128, depth=2, heads=2, mlp_dim=80, *, simple=False,
        version="1.26", registers=0, pool="cls", channels=3,
    ):  # fmt: skip
        super().__init__()
        self.patch, self.simple, self.pool = patch, simple, "mean" if simple else pool
        old, values, grid = version != "1.26", channels * patch**2, size // patch
        norms = [] if version == "0.35" else [nn.LayerNorm(values), nn.LayerNorm(width)]
        linear = nn.Linear(values, width)
        layers = [linear] if not norms else [norms[0], linear, norms[1]]
        self.to_patch_embedding = nn.Sequential(nn.Identity(), *layers)
        classes = 0 if self.pool == "mean" else 1
        if not simple:
            shapes = (classes, width), (grid**2 + classes, width)
            shapes = [(1, *shape) for shape in shapes] if old else shapes
            self.cls_token = nn.Parameter(torch.randn(shapes[0]))
            self.pos_embedding = nn.Parameter(torch.randn(shapes[1]))
        else:
            self.fixed = self.sincos(grid, grid, width)
        if registers:
            self.register_tokens = nn.Parameter(torch.randn(registers, width))
        self.transformer = nn.Module()
        if not old:
            self.transformer.norm = nn.LayerNorm(width)
        self.transformer.layers = nn.ModuleList()
        for _ in range(depth):
            out = nn.Linear(width, width, bias=not simple)
            out = out if simple else nn.Sequential(out, nn.Dropout(0.0))
            out = nn.Identity() if heads == 1 and not simple else out
            wrapped = old and not simple
            attention = VitPytorchAttention(width, heads, not wrapped, out)
            drop = [] if simple else [nn.Dropout(0.0)]
            net = [nn.Linear(width, mlp_dim), nn.GELU(), *drop, nn.Linear(mlp_dim, width), *drop]
            mlp = VitPytorchMlp([] if wrapped else [nn.LayerNorm(width)], net)
            pair = [attention, mlp]
            if wrapped:
                pair = [Wrapped(nn.LayerNorm(width), module) for module in pair]
            self.transformer.layers.append(nn.ModuleList(pair))
        head = nn.Linear(width, 5)
        head = nn.Sequential(nn.LayerNorm(width), head) if old else head
        setattr(self, "linear_head" if simple else "mlp_head", head)

    @staticmethod
    def sincos(rows: int, cols: int, width: int) -> Tensor:
        """`posemb_sincos_2d` of simple_vit.py."""
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
        omega = 1.0 / 10000 ** (torch.arange(width // 4) / (width // 4 - 1))
        y, x = y.flatten()[:, None] * omega, x.flatten()[:, None] * omega
        return torch.cat((x.sin(), x.cos(), y.sin(), y.cos()), dim=1)

    def forward(self, images: Tensor) -> Tensor:
        b, p = images.shape[0], self.patch
        x = images.unfold(2, p, p).unfold(3, p, p)  # (B, C, rows, cols, P, P)
        x = x.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)  # (B, N, P*P*C)
        x = self.to_patch_embedding(x)
        if self.simple:
            x = x + self.fixed
        else:
            token = self.cls_token if self.cls_token.ndim == 3 else self.cls_token[None]
            x = torch.cat([token.expand(b, -1, -1), x], dim=1) + self.pos_embedding
        n = x.shape[1]
        if hasattr(self, "register_tokens"):
            x = torch.cat([x, self.register_tokens.expand(b, -1, -1)], dim=1)
        for attention, mlp in self.transformer.layers:
            x = attention(x) + x
            x = mlp(x) + x
        x = self.transformer.norm(x) if hasattr(self.transformer, "norm") else x
        x = x[:, :n].mean(dim=1) if self.pool == "mean" else x[:, 0]
        return self.linear_head(x) if self.simple else self.mlp_head(x)


def drawn(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in evaluation mode, with weights that are nowhere 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return module.eval()
