"""Multiply-adds per image of a training run, in each of its stages."""

from dataclasses import dataclass, replace

from vitcli.config.schema import Recipe
from vitcli.train.budget import SCALE, stage_fractions
from vitcli.train.compatibility import check_smaller_sizes
from vitcli.train.lora import training_passes
from vitcli.train.objectives.base import Objective
from vitcli.vit import Config, ResNetConfig
from vitcli.vit.macs import macs, macs_by_part


@dataclass(frozen=True)
class RunStage:
    """A part of a run in which image size and patch dropout do not change.

    Attributes:
        fraction: of the steps of the run.
        image_size: side in pixels after shrinking; None if the images are not shrunk.
        patch_drop_rate: share of the patches that the encoder does not see.
        macs: multiply-adds of a forward pass per image, with the heads of the objective.
        training_macs: of forward and backward pass per image, averaged over frozen layers.
        tokens: per image in the encoder; 0 for a ResNet.
    """

    fraction: float
    image_size: int | None
    patch_drop_rate: float
    macs: int
    training_macs: float
    tokens: int


def run_stages(recipe: Recipe, config: Config, objective: Objective) -> list[RunStage]:
    """The stages of a run of `recipe`; the trainable weights of `objective` decide the backward.

    Raises:
        VitcliError: the model does not accept a size in `train.smaller_sizes`.
    """
    check_smaller_sizes(recipe, config)
    stages = []
    for step, fraction in stage_fractions(recipe.train):
        side = recipe.train.side_at(step, SCALE)
        # An objective that hides patches replaces patch dropout; both together are refused.
        rate = objective.hidden_rate or recipe.train.patch_drop_at(step, SCALE)
        resized = config if side is None else replace(config, image_size=(side, side))
        forward = sum(macs_by_part(resized, rate).values()) if rate else macs(resized)
        forward += objective.extra_macs(resized)
        training = training_passes(objective.model) * forward + objective.teacher_macs()
        tokens = count_tokens(resized, rate)
        stages.append(RunStage(fraction, side, rate, forward, training, tokens))
    return stages


def count_tokens(config: Config, patch_drop_rate: float = 0.0) -> int:
    """Tokens per image in the encoder; 0 for a ResNet."""
    if isinstance(config, ResNetConfig):
        return 0
    patches = config.grid[0] * config.grid[1]
    return config.num_prefix_tokens + max(1, patches - round(patch_drop_rate * patches))
