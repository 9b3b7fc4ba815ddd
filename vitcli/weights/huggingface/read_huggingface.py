"""Read Hugging Face's folders: `config.json`, weights, `preprocessor_config.json`.

`MODEL_TYPES` lists what we read: backbones, classifiers, and the encoders of masked-image models.
Everything that differs between model types is in their entries.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitcli.errors import VitcliError
from vitcli.vit.config import ViTConfig
from vitcli.weights.huggingface.huggingface_names import MODEL_TYPES, NOT_READ, PROBLEM_TYPES
from vitcli.weights.huggingface.huggingface_type import HuggingFaceType, ModelFiles
from vitcli.weights.huggingface.processor import read_processor
from vitcli.weights.loaded import PixelDecoder
from vitcli.weights.overrides import Overrides
from vitcli.weights.store import Checkpoint, readable_values

LAYER = re.compile(r"(?:encoder\.|model\.)?layers?\.(\d+)\.(.+)")
REPAIR = "correct the file, or save the model again with `save_pretrained`"
SUPPORTED = f"use one of the model types {', '.join(f'`{t}`' for t in MODEL_TYPES)}"
# The patch projections of all types identify the layout.
PATCHES = tuple(
    {
        f"{theirs}.weight"
        for family in MODEL_TYPES.values()
        for theirs, ours in family.encoder.items()
        if ours == "patch_embed.proj"
    }
)


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
        hint = NOT_READ.get(model_type, SUPPORTED)
        raise VitcliError(f"`{source}` is an unsupported `{model_type}` model", hint=hint)
    family = MODEL_TYPES[model_type]
    renamed, dropped = _rename(tensors, family)
    if "patch_embed.proj.weight" not in renamed:  # the settings read its shape
        raise VitcliError(
            f"`{source}` does not fit a `{model_type}` model; missing: its patch projection",
            hint=REPAIR,
        )
    with readable_values("config.json", source, REPAIR):
        tower = described if family.section is None else described[family.section]
        files = ModelFiles(model_type, tower, renamed, source, overrides, dropped=dropped)
        config = ViTConfig(**family.settings(files))
        labels = overrides.labels or _labels(described, config.num_classes)
        decoder = _decoder(tensors, family, files, config)
    notes = files.notes
    with readable_values("preprocessor_config.json", source, REPAIR):
        preprocess = read_processor(config, model_type, processor, source, overrides, notes)
    return Checkpoint(
        config=config,
        tensors=files.tensors,
        layout="huggingface",
        labels=labels,
        preprocess=preprocess,
        head_trained=config.num_classes > 0,
        dropped=files.dropped,
        notes=notes,
        activation=PROBLEM_TYPES.get(described.get("problem_type"), "softmax"),
        position_resize=family.position_resize,
        decoder=decoder,
    )


def _rename(
    tensors: Mapping[str, Tensor], family: HuggingFaceType
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Rename to our names; return the tensors, and dropped names with the reasons."""
    renamed: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    stacks: dict[tuple[str, int], dict[int, str]] = {}
    for full, tensor in tensors.items():
        name = full.removeprefix(family.prefix)
        unused = (why for pattern, why in family.unused.items() if re.fullmatch(pattern, name))
        place = place_of(full, family)
        if place is None and (reason := next(unused, None)):
            dropped[full] = reason
        elif place is None:
            renamed[full] = tensor  # the comparison with the model's names reports it
        elif place[2] == 1:
            renamed[place[0]] = tensor
        else:
            stacks.setdefault((place[0], place[2]), {})[place[1]] = full
    for (ours, size), found in stacks.items():
        if len(found) == size:
            renamed[ours] = torch.cat([tensors[found[i]] for i in sorted(found)])  # (3 D, D) …
        elif ours.endswith("attn.qkv.bias") and sorted(found) == [0, 2]:  # keys without a bias
            for index, bias in ((0, "q_bias"), (2, "v_bias")):
                renamed[ours.replace("qkv.bias", bias)] = tensors[found[index]]
        else:  # an MLP without a gate, or a damaged file
            for full in found.values():
                renamed[_alone(full, family) or full] = tensors[full]
    return renamed, dropped


def _alone(full: str, family: HuggingFaceType) -> str | None:
    """Return our name of a tensor inside a block, outside of the stacks; None if it has none."""
    layer = LAYER.fullmatch(full.removeprefix(family.prefix))
    inner, end = _split(layer[2] if layer else "")
    ours = family.block.get(inner)
    return f"blocks.{layer[1]}.{ours}{end}" if layer and ours else None


def place_of(full: str, family: HuggingFaceType) -> tuple[str, int, int] | None:
    """Return (our name, index in our stack of tensors, size of the stack); None if unknown."""
    name = full.removeprefix(family.prefix)
    stem, end = _split(name)
    if _split(full)[0] in family.heads:
        return family.heads[stem] + end, 0, 1
    if stem in family.encoder:
        return family.encoder[stem] + end, 0, 1
    layer = LAYER.fullmatch(name)
    inner, _ = _split(layer[2] if layer else "")
    if layer is None or any(re.fullmatch(pattern, name) for pattern in family.unused):
        return None
    for ours, styles in family.stacked.items():
        for style in styles:
            if inner in style:
                return f"blocks.{layer[1]}.{ours}{end}", style.index(inner), len(style)
    alone = _alone(full, family)
    return None if alone is None else (alone, 0, 1)


def _split(name: str) -> tuple[str, str]:
    """`layernorm.weight` -> `layernorm`, `.weight`; a name with another end -> itself, ``."""
    module, _, last = name.rpartition(".")
    return (module, f".{last}") if last in ("weight", "bias") else (name, "")


def _decoder(
    tensors: Mapping[str, Tensor], family: HuggingFaceType, files: ModelFiles, config: ViTConfig
) -> PixelDecoder | None:
    """Return the decoder of a masked autoencoder; None if the file has none."""
    stored = {name: tensor for name, tensor in tensors.items() if name.startswith("decoder.")}
    if family.decoder is None or not stored:
        return None
    names = replace(family, prefix="decoder.decoder_", encoder=family.decoder, unused={})
    renamed, _ = _rename(stored, names)
    sizes: dict[str, Any] = {
        "embed_dim": files.count("decoder_hidden_size", 512),
        "depth": files.count("decoder_num_hidden_layers", 8),
        "num_heads": files.count("decoder_num_attention_heads", 16),
        "mlp_dim": files.count("decoder_intermediate_size", 2048),
    }
    shape = replace(config, **sizes, position="none", representation_size=None, num_classes=0)
    return PixelDecoder(shape, renamed, files.flag("norm_pix_loss", default=False))


def _labels(described: Mapping[str, Any], num_classes: int) -> tuple[str, ...] | None:
    """Return the names in `id2label`; None for the default names `LABEL_0`, `LABEL_1` …"""
    names = {int(i): str(name) for i, name in (described.get("id2label") or {}).items()}
    if sorted(names) != list(range(num_classes)) or not names:
        return None
    if all(name == f"LABEL_{i}" for i, name in names.items()):
        return None
    return tuple(names[i] for i in range(num_classes))
