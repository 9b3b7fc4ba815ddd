"""Reading Hugging Face's folders: `config.json`, weights, `preprocessor_config.json`.

Of transformers' models: ViT, DeiT, DINOv2 (with and without registers) and the encoder of ViT-MAE;
of each the backbone, the classifier, and the encoder of a masked-image model.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vitcli.errors import VitcliError
from vitcli.vit.config import Pool, ViTConfig
from vitcli.vit.position import sincos2d
from vitcli.weights.huggingface.huggingface_names import (
    BLOCK,
    FAMILIES,
    GELUS,
    HEADS,
    JOINED,
    STEM,
    Family,
    swiglu_width,
)
from vitcli.weights.huggingface.processor import pixels, read_processor
from vitcli.weights.overrides import Stated
from vitcli.weights.store import Checkpoint, readable_values

LAYER = re.compile(r"(?:encoder\.)?layers?\.(\d+)\.(.+?)(?:\.(weight|bias))?")
OUR_BLOCK = re.compile(r"blocks\.(\d+)\.")
PARTS = {  # theirs -> (ours, place in it)
    name: (ours, place)
    for ours, styles in JOINED.items()
    for parts in styles
    for place, name in enumerate(parts)
}
MEND = "mend it, or save the model anew with `save_pretrained`"
UNDERSTOOD = "of Hugging Face's models " + ", ".join(f"`{t}`" for t in FAMILIES) + " are"


def is_huggingface(names: Mapping[str, Any] | list[str]) -> bool:
    """Whether these tensor names are those of a Hugging Face ViT."""
    return any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in names)


def read_huggingface(
    tensors: Mapping[str, Tensor],
    source: str,
    described: Mapping[str, Any],
    processor: Mapping[str, Any] | None,
    stated: Stated,
) -> Checkpoint:
    """Tensors of a Hugging Face Vision Transformer -> a checkpoint.

    Args:
        tensors: names -> tensors, as in the file.
        source: how messages call the folder.
        described: its `config.json`.
        processor: its `preprocessor_config.json`, or None.
        stated: what the caller says; it goes before the files.

    Raises:
        VitcliError: another kind of model, with what is understood.
    """
    kind = str(described.get("model_type"))
    if kind not in FAMILIES:
        raise VitcliError(
            f"`{source}` is a `{kind}` model, which is not understood", hint=UNDERSTOOD
        )
    family = FAMILIES[kind]
    renamed, dropped = _rename(tensors, family)
    if described.get("pooler_act", "tanh") != "tanh" or "head.weight" in renamed:
        for name in [n for n in renamed if n.startswith("pre_logits.")]:
            del renamed[name]
            dropped[name] = "a pooler that no head reads"
    notes: list[str] = []
    with readable_values("config.json", source, MEND):
        values = _values(renamed, described, family, source, stated)
        config = ViTConfig(**{**values, **_positions(renamed, values, kind, notes)})
        labels = stated.labels or _labels(described, config.num_classes)
    with readable_values("preprocessor_config.json", source, MEND):
        preprocess = read_processor(config, kind, processor, source, stated, notes)
    return Checkpoint(
        config=config,
        tensors=renamed,
        layout="huggingface",
        labels=labels,
        preprocess=preprocess,
        head_trained=config.num_classes > 0,
        dropped=dropped,
        notes=notes,
        activation="sigmoid"
        if described.get("problem_type") == "multi_label_classification"
        else "softmax",
    )


def _rename(
    tensors: Mapping[str, Tensor], family: Family
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Theirs -> (ours -> tensor; dropped -> reason). What has no place with us keeps its name."""
    renamed: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    joined: dict[str, dict[int, str]] = {}
    for full, tensor in tensors.items():
        name = full.removeprefix(family.prefix)
        layer = LAYER.fullmatch(name)
        end = f".{layer[3]}" if layer and layer[3] else ""
        if full in HEADS:
            renamed[HEADS[full]] = tensor
        elif name == "embeddings.register_tokens" and not tensor.numel():
            dropped[full] = "holds no registers"
        elif name in STEM:
            renamed[STEM[name]] = tensor
        elif name == "embeddings.mask_token" or name.startswith("decoder."):
            dropped[full] = "belongs to the masked-image training"
        elif layer and layer[2] in PARTS:
            ours, place = PARTS[layer[2]]
            joined.setdefault(f"blocks.{layer[1]}.{ours}{end}", {})[place] = full
        elif layer and layer[2] in BLOCK:
            renamed[f"blocks.{layer[1]}.{BLOCK[layer[2]]}{end}"] = tensor
        else:
            renamed[full] = tensor  # no place for it: the comparison of names will say so
    for ours, parts in joined.items():
        if len(parts) == (3 if ".qkv." in ours else 2):
            renamed[ours] = torch.cat([tensors[parts[i]] for i in sorted(parts)])  # (3 D, D) …
        else:
            renamed |= {full: tensors[full] for full in parts.values()}
    return renamed, dropped


