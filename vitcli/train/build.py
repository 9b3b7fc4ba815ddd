"""From a recipe to everything that trains: data, model, objective, optimizers, loader, loop."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vitcli.config.schema import CUDA_GRAPHS, ObjectiveSection, Recipe, Section
from vitcli.data.augment.policies import POLICIES, PRESETS
from vitcli.data.augment.transform import CROPS, TrainTransform, resolve_augment
from vitcli.data.batch import check_batch
from vitcli.data.loader import TrainLoader
from vitcli.data.sample_range import with_window
from vitcli.data.source import Source, open_data
from vitcli.devices import (
    Precision,
    allow_tf32,
    check_compiler,
    join_processes,
    matrix_peak,
    pick_device,
    resolve_precision,
)
from vitcli.errors import VitcliError
from vitcli.evals.fewshot.methods import METHODS
from vitcli.preprocess import Preprocess
from vitcli.progress import Watcher
from vitcli.run import Run
from vitcli.train.best_weights import best_weights
from vitcli.train.checkpoint import TrainState
from vitcli.train.compatibility import (
    check_augment,
    check_channels,
    check_patch_drop,
    check_sampler,
    check_smaller_sizes,
)
from vitcli.train.ema import Ema
from vitcli.train.fsdp import check_sharding, shard_module
from vitcli.train.imbalance import imbalance_notes
from vitcli.train.loop import Loop
from vitcli.train.lora import freeze_and_adapt, training_passes
from vitcli.train.objectives import (
    AUTO,
    OBJECTIVES,
    build_objective,
    objective_class,
    resolve_objective,
)
from vitcli.train.objectives.base import Objective
from vitcli.train.objectives.regression import regression_notes
from vitcli.train.optimizers import OPTIMIZERS, JointOptimizer, build_optimizers, find_optimizer
from vitcli.train.recorder import Recorder
from vitcli.train.schedules import SCHEDULES, find_schedule
from vitcli.train.validate import Validation, metric_names, run_validation, with_fewshot
from vitcli.vit.macs import macs
from vitcli.weights.loaded import LoadedModel

MakeModel = Callable[[Source], LoadedModel]


def build_loop(
    recipe: Recipe,
    source: Source,
    make_model: MakeModel,
    run: Run,
    accelerator: Any,
    watch: Watcher,
    resumed: Run | None = None,
) -> Loop:
    """Build everything that trains. The caller decides how many steps the loop makes.

    The directory of `run` need not exist yet, so that wrong settings leave nothing behind. A run
    that is `resumed` keeps its window.

    Raises:
        VitcliError: settings that do not fit the data, the model or each other.
    """
    from accelerate.utils import set_seed

    # Cheap checks first: a wrong setting must not cost the time to load a model.
    check_augment(recipe, source.splits["train"], accelerator.num_processes)
    check_sampler(recipe, source.splits["train"])
    for note in [*unused_settings(recipe, source.multi_label), *imbalance_notes(recipe, source)]:
        watch.note(note)

    # Model, trainable weights, objective. Every random draw starts from the seed of the recipe.
    set_seed(recipe.train.seed)
    model, train = make_model(source), recipe.train
    assert model.preprocess is not None
    # A resume must not choose again: the window decides the pixels, and so the weights. The same
    # holds for the class sizes that weigh the loss.
    model.class_counts = count_classes(recipe.objective, source)
    if resumed is None or not (known := resumed.provenance()):
        model.preprocess = with_window(model.preprocess, source.splits["train"], watch)
    else:
        model.preprocess = replace(model.preprocess, window=known.get("window"))
        model.class_counts = known.get("class_counts") or model.class_counts
    for note in freeze_and_adapt(model.network, recipe.lora, train.freeze, train.seed):
        watch.note(note)
    check_patch_drop(recipe, model.network)
    check_smaller_sizes(recipe, model.config)
    check_channels(recipe, source.splits["train"], model.config)
    objective = build_objective(model, recipe.objective, train.seed, source.multi_label)
    model.network.checkpoint_activations = train.activation_checkpointing
    metrics = metric_names(model, source.multi_label, train)
    best = best_weights(recipe, held_out_splits(source), metrics)
    if best is not None and train.best_metric is None:
        watch.note(f"`train.patience` counts evaluations of `{best.metric}` on validation images")
    wrapped, optimizer, state = _prepare(objective, recipe, accelerator)

    # Validation uses the transform that is stored with the weights, training its own augmentation.
    loader = make_loader(recipe, source, model.preprocess, accelerator)
    evaluations: dict[str, Callable[..., Validation]] = {
        name: partial(
            run_validation,
            images=source.splits[name],
            accelerator=accelerator,
            watch=watch,
            broken=loader.broken,
        )
        for name in held_out_splits(source)
        if model.config.num_classes > 0
    }
    if train.fewshot_shots is not None:
        first = next(iter(held_out_splits(source)), "")  # the one that is evaluated between steps
        evaluations[first] = with_fewshot(evaluations.get(first), source, first, train)
    return Loop(
        wrapped=wrapped,
        wrapped_optimizer=optimizer,
        state=state,
        loaded=model,
        loader=loader,
        recipe=recipe,
        run=run,
        accelerator=accelerator,
        watch=watch,
        recorder=_make_recorder(recipe, run, accelerator, watch, loader, objective),
        evaluations=evaluations,
        best=best,
    )


def _prepare(objective: Objective, recipe: Recipe, accelerator: Any) -> tuple[Any, Any, TrainState]:
    """(wrapped objective, wrapped optimizer, what a checkpoint holds) for this process's device."""
    train = recipe.train
    # Sharding comes before the optimizers, which must see the sharded parameters.
    if train.fully_shard:
        shard_module(objective.to(accelerator.device))
    optimizers = build_optimizers(objective, recipe.optim, accelerator.mixed_precision)
    if train.compile:
        # In place, so that parameter names stay. Static shapes: there are few image sizes.
        mode = train.compile if train.compile == CUDA_GRAPHS else None
        objective.compile(dynamic=False, mode=mode)
    if train.fully_shard:
        # FSDP2 already moves and synchronises; Accelerate adds only its precision (no DDP wrapper).
        wrapped = accelerator.prepare_model(objective, evaluation_mode=True)
        optimizer = accelerator.prepare(JointOptimizer(optimizers))
    else:
        wrapped, optimizer = accelerator.prepare(objective, JointOptimizer(optimizers))
    # Checkpoints, averages and schedules use the unwrapped objects: the names of their tensors must
    # not depend on the number of processes.
    objective = accelerator.unwrap_model(wrapped)
    # The average starts at the initial weights, so it is made before the first step.
    average = None
    if train.ema_decay:
        average = Ema(objective, train.ema_decay, warmup=train.ema_warmup)
    return wrapped, optimizer, TrainState(objective, optimizers, average, accelerator.scaler)


