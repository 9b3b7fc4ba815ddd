"""Read the vision towers in files of open_clip, and of OpenAI's CLIP, whose names it took.

The names become timm's, and `open_clip_config.json` becomes timm's Hub config, which `read_timm`
reads. Source: open_clip's transformer.py, timm_model.py and model.py.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from vitcli.vit.variants import VARIANTS
from vitcli.weights.find_network import FoundNetwork
from vitcli.weights.overrides import Overrides, matching_variant
from vitcli.weights.store import Checkpoint, readable_values
from vitcli.weights.timm.read_timm import read_timm
from vitcli.weights.timm.timm_config import CLIP

OPEN_CLIP_CONFIG = "open_clip_config.json"
REPAIR = "correct the file, or remove it and give `--set model.…` and `--set preprocess.…`"
OWN = "vit_open_clip"  # like timm's own towers of CLIP, it has the epsilon 1e-5
OPENAI = "input_resolution"  # a number that only OpenAI's own files hold
OUTSIDE = {
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "conv1": "patch_embed.proj",
    "ln_pre": "norm_pre",
    "ln_post": "norm",
    "proj": "projection.weight",
}
BLOCK = {
    "ln_1": "norm1",
    "ln_2": "norm2",
    "attn.in_proj_weight": "attn.qkv.weight",
    "attn.in_proj_bias": "attn.qkv.bias",
    "attn.out_proj": "attn.proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ls_1": "ls1",
    "ls_2": "ls2",
}
POOLS = {"tok": "token", "avg": "avg", "map": "map", "token": "token", "": None, "none": None}
CROP_MODES = {"shortest": "center", "squash": "squash", "longest": "border"}


def is_open_clip(network: FoundNetwork) -> bool:
    """Return True for a tower of open_clip, and for a tower of timm inside of open_clip."""
    full = next(iter(network.full_names.values()), "")
    return network.layout == "open_clip" or (".trunk." in f".{full}" and "visual." in full)


def read_open_clip(
    network: FoundNetwork,
    source: str,
    described: Mapping[str, Any] | None,
    overrides: Overrides,
) -> Checkpoint:
    """Convert the vision tower of an open_clip file to a checkpoint.

    Args:
        network: the tower and what else is in its file.
        source: the name of the file in messages.
        described: the `open_clip_config.json` in its folder, or None.
        overrides: the caller's settings, which override the files.

    Raises:
        VitcliError: the tower is not a Vision Transformer that we compute, or a value is invalid.
    """
    trunk = network.layout != "open_clip"
    found = dict(network.tensors) if trunk else _renamed(network.tensors)
    if trunk and "head.weight" in found:  # `visual.head.proj`, which was taken for a classifier
        found["projection.weight"] = found.pop("head.weight")
        del found["head.bias"]
        network.notes = [note for note in network.notes if not note.startswith("took ")]
    notes = ["the text tower of the file is left out"] if network.dropped else []
    network.dropped = dict.fromkeys(network.dropped, "belongs to the text tower")
    openai = any(name.endswith(OPENAI) for name in network.shapes)
    with readable_values(OPEN_CLIP_CONFIG, source, REPAIR):
        hub = _hub_config(found, described, trunk, openai, overrides, notes)
        vision = ((described or {}).get("model_cfg") or {}).get("vision_cfg") or {}
        eps = overrides.norm_eps or (vision.get("norm_kwargs") or {}).get("eps")
        overrides = replace(overrides, norm_eps=eps)
    checkpoint = read_timm(replace(network, layout="timm", tensors=found), source, hub, overrides)
    checkpoint.layout = "open_clip"
    checkpoint.notes[:0] = notes
    return checkpoint


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of open_clip's own tower under timm's names, with timm's shapes."""
    found = {_own_name(name): tensor for name, tensor in tensors.items()}
    if "proj" in tensors:  # they multiply from the right
        found["projection.weight"] = tensors["proj"].T.contiguous()  # (E, D)
    if "cls_token" in found:
        found["cls_token"] = found["cls_token"].reshape(1, 1, -1)
    if "pos_embed" in found:
        found["pos_embed"] = found["pos_embed"][None]  # (1, 1 + N, D)
    return found


def _own_name(name: str) -> str:
    """`transformer.resblocks.0.ln_1.weight` -> `blocks.0.norm1.weight`; others stay."""
    block = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
    inner, names = (block[2], BLOCK) if block else (name, OUTSIDE)
    module, _, last = inner.rpartition(".")
    ours = names.get(inner) or (f"{names[module]}.{last}" if module in names else None)
    if ours is None:
        return name  # the comparison with the model's names reports it
    return f"blocks.{block[1]}.{ours}" if block else ours


def _hub_config(
    found: Mapping[str, Tensor],
    described: Mapping[str, Any] | None,
    trunk: bool,
    openai: bool,
    overrides: Overrides,
    notes: list[str],
) -> dict[str, Any]:
    """Return the Hub config of timm that says the same as open_clip's."""
    model = (described or {}).get("model_cfg") or {}
    vision, transform = model.get("vision_cfg") or {}, (described or {}).get("preprocess_cfg") or {}
    name = str(vision.get("timm_model_name") or "") if trunk else OWN
    pool = POOLS[str(vision.get("timm_pool" if trunk else "pool_type") or "")]
    arguments: dict[str, Any] = {} if trunk else {"num_heads": _num_heads(found, vision, notes)}
    arguments |= {"global_pool": pool} if pool is not None else {}
    if not trunk:
        tanh = (vision.get("act_kwargs") or {}).get("approximate") == "tanh"
        quick = model.get("quick_gelu") or (openai and described is None)
        arguments["act_layer"] = "quick_gelu" if quick else "gelu_tanh" if tanh else "gelu"
        if described is None and not quick and overrides.gelu is None:
            notes.append(
                f"no {OPEN_CLIP_CONFIG}: assumed the exact GELU (for weights of OpenAI set "
                "`--set model.gelu=quick`)"
            )
    if vision.get("image_size") is not None:
        arguments["img_size"] = vision["image_size"]
    siglip = "siglip" in name.lower()
    mean, std = ([0.5] * 3, [0.5] * 3) if siglip else CLIP
    if not {"mean", "std"} <= {*transform, *overrides.preprocess}:
        whose = "mean and std 0.5, those of SigLIP" if siglip else "CLIP's mean and std"
        notes.append(f"no mean and std in {OPEN_CLIP_CONFIG}: assumed {whose}")
    mode = str(transform.get("resize_mode") or ("squash" if siglip else "shortest"))
    return {
        "architecture": name,
        "model_args": arguments,
        "pretrained_cfg": {
            "mean": transform.get("mean") or mean,
            "std": transform.get("std") or std,
            "interpolation": transform.get("interpolation") or "bicubic",
            "crop_pct": 1.0,
            "crop_mode": CROP_MODES[mode],
        },
    }


def _num_heads(found: Mapping[str, Tensor], vision: Mapping[str, Any], notes: list[str]) -> int:
    """Return the number of heads of open_clip's own tower, whose heads are 64 wide by default."""
    width = found["patch_embed.proj.weight"].shape[0]
    depth = len({name.split(".")[1] for name in found if name.startswith("blocks.")})
    hidden = found.get("blocks.0.mlp.fc1.weight", found["patch_embed.proj.weight"]).shape[0]
    if not vision and (variant := matching_variant(width, depth, hidden)):
        notes.append(f"assumed {VARIANTS[variant].num_heads} heads, as in ViT-{variant}")
        return VARIANTS[variant].num_heads
    return int(width) // int(vision.get("head_width") or 64)
