"""The tensor names of timm's relatives, brought to timm's own.

DeiT, DINO, DINOv2, MAE and MoCo v3 came out of timm's code; their files differ by prefixes, by
what is left of the training, and by a few names.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from vitcli.errors import VitcliError

PATCHES = "patch_embed.proj.weight"
BIT_ROOT, BIT_UNIT = "stem.conv.weight", "stages.0.blocks.0.conv1.weight"
# Of several models in one file, the one that is evaluated: averaged weights; in MoCo v3 the query.
PREFERRED = ("teacher", "ema", "target_encoder", "base_encoder")
LEFTOVERS = {
    r"mask_token|decoder[_.].*|.*\.decoder[_.].*": "belongs to the masked-image training",
    r"head\.(mlp|last_layer|\d+)\b.*|fc\.\w+(\.\w+)?|(predictor|projector|(dino|ibot)_\w+)\..*": (
        "belongs to the self-supervised training"
    ),
    r"(optimizer|scheduler|criterion|loss|teacher|student)\..*|n_averaged": (
        "belongs to the training"
    ),
    r"(.*\.)?total_(ops|params)": "a profiler's count",
}
RENAMED = {
    # DINOv2 for FSDP: blocks.CHUNK.BLOCK, and BLOCK counts through all chunks.
    r"blocks\.\d+\.(\d+)\.": r"blocks.\1.",
    r"(blocks\.\d+\.)gamma_([12])": r"\1ls\2.gamma",  # DeiT III
    r"(blocks\.\d+\.mlp\.)w12\.": r"\1fc1.",  # DINOv2's SwiGLU, packed as ours
    r"(blocks\.\d+\.mlp\.)w3\.": r"\1fc2.",
    r"patch_embed\.backbone\.(conv|norm)\.": r"patch_embed.backbone.stem.\1.",  # R+Ti/16
}


def is_timm(names: Iterable[str]) -> bool:
    """Whether these tensor names are those of a ViT of timm's kind, a common prefix aside."""
    return bool(_prefixes(names, PATCHES))


def is_bit(names: Iterable[str]) -> bool:
    """Whether these tensor names are those of a ResNet of timm's kind, a common prefix aside."""
    names = list(names)
    return not is_timm(names) and bool(
        set(_prefixes(names, BIT_ROOT)) & set(_prefixes(names, BIT_UNIT))
    )


def timm_names(
    tensors: Mapping[str, Tensor], source: str
) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """Tensors of a relative -> with timm's names; what was dropped and why; notes.

    Raises:
        VitcliError: several models in one file, or two tensors that come to one name.
    """
    anchor = PATCHES if is_timm(tensors) else BIT_ROOT
    prefix, notes = _chosen(_prefixes(tensors, anchor), source)
    dropped: dict[str, str] = {}
    found: dict[str, Tensor] = {}
    for full, tensor in tensors.items():
        name = full.removeprefix(prefix)
        if not full.startswith(prefix):
            dropped[full] = _leftover(full) or f"outside `{prefix}`"
        elif reason := _leftover(name):
            dropped[full] = reason
        else:
            for pattern, replacement in RENAMED.items():
                name = re.sub(f"^{pattern}", replacement, name)
            if name in found:
                raise VitcliError(
                    f"`{source}` has two tensors for `{name}`, one of them `{full}`",
                    hint="is this the file of another architecture?",
                )
            found[name] = tensor
    _pack_swiglu(found)
    if "register_tokens" in found:
        notes.append("DINOv2's registers have no positions; the class token's is added to it")
        _fold_position(found)
    return found, dropped, notes


def _prefixes(names: Iterable[str], anchor: str) -> list[str]:
    """What stands before `anchor` where a name ends in it."""
    before = [n.removesuffix(anchor) for n in names if n.endswith(anchor)]
    return [prefix for prefix in before if not prefix or prefix.endswith(".")]


def _chosen(prefixes: list[str], source: str) -> tuple[str, list[str]]:
    if len(prefixes) == 1:
        return prefixes[0], []
    for word in PREFERRED:
        wanted = [prefix for prefix in prefixes if word in prefix]
        if len(wanted) == 1:
            others = ", ".join(f"`{p}`" for p in prefixes if p != wanted[0])
            return wanted[0], [f"the weights under `{wanted[0]}` were taken, not {others}"]
    told = ", ".join(f"`{prefix}`" if prefix else "those without a prefix" for prefix in prefixes)
    raise VitcliError(
        f"`{source}` holds several models: {told}", hint="save the one that is wanted by itself"
    )


def _leftover(name: str) -> str | None:
    return next((why for pattern, why in LEFTOVERS.items() if re.fullmatch(pattern, name)), None)


def _pack_swiglu(found: dict[str, Tensor]) -> None:
    """Gate and value of timm's unpacked SwiGLU -> one `fc1`, gate first, in place."""
    for name in [n for n in found if ".mlp.fc1_g." in n]:
        value = name.replace("fc1_g", "fc1_x")
        if value in found and found[name].ndim > 0 and found[name].shape == found[value].shape:
            packed = torch.cat([found.pop(name), found.pop(value)])  # (2 h, D) or (2 h,)
            found[name.replace("fc1_g", "fc1")] = packed


def _fold_position(found: dict[str, Tensor]) -> None:
    """`register_tokens` of DINOv2: put in after the positions, which the class token has."""
    found["reg_token"] = found.pop("register_tokens")
    token, table = found.get("cls_token"), found.get("pos_embed")
    if token is None or table is None:
        return
    if table.ndim == 3 and token.shape == (1, 1, table.shape[2]):  # else the comparison says it
        table = table.float()
        found["cls_token"] = token.float() + table[:, :1]  # (1, 1, D)
        found["pos_embed"] = table[:, 1:].contiguous()  # (1, N, D)
