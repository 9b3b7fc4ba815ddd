"""Vision towers of CLIP, SigLIP, SigLIP 2 and AIMv2 in transformers.

A folder holds the tower alone (`clip_vision_model`), or the tower beside a text tower (`clip`),
which we leave out. Features are the `pooler_output` of the vision model. The projection to the
space of the text embeddings is kept for zero-shot heads.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from vitcli.errors import VitcliError
from vitcli.vit.config import ViTConfig
from vitcli.vit.position import sincos2d
from vitcli.weights.huggingface.huggingface_type import (
    CLIP_PROCESSOR,
    HEADS,
    NEW_QKV,
    HuggingFaceType,
    ModelFiles,
    Settings,
    WrittenType,
    described_act,
    described_sizes,
    encoder_settings,
    read_size,
)

VISION = "vision_config"  # the section of config.json about the tower
TEXT = "belongs to the text tower"
UNUSED = {
    r"(text_model|text_projection)\..*|logit_(scale|bias)": TEXT,
    r"embeddings\.position_ids": "only counts the positions",
}
ENCODER = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.patch_embedding": "patch_embed.proj",
    "embeddings.position_embedding": "pos_embed",
    "pre_layrnorm": "norm_pre",  # their spelling
    "post_layernorm": "norm",
    # SigLIP's pooling is big_vision's MAP; `nn.MultiheadAttention` stacks its projections.
    "head.probe": "attn_pool.latent",
    "head.attention.in_proj_weight": "attn_pool.qkv.weight",
    "head.attention.in_proj_bias": "attn_pool.qkv.bias",
    "head.attention.out_proj": "attn_pool.proj",
    "head.layernorm": "attn_pool.norm",
    "head.mlp.fc1": "attn_pool.mlp.fc1",
    "head.mlp.fc2": "attn_pool.mlp.fc2",
}
BLOCK = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
PROJECTION = {"visual_projection": "projection"}

AIMV2_ENCODER = {
    "embeddings.patch_embed": "patch_embed.proj",
    "embeddings.rms_norm": "patch_embed.norm",
    "embeddings.position_embedding": "pos_embed",
    "rms_norm": "norm",
    "head.cls_token": "attn_pool.latent",
    "head.k_proj": "attn_pool.k",
    "head.v_proj": "attn_pool.v",
    "head.output_proj": "attn_pool.proj",
}
AIMV2_BLOCK = {
    "rms_norm1": "norm1",
    "rms_norm2": "norm2",
    "attention.out_proj": "attn.proj",
    "ffn.down_proj": "mlp.fc2",
}
AIMV2_STACKED = {
    "attn.qkv": (NEW_QKV,),
    "mlp.fc1": (("ffn.gate_proj", "ffn.up_proj"),),
}
# transformers' values for keys that config.json does not have; its files leave these out.
CLIP = {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
SIGLIP = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
AIMV2 = {
    "patch_size": 14,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "qkv_bias": False,
}


def _tower_settings(files: ModelFiles, defaults: Mapping[str, Any]) -> Settings:
    """Fill the gaps of config.json, give the tensors our shapes, and read what is common."""
    files.described = {**defaults, **files.described}
    tensors = files.tensors
    if TEXT in files.dropped.values():
        files.notes.append("the text tower of the file is left out")
    if "pos_embed.weight" in tensors:
        tensors["pos_embed"] = tensors.pop("pos_embed.weight")[None]  # (1, N, D)
    if "cls_token" in tensors:
        tensors["cls_token"] = tensors["cls_token"].reshape(1, 1, -1)  # (1, 1, D)
    for end in ("weight", "bias"):
        if (stacked := tensors.pop(f"attn_pool.qkv.{end}", None)) is not None:
            q, k, v = stacked.chunk(3)
            tensors[f"attn_pool.q.{end}"] = q.clone()
            tensors[f"attn_pool.kv.{end}"] = torch.cat([k, v])  # (2 D, D) or (2 D,)
    values = encoder_settings(files)
    projection = tensors.get("projection.weight")
    values["projection_size"] = projection.shape[0] if projection is not None else None
    # Their convolution cuts off what does not fill a patch: So400m/14 has 27x27 patches at 384 px.
    rest = [side % values["patch_size"] for side in values["image_size"]]
    values["crop_to_patches"] = any(rest)
    return values


def _clip_settings(files: ModelFiles) -> Settings:
    values = _tower_settings(files, CLIP) | {"norm_before_blocks": True, "patch_bias": False}
    if "head.weight" in files.tensors:
        # transformers' classifier averages patches that no norm has seen.
        values |= {"pool": "mean", "final_norm": False}
        for end in ("weight", "bias"):
            files.drop(f"norm.{end}", "belongs to the class token, which no head reads")
    return values


def _siglip_settings(files: ModelFiles) -> Settings:
    values = _tower_settings(files, SIGLIP) | {"class_token": False, "pool": "map"}
    if "head.weight" in files.tensors:
        for name in [name for name in files.tensors if name.startswith("attn_pool.")]:
            files.drop(name, "belongs to a pooling that no head reads")
        values["pool"] = "mean"
    elif not files.flag("vision_use_head", default=True):
        values["pool"] = "mean"
    return values


def _described_siglip(config: ViTConfig) -> Settings:
    """The entries of config.json; a head reads the mean of the patches, a backbone either."""
    tower = {
        **described_sizes(config),
        "hidden_act": described_act(config),
        "intermediate_size": config.mlp_dim,
        "attention_dropout": 0.0,
        "vision_use_head": config.pool == "map",
    }
    if not config.num_classes:
        return tower
    return {VISION: {"model_type": "siglip_vision_model", **tower}}


def _siglip_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in SigLIP's shapes, the reverse of `_tower_settings`."""
    tensors = dict(tensors)
    tensors["pos_embed.weight"] = tensors.pop("pos_embed")[0]  # (N, D)
    for end in ("weight", "bias"):
        if (query := tensors.pop(f"attn_pool.q.{end}", None)) is not None:
            stacked = torch.cat([query, tensors.pop(f"attn_pool.kv.{end}")])  # (3 D, D) or (3 D,)
            tensors[f"attn_pool.qkv.{end}"] = stacked
    return tensors


