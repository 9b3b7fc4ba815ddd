"""Read Hugging Face's folders: `config.json`, weights, `preprocessor_config.json`.

We read ViT, DeiT, DINOv2 (with and without registers) and the encoder of ViT-MAE: backbones,
classifiers, and the encoders of masked-image models.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vitcli.config.choices import Pool
from vitcli.errors import VitcliError
from vitcli.vit.config import ViTConfig
from vitcli.vit.position import sincos2d
from vitcli.weights.huggingface.huggingface_names import (
    BLOCK,
    ENCODER,
    GELUS,
    HEADS,
    MODEL_TYPES,
    PROBLEM_TYPES,
    STACKED,
    HuggingFaceType,
    swiglu_width,
)
from vitcli.weights.huggingface.processor import read_processor, read_size
from vitcli.weights.overrides import Overrides
from vitcli.weights.store import Checkpoint, readable_values

LAYER = re.compile(r"(?:encoder\.)?layers?\.(\d+)\.(.+)")
OUR_BLOCK = re.compile(r"blocks\.(\d+)\.")
PARTS = {  # theirs -> (ours, index in the stack)
    name: (ours, index)
    for ours, styles in STACKED.items()
    for parts in styles
    for index, name in enumerate(parts)
}
REPAIR = "correct the file, or save the model again with `save_pretrained`"
SUPPORTED = f"use one of the model types {', '.join(f'`{t}`' for t in MODEL_TYPES)}"


def is_huggingface(names: Mapping[str, Any] | list[str]) -> bool:
    """Return True for the tensor names of a Hugging Face ViT."""
    return any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in names)


def read_huggingface(
    tensors: Mapping[str, Tensor],
    source: str,
    described: Mapping[str, Any],
    processor: Mapping[str, Any] | None,
    overrides: Overrides,
) -> Checkpoint:
    """Convert the tensors of a Hugging Face Vision Transformer to a checkpoint.

    Args:
        tensors: names -> tensors, as in the file.
        source: the name of the folder in messages.
        described: its `config.json`.
        processor: its `preprocessor_config.json`, or None.
        overrides: the caller's settings, which override the files.

    Raises:
        VitcliError: the model type is not supported, or the files contradict each other.
    """
    model_type = str(described.get("model_type"))
    if model_type not in MODEL_TYPES:
        raise VitcliError(f"`{source}` is an unsupported `{model_type}` model", hint=SUPPORTED)
    family = MODEL_TYPES[model_type]
    renamed, dropped = _rename(tensors, family)
    if described.get("pooler_act", "tanh") != "tanh" or "head.weight" in renamed:
        for name in [n for n in renamed if n.startswith("pre_logits.")]:
            del renamed[name]
            dropped[name] = "belongs to a pooler that no head reads"
    notes: list[str] = []
    with readable_values("config.json", source, REPAIR):
        values = _config_values(renamed, described, family, source, overrides)
        config = ViTConfig(**{**values, **_positions(renamed, values, model_type, notes)})
        labels = overrides.labels or _labels(described, config.num_classes)
    with readable_values("preprocessor_config.json", source, REPAIR):
        preprocess = read_processor(config, model_type, processor, source, overrides, notes)
    problem_type = described.get("problem_type")
    return Checkpoint(
        config=config,
        tensors=renamed,
        layout="huggingface",
        labels=labels,
        preprocess=preprocess,
        head_trained=config.num_classes > 0,
        dropped=dropped,
        notes=notes,
        activation=PROBLEM_TYPES.get(problem_type, "softmax"),
        # transformers antialiases positions only in DINOv2 with registers, which was trained so.
        position_resize="bicubic" if config.num_registers else "bicubic_plain",
    )


def _rename(
    tensors: Mapping[str, Tensor], family: HuggingFaceType
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Rename to our names; return the tensors, and dropped names with the reasons."""
    renamed: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    stacks: dict[str, dict[int, str]] = {}
    for full, tensor in tensors.items():
        name = full.removeprefix(family.prefix)
        layer = LAYER.fullmatch(name)
        inside = layer[2] if layer else ""
        stem, end = _split(name)
        inner, _ = _split(inside)
        if _split(full)[0] in HEADS:
            renamed[HEADS[stem] + end] = tensor
        elif name == "embeddings.register_tokens" and not tensor.numel():
            dropped[full] = "holds no registers"
        elif stem in ENCODER:
            renamed[ENCODER[stem] + end] = tensor
        elif name == "embeddings.mask_token" or name.startswith("decoder."):
            dropped[full] = "used only by masked-image training"
        elif layer and inner in PARTS:
            ours, index = PARTS[inner]
            stacks.setdefault(f"blocks.{layer[1]}.{ours}{end}", {})[index] = full
        elif layer and inner in BLOCK:
            renamed[f"blocks.{layer[1]}.{BLOCK[inner]}{end}"] = tensor
        else:
            renamed[full] = tensor  # the comparison with the model's names reports it
    for ours, parts in stacks.items():
        if len(parts) == (3 if ".qkv." in ours else 2):
            renamed[ours] = torch.cat([tensors[parts[i]] for i in sorted(parts)])  # (3 D, D) …
        else:
            renamed |= {full: tensors[full] for full in parts.values()}
    return renamed, dropped


def _split(name: str) -> tuple[str, str]:
    """`layernorm.weight` -> `layernorm`, `.weight`; a name with another end -> itself, ``."""
    module, _, last = name.rpartition(".")
    return (module, f".{last}") if last in ("weight", "bias") else (name, "")


