"""A run to plan, and its exact numbers: parameters, multiply-adds, tokens, memory."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from vitcli.config.schema import Recipe
from vitcli.cost.flops import RunStage, run_stages
from vitcli.cost.memory import (
    ForwardMemory,
    StepMemory,
    StepShape,
    evaluation_memory,
    step_memory,
)
from vitcli.data.augment.mixing import mixes_pairs
from vitcli.data.augment.transform import resolve_augment
from vitcli.data.prefetch import PREFETCH_BATCHES
from vitcli.data.source import Source
from vitcli.devices import pick_device
from vitcli.train.build import count_classes, held_out_images
from vitcli.train.lora import ADAPTER, freeze_and_adapt
from vitcli.train.objectives import build_objective
from vitcli.train.objectives.base import Objective
from vitcli.train.validate import eval_batch_size
from vitcli.vit import Config, from_config
from vitcli.vit.macs import macs, macs_by_part
from vitcli.weights.loaded import LoadedModel


@dataclass(frozen=True)
class PlannedRun:
    """A run to plan.

    Attributes:
        model: with or without weights; the plan reads its shape, labels and preprocessing.
        images: number of training images.
    """

    recipe: Recipe
    source: Source
    model: LoadedModel
    images: int
    processes: int = 1
    precision: str = "fp32"

    @property
    def config(self) -> Config:
        """The shape of the model."""
        return self.model.config

    @property
    def batch_per_process(self) -> int:
        """Images per optimizer step in one process."""
        return self.recipe.train.batch_size // self.processes

    @property
    def micro_batch(self) -> int:
        """Images per forward pass in one process."""
        batch = self.batch_per_process
        return min(self.recipe.train.micro_batch_size or batch, batch)

    def build_objective(self) -> Objective:
        """The objective around a model without weights on the meta device.

        Raises:
            VitcliError: it does not suit the model or the data.
        """
        recipe = self.recipe
        with torch.device("meta"):
            empty = from_config(self.config)
            freeze_and_adapt(empty, recipe.lora, recipe.train.freeze, recipe.train.seed)
        counts = count_classes(recipe.objective, self.source)
        model = replace(self.model, network=empty, class_counts=counts)
        # The initial bias would be written into the head, which has no memory here.
        section = recipe.objective.model_copy(update={"head_bias": None})
        return build_objective(model, section, recipe.train.seed, self.source.multi_label)

    def step_memory(
        self,
        stages: list[RunStage],
        checkpointing: bool,
        micro_batch: int | None = None,
        **shape: Any,
    ) -> StepMemory:
        """The memory of a step in the stage with the largest model input."""
        recipe, config = self.recipe, self.config
        soft_labels = self.source.multi_label or mixes_pairs(resolve_augment(recipe.augment))
        largest = max(stages, key=lambda stage: stage.macs)
        micro_batch = micro_batch or self.micro_batch
        settings: dict[str, Any] = {
            "size": (config.num_channels, *config.image_size),
            "batch": max(micro_batch, self.batch_per_process),
            "micro_batch": micro_batch,
            "precision": self.precision,
            "side": largest.image_size,
            "classes": config.num_classes if soft_labels else 0,
            "patch_drop_rate": largest.patch_drop_rate if recipe.train.patch_drop_rate else 0.0,
            "checkpointing": checkpointing,
        }
        return step_memory(self.build_objective, recipe, StepShape(**settings | shape))

    def evaluation_memory(self) -> ForwardMemory:
        """The memory of a pass over the larger held-out split, on top of what a step leaves."""
        images, config = max(held_out_images(self.source)), self.config
        if not images or not config.num_classes:
            return ForwardMemory()
        images = -(-images // self.processes)
        with torch.device("meta"):
            model = from_config(config)
        size = (config.num_channels, *config.image_size)
        at_once = eval_batch_size(pick_device())
        batch = min(at_once, images)
        found = evaluation_memory(model, size, batch, self.precision)
        # Decoded as uint8 while the model computes.
        waiting = min(images - batch, PREFETCH_BATCHES * at_once)
        return found.with_batches(waiting * math.prod(size))


@dataclass(frozen=True)
class RunCounts:
    """The exact numbers of a run, which need no measurement.

    Attributes:
        parameters: of the model, without adapters.
        trained: parameters that are trained, with the heads of the objective.
        parts: multiply-adds of a forward pass per image, by part of the model.
        macs: their sum.
        steps: None if the recipe has only a time budget.
        memory: of a step as the recipe has it.
        other: of a step with activation checkpointing switched the other way.
        evaluation: of a pass over the held-out split, without the weights.
    """

    parameters: int
    trained: int
    parts: dict[str, int]
    macs: int
    stages: tuple[RunStage, ...]
    steps: int | None
    memory: StepMemory
    other: StepMemory
    evaluation: ForwardMemory

    @property
    def training_macs(self) -> float:
        """Multiply-adds per image of forward and backward pass, averaged over the run."""
        return sum(stage.fraction * stage.training_macs for stage in self.stages)

    @property
    def tokens(self) -> float:
        """Tokens per image, averaged over the run."""
        return sum(stage.fraction * stage.tokens for stage in self.stages)


def count_run(planned: PlannedRun) -> RunCounts:
    """Parameters, multiply-adds, tokens and memory of a run.

    Raises:
        VitcliError: the objective does not suit the model or the data.
    """
    objective = planned.build_objective()
    config, train = planned.config, planned.recipe.train
    stages = run_stages(planned.recipe, config, objective)
    named = objective.model.named_parameters()
    return RunCounts(
        parameters=sum(p.numel() for name, p in named if not name.endswith(ADAPTER)),
        trained=sum(p.numel() for p in objective.parameters() if p.requires_grad),
        parts=macs_by_part(config),
        macs=macs(config),
        stages=tuple(stages),
        steps=train.total_steps(planned.images),
        memory=planned.step_memory(stages, train.activation_checkpointing),
        other=planned.step_memory(stages, not train.activation_checkpointing),
        evaluation=planned.evaluation_memory(),
    )