def _naflex_settings(files: ModelFiles) -> Settings:
    """SigLIP 2 in its NaFlex form, for images of one size."""
    side = isqrt(files.count("num_patches", 256))
    patch = read_size(files.described.get("patch_size", 16), "patch_size")[0]
    files.described = {**files.described, "image_size": side * patch}
    kernel = files.tensors.get("patch_embed.proj.weight")
    if kernel is not None and kernel.ndim == 2 and not kernel.shape[1] % (patch * patch):
        kernel = kernel.reshape(len(kernel), patch, patch, -1)  # (D, P, P, C)
        files.tensors["patch_embed.proj.weight"] = kernel.permute(0, 3, 1, 2).contiguous()
    files.notes.append(
        f"SigLIP 2 NaFlex: images are resized to {side * patch}x{side * patch} px, without regard "
        "to their shape (change with `--set model.image_size=[Y,X]`)"
    )
    return _siglip_settings(files)


def _aimv2_settings(files: ModelFiles) -> Settings:
    if (act := files.described.get("hidden_act", "silu")) != "silu":
        raise VitcliError(
            f"`{files.source}` has the unsupported activation `{act}`",
            hint="AIMv2 is supported with `silu`",
        )
    eps = files.fraction("rms_norm_eps", 1e-5)
    files.described = {**files.described, "hidden_act": "gelu", "layer_norm_eps": eps}
    values = _tower_settings(files, AIMV2)
    pooled = files.flag("use_head", default=True)
    values |= {
        "norm": "rms",
        "patch_norm": True,
        "mlp": "swiglu",
        "class_token": False,
        "pool": "map" if pooled else "mean",
    }
    _add_zero_biases(files, values)
    if pooled:
        _fill_pooling(files, values)
    if files.flag("is_native", default=False):
        values |= _native_positions(files, values)
    return values


def _add_zero_biases(files: ModelFiles, values: Settings) -> None:
    """Add zeros for biases that AIMv2 does not have; the outputs stay the same."""
    width = {"attn.proj": values["embed_dim"], "mlp.fc2": values["embed_dim"]}
    width["mlp.fc1"] = 2 * values["mlp_dim"]
    flags = {"attn.proj": "qkv_bias", "mlp.fc1": "mlp_bias", "mlp.fc2": "mlp_bias"}
    for name, key in flags.items():
        if not files.flag(key, default=False):
            for i in range(values["depth"]):
                files.tensors[f"blocks.{i}.{name}.bias"] = torch.zeros(width[name])