def _make_recorder(
    recipe: Recipe,
    run: Run,
    accelerator: Any,
    watch: Watcher,
    loader: TrainLoader,
    objective: Objective,
) -> Recorder:
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    network, flops = objective.model, 0.0
    if not objective.hidden_rate:  # otherwise the encoder sees fewer patches
        flops = 2.0 * training_passes(network) * macs(network.config)
    # The `mfu` of the records refers to the measured peak of this machine.
    peak = accelerator.num_processes * matrix_peak(accelerator.device, precision)
    return Recorder(recipe, run, accelerator, watch, loader, peak_flops=peak, flops_per_image=flops)


def open_source(recipe: Recipe, watch: Watcher, opened: Source | None = None) -> Source:
    """Open the data of a recipe, unless they are `opened`; note what was decided about them.

    Raises:
        VitcliError: there is no such data, or no training split.
    """
    section = recipe.data
    numeric = objective_class(recipe.objective.name).regression
    source = opened or open_data(section, watch=watch, streams=True, numeric=numeric)
    source.tell(watch)
    if "train" not in source.splits:
        raise VitcliError(
            f"`{section.name}` has no training images, only {', '.join(source.splits)}",
            "use `vitcli evaluate` for such data",
        )
    if section.streaming:
        if recipe.train.epochs is not None:
            len(source.splits["train"])  # raises now, and not after the model is loaded
        watch.warn(
            f"a stream is shuffled within {section.shuffle_buffer:,} images only, and `--resume` "
            "continues with another order of the images"
        )
    return source


def count_classes(section: ObjectiveSection, source: Source) -> tuple[int, ...] | None:
    """Training images per class, or None: the objective does not use them, or a stream has none."""
    images: Any = source.splits["train"]
    if not section.uses_class_counts or images.kind == "stream":
        return None
    return tuple(int(count) for count in images.class_counts())


def make_loader(
    recipe: Recipe, source: Source, preprocess: Preprocess, accelerator: Any
) -> TrainLoader:
    """The loader that makes the batches of this process."""
    transform = TrainTransform(preprocess, recipe.augment)
    return TrainLoader(
        source.splits["train"],
        transform,
        batch_size=recipe.train.batch_size,
        seed=recipe.train.seed,
        workers=recipe.data.workers,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        strict=recipe.data.strict,
        repeats=recipe.augment.repeats if source.splits["train"].kind == "images" else 1,
        sampler=recipe.data.sampler if source.splits["train"].kind == "images" else "shuffle",
        augment=transform.settings,
        # A GPU copies from pinned memory while it computes.
        pin_memory=accelerator.device.type == "cuda",
    )


