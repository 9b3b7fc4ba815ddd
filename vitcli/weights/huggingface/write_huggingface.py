"""Writing Hugging Face's folders: `config.json`, `model.safetensors`, `preprocessor_config.json`.

transformers loads them as they are, `transformers.pipeline("image-classification", model=DIR)`
included; reading them back gives the same model.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vitcli.errors import VitcliError
from vitcli.files import replacing
from vitcli.vit import ViTConfig
from vitcli.weights.huggingface.huggingface_names import (
    FAMILIES,
    GELU_WRITTEN,
    QKV,
    STEM,
    TEACHER,
    Family,
    block_names,
    swiglu_width,
)
from vitcli.weights.huggingface.processor import write_processor
from vitcli.weights.loaded import LoadedModel

# What each class of transformers can say: setting -> the values that it has. What is not named
# here (sizes, epsilon, GELU, biases of query, key and value) every class takes as it is.
ALWAYS: dict[str, Collection[Any]] = {
    "class_token": (True,),
    "pool_blocks": (1,),
    "position": ("learned", "sincos2d"),
    "position_at": ("stem",),
    "qk_norm": (False,),
    "norm_before_blocks": (False,),
    "norm_after_pool": (False,),
    "patch_bias": (True,),
    "axial": (False,),
    "stem": (None,),
}
PLAIN: dict[str, Collection[Any]] = {**ALWAYS, "layer_scale": (None,), "mlp": ("gelu",)}
EXPRESSED: dict[str, dict[str, Collection[Any]]] = {
    "vit": {**PLAIN, "pool": ("token",)},
    "deit": {**PLAIN, "pool": ("token", "distilled")},
    "dinov2": {**ALWAYS, "representation_size": (None,)},
    "dinov2_with_registers": {
        **ALWAYS,
        "representation_size": (None,),
        "position_covers_prefix": (False,),
    },
}


def write_huggingface(model: LoadedModel, out: Path) -> list[str]:
    """Write `model` into the new folder `out`, whole or not at all.

    Returns:
        What the folder cannot say, one line each.

    Raises:
        VitcliError: transformers has no class for such a model; `out` is not empty, or cannot be
            written.
    """
    if not isinstance(model.config, ViTConfig):
        raise VitcliError(
            "a ResNet is no Vision Transformer, which Hugging Face's layout here is for",
            hint="`--to timm` or `--to onnx`",
        )
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise VitcliError(f"`{out}` is there already", hint="another `--out`, or remove it first")
    config = model.config
    kind = _model_type(config)
    _refuse(config, kind)
    notes: list[str] = []
    described = _described(model, config, kind, notes)
    processor = None
    if model.preprocess is not None:
        processor = write_processor(model.preprocess)
        if processor.get("crop_rounding") == "even":
            notes.append(
                "transformers rounds an odd margin of the crop down, this model to even: some "
                "pictures are cut one pixel apart (not with `--set preprocess.crop_rounding=down`)"
            )
        if not model.preprocess.antialias:
            notes.append("transformers smooths pictures that it shrinks, this model does not")
    else:
        notes.append("no preprocessing is known, so none is written: `pipeline` will miss it")
    tensors = {n: t.detach().cpu().contiguous() for n, t in _named(model, config, kind).items()}
    with replacing(out) as temporary:
        temporary.mkdir()
        try:
            save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, in safetensors' own words
            raise OSError(str(error)) from error
        _write_json(temporary / "config.json", described)
        if processor is not None:
            _write_json(temporary / "preprocessor_config.json", processor)
    return notes


def _model_type(config: ViTConfig) -> str:
    """The type that comes closest."""
    if config.distillation_token:
        return "deit"
    if config.num_registers:
        return "dinov2_with_registers"
    dino = config.layer_scale is not None or config.mlp == "swiglu" or config.pool == "token_mean"
    return "dinov2" if dino else "vit"


def _refuse(config: ViTConfig, kind: str) -> None:
    """Raises a VitcliError that names every setting which the type `kind` cannot express."""
    wrong = [
        f"`model.{key}` = {_said(getattr(config, key))}"
        for key, values in EXPRESSED[kind].items()
        if getattr(config, key) not in values
    ]
    if FAMILIES[kind].dino:
        wrong += _refused_by_dino(config)
    else:
        if config.num_registers:
            wrong.append(f"`model.num_registers` = {config.num_registers}")
        if config.num_classes and config.representation_size:
            wrong.append(
                f"`model.representation_size` = {config.representation_size} before a head"
            )
        if config.pool == "distilled" and not config.distillation_head:
            wrong.append("`model.pool` = `distilled` without two heads")
    if wrong:
        raise VitcliError(
            f"Hugging Face's `{kind}` cannot express {', '.join(wrong)}",
            hint="`--to onnx` takes every model, `--to timm` most of them",
        )


def _refused_by_dino(config: ViTConfig) -> list[str]:
    wrong = []
    if config.layer_scale is None:
        wrong.append("`model.layer_scale` = none")
    if config.pool != (pool := "token_mean" if config.num_classes else "token"):
        head = "with" if config.num_classes else "without"
        wrong.append(f"`model.pool` = `{config.pool}` {head} a head, only `{pool}`")
    if _mlp_ratio(config) is None:
        wrong.append(f"`model.mlp_dim` = {config.mlp_dim} with {config.mlp} at this width")
    if config.image_size[0] != config.image_size[1]:  # it resamples these as if they were square
        wrong.append(f"`model.image_size` = {list(config.image_size)}, no square")
    return wrong


def _said(value: Any) -> str:
    return f"`{value}`" if isinstance(value, str) else str(value).lower()


def _mlp_ratio(config: ViTConfig) -> int | None:
    """The whole number from which DINOv2 gets to this hidden width; None: there is none."""
    width, hidden = config.embed_dim, config.mlp_dim
    if config.mlp == "gelu":
        return None if hidden % width else hidden // width
    near = round(hidden * 1.5 / width)
    return next((r for r in (near, near - 1, near + 1) if swiglu_width(width, r) == hidden), None)


def _described(
    model: LoadedModel, config: ViTConfig, kind: str, notes: list[str]
) -> dict[str, Any]:
    """The content of `config.json`; what it cannot say is added to `notes`."""
    family = FAMILIES[kind]
    rows, cols = config.image_size
    values: dict[str, Any] = {
        "architectures": [_class(config, family)],
        "model_type": kind,
        "dtype": str(next(model.network.parameters()).dtype).removeprefix("torch."),
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "hidden_act": GELU_WRITTEN[config.gelu],
        "hidden_dropout_prob": config.dropout_rate,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": config.norm_eps,
        "image_size": rows if rows == cols else [rows, cols],
        "patch_size": config.patch_size,
        "num_channels": config.num_channels,
        "qkv_bias": config.qkv_bias,
    }
    if family.dino:
        values["mlp_ratio"] = _mlp_ratio(config)
        values["use_swiglu_ffn"] = config.mlp == "swiglu"
        values["layerscale_value"] = config.layer_scale
    else:
        values["intermediate_size"] = config.mlp_dim
    if config.num_registers:
        values["num_register_tokens"] = config.num_registers
    if config.representation_size:
        values |= {"pooler_output_size": config.representation_size, "pooler_act": "tanh"}
    if config.num_classes:
        values |= _classes(model, notes)
    elif not family.dino and not config.representation_size:
        notes.append(
            f"transformers gives a `{family.backbone}` a random pooler unless it is loaded with "
            "`add_pooling_layer=False`"
        )
    bare = not config.position_covers_prefix and not config.num_registers
    if config.position == "sincos2d" and bare:
        notes.append("the fixed positions come back with a row of zeros for the class token")
    if config.drop_path_rate:
        notes.append("`drop_path_rate`, which only training uses, has no place in the folder")
    if config.num_channels == 1:
        notes.append("`pipeline` opens pictures in colour: hand this model grey arrays instead")
    return values


def _class(config: ViTConfig, family: Family) -> str:
    if config.distillation_head:
        return TEACHER
    return family.classifier or family.backbone if config.num_classes else family.backbone


def _classes(model: LoadedModel, notes: list[str]) -> dict[str, Any]:
    labels = model.labels
    if labels is None:  # what transformers puts in itself, and what we read as no names
        labels = tuple(f"LABEL_{i}" for i in range(model.config.num_classes))
        notes.append("no class names are known: transformers will say `LABEL_0`, `LABEL_1` …")
    if not model.head_trained:
        notes.append("the head is not trained, which the folder cannot say")
    sigmoid = {"problem_type": "multi_label_classification"}  # what its pipeline goes by
    return {
        **(sigmoid if model.head_activation == "sigmoid" else {}),
        "id2label": {str(i): name for i, name in enumerate(labels)},
        "label2id": {name: i for i, name in enumerate(labels)},
    }


def _named(model: LoadedModel, config: ViTConfig, kind: str) -> dict[str, Tensor]:
    """The tensors under the classic names of transformers."""
    family = FAMILIES[kind]
    prefix = family.prefix if config.num_classes else ""
    state = model.state_dict()
    state["pos_embed"] = _with_prefix_rows(state["pos_embed"], config)
    named: dict[str, Tensor] = {}
    for theirs, ours in STEM.items():
        if ours in state:
            named[prefix + theirs] = state.pop(ours)
    for part in ("weight", "bias") if config.num_classes else ():
        head = "cls_classifier" if config.distillation_head else "classifier"
        named[f"{head}.{part}"] = state.pop(f"head.{part}")
        if config.distillation_head:
            named[f"distillation_classifier.{part}"] = state.pop(f"head_dist.{part}")
    if family.dino:  # for masked training; the classes with registers miss it when it is not there
        token = named[f"{prefix}embeddings.cls_token"]
        named[f"{prefix}embeddings.mask_token"] = torch.zeros_like(token[0])
    names = block_names(dino=family.dino, swiglu=config.mlp == "swiglu")
    for i in range(config.depth):
        _move_block(state, named, i, f"{prefix}encoder.layer.{i}", names)
    assert not state, f"tensors without a name in {kind}: {', '.join(state)}"
    return named


def _move_block(
    state: dict[str, Tensor], named: dict[str, Tensor], i: int, layer: str, names: Mapping[str, str]
) -> None:
    """Block `i` from `state` under our names to `named` under theirs."""
    start = f"blocks.{i}."
    for full in [n for n in state if n.startswith(start)]:
        name, tensor = full.removeprefix(start), state.pop(full)
        part, _, end = name.rpartition(".")
        if part == "attn.qkv":
            for theirs, one in zip(QKV, tensor.chunk(3), strict=True):
                named[f"{layer}.{theirs}.{end}"] = one.clone()
        elif name in names:
            named[f"{layer}.{names[name]}"] = tensor
        else:
            named[f"{layer}.{names[part]}.{end}"] = tensor


def _with_prefix_rows(table: Tensor, config: ViTConfig) -> Tensor:
    """(1, [prefix+]N, D) -> (1, prefix+N, D): zeros for tokens that have no position.

    The prefix is the class token and DeiT's distillation token; registers never have a row.
    """
    if config.position_covers_prefix:
        return table
    rows = table.new_zeros(1, 1 + config.distillation_token, table.shape[2])
    return torch.cat([rows, table], dim=1)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
