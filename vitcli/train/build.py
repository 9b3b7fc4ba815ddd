"""What a training run is put together from: data, objective, optimizers, loader, loop.

What comes before the first step, whatever the steps are for: device, data, model, objective.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitcli.config.schema import Recipe
from vitcli.data.augment.mixing import mixes_pairs
from vitcli.data.augment.policies import changes_pixels
from vitcli.data.augment.transform import TrainTransform, resolve_augment
from vitcli.data.batch import check_batch
from vitcli.data.loader import TrainLoader
from vitcli.data.source import Source, open_data
from vitcli.data.streaming import StreamSet
from vitcli.devices import Precision, join_processes, pick_device, resolve_precision
from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.progress import Logged, Watcher
from vitcli.run import Run
from vitcli.train.checkpoint import TrainState
from vitcli.train.ema import Ema
from vitcli.train.fsdp import check_sharding, share_out
from vitcli.train.loop import Loop, Validate
from vitcli.train.lora import choose_learning
from vitcli.train.objectives.mae import check_droppable
from vitcli.train.objectives.registry import build_objective, is_supervised, settled
from vitcli.train.optimizers.registry import build_optimizers, unused
from vitcli.train.validate import Outcome, measure
from vitcli.vit import ResNet
from vitcli.weights.loaded import LoadedModel


def open_source(recipe: Recipe, watch: Watcher) -> Source:
    """The data of a recipe, with a note for each thing that was decided about it."""
    section = recipe.data
    source = open_data(section, watch=watch, streams=True)
    for note in source.notes:
        watch.note(note)
    if "train" not in source.splits:
        raise VitcliError(
            f"`{section.name}` has no training images, only {', '.join(source.splits)}",
            "`vitcli evaluate` takes such a set",
        )
    return source


def make_loop(
    recipe: Recipe,
    model: LoadedModel,
    objective: Any,
    source: Source,
    run: Run,
    accelerator: Any,
    watch: Logged,
) -> Loop:
    """Everything that trains, put together; its timeline is not settled yet."""
    preprocess = model.preprocess
    assert preprocess is not None
    model.network.checkpoint_activations = recipe.train.activation_checkpointing
    if recipe.train.fully_shard:
        share_out(objective.to(accelerator.device))
    optimizers = build_optimizers(objective, recipe.optim)
    if recipe.train.compile:
        # In place, so that names stay. Sizes are few: those of `smaller_sizes`, and a last part's.
        objective.compile(dynamic=False)
    if recipe.train.fully_shard:  # only its precision is Accelerate's then
        module = accelerator.prepare_model(objective, evaluation_mode=True)
        optimizers = [accelerator.prepare(optimizer) for optimizer in optimizers]
    else:
        module, *optimizers = accelerator.prepare(objective, *optimizers)
    inner = [getattr(o, "optimizer", o) for o in optimizers]
    objective = accelerator.unwrap_model(module)
    decay = recipe.train.ema_decay
    state = TrainState(
        objective, inner, Ema(objective, decay) if decay else None, accelerator.scaler
    )
    loader = make_loader(recipe, source, preprocess, objective.views, accelerator)
    held_out = held_out_split(source)
    validate: Validate | None = None
    outcomes: list[Outcome] = []
    if held_out is not None and model.config.num_classes > 0:
        test = source.splits[held_out]
        validate = partial(
            measure, model, test, accelerator, watch, loader.broken, outcomes=outcomes
        )
    return Loop(
        module=module,
        state=state,
        optimizers=optimizers,
        loader=loader,
        preprocess=preprocess,
        recipe=recipe,
        run=run,
        accelerator=accelerator,
        watch=watch,
        validate=validate,
        outcomes=outcomes,
    )


def make_loader(
    recipe: Recipe, source: Source, preprocess: Preprocess, views: int, accelerator: Any
) -> TrainLoader:
    """What makes the batches of this process."""
    transform = TrainTransform(preprocess, recipe.augment)
    return TrainLoader(
        source.splits["train"],
        transform,
        batch_size=recipe.train.batch_size,
        seed=recipe.train.seed,
        views=views,
        workers=recipe.data.workers,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        strict=recipe.data.strict,
        repeats=recipe.augment.repeats,
        augment=transform.settings,
        pin_memory=accelerator.device.type == "cuda",
    )


def check_augment(recipe: Recipe, images: Any, processes: int) -> None:
    """Whether `[augment]` can be done with this data, objective and batch.

    Raises:
        VitcliError: the set draws whole batches, which augmentation cannot change; without labels
            there is nothing to mix; or a micro-batch or a process would part a pair.
    """
    settings = resolve_augment(recipe.augment)
    mixes = mixes_pairs(settings)
    if hasattr(images, "batch") and (changes_pixels(settings) or settings.repeats > 1):
        raise VitcliError(
            f"`{recipe.data.name}` draws its images with their variations, and `[augment]` changes "
            "none of them",
            "leave out `augment.preset`, `policy`, colours, `erase_rate` and `repeats`",
        )
    if isinstance(images, StreamSet) and settings.repeats > 1:
        raise VitcliError("a stream shows each image once at a time", "leave out `augment.repeats`")
    if mixes and not is_supervised(recipe.objective.name):
        raise VitcliError(
            f"objective `{recipe.objective.name}` has no labels that mixup or cutmix could mix",
            "`--set augment.mix_rate=0.0` leaves images as they are",
        )
    micro = recipe.train.micro_batch_size
    if mixes and micro is not None and micro % 2:
        raise VitcliError(
            f"`train.micro_batch_size` = {micro} would part the pairs that mixup or cutmix mixes",
            f"`--set train.micro_batch_size={micro + 1}`",
        )
    check_batch(recipe.train.batch_size, processes, settings.repeats, mixes)


def held_out_images(source: Source) -> int:
    """How many images a pass over the held-out split looks at."""
    name = held_out_split(source)
    return len(source.splits[name]) if name else 0


def held_out_split(source: Source) -> str | None:
    """The split that figures come from: `validation`, else `test`, else none."""
    return next((name for name in ("validation", "test") if name in source.splits), None)


def check_patch_drop(recipe: Recipe, model: LoadedModel) -> None:
    """Whether patches of this model can be left out, where the recipe asks for it.

    Raises:
        VitcliError: a ResNet, an objective that hides patches by itself, or blocks and poolings
            that need every patch at its place.
    """
    if not recipe.train.patch_drop_rate:
        return
    if isinstance(model.network, ResNet):
        raise VitcliError(
            "a ResNet has no patches to leave out", "`--set train.patch_drop_rate=0.0`"
        )
    if recipe.objective.name in ("masked_patch", "mae"):
        raise VitcliError(
            f"objective `{recipe.objective.name}` chooses itself which patches are seen",
            "`--set train.patch_drop_rate=0.0`, and `objective.mask_rate` for another share",
        )
    check_droppable(model.network.config, "`train.patch_drop_rate`")
    if model.network.config.pool == "quadrants":
        raise VitcliError(
            "`train.patch_drop_rate` leaves patches out, and pool `quadrants` needs them all",
            "`--set model.pool=mean`",
        )


MakeModel = Callable[[Source], LoadedModel]


@dataclass(frozen=True)
class Parts:
    """What a loop is made of.

    Attributes:
        model: `objective` holds its network.
    """

    source: Source
    model: LoadedModel
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

    resolve_augment(recipe.augment)  # an unknown name is an error before the data are opened
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
    for note in choose_learning(model.network, recipe.lora, recipe.train.freeze, recipe.train.seed):
        watch.note(note)
    check_patch_drop(recipe, model)
    objective = build_objective(model, recipe.objective, recipe.train.seed, source.multi_label)
    return Parts(source, model, objective)