def _values(
    renamed: Mapping[str, Tensor],
    described: Mapping[str, Any],
    family: Family,
    source: str,
    stated: Stated,
) -> dict[str, Any]:
    """Fields of ViTConfig, but for the positions."""
    act = described.get("hidden_act", "gelu")
    if act not in GELUS and stated.gelu is None:
        raise VitcliError(
            f"`{source}` has the activation `{act}`, which is not understood",
            hint=f"understood are {', '.join(f'`{a}`' for a in GELUS)}",
        )
    patch = pixels(described.get("patch_size", family.patch_size), "patch_size")
    size = pixels(described.get("image_size", 224), "image_size")
    if patch[0] != patch[1]:
        raise VitcliError(
            f"`{source}` has patches of {patch[0]}x{patch[1]} pixels; ours are square",
            hint="give weights of another model",
        )
    head, pooler = renamed.get("head.weight"), renamed.get("pre_logits.fc.weight")
    depth = 1 + max((int(m[1]) for n in renamed if (m := OUR_BLOCK.match(n))), default=-1)
    channels = renamed["patch_embed.proj.weight"].shape[1]
    for key, usual, found in (("num_hidden_layers", 12, depth), ("num_channels", 3, channels)):
        if (said := _count(described, key, usual)) != found:
            raise ValueError(f"`{key}` is {said}, the weights have {found}")
    width = _count(described, "hidden_size", 768)
    mlp_dim = _count(described, "intermediate_size", 3072)
    swiglu = bool(family.dino and described.get("use_swiglu_ffn", False))
    if family.dino:
        ratio = described.get("mlp_ratio", 4)
        if not 0 < ratio <= 1000:
            raise ValueError(f"`mlp_ratio` is {ratio}")
        mlp_dim = swiglu_width(width, ratio) if swiglu else int(width * ratio)
    registers = _count(described, "num_register_tokens", 4) if "reg_token" in renamed else 0
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
        "num_heads": stated.num_heads or _count(described, "num_attention_heads", 12),
        "mlp_dim": mlp_dim,
        "num_classes": head.shape[0] if head is not None else 0,
        "pool": pool,
        "distillation_token": "dist_token" in renamed,
        "distillation_head": pool == "distilled",
        "num_registers": registers,
        "representation_size": pooler.shape[0] if pooler is not None else None,
        "qkv_bias": bool(described.get("qkv_bias", True)),
        "layer_scale": float(described.get("layerscale_value", 1.0)) if family.dino else None,
        "mlp": "swiglu" if swiglu else "gelu",
        "gelu": stated.gelu or GELUS[act],
        "norm_eps": stated.norm_eps or _share(described, "layer_norm_eps", family.norm_eps),
        "dropout_rate": _share(described, "hidden_dropout_prob", 0.0),
    }


def _count(described: Mapping[str, Any], key: str, usual: int) -> int:
    value = int(described.get(key, usual))
    if not 0 <= value <= 10**6:  # beyond any model; torch takes sizes of 64 bits only
        raise ValueError(f"`{key}` is {value}")
    return value


def _share(described: Mapping[str, Any], key: str, usual: float) -> float:
    value = float(described.get(key, usual))
    if not 0 <= value < 1:
        raise ValueError(f"`{key}` is {value}")
    return value


def _positions(
    renamed: dict[str, Tensor], values: Mapping[str, Any], kind: str, notes: list[str]
) -> dict[str, Any]:
    """What the table says of itself -> fields of ViTConfig; `renamed` is brought into that form.

    Theirs always has rows for the class token (and DeiT's distillation token), never for
    registers. Rows of zeros add nothing: such a table does not cover these tokens. Beside
    registers the class token's row moves into the token, which is the same sum.
    """
    table, token = renamed.get("pos_embed"), renamed.get("cls_token")
    covered = 1 + values["distillation_token"]
    grid = (
        values["image_size"][0] // values["patch_size"],
        values["image_size"][1] // values["patch_size"],
    )
    width = values["embed_dim"]
    if table is None or token is None or table.shape != (1, covered + grid[0] * grid[1], width):
        return {}  # the comparison of shapes will say it
    rows, patches = table[:, :covered], table[:, covered:]
    zero = not rows.any()
    fixed = width % 4 == 0 and width >= 8 and torch.equal(patches, sincos2d(grid, width))
    if values["num_registers"]:
        if not zero:
            renamed["cls_token"] = token.float() + rows.float()
            notes.append("the class token's position is added to the class token itself")
        renamed["pos_embed"] = patches
        position = "sincos2d" if fixed else "learned"
        return {"position": position, "position_covers_prefix": False}
    if zero and fixed:
        return {"position": "sincos2d"}
    if zero and kind != "vit_mae":
        renamed["pos_embed"] = patches
        return {"position_covers_prefix": False}
    return {}


def _labels(described: Mapping[str, Any], num_classes: int) -> tuple[str, ...] | None:
    """The names in `id2label`; None where transformers has put in `LABEL_0`, `LABEL_1` …"""
    names = {int(i): str(name) for i, name in (described.get("id2label") or {}).items()}
    if sorted(names) != list(range(num_classes)) or not names:
        return None
    if all(name == f"LABEL_{i}" for i, name in names.items()):
        return None
    return tuple(names[i] for i in range(num_classes))
