"""ViT, DeiT, ViT-MAE, ViT-MSN, I-JEPA and DINOv2 of transformers.

Files have the classic names (`encoder.layer.0.intermediate.dense`), which transformers writes by
default, or the names that version 5 uses in memory (`layers.0.mlp.fc1`). We read both and write the
classic names.
"""

from dataclasses import replace
from functools import partial

import torch

from vitcli.vit.config import ViTConfig
from vitcli.vit.position import sincos2d
from vitcli.weights.huggingface.huggingface_type import (
    ATTENTION,
    CROPPED,
    HEADS,
    IMAGENET,
    MASKED_TRAINING,
    QKV,
    STACKED,
    HuggingFaceType,
    ModelFiles,
    Settings,
    WrittenType,
    described_act,
    described_sizes,
    encoder_settings,
)

# Theirs -> ours, without the prefix, outside the blocks.
ENCODER = {
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "pooler.dense": "pre_logits.fc",
}
# Ours -> theirs within a block, in classic names.
VIT_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
DINO_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}
SWIGLU_BLOCK = {**DINO_BLOCK, "mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"}
# Theirs -> ours within a block, classic and new names.
BLOCK = {theirs: ours for t in (VIT_BLOCK, DINO_BLOCK, SWIGLU_BLOCK) for ours, theirs in t.items()}
BLOCK |= {**ATTENTION, "mlp.down_proj": "mlp.fc2"}
UNUSED = {r"embeddings\.mask_token|decoder\..*": MASKED_TRAINING}


def _plain_settings(files: ModelFiles, *, norm_eps: float = 1e-12) -> Settings:
    """The settings of ViT, DeiT, ViT-MAE and ViT-MSN."""
    values = encoder_settings(files, norm_eps=norm_eps)
    if "head_dist.weight" in files.tensors:
        values |= {"pool": "distilled", "distillation_head": True}
    values["distillation_token"] = "dist_token" in files.tensors
    if files.described.get("pooler_act", "tanh") != "tanh" or "head.weight" in files.tensors:
        for name in ("pre_logits.fc.weight", "pre_logits.fc.bias"):
            files.drop(name, "belongs to a pooler that no head reads")
    pooler = files.tensors.get("pre_logits.fc.weight")
    values["representation_size"] = pooler.shape[0] if pooler is not None else None
    return values | _positions(files, values)


def _ijepa_settings(files: ModelFiles) -> Settings:
    """The settings of I-JEPA, which has no class token; its head reads the mean of the patches."""
    for name in ("pre_logits.fc.weight", "pre_logits.fc.bias"):
        files.drop(name, "belongs to a pooler that reads the first patch")
    return encoder_settings(files) | {"class_token": False, "pool": "mean"}


def _dinov2_settings(files: ModelFiles, patch_size: int = 14, registers: int = 0) -> Settings:
    """The settings of DINOv2; `registers` is their number if config.json does not have it."""
    values = encoder_settings(files, patch_size=patch_size, norm_eps=1e-6)
    ratio, width = files.described.get("mlp_ratio", 4), values["embed_dim"]
    if not 0 < ratio <= 1000:
        raise ValueError(f"`mlp_ratio` is {ratio}")
    gated = files.flag("use_swiglu_ffn", default=False)
    values |= {
        "mlp": "swiglu" if gated else "gelu",
        "mlp_dim": swiglu_width(width, ratio) if gated else int(width * ratio),
        "layer_scale": float(files.described.get("layerscale_value", 1.0)),
        "num_registers": files.count("num_register_tokens", registers),
    }
    if "head.weight" in files.tensors:
        values["pool"] = "token_mean"
    files.drop_empty_registers()
    return values | _positions(files, values)


def _positions(files: ModelFiles, values: Settings) -> Settings:
    """Return the fields of ViTConfig about positions; change the tensors to match.

    Hugging Face's table has rows for the class token and DeiT's distillation token, never for
    registers. Rows of zeros add nothing, so such a table does not cover these tokens. In a model
    with registers the class token's row is added to the token, which gives the same sum.
    """
    tensors = files.tensors
    table, token = tensors.get("pos_embed"), tensors.get("cls_token")
    covered = 1 + values.get("distillation_token", False)
    (rows, cols), patch, width = values["image_size"], values["patch_size"], values["embed_dim"]
    grid = rows // patch, cols // patch
    if table is None or token is None or table.shape != (1, covered + grid[0] * grid[1], width):
        return {}  # the comparison of shapes reports it
    prefix, patches = table[:, :covered], table[:, covered:]
    zero = not prefix.any()
    fixed = width % 4 == 0 and width >= 8 and torch.equal(patches, sincos2d(grid, width))
    if values.get("num_registers"):
        if not zero:
            tensors["cls_token"] = token.float() + prefix.float()
            files.notes.append("added the class token's position to the class token itself")
        tensors["pos_embed"] = patches
        position = "sincos2d" if fixed else "learned"
        return {"position": position, "position_covers_prefix": False}
    if zero and fixed:
        return {"position": "sincos2d"}
    if zero and files.model_type != "vit_mae":
        tensors["pos_embed"] = patches
        return {"position_covers_prefix": False}
    return {}


