"""The names and shapes of the tensors in the official JAX code, and ours for them.

The tables serve both directions. They hold the names of today's flax. `canonical` converts the
names of every older generation to these. `released` converts them to the names in the files that
Google published.

Sources: vit_jax/models_vit.py, models_resnet.py and checkpoint.py; big_vision/models/vit.py and
bit_paper.py (`fix_old_checkpoints`, `maybe_convert_big_transfer_format`).
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitcli.errors import VitcliError, quoted
from vitcli.vit.config import ViTConfig
from vitcli.vit.resnet import ResNetConfig
from vitcli.weights.google.npz import WEIGHTS

# Their shape -> our shape (D width, H heads, E head width, Y X kernel rows and columns):
#   same        unchanged
#   dense       (in, out)     -> (out, in)
#   conv        (Y, X, C, D)  -> (D, C, Y, X)
#   flat        (C,)          -> (C,)
#   group_norm  (1, 1, 1, C), also read as (C,) -> (C,)
#   heads       (D, H, E) for each part         -> (parts * H * E, D)
#   heads_bias  (H, E) for each part            -> (parts * H * E,)
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
# A layer of theirs -> (our last part, their last part, kind) of each of its tensors.
LAYERS: dict[str, tuple[tuple[str, str, Kind], ...]] = {
    "conv": (("weight", "kernel", "conv"),),
    "patches": (("weight", "kernel", "conv"), ("bias", "bias", "flat")),
    "norm": (("weight", "scale", "flat"), ("bias", "bias", "flat")),
    "group_norm": (("weight", "scale", "group_norm"), ("bias", "bias", "group_norm")),
    "dense": (("weight", "kernel", "dense"), ("bias", "bias", "flat")),
    "heads": (("weight", "kernel", "heads"), ("bias", "bias", "heads_bias")),
    "out": (("weight", "kernel", "out"), ("bias", "bias", "flat")),
}
# Our layer -> (its kind, their layer or the layers that ours stacks).
LayerTable = Mapping[str, tuple[str, ...]]
ATTENTION = "MultiHeadDotProductAttention_0"
BLOCK: LayerTable = {
    "norm1": ("norm", "LayerNorm_0"),
    "attn.qkv": ("heads", f"{ATTENTION}/query", f"{ATTENTION}/key", f"{ATTENTION}/value"),
    "attn.proj": ("out", f"{ATTENTION}/out"),
    "norm2": ("norm", "LayerNorm_1"),
    "mlp.fc1": ("dense", "MlpBlock_0/Dense_0"),
    "mlp.fc2": ("dense", "MlpBlock_0/Dense_1"),
}
ATTENTION_POOL: LayerTable = {
    "q": ("heads", f"{ATTENTION}/query"),
    "kv": ("heads", f"{ATTENTION}/key", f"{ATTENTION}/value"),
    "proj": ("out", f"{ATTENTION}/out"),
    "norm": ("norm", "LayerNorm_0"),
    "mlp.fc1": ("dense", "MlpBlock_0/Dense_0"),
    "mlp.fc2": ("dense", "MlpBlock_0/Dense_1"),
}
RESNET_UNIT: LayerTable = {
    **{f"conv{n}": ("conv", f"conv{n}") for n in (1, 2, 3)},
    **{f"norm{n}": ("group_norm", f"gn{n}") for n in (1, 2, 3)},
}
# The first unit of every stage changes the number of feature maps.
HYBRID_PROJECTION: LayerTable = {
    "downsample.conv": ("conv", "conv_proj"),
    "downsample.norm": ("group_norm", "gn_proj"),
}
BIT_PROJECTION: LayerTable = {"downsample.conv": ("conv", "conv_proj")}

# The first part of the name of an array of a ViT, hybrid or BiT ResNet.
PARTS = re.compile(
    r"(Transformer|embedding|cls|pos_embedding|head|pre_logits|MAPHead_0|conv_root|gn_root|"
    r"root_block|norm-pre-head|block\d+)(/|$)"
)


# The prefixes of the image model's arrays, outermost first -> the reason to drop the others.
PREFIXES = {
    "params/": "not under `params/`",
    WEIGHTS: f"not under `{WEIGHTS}`",
    "img/": "not the image tower",
}
STACKED = "Transformer/encoderblock/"  # big_vision's scanned encoder stacks all blocks
STEM_POSITIONS = "Transformer/posembed_input/pos_embedding"
POSITIONS = "pos_embedding"


@dataclass(frozen=True)
class TensorPair:
    """One tensor of ours, the arrays of theirs that it consists of, and their kind of shape."""

    ours: str
    theirs: tuple[str, ...]
    kind: Kind


def vit_pairs(config: ViTConfig) -> Iterator[TensorPair]:
    """Yield every tensor of a ViT or hybrid that the official code has, without the positions."""
    if config.stem is not None:
        base = "patch_embed.backbone"
        root = {"stem.conv": ("conv", "conv_root"), "stem.norm": ("group_norm", "gn_root")}
        yield from _pairs(f"{base}.", "", root)
        for i, depth in enumerate(config.stem):
            for j in range(depth):
                table = {**RESNET_UNIT, **(HYBRID_PROJECTION if j == 0 else {})}
                yield from _pairs(
                    f"{base}.stages.{i}.blocks.{j}.", f"block{i + 1}/unit{j + 1}/", table
                )
    yield from _pairs("", "", {"patch_embed.proj": ("patches", "embedding")})
    if config.class_token:
        yield TensorPair("cls_token", ("cls",), "same")
    for i in range(config.depth):
        yield from _pairs(f"blocks.{i}.", f"Transformer/encoderblock_{i}/", BLOCK)
    yield from _pairs("", "", {"norm": ("norm", "Transformer/encoder_norm")})
    if config.pool == "map":
        yield TensorPair("attn_pool.latent", ("MAPHead_0/probe",), "same")
        yield from _pairs("attn_pool.", "MAPHead_0/", ATTENTION_POOL)
    if config.representation_size:
        yield from _pairs("", "", {"pre_logits.fc": ("dense", "pre_logits")})
    if config.num_classes:
        yield from _pairs("", "", {"head": ("dense", "head")})


def resnet_pairs(config: ResNetConfig) -> Iterator[TensorPair]:
    """Yield every tensor of a BiT ResNet, in big_vision's names."""
    yield from _pairs("", "", {"stem.conv": ("conv", "root_block/conv_root")})
    for i, depth in enumerate(config.layers):
        for j in range(depth):
            table = {**RESNET_UNIT, **(BIT_PROJECTION if j == 0 else {})}
            yield from _pairs(f"stages.{i}.blocks.{j}.", f"block{i + 1}/unit{j + 1:02d}/", table)
    yield from _pairs("", "", {"norm": ("group_norm", "norm-pre-head")})
    if config.num_classes:
        yield from _pairs("", "", {"head": ("dense", "head")})


