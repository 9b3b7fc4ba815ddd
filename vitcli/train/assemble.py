"""What comes before the first step, whatever the steps are for: device, data, model, objective."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitcli.config.schema import Recipe
from vitcli.data.image_set import Source
from vitcli.devices import Precision, join_processes, pick_device, resolve_precision
from vitcli.errors import VitcliError
from vitcli.progress import Watcher
from vitcli.train.lora import choose_learning
from vitcli.train.objectives import build_objective, settled
from vitcli.train.optim import unused
from vitcli.train.setup import check_augment, check_patch_drop, open_source
from vitcli.train.sharded import check_sharding
from vitcli.vit import Model

MakeModel = Callable[[Source], Model]


@dataclass(frozen=True)
class Parts:
    """What a loop is made of.

    Attributes:
        model: the one inside `objective`.
    """

    source: Source
    model: Model
    objective: nn.Module


def start_accelerator(
    recipe: Recipe,
    *,
    precision: Precision | None = None,
    track: str | None = None,
    folder: Path | None = None,
) -> tuple[Any, Precision]:
    """Accelerate's `Accelerator` for this process, and the precision that all have settled on.

    Args:
        precision: of a run that goes on; None goes by the recipe and, for `auto`, a measurement.
        track: a tracker, which writes into `folder`.

    Raises:
        VitcliError: the batch cannot be shared out among the processes, or the device has not what
            the recipe asks for.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import broadcast_object_list

    device = pick_device()
    precision = precision or resolve_precision(recipe.train.precision, device)
    join_processes(device)
    precision = broadcast_object_list([precision])[0]  # each has measured for itself
    # Accelerate keeps the precision of a process's first run for all later ones.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        cpu=device.type == "cpu",
        log_with=track,
        project_dir=str(folder) if folder else None,
    )
    torch.set_float32_matmul_precision("high" if recipe.train.tf32 else "highest")
    if recipe.train.batch_size % accelerator.num_processes:
        raise VitcliError(
            f"batch size {recipe.train.batch_size} is not a multiple of the "
            f"{accelerator.num_processes} processes",
            "`--batch-size` counts the images of all processes together",
        )
    check_sharding(recipe, accelerator.num_processes)
    return accelerator, precision


def build_parts(recipe: Recipe, make_model: MakeModel, processes: int, watch: Watcher) -> Parts:
    """The data, and the model and objective for it, with a note for each thing that was decided.

    Raises:
        VitcliError: bad input.
    """
    from accelerate.utils import set_seed

    source = open_source(recipe, watch)
    if recipe.data.streaming:
        watch.warn(
            f"a stream is mixed only within {recipe.data.shuffle_buffer:,} images, and cannot be "
            "entered in its middle: `--resume` keeps the weights but begins another order"
        )
    for note in settled(recipe.objective, source.multi_label)[1]:
        watch.note(note)
    for note in unused(recipe.optim, recipe.schedule):
        watch.note(note)
    check_augment(recipe, source.splits["train"], processes)
    set_seed(recipe.train.seed)
    model = make_model(source)
    for note in choose_learning(model, recipe.lora, recipe.train.freeze, recipe.train.seed):
        watch.note(note)
    check_patch_drop(recipe, model)
    objective = build_objective(model, recipe.objective, recipe.train.seed, source.multi_label)
    return Parts(source, model, objective)