def held_out_splits(source: Source) -> list[str]:
    """The splits that are evaluated: the first during training, all of them at the end.

    With validation images, the test images are used once, at the end, so that no decision of the
    run depends on them.
    """
    return [name for name in ("validation", "test") if name in source.splits]


def held_out_images(source: Source) -> tuple[int, int]:
    """The number of images that are evaluated during training, and once more at the end."""
    counts = [len(source.splits[name]) for name in held_out_splits(source)]
    return sum(counts[:1]), sum(counts[1:])


def start_accelerator(
    recipe: Recipe,
    *,
    precision: Precision | None = None,
    track: str | None = None,
    folder: Path | None = None,
) -> tuple[Any, Precision]:
    """The `accelerate.Accelerator` of this process, and the precision that all processes use.

    Args:
        precision: that of a run that is resumed; None takes the recipe's, and measures for `auto`.
        track: a tracker, which writes into `folder`.

    Raises:
        VitcliError: an unknown name, a batch that the processes cannot share, a precision that
            the device lacks, or no compiler for `train.compile`.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import broadcast_object_list

    check_names(recipe)
    device = pick_device()
    if recipe.train.compile:
        check_compiler(device)
    precision = precision or resolve_precision(recipe.train.precision, device)
    join_processes(device)  # before the first collective operation, which follows
    # Each process has measured for itself, and the results may differ.
    precision = broadcast_object_list([precision])[0]
    # Accelerate keeps the precision of the first run in a process for all later ones.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        cpu=device.type == "cpu",
        log_with=track,
        project_dir=str(folder) if folder else None,
    )
    # Set in both directions: the settings are global, and another run may precede in this process.
    if recipe.train.deterministic:
        # cuBLAS reads it when the first matrix product runs; it is exact with a fixed workspace.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(recipe.train.deterministic)
    allow_tf32(recipe.train.tf32)
    check_batch(recipe.train.batch_size, accelerator.num_processes)
    check_sharding(recipe, accelerator.num_processes)
    return accelerator, precision


def check_names(recipe: Recipe) -> None:
    """Check objective, optimizer, schedule and augmentation of a recipe against their registries.

    Raises:
        VitcliError: a name is unknown; the hint gives the nearest one and the list.
    """
    objective_class(recipe.objective.name)
    find_optimizer(recipe.optim)
    find_schedule(recipe.schedule)
    resolve_augment(recipe.augment)


def registered_names() -> dict[str, tuple[str, ...]]:
    """The names that each registry offers, for help texts and the settings reference."""
    return {
        "augment.crop": tuple(CROPS),
        "augment.preset": tuple(PRESETS),
        "augment.policy": tuple(POLICIES),
        "fewshot.method": tuple(METHODS),
        "objective.name": (AUTO, *OBJECTIVES),
        "optim.name": tuple(OPTIMIZERS),
        "schedule.name": tuple(SCHEDULES),
    }


def unused_settings(recipe: Recipe, multi_label: bool) -> list[str]:
    """A note per objective, optimizer and schedule whose settings include some that it ignores.

    Not an error: someone who changes the optimizer of a recipe leaves the settings of the old one.
    """
    objective, notes = resolve_objective(recipe.objective, multi_label)
    objectives = {name: kind.settings for name, kind in OBJECTIVES.items()}
    optimizers = {name: entry.settings for name, entry in OPTIMIZERS.items()}
    schedules = {name: entry.settings for name, entry in SCHEDULES.items()}
    return [
        *notes,
        *regression_notes(recipe),
        *_unused("objective", "objective", objective, objectives),
        *_unused("optimizer", "optim", recipe.optim, optimizers),
        *_unused("schedule", "schedule", recipe.schedule, schedules),
    ]


def _unused(
    kind: str, table: str, section: Any, settings: Mapping[str, Collection[str]]
) -> Iterator[str]:
    # A recipe is complete, so "given" cannot be seen. A value that differs from the default can.
    defaults: Section = type(section)()
    foreign = sorted(set().union(*settings.values()) - set(settings[section.name]))
    changed = [key for key in foreign if getattr(section, key) != getattr(defaults, key)]
    if changed:
        keys = ", ".join(f"`{table}.{key}`" for key in changed)
        yield f"{kind} `{section.name}` does not use {keys}"
