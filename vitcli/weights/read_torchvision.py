"""Read the ViTs of torchvision: `vit_b_16`, `vit_b_32`, `vit_l_16`, `vit_l_32`, `vit_h_14`.

The tensors are those of timm's ViT under other names. Source: torchvision 0.24,
models/vision_transformer.py.
"""

import math
from dataclasses import replace
from typing import Any

from vitcli.errors import VitcliError, quoted
from vitcli.weights.find_network import FoundNetwork
from vitcli.weights.overrides import Overrides
from vitcli.weights.store import Checkpoint
from vitcli.weights.timm.read_timm import read_timm
from vitcli.weights.timm.timm_config import IMAGENET
from vitcli.weights.timm.timm_names import CHECK_FILE, KNOWN, timm_name

BLOCK = r"encoder\.layers\.encoder_layer_(\d+)\."
NAMES = {  # theirs -> ours
    r"conv_proj\.": "patch_embed.proj.",
    "class_token": "cls_token",
    r"encoder\.pos_embedding": "pos_embed",
    r"encoder\.ln\.": "norm.",
    r"heads\.pre_logits\.": "pre_logits.fc.",
    r"heads\.head\.": "head.",
    rf"{BLOCK}ln_([12])\.": r"blocks.\1.norm\2.",
    rf"{BLOCK}self_attention\.in_proj_": r"blocks.\1.attn.qkv.",
    rf"{BLOCK}self_attention\.out_proj\.": r"blocks.\1.attn.proj.",
    rf"{BLOCK}mlp\.(?:0|linear_1)\.": r"blocks.\1.mlp.fc1.",  # linear_1 in the first releases
    rf"{BLOCK}mlp\.(?:3|linear_2)\.": r"blocks.\1.mlp.fc2.",
}


def read_torchvision(network: FoundNetwork, source: str, overrides: Overrides) -> Checkpoint:
    """Convert a network in torchvision's layout to a checkpoint; raises as `read_timm` does."""
    renamed = {timm_name(name, NAMES): tensor for name, tensor in network.tensors.items()}
    if foreign := [name for name in network.tensors if not KNOWN.fullmatch(timm_name(name, NAMES))]:
        raise VitcliError(
            f"`{source}` does not fit a Vision Transformer of torchvision; not part of the model: "
            f"{quoted(foreign, 6)}",
            hint=CHECK_FILE,
        )
    patches, table = renamed["patch_embed.proj.weight"], renamed["pos_embed"]
    notes: list[str] = []
    if patches.ndim == 4 and table.ndim == 3 and patches.shape[1] == 3:
        side = math.isqrt(max(table.shape[1] - 1, 0)) * patches.shape[2]  # px
        swag = "swag" in source.lower()
        settings = evaluation_transform(side, patches.shape[0], patches.shape[2], swag=swag)
        if not set(settings) <= set(overrides.preprocess):
            notes.append(
                f"assumed torchvision's evaluation transform: resize to {settings['resize_size']} "
                f"px, {settings['interpolation']}, ImageNet's mean and std (change with "
                "`--set preprocess.…`)"
            )
        overrides = replace(overrides, preprocess={**settings, **overrides.preprocess})
    translated = replace(network, layout="timm", tensors=renamed)
    checkpoint = read_timm(translated, source, None, overrides)
    checkpoint.notes += notes
    checkpoint.layout, checkpoint.position_resize = "torchvision", "bicubic_aligned"
    return checkpoint


def evaluation_transform(side: int, width: int, patch_size: int, *, swag: bool) -> dict[str, Any]:
    """Settings of torchvision's `ImageClassification` for the weights with these sizes.

    `IMAGENET1K_V1` resizes to 256 px (`vit_l_16`: 242) and crops 224, bilinear. The weights of SWAG
    (in the file's name; all of ViT-H/14 and of more than 224 px) resize to the crop, bicubic.

    Args:
        side: of the image, in pixels.
        swag: True if the name of the file says it.
    """
    mean, std = IMAGENET
    if swag or width == 1280 or side in (384, 512, 518):
        return {"resize_size": side, "interpolation": "bicubic", "mean": mean, "std": std}
    shorter = 242 / 224 if (width, patch_size) == (1024, 16) else 256 / 224
    size = round(side * shorter)
    return {"resize_size": size, "interpolation": "bilinear", "mean": mean, "std": std}
