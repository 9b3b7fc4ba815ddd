"""Hugging Face's ViT folders: `config.json`, `model.safetensors`, `preprocessor_config.json`.

`ViTForImageClassification`, `ViTModel` and the encoder of `ViTForMaskedImageModeling`, with the
names that transformers 5 holds in memory and the classic ones that it writes to disk.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vitcli.data.transforms import Interpolation, Preprocess
from vitcli.errors import VitcliError
from vitcli.vit.variants import Gelu, ViTConfig
from vitcli.weights.stated import Stated, as_size, per_channel, stated_preprocess
from vitcli.weights.store import Checkpoint

GELUS: dict[str, Gelu] = {
    "gelu": "exact",
    "gelu_python": "exact",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
}
INTERPOLATIONS: dict[int, Interpolation] = {  # by Pillow's numbers
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
}
STEM = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
    "pooler.dense.weight": "pre_logits.fc.weight",
    "pooler.dense.bias": "pre_logits.fc.bias",
    "classifier.weight": "head.weight",
    "classifier.bias": "head.bias",
}
BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
LAYER = re.compile(r"(?:encoder\.)?layers?\.(\d+)\.(.+)\.(weight|bias)")
QKV = re.compile(r"attention\.(?:attention\.)?(query|key|value|q_proj|k_proj|v_proj)")


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
    """Tensors of a Hugging Face ViT -> a checkpoint.

    Args:
        tensors: names -> tensors, as in the file.
        source: how messages call the folder.
        described: its `config.json`.
        processor: its `preprocessor_config.json`, or None.
        stated: what the caller says; it goes before the files.

    Raises:
        VitcliError: another kind of model, with what is understood.
    """
    kind = described.get("model_type")
    if kind != "vit":
        raise VitcliError(
            f"`{source}` is a `{kind}` model, which is not understood",
            hint="of Hugging Face's models `vit` is: ViTForImageClassification and ViTModel",
        )
    renamed, dropped = _rename(tensors)
    if described.get("pooler_act", "tanh") != "tanh" or "head.weight" in renamed:
        for name in [n for n in renamed if n.startswith("pre_logits.")]:
            del renamed[name]
            dropped[name] = "a pooler that no head reads"
    notes: list[str] = []
    config = _config(renamed, described, source, stated)
    preprocess = _preprocess(config, processor, source, stated, notes)
    labels = stated.labels or _labels(described, config.num_classes)
    return Checkpoint(
        config,
        renamed,
        "huggingface",
        labels,
        preprocess,
        config.num_classes > 0,
        None,
        dropped,
        notes,
    )


def _rename(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    renamed: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        name = full.removeprefix("vit.")
        if name in STEM:
            renamed[STEM[name]] = tensor
        elif name == "embeddings.mask_token" or name.startswith("decoder."):
            dropped[full] = "belongs to the masked-image training"
        elif (layer := LAYER.fullmatch(name)) and (qkv := QKV.fullmatch(layer[2])):
            parts.setdefault(f"blocks.{layer[1]}.attn.qkv.{layer[3]}", {})[qkv[1][0]] = tensor
        elif layer and layer[2] in BLOCK:
            renamed[f"blocks.{layer[1]}.{BLOCK[layer[2]]}.{layer[3]}"] = tensor
        else:
            renamed[full] = tensor  # no place for it: the comparison of names will say so
    for name, three in parts.items():
        if set(three) == set("qkv"):
            renamed[name] = torch.cat([three["q"], three["k"], three["v"]])  # (3 D, D)
    return renamed, dropped


def _config(
    renamed: Mapping[str, Tensor], described: Mapping[str, Any], source: str, stated: Stated
) -> ViTConfig:
    act = described.get("hidden_act", "gelu")
    if act not in GELUS and stated.gelu is None:
        raise VitcliError(
            f"`{source}` has the activation `{act}`, which is not understood",
            hint=f"understood are {', '.join(f'`{a}`' for a in GELUS)}",
        )
    head = renamed.get("head.weight")
    pooler = renamed.get("pre_logits.fc.weight")
    patch = described.get("patch_size", 16)
    size = as_size(described.get("image_size", 224))
    assert size is not None
    try:
        return ViTConfig(
            image_size=size,
            patch_size=int(patch if isinstance(patch, int) else patch[0]),
            num_channels=int(described.get("num_channels", 3)),
            embed_dim=int(described.get("hidden_size", 768)),
            depth=int(described.get("num_hidden_layers", 12)),
            num_heads=stated.num_heads or int(described.get("num_attention_heads", 12)),
            mlp_dim=int(described.get("intermediate_size", 3072)),
            num_classes=head.shape[0] if head is not None else 0,
            representation_size=pooler.shape[0] if pooler is not None else None,
            qkv_bias=bool(described.get("qkv_bias", True)),
            gelu=stated.gelu or GELUS[act],  # type: ignore[arg-type]  # checked by Stated
            norm_eps=stated.norm_eps or float(described.get("layer_norm_eps", 1e-12)),
        )
    except (TypeError, ValueError) as error:
        raise VitcliError(
            f"the config.json of `{source}` does not fit together: {error}",
            hint="mend it, or save the model anew with `save_pretrained`",
        ) from error


def _preprocess(
    config: ViTConfig,
    processor: Mapping[str, Any] | None,
    source: str,
    stated: Stated,
    notes: list[str],
) -> Preprocess | None:
    channels = config.num_channels
    if processor is None:
        processor = {}
        if not {"mean", "std"} <= set(stated.preprocess):
            notes.append(
                "no preprocessor_config.json: mean and std 0.5, squashed bilinearly to the image "
                "size, as the ViT processor of transformers does by default"
            )
    interpolation = INTERPOLATIONS.get(processor.get("resample", 2))
    if interpolation is None:
        raise VitcliError(
            f"`{source}` resizes with a filter that is not understood: {processor['resample']}",
            hint="`resample` is 0 (nearest), 1 (lanczos), 2 (bilinear) or 3 (bicubic)",
        )
    mean = per_channel(processor.get("image_mean", 0.5), channels, "image_mean")
    std = per_channel(processor.get("image_std", 0.5), channels, "image_std")
    if not processor.get("do_normalize", True):
        mean, std = (0.0,) * channels, (1.0,) * channels
    # Ours divides by 255 first; another factor is a change of mean and std.
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    if abs(factor * 255 - 1) > 1e-6:
        mean = tuple(m / (255 * factor) for m in mean)
        std = tuple(s / (255 * factor) for s in std)
    base = Preprocess(
        **_geometry(config, processor),
        interpolation=interpolation,
        mean=mean,
        std=std,
        num_channels=channels,
    )
    return stated_preprocess(base, stated.preprocess, config.image_size, channels)


def _geometry(config: ViTConfig, processor: Mapping[str, Any]) -> dict[str, Any]:
    """How the processor comes to the image size: squashed to it, or shorter side and crop."""
    size = processor.get("size", config.image_size[0])
    sides = size if isinstance(size, Mapping) else {"height": size, "width": size}
    edge = sides.get("shortest_edge")
    height = int(edge if edge is not None else sides.get("height", config.image_size[0]))
    mode = "crop" if edge is not None else "squash"
    # A resize without a crop after it leads to the size of the model, whatever it says.
    cropped = bool(processor.get("do_center_crop")) or edge is not None
    return {
        "image_size": config.image_size,
        "resize_mode": mode,
        "resize_size": height if cropped and (height,) * 2 != config.image_size else None,
    }


def _labels(described: Mapping[str, Any], num_classes: int) -> tuple[str, ...] | None:
    """The names in `id2label`; None where transformers has put in `LABEL_0`, `LABEL_1` …"""
    names = {int(i): str(name) for i, name in (described.get("id2label") or {}).items()}
    if sorted(names) != list(range(num_classes)) or not names:
        return None
    if all(name == f"LABEL_{i}" for i, name in names.items()):
        return None
    return tuple(names[i] for i in range(num_classes))