def _fill_pooling(files: ModelFiles, values: Settings) -> None:
    """Complete AIMv2's pooling to MAP, which has a query projection and an MLP behind it.

    The projection is the identity and the MLP gives zero, so the outputs stay the same.
    """
    tensors, d, hidden = files.tensors, values["embed_dim"], values["mlp_dim"]
    for end in ("weight", "bias"):
        parts = [tensors.pop(f"attn_pool.{part}.{end}", None) for part in "kv"]
        if parts[0] is not None and parts[1] is not None:
            tensors[f"attn_pool.kv.{end}"] = torch.cat([parts[0], parts[1]])
    if not values["qkv_bias"]:
        tensors["attn_pool.kv.bias"] = torch.zeros(2 * d)
    tensors |= {
        "attn_pool.q.weight": torch.eye(d),
        "attn_pool.q.bias": torch.zeros(d),
        "attn_pool.norm.weight": torch.ones(d),
        "attn_pool.mlp.fc1.weight": torch.zeros(hidden, d),
        "attn_pool.mlp.fc1.bias": torch.zeros(hidden),
        "attn_pool.mlp.fc2.weight": torch.zeros(d, hidden),
        "attn_pool.mlp.fc2.bias": torch.zeros(d),
    }


def _native_positions(files: ModelFiles, values: Settings) -> Settings:
    """The fixed positions of AIMv2 at native resolution, for the image size that the user wants."""
    (rows, cols), patch = files.overrides.image_size or values["image_size"], values["patch_size"]
    if rows % patch or cols % patch:
        rows, cols = values["image_size"]  # the change of the image size reports it
    grid = rows // patch, cols // patch
    files.tensors["pos_embed"] = sincos2d(grid, values["embed_dim"], inclusive=False)
    return {"position": "sincos2d", "image_size": (rows, cols)}


_CLIP = HuggingFaceType(
    prefix="vision_model.",
    backbone="CLIPVisionModel",
    classifier=None,
    settings=_clip_settings,
    encoder=ENCODER,
    block=BLOCK,
    stacked={"attn.qkv": (QKV,)},
    heads={**HEADS, **PROJECTION},
    unused=UNUSED,
    processor="CLIPImageProcessor",
    published=CLIP_PROCESSOR,
)
_SIGLIP = replace(
    _CLIP,
    backbone="SiglipVisionModel",
    settings=_siglip_settings,
    heads=HEADS,
    processor="SiglipImageProcessor",
    published={"resample": 3},
    written=WrittenType(
        described=_described_siglip,
        block=lambda _: {**{ours: theirs for theirs, ours in BLOCK.items()}, "attn.qkv": QKV},
        layer="encoder.layers.",
        tensors=_siglip_tensors,
        always_prefixed=True,
    ),
)
_NAFLEX = replace(
    _SIGLIP,
    backbone="Siglip2VisionModel",
    settings=_naflex_settings,
    processor="Siglip2ImageProcessor",
    published={"resample": 2},
    position_resize="bilinear_antialiased",
    written=None,
)
_AIMV2 = replace(
    _CLIP,
    backbone="Aimv2VisionModel",
    settings=_aimv2_settings,
    encoder=AIMV2_ENCODER,
    block=AIMV2_BLOCK,
    stacked=AIMV2_STACKED,
)
CLIP_TYPES = {
    "clip_vision_model": _CLIP,
    "clip": replace(
        _CLIP, backbone="CLIPModel", classifier="CLIPForImageClassification", section=VISION
    ),
    "siglip_vision_model": _SIGLIP,
    "siglip": replace(
        _SIGLIP, backbone="SiglipModel", classifier="SiglipForImageClassification", section=VISION
    ),
    "siglip2_vision_model": _NAFLEX,
    "siglip2": replace(
        _NAFLEX,
        backbone="Siglip2Model",
        classifier="Siglip2ForImageClassification",
        section=VISION,
    ),
    "aimv2_vision_model": _AIMV2,
    "aimv2": replace(_AIMV2, backbone="Aimv2Model", section=VISION),
}