def _described(config: ViTConfig) -> Settings:
    """The entries of config.json of ViT, DeiT and DINOv2."""
    values = {
        **described_sizes(config),
        "hidden_act": described_act(config),
        "hidden_dropout_prob": config.dropout_rate,
        "attention_probs_dropout_prob": 0.0,
        "qkv_bias": config.qkv_bias,
    }
    if config.representation_size:
        values |= {"pooler_output_size": config.representation_size, "pooler_act": "tanh"}
    return values


def _described_vit(config: ViTConfig) -> Settings:
    return {**_described(config), "intermediate_size": config.mlp_dim}


def _described_dinov2(config: ViTConfig) -> Settings:
    values = {
        **_described(config),
        "mlp_ratio": dino_mlp_ratio(config),
        "use_swiglu_ffn": config.mlp == "swiglu",
        "layerscale_value": config.layer_scale,
    }
    if config.num_registers:
        values["num_register_tokens"] = config.num_registers
    return values


def _written_dinov2(config: ViTConfig) -> dict[str, str | tuple[str, ...]]:
    block = SWIGLU_BLOCK if config.mlp == "swiglu" else DINO_BLOCK
    return {**block, "attn.qkv": QKV}


def swiglu_width(embed_dim: int, ratio: float) -> int:
    """Return the hidden width of DINOv2's SwiGLU: 2/3 of `ratio` widths, in steps of 8."""
    return (int(embed_dim * ratio * 2 / 3) + 7) // 8 * 8


def dino_mlp_ratio(config: ViTConfig) -> int | None:
    """Return the whole `mlp_ratio` from which DINOv2 derives this hidden width, None if none."""
    width, hidden = config.embed_dim, config.mlp_dim
    if config.mlp == "gelu":
        return None if hidden % width else hidden // width
    near = round(hidden * 1.5 / width)
    return next((r for r in (near, near - 1, near + 1) if swiglu_width(width, r) == hidden), None)


_WRITTEN = WrittenType(
    described=_described_vit, block=lambda config: {**VIT_BLOCK, "attn.qkv": QKV}
)
_VIT = HuggingFaceType(
    prefix="vit.",
    backbone="ViTModel",
    classifier="ViTForImageClassification",
    settings=_plain_settings,
    encoder=ENCODER,
    block=BLOCK,
    unused=UNUSED,
    processor="ViTImageProcessor",
    published={"resample": 2},
)
_DINOV2 = HuggingFaceType(
    prefix="dinov2.",
    backbone="Dinov2Model",
    classifier="Dinov2ForImageClassification",
    settings=_dinov2_settings,
    encoder=ENCODER,
    block=BLOCK,
    # `mlp.gate_proj` and `mlp.up_proj` are the new names of the SwiGLU.
    stacked={**STACKED, "mlp.fc1": (("mlp.gate_proj", "mlp.up_proj"),)},
    unused=UNUSED,
    processor="BitImageProcessor",
    published={"size": {"shortest_edge": 256}, **CROPPED, **IMAGENET},
    any_size=True,  # Meta's config.json has 518 px, its image processor 224 px
    written=WrittenType(
        described=_described_dinov2,
        block=_written_dinov2,
        # For masked training; the classes with registers report it as missing.
        empty=lambda token, _: {"embeddings.mask_token": torch.zeros_like(token[0])},
    ),
)
VIT_TYPES = {
    "vit": replace(_VIT, written=_WRITTEN),
    "deit": replace(
        _VIT,
        prefix="deit.",
        backbone="DeiTModel",
        classifier="DeiTForImageClassification",
        # Two heads, one for each of the two tokens; the logits are the mean of both.
        heads={**HEADS, "cls_classifier": "head", "distillation_classifier": "head_dist"},
        processor="DeiTImageProcessor",
        published={"size": 256, **CROPPED, **IMAGENET},
        written=_WRITTEN,
    ),
    "dinov2": _DINOV2,
    "dinov2_with_registers": replace(
        _DINOV2,
        prefix="dinov2_with_registers.",
        backbone="Dinov2WithRegistersModel",
        classifier="Dinov2WithRegistersForImageClassification",
        settings=partial(_dinov2_settings, patch_size=16, registers=4),
        # transformers antialiases positions only here, because the model was trained so.
        position_resize="bicubic",
    ),
    "vit_mae": replace(
        _VIT,
        backbone="ViTMAEModel",
        classifier=None,
        published={"resample": 2, **IMAGENET},
        decoder={
            "decoder.mask_token": "mask",
            "pos_embed": "positions",
            "embed": "entry",
            "norm": "norm",
            "pred": "exit",
        },
    ),
    "vit_msn": replace(
        _VIT,
        backbone="ViTMSNModel",
        classifier="ViTMSNForImageClassification",
        settings=partial(_plain_settings, norm_eps=1e-6),
        published={"resample": 2, **IMAGENET},
    ),
    "ijepa": replace(
        _VIT,
        prefix="ijepa.",
        backbone="IJepaModel",
        classifier="IJepaForImageClassification",
        settings=_ijepa_settings,
        published={"resample": 2, **IMAGENET},
    ),
}
