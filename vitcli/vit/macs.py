"""Multiply-adds of a model, counted by operation on a model without memory."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from vitcli.vit import ResNetConfig, VisionTransformer, ViTConfig, from_config

BACKWARD = 3  # forward and backward: the gradients cost twice the forward pass
# A module's name, without its number -> the part of the model that it counts for.
PARTS = {
    "patch_embed": "embedding",
    "attn": "attention",
    "mlp": "mlp",
    "attn_pool": "pooling",
    "pre_logits": "head",
    "projection": "head",
    "head": "head",
    "head_dist": "head",
}


def macs(config: ViTConfig | ResNetConfig) -> int:
    """Multiply-adds of matrix products and convolutions in one image's forward pass."""
    return sum(macs_by_part(config).values())


@cache
def _counted(config: ViTConfig | ResNetConfig, patch_drop_rate: float = 0.0) -> Mapping[str, int]:
    # A ResNet, also that of a hybrid, is run whole: two passes over it take longer than one.
    if isinstance(config, ResNetConfig) or config.stem or config.depth < config.pool_blocks + 2:
        return _run_and_count(config, patch_drop_rate)
    least = config.pool_blocks  # all blocks of a ViT cost the same
    one, two = (
        _run_and_count(replace(config, depth=depth), patch_drop_rate)
        for depth in (least, least + 1)
    )
    return {part: one[part] + (config.depth - least) * (two[part] - one[part]) for part in two}


def _run_and_count(config: ViTConfig | ResNetConfig, patch_drop_rate: float) -> Mapping[str, int]:
    with torch.device("meta"):
        # FlopCounterMode hooks gradients, which fails on a view of a parameter such as MAP's query.
        model = from_config(config).requires_grad_(False)
        images = torch.empty(1, config.num_channels, *config.image_size)
        if isinstance(model, VisionTransformer):
            model.patch_drop_rate = patch_drop_rate
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model.train(patch_drop_rate > 0.0)(images)
    found: dict[str, int] = {}
    counts = counter.get_flop_counts()
    whole = type(model).__name__
    total = sum(counts["Global"].values())
    for name, by_operation in counts.items():
        path = name.split(".")
        if path[0] != whole or len(path) < 2:
            continue
        part = PARTS.get(path[-1])
        inside = {PARTS.get(step) for step in path[1:-1]} - {None}
        if part is not None and not inside:
            found[part] = found.get(part, 0) + sum(by_operation.values()) // 2
    if rest := total // 2 - sum(found.values()):
        found["stages" if isinstance(config, ResNetConfig) else "rest"] = rest
    return found


def macs_by_part(config: ViTConfig | ResNetConfig, patch_drop_rate: float = 0.0) -> dict[str, int]:
    """Multiply-adds of one image's forward pass by part of the model.

    Of a ViT `embedding`, `attention` (projections and the products with keys and values), `mlp`,
    `pooling`, `head`; of a ResNet `stages` and `head`. Normalisations, activations and softmax are
    not counted: the paper's exaFLOPs leave them out too. Of the ViTs of its table 6, five of six
    runs are within 0.3 % of this count; B/32 is 2.0 % below it, of which rounding to 55 explains
    0.9 %. ResNets are 3.0 to 4.0 % below it, and hybrids up to 1.5 %: the paper's count leaves out
    products with zeros beyond the border, which a GPU or CPU computes. Without them all are within
    1 %.

    Args:
        patch_drop_rate: share of the patches that training leaves out after the embedding.
    """
    return dict(_counted(config, patch_drop_rate))


def training_flops(config: ViTConfig | ResNetConfig, images: float) -> float:
    """Floating-point operations of training on so many images: two a multiply-add, three passes.

    Table 6 of the paper counts so: B/16 on 7 epochs of JFT-300M comes to 224 exaFLOPs there.
    """
    return 2.0 * BACKWARD * macs(config) * images
