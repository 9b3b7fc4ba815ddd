"""Read the vision towers in files of open_clip, and of OpenAI's CLIP, whose names it took.

The names become timm's, and `open_clip_config.json` becomes timm's Hub config, which `read_timm`
reads. Source: open_clip's transformer.py, timm_model.py and model.py.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from vitcli.vit.variants import VARIANTS
from vitcli.weights.overrides import Overrides
from vitcli.weights.store import Checkpoint, readable_values
from vitcli.weights.timm.read_timm import matching_variant, read_timm
from vitcli.weights.timm.timm_config import CLIP

CONFIG = "open_clip_config.json"
REPAIR = "correct the file, or remove it and give `--set model.…` and `--set preprocess.…`"
TEXT = "belongs to the text tower"
OWN = "vit_open_clip"  # like timm's own towers of CLIP, it has the epsilon 1e-5
OPENAI = "input_resolution"  # a number that only OpenAI's own files hold
# The patch projection of open_clip's own tower, and of a tower of timm inside of open_clip.
ANCHOR = re.compile(r"(?P<prefix>(?:.*\.)?)(?P<own>conv1\.weight|trunk\.patch_embed\.proj\.weight)")
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


def is_open_clip(names: Iterable[str]) -> bool:
    """Return True for the tensor names of a vision tower of open_clip or OpenAI's CLIP."""
    return _anchor(names) is not None


def _anchor(names: Iterable[str]) -> tuple[str, bool] | None:
    """Return the prefix of the tower's names, and True for a tower of timm; None if none is."""
    known = set(names)
    for name in known:
        if (found := ANCHOR.fullmatch(name)) is not None:
            prefix, trunk = found["prefix"], found["own"] != "conv1.weight"
            if trunk or f"{prefix}class_embedding" in known:
                return prefix, trunk
    return None


def read_open_clip(
    tensors: Mapping[str, Tensor],
    source: str,
    described: Mapping[str, Any] | None,
    overrides: Overrides,
) -> Checkpoint:
    """Convert the vision tower of an open_clip file to a checkpoint.

    Args:
        tensors: names -> tensors, with or without those of the text tower.
        source: the name of the file in messages.
        described: the `open_clip_config.json` in its folder, or None.
        overrides: the caller's settings, which override the files.

    Raises:
        VitcliError: the tower is not a Vision Transformer that we compute, or a value is invalid.
    """
    anchor = _anchor(tensors)
    assert anchor is not None
    prefix, trunk = anchor
    found, dropped = _rename(tensors, prefix, trunk)
    notes = ["the text tower of the file is left out"] if TEXT in dropped.values() else []
    with readable_values(CONFIG, source, REPAIR):
        hub = _hub_config(found, described, trunk, OPENAI in tensors, overrides, notes)
        vision = ((described or {}).get("model_cfg") or {}).get("vision_cfg") or {}
        eps = overrides.norm_eps or (vision.get("norm_kwargs") or {}).get("eps")
    checkpoint = read_timm(found, source, hub, replace(overrides, norm_eps=eps))
    checkpoint.layout = "open_clip"
    checkpoint.dropped = dropped | checkpoint.dropped
    checkpoint.notes[:0] = notes
    return checkpoint


def _rename(
    tensors: Mapping[str, Tensor], prefix: str, trunk: bool
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tower's tensors under timm's names, and the dropped ones with the reason."""
    found: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    for full, tensor in tensors.items():
        name = full.removeprefix(prefix)
        if prefix and not full.startswith(prefix):
            dropped[full] = TEXT
        elif trunk and name == "head.proj.weight":
            found["projection.weight"] = tensor
        elif trunk:
            found[name.removeprefix("trunk.")] = tensor
        elif name == "proj" and tensor.ndim == 2:  # they multiply from the right
            found["projection.weight"] = tensor.T.contiguous()  # (E, D)
        else:
            found[_own_name(name)] = tensor
    shapes = {"cls_token": (1, 1, -1), "pos_embed": None}
    for name, shape in () if trunk else shapes.items():
        if name in found:
            found[name] = found[name].reshape(shape) if shape else found[name][None]
    return found, dropped


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
    arguments = {} if trunk else {"num_heads": _num_heads(found, vision, notes)}
    arguments |= {"global_pool": pool} if pool is not None else {}
    if not trunk:
        tanh = (vision.get("act_kwargs") or {}).get("approximate") == "tanh"
        quick = model.get("quick_gelu") or (openai and described is None)
        arguments["act_layer"] = "quick_gelu" if quick else "gelu_tanh" if tanh else "gelu"
        if described is None and not quick and overrides.gelu is None:
            notes.append(
                f"no {CONFIG}: assumed the exact GELU (for weights of OpenAI set "
                "`--set model.gelu=quick`)"
            )
    if vision.get("image_size") is not None:
        arguments["img_size"] = vision["image_size"]
    siglip = "siglip" in name.lower()
    mean, std = ([0.5] * 3, [0.5] * 3) if siglip else CLIP
    if not {"mean", "std"} <= {*transform, *overrides.preprocess}:
        whose = "mean and std 0.5, those of SigLIP" if siglip else "CLIP's mean and std"
        notes.append(f"no mean and std in {CONFIG}: assumed {whose}")
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
