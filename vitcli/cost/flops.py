"""The operations of a run: of every image, in every stage, in every part of the model."""

from dataclasses import dataclass, replace
from typing import Any

from vitcli.config.schema import Recipe
from vitcli.train.budget import SCALE, stage_fractions
from vitcli.train.lora import training_passes
from vitcli.train.objectives.base import Objective
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


def stages_of(recipe: Recipe, config: Config, objective: Objective) -> list[Stage]:
    """The stages of a run of `recipe`: smaller sizes, patches left out.

    Args:
        objective: around the model, on any device; what learns of it decides the backward pass.
    """
    found = []
    for place, share in stage_fractions(recipe.train):
        side = recipe.train.side_at(place, SCALE)
        rate = recipe.train.patch_drop_at(place, SCALE)
        if objective.hidden_rate:  # the encoder sees only what is not hidden
            rate = objective.hidden_rate
        sized = config if side is None else replace(config, image_size=(side, side))
        forward = sum(parts(sized, rate).values()) if rate else macs(sized)
        forward += objective.extra_macs(sized)
        model: Any = objective.model
        training = training_passes(model) * forward + objective.teacher_macs()
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
