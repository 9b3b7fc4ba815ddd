"""What the tensors of the official JAX code are called and how they lie, beside ours.

One table for both directions: a `Pair` is one tensor of ours and the arrays of theirs that it is
made of. The names are those that flax gives now; `canonical` brings every older generation of files
to them, and `released` gives those of the files that Google published.

Sources: vit_jax/models_vit.py, models_resnet.py and checkpoint.py; big_vision/models/vit.py and
bit_paper.py (`fix_old_checkpoints`, `maybe_convert_big_transfer_format`).
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitcli.vit.config import ViTConfig
from vitcli.vit.resnet import ResNetConfig

# How theirs lies -> ours (D width, H heads, E head width, Y X sides of a kernel):
#   same        as it is
#   dense       (in, out)     -> (out, in)
#   conv        (Y, X, C, D)  -> (D, C, Y, X)
#   flat        (C,)          -> (C,)
#   group_norm  (1, 1, 1, C), also read as (C,) -> (C,)
#   heads       (D, H, E), as many as parts -> (parts * H * E, D)
#   heads_bias  (H, E), likewise  -> (parts * H * E,)
#   out         (H, E, D)     -> (D, H * E)
Kind = Literal["same", "dense", "conv", "flat", "group_norm", "heads", "heads_bias", "out"]
NDIM: dict[Kind, int] = {
    "same": 3,
    "dense": 2,
    "conv": 4,
    "heads": 3,
    "heads_bias": 2,
    "out": 3,
}

STEM_POSITIONS = "Transformer/posembed_input/pos_embedding"
POSITIONS = "pos_embedding"


@dataclass(frozen=True)
class Pair:
    """One tensor of ours, the arrays of theirs that it is made of, and how these lie."""

    ours: str
    theirs: tuple[str, ...]
    kind: Kind


def vit_pairs(config: ViTConfig) -> Iterator[Pair]:
    """Every tensor of a ViT or hybrid that the official code can express, but the positions."""
    if config.stem is not None:
        yield from _stem_pairs(config.stem)
    yield Pair("patch_embed.proj.weight", ("embedding/kernel",), "conv")
    yield Pair("patch_embed.proj.bias", ("embedding/bias",), "flat")
    if config.class_token:
        yield Pair("cls_token", ("cls",), "same")
    for i in range(config.depth):
        ours, theirs = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        yield from _norm(f"{ours}.norm1", f"{theirs}/LayerNorm_0")
        attention = f"{theirs}/MultiHeadDotProductAttention_0"
        yield from _heads(f"{ours}.attn.qkv", attention, "query", "key", "value")
        yield from _out(f"{ours}.attn.proj", attention)
        yield from _norm(f"{ours}.norm2", f"{theirs}/LayerNorm_1")
        yield from _mlp(f"{ours}.mlp", theirs)
    yield from _norm("norm", "Transformer/encoder_norm")
    if config.pool == "map":
        attention = "MAPHead_0/MultiHeadDotProductAttention_0"
        yield Pair("attn_pool.latent", ("MAPHead_0/probe",), "same")
        yield from _heads("attn_pool.q", attention, "query")
        yield from _heads("attn_pool.kv", attention, "key", "value")
        yield from _out("attn_pool.proj", attention)
        yield from _norm("attn_pool.norm", "MAPHead_0/LayerNorm_0")
        yield from _mlp("attn_pool.mlp", "MAPHead_0")
    if config.representation_size:
        yield from _dense("pre_logits.fc", "pre_logits")
    if config.num_classes:
        yield from _dense("head", "head")


def resnet_pairs(config: ResNetConfig) -> Iterator[Pair]:
    """Every tensor of a BiT ResNet, in big_vision's names."""
    yield Pair("stem.conv.weight", ("root_block/conv_root/kernel",), "conv")
    for i, depth in enumerate(config.layers):
        for j in range(depth):
            ours, theirs = f"stages.{i}.blocks.{j}", f"block{i + 1}/unit{j + 1:02d}"
            for n in (1, 2, 3):
                yield from _norm(f"{ours}.norm{n}", f"{theirs}/gn{n}", "group_norm")
                yield Pair(f"{ours}.conv{n}.weight", (f"{theirs}/conv{n}/kernel",), "conv")
            if j == 0:
                projection = (f"{theirs}/conv_proj/kernel",)
                yield Pair(f"{ours}.downsample.conv.weight", projection, "conv")
    yield from _norm("norm", "norm-pre-head", "group_norm")
    if config.num_classes:
        yield from _dense("head", "head")


