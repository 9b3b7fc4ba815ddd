"""Find a classification head of any name: `fc`, `head.1`, `classifier.1`, `heads.head`.

Users put a head of their own on a backbone, in the network or beside it, often after a dropout
(`head.1`) or a BatchNorm without parameters (the linear probes of MAE). One linear layer is a head
of our model, with the BatchNorm folded into it. A head of several layers is not.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

ROOT = re.compile(r"((?:cls_)?heads?|mlp_head|linear(?:_head)?|fc|classifier)\.")
BATCH_NORM_EPS = 1e-5  # torch's default; a file does not tell it


NORM_PARTS = ("running_mean", "running_var", "weight", "bias")
HEAD_PARTS = ("weight", "bias", *(f"norm.{part}" for part in NORM_PARTS))


@dataclass
class FoundHead:
    """A head in a file.

    Attributes:
        note: what was done, in one line.
        parts: names of `HEAD_PARTS` -> the paths of the tensors; empty for a head that is refused.
        refused: the paths of the tensors of a head that is refused.
    """

    note: str
    parts: dict[str, str] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)


def find_head(everything: Mapping[str, Tensor], place: str, width: int) -> FoundHead | None:
    """Return the head of the network at `place`, the nearest one; None if there is none.

    Args:
        everything: path -> each tensor of the file.
        place: path and prefix of the network.
        width: width of its features; a head may also read two vectors of this width.
    """
    for around in _outwards(place):
        heads: dict[str, list[str]] = {}
        for path in everything:
            if path.startswith(around) and (m := ROOT.match(path, len(around))):
                heads.setdefault(around + m[1], []).append(path)
        fitting = {
            name: paths
            for name, paths in heads.items()
            if any(_is_linear(everything[path], width) for path in paths)
            # The attention pool of SigLIP is called `head` and belongs to the network.
            and not any(re.search("attention|attn", path[len(name) :]) for path in paths)
        }
        if fitting:
            return _checked(everything, fitting)
    return None


def _outwards(place: str) -> Iterator[str]:
    """`a.b.` -> `a.b.`, `a.`, ``."""
    parts = place.split(".")[:-1]
    for count in range(len(parts), -1, -1):
        yield "".join(f"{part}." for part in parts[:count])


def _is_linear(tensor: Tensor, width: int) -> bool:
    return tensor.ndim == 2 and tensor.shape[1] in (width, 2 * width)


def _checked(everything: Mapping[str, Tensor], heads: Mapping[str, list[str]]) -> FoundHead:
    """Return the only head if it is one linear layer, alone or after a BatchNorm."""
    shown = " and ".join(f"`{name}`" for name in heads)
    paths = [path for paths in heads.values() for path in paths]
    if len(heads) > 1:
        note = f"the file has several heads, {shown}: loaded the network without a head"
        return FoundHead(note, refused=paths)
    layers = [path for path in paths if everything[path].ndim > 1]
    module = layers[0].removesuffix(".weight")
    rest = {path.rpartition(".")[2]: path for path in paths if not path.startswith(f"{module}.")}
    rest.pop("num_batches_tracked", None)
    is_norm = {"running_mean", "running_var"} <= set(rest) <= set(NORM_PARTS)
    inputs = (everything[layers[0]].shape[-1],)
    fits = all(everything[path].shape == inputs for path in rest.values())
    if len(layers) > 1 or (rest and not (is_norm and fits)):
        note = f"the head {shown} is more than one linear layer: loaded the network without a head"
        return FoundHead(note, refused=paths)
    note = f"took `{module}` as the head"
    if rest:
        note += f", with the BatchNorm before it (assumed epsilon {BATCH_NORM_EPS:g})"
    parts = {"weight": layers[0]} | {f"norm.{part}": path for part, path in rest.items()}
    if f"{module}.bias" in everything:
        parts["bias"] = f"{module}.bias"
    return FoundHead(note, parts)


def fold_batch_norm(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return weight (K, F) and bias (K,) of a linear head, with the BatchNorm before it folded in.

    Args:
        parts: the tensors, under names of `HEAD_PARTS`.
    """
    weight = parts["weight"]
    bias = parts.get("bias", weight.new_zeros(weight.shape[0]))
    if "norm.running_mean" not in parts:
        return weight, bias
    scale = (parts["norm.running_var"].double() + BATCH_NORM_EPS).rsqrt()  # (F,)
    scale = scale * parts.get("norm.weight", scale.new_ones(())).double()
    shift = parts.get("norm.bias", scale.new_zeros(())) - parts["norm.running_mean"] * scale  # (F,)
    folded = bias.double() + weight.double() @ shift.double()  # (K,)
    return (weight.double() * scale).float(), folded.float()
