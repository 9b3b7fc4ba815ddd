"""Write Hugging Face's folders: `config.json`, `model.safetensors`, `preprocessor_config.json`.

transformers loads them unchanged, for example with `transformers.pipeline("image-classification",
model=DIR)`. Reading them back gives the same model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitcli.vit import ViTConfig
from vitcli.weights.expressible import check_expressible
from vitcli.weights.huggingface.huggingface_names import (
    MODEL_TYPES,
    PROBLEM_TYPES,
    TEACHER,
    closest_type,
)
from vitcli.weights.huggingface.huggingface_type import GELUS, QKV
from vitcli.weights.huggingface.processor import write_processor
from vitcli.weights.huggingface.vit_types import (
    DINO_BLOCK,
    ENCODER,
    SWIGLU_BLOCK,
    VIT_BLOCK,
    dino_mlp_ratio,
)
from vitcli.weights.loaded import LoadedModel
from vitcli.weights.store import write_folder


def write_huggingface(model: LoadedModel, out: Path) -> list[str]:
    """Write `model` into the new folder `out`, completely or not at all.

    Returns:
        A line for each property that the folder does not store.

    Raises:
        VitcliError: transformers cannot express the model, or `out` is not empty or not writable.
    """
    notes = check_expressible(model, "huggingface")
    assert isinstance(model.config, ViTConfig)
    files = {"config.json": _config_json(model, model.config)}
    if model.preprocess is not None:
        files["preprocessor_config.json"] = write_processor(model.preprocess)
    write_folder(out, _named(model, model.config), files)
    return notes


def _config_json(model: LoadedModel, config: ViTConfig) -> dict[str, Any]:
    model_type = closest_type(config)
    rows, cols = config.image_size
    values: dict[str, Any] = {
        "architectures": [_class_name(config)],
        "model_type": model_type,
        "dtype": str(model.state_dict()["cls_token"].dtype).removeprefix("torch."),
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "hidden_act": next(name for name, gelu in GELUS.items() if gelu == config.gelu),
        "hidden_dropout_prob": config.dropout_rate,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": config.norm_eps,
        "image_size": rows if rows == cols else [rows, cols],
        "patch_size": config.patch_size,
        "num_channels": config.num_channels,
        "qkv_bias": config.qkv_bias,
    }
    if model_type.startswith("dinov2"):
        values["mlp_ratio"] = dino_mlp_ratio(config)
        values["use_swiglu_ffn"] = config.mlp == "swiglu"
        values["layerscale_value"] = config.layer_scale
    else:
        values["intermediate_size"] = config.mlp_dim
    if config.num_registers:
        values["num_register_tokens"] = config.num_registers
    if config.representation_size:
        values |= {"pooler_output_size": config.representation_size, "pooler_act": "tanh"}
    if config.num_classes:
        # transformers' own default names, which we read as "no names".
        labels = model.labels or tuple(f"LABEL_{i}" for i in range(config.num_classes))
        for problem_type, activation in PROBLEM_TYPES.items():
            if model.head_activation == activation:  # transformers' pipeline follows this key
                values["problem_type"] = problem_type
        values["id2label"] = {str(i): name for i, name in enumerate(labels)}
        values["label2id"] = {name: i for i, name in enumerate(labels)}
    return values


def _class_name(config: ViTConfig) -> str:
    family = MODEL_TYPES[closest_type(config)]
    if config.distillation_head:
        return TEACHER
    return family.classifier or family.backbone if config.num_classes else family.backbone


def _named(model: LoadedModel, config: ViTConfig) -> dict[str, Tensor]:
    """Return the tensors under the classic names of transformers."""
    model_type = closest_type(config)
    prefix = MODEL_TYPES[model_type].prefix if config.num_classes else ""
    head = "cls_classifier" if config.distillation_head else "classifier"
    outside = {ours: prefix + theirs for theirs, ours in ENCODER.items()}
    outside |= {"head": head, "head_dist": "distillation_classifier"}
    block = VIT_BLOCK
    dino = model_type.startswith("dinov2")
    if dino:
        block = SWIGLU_BLOCK if config.mlp == "swiglu" else DINO_BLOCK
    named: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "pos_embed":
            tensor = _with_prefix_rows(tensor, config)
        if not name.startswith("blocks."):
            named[_rename_module(name, outside)] = tensor
            continue
        _, i, inside = name.split(".", 2)
        layer = f"{prefix}encoder.layer.{i}."
        if inside.startswith("attn.qkv."):
            for theirs, part in zip(QKV, tensor.chunk(3), strict=True):
                named[f"{layer}{theirs}{inside.removeprefix('attn.qkv')}"] = part.clone()
        else:
            named[layer + _rename_module(inside, block)] = tensor
    if dino:  # for masked training; the classes with registers report it as missing
        token = named[f"{prefix}embeddings.cls_token"]
        named[f"{prefix}embeddings.mask_token"] = torch.zeros_like(token[0])
    return named


def _rename_module(name: str, names: Mapping[str, str]) -> str:
    """`norm1.weight` -> `layernorm_before.weight`; `cls_token` -> `embeddings.cls_token`."""
    if name in names:
        return names[name]
    module, _, last = name.rpartition(".")
    return f"{names[module]}.{last}"


def _with_prefix_rows(table: Tensor, config: ViTConfig) -> Tensor:
    """(1, [prefix+]N, D) -> (1, prefix+N, D): add zeros for tokens without a position.

    The prefix is the class token and DeiT's distillation token; registers never have a row.
    """
    if config.position_covers_prefix:
        return table
    rows = table.new_zeros(1, 1 + config.distillation_token, table.shape[2])
    return torch.cat([rows, table], dim=1)
