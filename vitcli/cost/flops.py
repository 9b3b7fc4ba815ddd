"""The operations of a run: of every image, in every stage, in every part of the model."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitcli.config.schema import Recipe
from vitcli.train.budget import SCALE, stage_fractions
from vitcli.train.lora import passes
from vitcli.train.objectives.mae import Mae
from vitcli.train.objectives.masked_patch import MaskedPatch
from vitcli.vit import ResNetConfig, ViTConfig
from vitcli.vit.macs import macs, parts

Config = ViTConfig | ResNetConfig


@dataclass(frozen=True)
class Stage:
    """A part of a run whose steps are all alike.

    Attributes:
        place: a step of it, of `SCALE` in the whole run.
        share: of the run's steps.
        side: that images are shrunk to, or None.
        macs: multiply-adds of an image's forward pass, what only the objective needs included.
        training_macs: of its forward and backward pass.
        tokens: that the encoder sees of an image; 0 for a ResNet.
    """

    place: int
    share: float
    side: int | None
    patch_drop_rate: float
    macs: int
    training_macs: float
    tokens: int


def stages_of(recipe: Recipe, config: Config, objective: nn.Module) -> list[Stage]:
    """The stages of a run of `recipe`: smaller sizes, patches left out.

    Args:
        objective: around the model, on any device; what learns of it decides the backward pass.
    """
    found = []
    for place, share in stage_fractions(recipe.train):
        side = recipe.train.side_at(place, SCALE)
        rate = recipe.train.patch_drop_at(place, SCALE)
        if isinstance(objective, Mae):  # its encoder sees what is not hidden
            rate = objective.mask_rate
        sized = config if side is None else replace(config, image_size=(side, side))
        forward = sum(parts(sized, rate).values()) if rate else macs(sized)
        forward += added_macs(objective, sized)
        model: Any = objective.model
        training = passes(model) * forward + taught_macs(objective)
        found.append(
            Stage(place, share, side, rate, forward, training, tokens_of_image(sized, rate))
        )
    return found


def tokens_of_image(config: Config, patch_drop_rate: float = 0.0) -> int:
    """Tokens that the blocks see of an image; 0 for a ResNet, which has none."""
    if isinstance(config, ResNetConfig):
        return 0
    n = config.grid[0] * config.grid[1]
    return config.num_prefix_tokens + max(1, n - round(patch_drop_rate * n))


def added_macs(objective: nn.Module, config: Config) -> int:
    """Multiply-adds of an image in what only the objective has: decoders, predictors."""
    if isinstance(config, ResNetConfig):
        return 0
    n = config.grid[0] * config.grid[1]
    if isinstance(objective, Mae):
        total = n + config.num_prefix_tokens
        visible = tokens_of_image(config, objective.mask_rate)
        calls: list[tuple[Any, tuple[int, ...]]] = [
            (objective.entry, (1, visible, config.embed_dim))
        ]
        calls += [(block, (1, total, objective.width)) for block in objective.decoder]
        calls += [(objective.exit, (1, n, objective.width))]
        return sum(_count(module, shape, config.grid) for module, shape in calls)
    if isinstance(objective, MaskedPatch):
        chosen = min(n, max(1, round(objective.mask_rate * n)))
        return _count(objective.predict, (chosen, config.embed_dim), config.grid)
    decoder = getattr(getattr(objective, "descriptors", objective), "decoder", None)
    return _count(decoder, (4, config.embed_dim), config.grid) if decoder is not None else 0


def taught_macs(objective: nn.Module) -> int:
    """Multiply-adds of an image in the forward pass of frozen teachers."""
    return sum(macs(teacher.config) for teacher in getattr(objective, "others", ()))


def _count(module: nn.Module, shape: tuple[int, ...], grid: tuple[int, int]) -> int:
    """Of one module, on the meta device."""
    counter = FlopCounterMode(display=False)
    empty = {name: torch.empty_like(p, device="meta") for name, p in module.named_parameters()}
    arguments: tuple[Any, ...] = (torch.empty(shape, device="meta"),)
    if not isinstance(module, nn.Linear):
        arguments += (grid,)
    with counter, torch.no_grad():
        torch.func.functional_call(module, empty, arguments)
    return int(counter.get_total_flops()) // 2