def _config_values(
    renamed: Mapping[str, Tensor],
    described: Mapping[str, Any],
    family: HuggingFaceType,
    source: str,
    overrides: Overrides,
) -> dict[str, Any]:
    """Return the fields of ViTConfig, without those about positions."""
    act = described.get("hidden_act", "gelu")
    if act not in GELUS and overrides.gelu is None:
        raise VitcliError(
            f"`{source}` has the unsupported activation `{act}`",
            hint=f"supported: {', '.join(f'`{a}`' for a in GELUS)}",
        )
    patch = read_size(described.get("patch_size", family.patch_size), "patch_size")
    size = read_size(described.get("image_size", 224), "image_size")
    if patch[0] != patch[1]:
        raise VitcliError(
            f"`{source}` has patches of {patch[0]}x{patch[1]} pixels, which are not square",
            hint="use a model with square patches",
        )
    head, pooler = renamed.get("head.weight"), renamed.get("pre_logits.fc.weight")
    depth = 1 + max((int(m[1]) for n in renamed if (m := OUR_BLOCK.match(n))), default=-1)
    channels = renamed["patch_embed.proj.weight"].shape[1]
    for key, default, found in (("num_hidden_layers", 12, depth), ("num_channels", 3, channels)):
        if (value := _count(described, key, default)) != found:
            raise ValueError(f"`{key}` is {value}, the weights have {found}")
    width = _count(described, "hidden_size", 768)
    mlp_dim = _count(described, "intermediate_size", 3072)
    swiglu = bool(family.dino and described.get("use_swiglu_ffn", False))
    if family.dino:
        ratio = described.get("mlp_ratio", 4)
        if not 0 < ratio <= 1000:
            raise ValueError(f"`mlp_ratio` is {ratio}")
        mlp_dim = swiglu_width(width, ratio) if swiglu else int(width * ratio)
    pool: Pool = "token"
    if "head_dist.weight" in renamed:
        pool = "distilled"
    elif family.dino and head is not None:
        pool = "token_mean"
    return {
        "image_size": size,
        "patch_size": patch[0],
        "num_channels": channels,
        "embed_dim": width,
        "depth": depth,
        "num_heads": overrides.num_heads or _count(described, "num_attention_heads", 12),
        "mlp_dim": mlp_dim,
        "num_classes": head.shape[0] if head is not None else 0,
        "pool": pool,
        "distillation_token": "dist_token" in renamed,
        "distillation_head": pool == "distilled",
        "num_registers": (
            _count(described, "num_register_tokens", 4) if "reg_token" in renamed else 0
        ),
        "representation_size": pooler.shape[0] if pooler is not None else None,
        "qkv_bias": bool(described.get("qkv_bias", True)),
        "layer_scale": float(described.get("layerscale_value", 1.0)) if family.dino else None,
        "mlp": "swiglu" if swiglu else "gelu",
        "gelu": overrides.gelu or GELUS[act],
        "norm_eps": overrides.norm_eps or _fraction(described, "layer_norm_eps", family.norm_eps),
        "dropout_rate": _fraction(described, "hidden_dropout_prob", 0.0),
    }


def _count(described: Mapping[str, Any], key: str, default: int) -> int:
    value = int(described.get(key, default))
    if not 0 <= value <= 10**6:  # larger than any model; torch counts bytes with 64 bits
        raise ValueError(f"`{key}` is {value}")
    return value


def _fraction(described: Mapping[str, Any], key: str, default: float) -> float:
    value = float(described.get(key, default))
    if not 0 <= value < 1:
        raise ValueError(f"`{key}` is {value}")
    return value


def _positions(
    renamed: dict[str, Tensor], values: Mapping[str, Any], model_type: str, notes: list[str]
) -> dict[str, Any]:
    """Return the fields of ViTConfig about positions; change the tensors in `renamed` to match.

    Hugging Face's table has rows for the class token and DeiT's distillation token, never for
    registers. Rows of zeros add nothing, so such a table does not cover these tokens. In a model
    with registers the class token's row is added to the token, which gives the same sum.
    """
    table, token = renamed.get("pos_embed"), renamed.get("cls_token")
    covered = 1 + values["distillation_token"]
    (rows, cols), patch, width = values["image_size"], values["patch_size"], values["embed_dim"]
    grid = rows // patch, cols // patch
    if table is None or token is None or table.shape != (1, covered + grid[0] * grid[1], width):
        return {}  # the comparison of shapes reports it
    prefix, patches = table[:, :covered], table[:, covered:]
    zero = not prefix.any()
    fixed = width % 4 == 0 and width >= 8 and torch.equal(patches, sincos2d(grid, width))
    if values["num_registers"]:
        if not zero:
            renamed["cls_token"] = token.float() + prefix.float()
            notes.append("added the class token's position to the class token itself")
        renamed["pos_embed"] = patches
        position = "sincos2d" if fixed else "learned"
        return {"position": position, "position_covers_prefix": False}
    if zero and fixed:
        return {"position": "sincos2d"}
    if zero and model_type != "vit_mae":
        renamed["pos_embed"] = patches
        return {"position_covers_prefix": False}
    return {}


def _labels(described: Mapping[str, Any], num_classes: int) -> tuple[str, ...] | None:
    """Return the names in `id2label`; None for the default names `LABEL_0`, `LABEL_1` …"""
    names = {int(i): str(name) for i, name in (described.get("id2label") or {}).items()}
    if sorted(names) != list(range(num_classes)) or not names:
        return None
    if all(name == f"LABEL_{i}" for i, name in names.items()):
        return None
    return tuple(names[i] for i in range(num_classes))
