"""timm's class Eva: EVA, EVA-02 and DINOv3; and the files of the authors of DINOv3 and EVA-02.

Keys have no bias, so the other biases are apart from the projection; or query, key and value have a
projection each. Tensors do not show the rotary positions: they come from the architecture and the
arguments in timm's config.json, else from the tensor names that only one of the families has.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vitcli.errors import VitcliError
from vitcli.weights.timm.timm_config import TimmHubConfig

# Names that the authors' files have instead of timm's; `w12` and `w3` are in `timm_names.RENAMED`.
RENAMED = {
    r"storage_tokens": "reg_token",
    r"(blocks\.\d+\.mlp\.)w1\.": r"\1fc1_g.",
    r"(blocks\.\d+\.mlp\.)w2\.": r"\1fc1_x.",
    r"(blocks\.\d+\.mlp\.)ffn_ln\.": r"\1norm.",
    r"(blocks\.\d+\.attn\.)inner_attn_ln\.": r"\1norm.",
}
COMPUTED = "computed from the settings"
DROPPED = {
    r"(blocks\.\d+\.attn\.)?rope\.freqs_(cos|sin)|rope_embed\.periods": COMPUTED,
    r"(lm_head|local_cls_norm)\..*": "used only by self-supervised training",
}
DINOV3: dict[str, Any] = {"rope": "centred", "rope_theta": 100.0, "rope_pairs": "halves"}
EVA02: dict[str, Any] = {
    "rope": "index",
    "rope_theta": 1e4,
    "rope_pairs": "neighbours",
    "rope_grid": (16, 16),
}
# Architectures of timm 1.0.31 with rotary positions that we compute -> their settings.
ROTARY: dict[str, dict[str, Any]] = {r"vit_\w+_dinov3(_|$)": DINOV3, r"eva02_": EVA02}
# Arguments of the class -> the values that we compute.
ARGUMENTS = {
    "rope_type": ("cat", "dinov3"),
    "rope_grid_offset": (0, 0.0),
    "rope_grid_indexing": ("ij",),
    "use_post_norm": (False,),
    "attn_type": ("eva",),
    "num_kv_heads": (None,),
    "attn_only_layer_scale": (False,),
}
AUGMENTED = {
    "rope_shift_coords": "rope_shift",
    "rope_jitter_coords": "rope_jitter",
    "rope_rescale_coords": "rope_rescale",
}


def unify_eva(found: dict[str, Tensor], dropped: dict[str, str]) -> None:
    """Give query, key and value of Eva and its relatives our names, in place."""
    for name in list(found):
        if reason := next((why for p, why in DROPPED.items() if re.fullmatch(p, name)), None):
            dropped[name] = reason
            del found[name]
    for name in [n for n in found if re.fullmatch(r"blocks\.\d+\.attn\.q_proj\.weight", n)]:
        parts = [name.replace("q_proj", f"{part}_proj") for part in "qkv"]
        if all(p in found and found[p].shape == found[name].shape for p in parts):
            stacked = torch.cat([found.pop(p) for p in parts])  # (3 D, D)
            found[name.replace("q_proj", "qkv")] = stacked
    for name in [n for n in found if re.fullmatch(r"blocks\.\d+\.attn\.[qv]_proj\.bias", n)]:
        found[name.replace("_proj.bias", "_bias")] = found.pop(name)
    for name in [n for n in found if n.endswith("attn.k_bias") and not found[n].any()]:
        dropped[name] = "is zero: the keys have no bias"
        del found[name]
    for name in [n for n in found if n.endswith("attn.qkv.bias_mask")]:  # DINOv3's own files
        bias = name.removesuffix("_mask")
        dropped[name] = "marks the keys, which have no bias"
        del found[name]
        if bias in found and found[bias].ndim == 1 and found[bias].shape[0] % 3 == 0:
            query, _, value = found.pop(bias).chunk(3)
            found[bias.replace("qkv.bias", "q_bias")] = query.clone()
            found[bias.replace("qkv.bias", "v_bias")] = value.clone()


def rotary_settings(
    tensors: Mapping[str, Tensor], hub: TimmHubConfig, source: str, notes: list[str]
) -> dict[str, Any]:
    """Return the fields of ViTConfig about rotary positions; empty for a model without them.

    Args:
        tensors: names -> tensors, as in the file.
        hub: the config.json of the file.

    Raises:
        VitcliError: an argument or the stored periods are not supported.
    """
    for key, supported in ARGUMENTS.items():
        if hub.arguments.get(key, supported[0]) not in supported:
            raise VitcliError(
                f"`{source}` has `{key}={hub.arguments[key]}`, which is not supported",
                hint=f"use a model with `{key}={supported[0]}`",
            )
    if not hub.architecture:
        return _assumed(tensors, source, notes)
    known = (values for pattern, values in ROTARY.items() if re.match(pattern, hub.architecture))
    settings = dict(next(known, {}))
    arguments = hub.arguments
    if not settings or arguments.get("use_rot_pos_emb") is False:
        return {}
    if arguments.get("rope_temperature"):
        settings["rope_theta"] = float(arguments["rope_temperature"])
    if (half := arguments.get("rope_rotate_half")) is not None:
        settings["rope_pairs"] = "halves" if half else "neighbours"
    if "ref_feat_shape" in arguments and settings["rope"] == "index":
        grid = arguments["ref_feat_shape"]
        grid = grid if isinstance(grid, list | tuple) or grid is None else (grid, grid)
        settings["rope_grid"] = None if grid is None else tuple(grid)
    for theirs, ours in AUGMENTED.items():
        if arguments.get(theirs) is not None:
            settings[ours] = float(arguments[theirs])
    return settings


def _assumed(tensors: Mapping[str, Tensor], source: str, notes: list[str]) -> dict[str, Any]:
    """Return the rotary positions of a file without config.json, from the names in it."""
    names = set(tensors)

    def any_name(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in names)

    positions = any_name(r"(^|\.)pos_embed$|relative_position_")  # the second is BEiT's
    if not positions and any_name(r"(^|\.)storage_tokens$|\.gamma_1$"):
        settings = dict(DINOV3)
        periods = next((t for n, t in tensors.items() if n.endswith("rope_embed.periods")), None)
        if periods is not None:  # Meta's file, whose training had this setting
            settings |= {"rope_rescale": 2.0, "rope_dtype": _dtype_of(periods, source)}
        notes.append("assumed the rotary positions of DINOv3, because of the tensor names")
        return settings
    gated = any_name(r"\.mlp\.(fc1_g|w1)\.") or any(
        name.endswith("blocks.0.mlp.fc1.weight")
        and tensors[name].shape[0] == 2 * tensors[name.replace("fc1", "fc2")].shape[-1]
        for name in names
        if name.replace("fc1", "fc2") in names and tensors[name].ndim == 2
    )
    if positions and gated and any_name(r"\.attn\.(q_proj|q_bias)"):
        notes.append("assumed the rotary positions of EVA-02, because of the tensor names")
        return dict(EVA02)
    return {}


def _dtype_of(periods: Tensor, source: str) -> str:
    """Return the dtype to which the stored periods of DINOv3 are rounded."""
    count = periods.numel()
    exact = DINOV3["rope_theta"] ** (torch.arange(count, dtype=torch.float32) / count)
    found = periods.float().flatten()
    if torch.allclose(found, exact, rtol=1e-5, atol=0):
        return "fp32"
    if torch.equal(found, exact.to(torch.bfloat16).float()):
        return "bf16"
    raise VitcliError(
        f"`{source}` has rotary positions with other periods than DINOv3: `rope_embed.periods`",
        hint="use a file of DINOv3, whose periods go from 1 to 100",
    )