def _stem_pairs(layers: tuple[int, ...]) -> Iterator[Pair]:
    base = "patch_embed.backbone"
    yield Pair(f"{base}.stem.conv.weight", ("conv_root/kernel",), "conv")
    yield from _norm(f"{base}.stem.norm", "gn_root", "group_norm")
    for i, depth in enumerate(layers):
        for j in range(depth):
            ours, theirs = f"{base}.stages.{i}.blocks.{j}", f"block{i + 1}/unit{j + 1}"
            for n in (1, 2, 3):
                yield Pair(f"{ours}.conv{n}.weight", (f"{theirs}/conv{n}/kernel",), "conv")
                yield from _norm(f"{ours}.norm{n}", f"{theirs}/gn{n}", "group_norm")
            if j == 0:  # the first unit of every stage changes the number of feature maps
                projection = (f"{theirs}/conv_proj/kernel",)
                yield Pair(f"{ours}.downsample.conv.weight", projection, "conv")
                yield from _norm(f"{ours}.downsample.norm", f"{theirs}/gn_proj", "group_norm")


def _norm(ours: str, theirs: str, kind: Kind = "flat") -> Iterator[Pair]:
    yield Pair(f"{ours}.weight", (f"{theirs}/scale",), kind)
    yield Pair(f"{ours}.bias", (f"{theirs}/bias",), kind)


def _dense(ours: str, theirs: str) -> Iterator[Pair]:
    yield Pair(f"{ours}.weight", (f"{theirs}/kernel",), "dense")
    yield Pair(f"{ours}.bias", (f"{theirs}/bias",), "flat")


def _mlp(ours: str, theirs: str) -> Iterator[Pair]:
    yield from _dense(f"{ours}.fc1", f"{theirs}/MlpBlock_0/Dense_0")
    yield from _dense(f"{ours}.fc2", f"{theirs}/MlpBlock_0/Dense_1")


def _heads(ours: str, theirs: str, *parts: str) -> Iterator[Pair]:
    yield Pair(f"{ours}.weight", tuple(f"{theirs}/{part}/kernel" for part in parts), "heads")
    yield Pair(f"{ours}.bias", tuple(f"{theirs}/{part}/bias" for part in parts), "heads_bias")


def _out(ours: str, theirs: str) -> Iterator[Pair]:
    yield Pair(f"{ours}.weight", (f"{theirs}/out/kernel",), "out")
    yield Pair(f"{ours}.bias", (f"{theirs}/out/bias",), "flat")


def to_ours(kind: Kind, arrays: list[Tensor]) -> Tensor:
    """Theirs -> ours.

    Raises:
        ValueError: another number of dimensions than `kind` has, or parts of different shapes.
    """
    first = arrays[0]
    if first.ndim != NDIM.get(kind, first.ndim) or any(a.shape != first.shape for a in arrays):
        raise ValueError(f"of shape {' and '.join(str(tuple(a.shape)) for a in arrays)}")
    if kind == "same":
        return first
    if kind == "dense":
        return first.T.contiguous()
    if kind == "conv":
        return first.permute(3, 2, 0, 1).contiguous()
    if kind == "heads":
        return torch.cat([a.flatten(1).T for a in arrays]).contiguous()
    if kind == "out":
        return first.flatten(0, 1).T.contiguous()
    return torch.cat([a.flatten() for a in arrays])


def to_theirs(pair: Pair, tensor: Tensor, num_heads: int) -> Iterator[tuple[str, NDArray[Any]]]:
    """Ours -> names and float32 arrays of theirs, the inverse of `to_ours`."""
    tensor = tensor.detach().cpu().float()
    for name, part in zip(pair.theirs, tensor.chunk(len(pair.theirs)), strict=True):
        if pair.kind == "dense":
            part = part.T
        elif pair.kind == "conv":
            part = part.permute(2, 3, 1, 0)
        elif pair.kind == "group_norm":
            part = part[None, None, None]
        elif pair.kind == "heads":
            part = part.T.reshape(part.shape[1], num_heads, -1)  # (D, H, E)
        elif pair.kind == "heads_bias":
            part = part.reshape(num_heads, -1)  # (H, E)
        elif pair.kind == "out":
            part = part.T.reshape(num_heads, -1, part.shape[0])  # (H, E, D)
        yield name, np.ascontiguousarray(part.numpy())


