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
from vitcli.weights.huggingface.huggingface_type import WrittenType
from vitcli.weights.huggingface.processor import write_processor
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
    values: dict[str, Any] = {
        "architectures": [_class_name(config)],
        "model_type": model_type,
        "dtype": str(model.state_dict()["patch_embed.proj.weight"].dtype).removeprefix("torch."),
        **_written(model_type).described(config),
    }
    if config.num_classes:
        # transformers' own default names, which we read as "no names".
        labels = model.labels or tuple(f"LABEL_{i}" for i in range(config.num_classes))
        for problem_type, activation in PROBLEM_TYPES.items():
            if model.head_activation == activation:  # transformers' pipeline follows this key
                values["problem_type"] = problem_type
        values["id2label"] = {str(i): name for i, name in enumerate(labels)}
        values["label2id"] = {name: i for i, name in enumerate(labels)}
    return values


def _written(model_type: str) -> WrittenType:
    written = MODEL_TYPES[model_type].written
    assert written is not None, model_type  # `closest_type` returns types that we write
    return written


def _class_name(config: ViTConfig) -> str:
    family = MODEL_TYPES[closest_type(config)]
    if config.distillation_head:
        return TEACHER
    return family.classifier or family.backbone if config.num_classes else family.backbone


def _named(model: LoadedModel, config: ViTConfig) -> dict[str, Tensor]:
    """Return the tensors under the classic names of transformers."""
    family = MODEL_TYPES[closest_type(config)]
    written = _written(closest_type(config))
    prefix = family.prefix if config.num_classes or written.always_prefixed else ""
    head = "cls_classifier" if config.distillation_head else "classifier"
    outside = {ours: prefix + theirs for theirs, ours in family.encoder.items()}
    outside |= {"head": head, "head_dist": "distillation_classifier"}
    block = written.block(config)
    query, _, value = tuple(block["attn.qkv"])
    named: dict[str, Tensor] = {}
    tensors = model.state_dict()
    if "pos_embed" in tensors:
        tensors["pos_embed"] = _with_prefix_rows(tensors["pos_embed"], config)
    for name, tensor in written.tensors(tensors).items():
        if name == "projection.weight":
            continue  # without a head nothing reads it
        if not name.startswith("blocks."):
            named[_rename_module(name, outside)] = tensor
            continue
        _, i, inside = name.split(".", 2)
        layer = f"{prefix}{written.layer}{i}."
        module, _, last = inside.rpartition(".")
        theirs = block.get(inside) or block.get(module, "")
        if last in ("q_bias", "v_bias"):
            named[f"{layer}{query if last == 'q_bias' else value}.bias"] = tensor
        elif isinstance(theirs, tuple):
            for part, chunk in zip(theirs, tensor.chunk(len(theirs)), strict=True):
                named[f"{layer}{part}.{last}"] = chunk.clone()
        else:
            named[layer + theirs + ("" if inside in block else f".{last}")] = tensor
    token = tensors.get("cls_token")
    empty = {} if token is None else written.empty(token, config)
    return named | {prefix + n: t for n, t in empty.items()}


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
    if config.position_covers_prefix or not config.class_token:
        return table
    rows = table.new_zeros(1, 1 + config.distillation_token, table.shape[2])
    return torch.cat([rows, table], dim=1)