def _pairs(ours: str, theirs: str, table: LayerTable) -> Iterator[TensorPair]:
    """Yield the tensors of the layers in `table`, with a prefix for our and for their names."""
    for layer, (layer_kind, *parts) in table.items():
        for our_end, their_end, kind in LAYERS[layer_kind]:
            names = tuple(f"{theirs}{part}/{their_end}" for part in parts)
            yield TensorPair(f"{ours}{layer}.{our_end}", names, kind)


def to_ours(kind: Kind, arrays: list[Tensor]) -> Tensor:
    """Convert the arrays of theirs to one tensor of ours.

    Raises:
        ValueError: an array has another number of dimensions than `kind`, or the shapes differ.
    """
    first = arrays[0]
    if first.ndim != NDIM.get(kind, first.ndim) or any(a.shape != first.shape for a in arrays):
        raise ValueError(f"has the shape {' and '.join(str(tuple(a.shape)) for a in arrays)}")
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


def to_theirs(
    pair: TensorPair, tensor: Tensor, num_heads: int
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield their names and float32 arrays for one tensor of ours: the inverse of `to_ours`."""
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


# Older generations of names.

# Names within a unit of BiT's first files, which are TensorFlow's -> the present names.
BIT_RELEASED_UNIT = {
    "a/proj/standardized_conv2d/kernel": "conv_proj/kernel",
    **{
        f"{letter}/{then}": now.format(n)
        for n, letter in enumerate("abc", 1)
        for then, now in {
            "standardized_conv2d/kernel": "conv{}/kernel",
            "group_norm/gamma": "gn{}/scale",
            "group_norm/beta": "gn{}/bias",
        }.items()
    },
}
BIT_RELEASED = {
    "root_block/standardized_conv2d/kernel": "root_block/conv_root/kernel",
    "group_norm/gamma": "norm-pre-head/scale",
    "group_norm/beta": "norm-pre-head/bias",
    "head/conv2d/kernel": "head/kernel",
    "head/conv2d/bias": "head/bias",
}
# Names within a block of Google's published ViTs, which count all kinds of layers together.
VIT_RELEASED = {
    "LayerNorm_2": "LayerNorm_1",
    "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
    "MlpBlock_3": "MlpBlock_0",
}
UNIT = re.compile(r"(block\d+/unit\d+/)(.*)")


def canonical(names: Iterable[str]) -> dict[str, str]:
    """Map every name to the name of the present generation.

    Before flax's "linen", one counter ran through all layers of a block in their order of use; now
    each kind has its own. Positions were part of the encoder once, and the layers of the attention
    pool were at the top level. BiT's first files have TensorFlow's names.
    """
    names = list(names)
    found = {name: _from_bit_release(name) if "resnet/" in name else name for name in names}
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


def _from_bit_release(name: str) -> str:
    """`resnet/block1/unit01/a/standardized_conv2d/kernel` -> `block1/unit01/conv1/kernel`."""
    # TensorFlow numbers equal layers: standardized_conv2d_1, head/conv2d_2.
    name = re.sub(r"(standardized_conv2d|head/conv2d)_\d+/", r"\1/", name)
    name = name[name.index("resnet/") + len("resnet/") :]
    if m := UNIT.fullmatch(name):
        return m[1] + BIT_RELEASED_UNIT.get(m[2], m[2])
    return BIT_RELEASED.get(name, name)


def to_bit_release(name: str) -> str:
    """Convert big_vision's name of a BiT array to the name in the first release."""
    if m := UNIT.fullmatch(name):
        then = {now: then for then, now in BIT_RELEASED_UNIT.items()}
        return f"resnet/{m[1]}{then[m[2]]}"
    return "resnet/" + {now: then for then, now in BIT_RELEASED.items()}[name]


def released(name: str) -> str:
    """Convert the present name of a ViT array to the name in the files that Google published."""
    for then, now in VIT_RELEASED.items():
        name = re.sub(rf"(encoderblock_\d+)/{now}/", rf"\1/{then}/", name)
    return name


def present_names(
    arrays: Mapping[str, NDArray[Any]], dropped: dict[str, str], source: str
) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Map present names to arrays, and present names to names in the file; fill `dropped`.

    This removes prefixes and splits the stacked blocks of a scanned encoder.
    """
    found, names = dict(arrays), {name: name for name in arrays}
    for prefix, reason in PREFIXES.items():
        if any(name.startswith(prefix) for name in found):
            dropped |= {names[n]: reason for n in found if not n.startswith(prefix)}
            inside = {n: n.removeprefix(prefix) for n in found if n.startswith(prefix)}
            found = {now: found[n] for n, now in inside.items()}
            names = {now: names[n] for n, now in inside.items()}
    for name in [n for n in found if n.startswith(STACKED)]:
        layers, was = found.pop(name), names.pop(name)
        for i, layer in enumerate(layers if layers.ndim else ()):
            apart = f"Transformer/encoderblock_{i}/{name.removeprefix(STACKED)}"
            found[apart], names[apart] = layer, was
    now = canonical(found)
    if twice := [n for n, times in Counter(now.values()).items() if times > 1]:
        both = [name for name in found if now[name] == twice[0]]
        raise not_official(source, [], [names[name] for name in both])
    found = {now[name]: array for name, array in found.items()}
    names = {now[name]: was for name, was in names.items()}
    if "root_block/conv_root/kernel" in found and found.get("head/kernel", np.empty(0)).ndim == 4:
        found["head/kernel"] = found["head/kernel"][0, 0]  # a 1x1 convolution in BiT's first files
    return found, names


def not_official(source: str, missing: Collection[str], foreign: Collection[str]) -> VitcliError:
    """Return the error for another architecture, with the missing and the unexpected names."""
    shown = [
        f"{kind}: {quoted(names, 6)}"
        for kind, names in {"missing": missing, "not part of one": foreign}.items()
        if names
    ]
    return VitcliError(
        f"`{source}` is not an official ViT, hybrid or BiT checkpoint; {'; '.join(shown)}",
        hint="check that the file holds a whole model of one of these architectures",
    )