def canonical(names: Iterable[str]) -> dict[str, str]:
    """Names of any generation -> the present ones.

    Before flax's "linen" one counter ran through all parts of a block, in the order of their use;
    now each kind has its own. Positions lay in the encoder once, the parts of the attention pool
    outside it, and BiT's first files have TensorFlow's names.
    """
    names = list(names)
    found = {name: _from_big_transfer(name) if "resnet/" in name else name for name in names}
    if "probe" in names:
        pool = re.compile(r"probe$|(MlpBlock|MultiHeadDotProductAttention|LayerNorm)_\d+/")
        found = {n: f"MAPHead_0/{now}" if pool.match(now) else now for n, now in found.items()}
    numbers: dict[tuple[str, str], set[int]] = {}
    part = re.compile(r"(.*/)?(LayerNorm|MlpBlock|MultiHeadDotProductAttention)_(\d+)/")
    for now in found.values():
        if m := part.match(now):
            numbers.setdefault((m[1] or "", m[2]), set()).add(int(m[3]))
    for name, now in found.items():
        if m := part.match(now):
            order = sorted(numbers[m[1] or "", m[2]])
            now = f"{m[1] or ''}{m[2]}_{order.index(int(m[3]))}/{now[m.end() :]}"
        found[name] = POSITIONS if now == "Transformer/pos_embedding" else now
    return found


def _from_big_transfer(name: str) -> str:
    """`resnet/block1/unit01/a/standardized_conv2d/kernel` -> `block1/unit01/conv1/kernel`."""
    name = re.sub(r"standardized_conv2d(_\d+)?/", "standardized_conv2d/", name)
    name = name[name.index("resnet/") + len("resnet/") :]
    name = name.replace("group_norm/gamma", "group_norm/scale")
    name = name.replace("group_norm/beta", "group_norm/bias")
    if name.startswith("group_norm/"):
        return name.replace("group_norm", "norm-pre-head")
    if name.startswith("head/"):
        return re.sub(r"head/conv2d(_\d+)?/", "head/", name)
    name = name.replace("root_block/standardized_conv2d", "root_block/conv_root")
    if m := re.match(r"(block\d+/unit\d+)/([abc])/(.*)", name):
        number = "abc".index(m[2]) + 1
        if m[3].startswith("proj/"):
            return f"{m[1]}/conv_proj/kernel"
        rest = m[3].replace("standardized_conv2d", f"conv{number}")
        return f"{m[1]}/{rest.replace('group_norm', f'gn{number}')}"
    return name


def first_release(name: str) -> str:
    """big_vision's name of a BiT array -> that of the first release, which has TensorFlow's."""
    if m := re.match(r"(block\d+/unit\d+)/conv_proj/", name):
        return f"resnet/{m[1]}/a/proj/standardized_conv2d/kernel"
    norms = {"scale": "group_norm/gamma", "bias": "group_norm/beta"}
    if m := re.match(r"(block\d+/unit\d+)/(conv|gn)([123])/(\w+)", name):
        rest = norms[m[4]] if m[2] == "gn" else "standardized_conv2d/kernel"
        return f"resnet/{m[1]}/{'abc'[int(m[3]) - 1]}/{rest}"
    part, _, last = name.rpartition("/")
    if part == "norm-pre-head":
        return f"resnet/{norms[last]}"
    return {
        "root_block/conv_root": "resnet/root_block/standardized_conv2d/kernel",
        "head": f"resnet/head/conv2d/{last}",
    }[part]


def released(name: str) -> str:
    """The present name -> that of the files Google published, with one counter a block."""
    for now, then in (
        ("LayerNorm_1", "LayerNorm_2"),
        ("MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1"),
        ("MlpBlock_0", "MlpBlock_3"),
    ):
        name = re.sub(rf"(encoderblock_\d+)/{now}/", rf"\1/{then}/", name)
    return name
