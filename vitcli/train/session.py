"""One training run from its recipe to its result: what `pretrain` and `finetune` share."""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitcli.config import Recipe, parse_duration
from vitcli.cost.budget import steps_within
from vitcli.data.augment import TrainTransform
from vitcli.data.loader import TrainLoader, check_batch
from vitcli.data.presets import Strength
from vitcli.data.sources import Source, open_data
from vitcli.data.stream_loader import StreamLoader
from vitcli.data.streaming import StreamSet
from vitcli.data.transforms import Preprocess
from vitcli.devices import join_processes, pick_device, resolve_precision
from vitcli.errors import VitcliError
from vitcli.run import Run, check_free, create_run, reopen_run
from vitcli.train.checkpoint import TrainState, list_checkpoints, load_checkpoint
from vitcli.train.curves import draw_curves
from vitcli.train.ema import Ema
from vitcli.train.loop import Loop, Stopped, Validate, averaged
from vitcli.train.measure import measure
from vitcli.train.objectives import build_objective, is_supervised, settled
from vitcli.train.optim import build_optimizers
from vitcli.vit import Model
from vitcli.watch import Logged, Quiet, Watcher
from vitcli.weights.store import save_model

EVALUATIONS = 5  # of a run that does not say how often


@dataclass
class Trained:
    """What a finished run has to say.

    Attributes:
        run: its directory.
        figures: of the test split, or of the last training steps where there is none.
        broken: images that could not be read -> why.
    """

    run: str
    command: str
    data: str
    model: str
    parameters: int
    steps: int
    images: int
    seconds: float
    images_per_second: float
    figures: dict[str, float]
    labels: int
    already_finished: bool = False
    broken: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def train(
    recipe: Recipe,
    make_model: Callable[[Source], Model],
    *,
    out: Path,
    resume: bool,
    watch: Watcher,
) -> Trained:
    """Run `recipe` in the directory `out`; `make_model` builds the model for the data.

    Raises:
        VitcliError: bad input, a loss that is not finite, a disk that is full.
        Stopped: a signal came; the state is saved.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import broadcast_object_list, set_seed

    began = time.monotonic()
    if recipe.data.name is None:
        raise VitcliError("the recipe names no data", "add DATA after the command")
    old = reopen_run(out, recipe) if resume else None
    if old is None:
        check_free(out)  # before anything costly
    if old is not None and old.finished:
        watch.note(f"`{out}` is already finished")
        try:
            return Trained(**{**old.result(), "already_finished": True})
        except TypeError:
            raise VitcliError(
                f"`{old.result_file}` is not the result of a training run", "remove it"
            ) from None
    device = pick_device()
    precision = resolve_precision(recipe.train.precision, device)
    if old is not None:  # `auto` is measured; a resumed run computes as it began
        precision = old.provenance().get("precision", precision)
    join_processes(device)
    precision = broadcast_object_list([precision])[0]  # each has measured for itself
    # Accelerate keeps the precision of a process's first run for all later ones.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision, cpu=device.type == "cpu"
    )
    if recipe.train.batch_size % accelerator.num_processes:
        raise VitcliError(
            f"batch size {recipe.train.batch_size} is not a multiple of the "
            f"{accelerator.num_processes} processes",
            "`--batch-size` counts the images of all processes together",
        )
    if old is not None:
        warn_of_other_processes(old, accelerator.num_processes, watch)
    source = open_source(recipe, watch)
    if recipe.data.streaming:
        watch.warn(
            f"a stream is mixed only within {recipe.data.shuffle_buffer:,} images, and cannot be "
            "entered in its middle: `--resume` keeps the weights but begins another order"
        )
    for note in settled(recipe.objective, source.multi_label)[1]:
        watch.note(note)
    images = source.splits["train"]
    check_augment(recipe, images, accelerator.num_processes)
    set_seed(recipe.train.seed)
    model = make_model(source)
    if old is None:
        if resume:
            watch.note(f"nothing to resume at `{out}`: starting from step 0")
        run = create_run(out, recipe) if accelerator.is_main_process else Run(out)
    else:
        run = old
    accelerator.wait_for_everyone()
    main = accelerator.is_main_process
    logged = Logged(watch, run.path / "log.txt") if main else Logged(Quiet(), Path(os.devnull))
    facts = {
        "model": model.load_report.provenance() if model.load_report else None,
        "data": {
            "name": recipe.data.name,
            "fingerprint": source.fingerprint,
            **source.splitting,
        },
        "parameters": count_parameters(model),
        "precision": precision,
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
    }
    try:
        loop = make_loop(recipe, model, source, run, accelerator, logged)
        # Only epochs need the number of training images, which a stream does not know.
        images_of_an_epoch = 0 if recipe.train.epochs is None else len(images)
        settle_steps(loop, facts, began, images_of_an_epoch, held_out_images(source))
        return finish(loop, model, *run_through(loop))
    except VitcliError as error:
        logged.write(f"error: {error.message}")
        raise
    except Stopped as stopped:
        logged.write(str(stopped))
        raise


def warn_of_other_processes(run: Run, number: int, watch: Watcher) -> None:
    """Tell that a resume is not exact where `run` was begun with another number of processes."""
    before = run.provenance().get("processes", number)
    if before != number:
        watch.warn(
            f"`{run.path}` was begun with {before} process{'es' * (before > 1)}, and goes on with "
            f"{number}: the same images in the same order, but sums and dropout differ"
        )


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


def count_parameters(model: nn.Module) -> int:
    """Numbers that a model holds in its parameters."""
    return sum(p.numel() for p in model.parameters())


def make_loop(
    recipe: Recipe,
    model: Model,
    source: Source,
    run: Run,
    accelerator: Any,
    watch: Logged,
) -> Loop:
    """Everything that trains, put together; `total_steps` is not settled yet."""
    preprocess = model.preprocess
    assert preprocess is not None
    model.checkpoint_activations = recipe.train.activation_checkpointing
    objective = build_objective(model, recipe.objective, recipe.train.seed, source.multi_label)
    optimizers = build_optimizers(objective, recipe.optim)
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
    if held_out is not None and model.config.num_classes > 0:
        test = source.splits[held_out]
        validate = partial(measure, model, test, accelerator, watch, loader.broken)
    return Loop(
        module=module,
        state=state,
        optimizers=optimizers,
        loader=loader,
        preprocess=preprocess,
        recipe=recipe,
        total_steps=0,
        run=run,
        accelerator=accelerator,
        watch=watch,
        validate=validate,
    )


def make_loader(
    recipe: Recipe, source: Source, preprocess: Preprocess, views: int, accelerator: Any
) -> TrainLoader | StreamLoader:
    """What makes the batches of this process."""
    images: Any = source.splits["train"]
    transform = TrainTransform(preprocess, recipe.augment)
    settings: dict[str, Any] = {
        "batch_size": recipe.train.batch_size,
        "seed": recipe.train.seed,
        "views": views,
        "workers": recipe.data.workers,
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
        "strict": recipe.data.strict,
        "strength": Strength.of(recipe.augment),
    }
    if isinstance(images, StreamSet):
        return StreamLoader(images, transform, **settings)
    return TrainLoader(
        images,
        transform,
        repeats=recipe.augment.repeats,
        pin_memory=accelerator.device.type == "cuda",
        **settings,
    )


def check_augment(recipe: Recipe, images: Any, processes: int) -> None:
    """Whether `[augment]` can be done with this data, objective and batch.

    Raises:
        VitcliError: the set draws whole batches, which augmentation cannot change; without labels
            there is nothing to mix; or a micro-batch or a process would part a pair.
    """
    section, strength = recipe.augment, Strength.of(recipe.augment)
    if hasattr(images, "batch") and (strength.changes or section.repeats > 1):
        raise VitcliError(
            f"`{recipe.data.name}` draws its images with their variations, and `[augment]` changes "
            "none of them",
            "leave out `augment.preset`, `policy`, colours, `erase_rate` and `repeats`",
        )
    if isinstance(images, StreamSet) and section.repeats > 1:
        raise VitcliError("a stream shows each image once at a time", "leave out `augment.repeats`")
    if strength.mixes and not is_supervised(recipe.objective.name):
        raise VitcliError(
            f"objective `{recipe.objective.name}` has no labels that mixup or cutmix could mix",
            "`--set augment.mix_rate=0.0` leaves images as they are",
        )
    micro = recipe.train.micro_batch_size
    if strength.mixes and micro is not None and micro % 2:
        raise VitcliError(
            f"`train.micro_batch_size` = {micro} would part the pairs that mixup or cutmix mixes",
            f"`--set train.micro_batch_size={micro + 1}`",
        )
    check_batch(recipe.train.batch_size, processes, section.repeats, strength.mixes)


def settle_steps(
    loop: Loop, facts: dict[str, Any], began: float, train_images: int, test_images: int
) -> None:
    """Say how long the run is, going on from its last checkpoint if there is one.

    A budget is turned into steps once, at the start of a run, and kept with its provenance
    (`facts`); a resumed run makes the steps that were settled then.
    """
    run, train, watch = loop.run, loop.recipe.train, loop.watch
    known = run.provenance().get("steps")
    total = train.total_steps(train_images) or known
    if total is None:
        left = parse_duration(train.budget or "") - (time.monotonic() - began)
        measured = steps_within(loop, left, test_images if loop.validate else 0)
        total = loop.agree(measured) or measured
        watch.note(f"budget {train.budget}: {total} steps, measured on this machine")
    if known is None and loop.accelerator.is_main_process:
        run.write_provenance({**facts, "steps": total})
    loop.total_steps = total
    loop.eval_steps = train.eval_steps or (total if train.budget else max(1, total // EVALUATIONS))
    watch.note(
        f"run `{run.path}`: {total} steps of {train.batch_size} images, {facts['precision']}"
    )
    if found := list_checkpoints(run.checkpoints):
        load_checkpoint(found[-1], loop.state)
        watch.note(f"resuming from step {loop.state.step} of {total}")
    elif run.metrics_file.is_file():
        watch.note("no checkpoint was written before: starting from step 0")
    if loop.accelerator.is_main_process and run.metrics_file.is_file():
        run.forget_after(loop.state.step)


def run_through(loop: Loop) -> tuple[float, float, dict[str, float]]:
    """Train to the end and measure; seconds, images a second, and the figures."""
    started, first = time.perf_counter(), loop.state.step
    loop.fit()
    seconds = time.perf_counter() - started
    done = (loop.total_steps - first) * loop.recipe.train.batch_size
    figures = {name.removeprefix("test_"): value for name, value in loop.evaluate().items()}
    return seconds, done / seconds if done else 0.0, figures or last_figures(loop.run)


def finish(
    loop: Loop,
    model: Model,
    seconds: float,
    images_per_second: float,
    figures: dict[str, float],
) -> Trained:
    """Write weights, curves and, last of all, the result."""
    recipe, run = loop.recipe, loop.run
    broken = united(loop.loader.broken, loop.accelerator)
    if broken:
        loop.watch.warn(
            f"{len(broken)} images could not be read; in training others of their class stood in"
        )
    result = Trained(
        run=str(run.path),
        command=recipe.command,
        data=str(recipe.data.name),
        model=str(recipe.model.name),
        parameters=count_parameters(model),
        steps=loop.total_steps,
        images=loop.total_steps * recipe.train.batch_size,
        seconds=round(seconds, 2),
        images_per_second=round(images_per_second, 1),
        figures=figures,
        labels=model.config.num_classes,
        broken=broken,
    )
    if loop.accelerator.is_main_process:
        model.eval()
        model.head_trained = model.config.num_classes > 0
        with averaged(loop.state):
            save_model(run.weights_file, model, recipe_hash=recipe.fingerprint())
        draw_curves(run)
        run.finish(result.to_json())
    loop.accelerator.wait_for_everyone()
    return result


def held_out_images(source: Source) -> int:
    """How many images a pass over the held-out split looks at."""
    name = held_out_split(source)
    return len(source.splits[name]) if name else 0


def held_out_split(source: Source) -> str | None:
    """The split that figures come from: `validation`, else `test`, else none."""
    return next((name for name in ("validation", "test") if name in source.splits), None)


def last_figures(run: Run) -> dict[str, float]:
    """The last record's training figures."""
    for record in reversed(run.records()):
        if "train/loss" in record:
            return {k: v for k, v in record.items() if k.startswith("train/")}
    return {}


def united(broken: dict[str, str], accelerator: Any) -> dict[str, str]:
    """What all processes found broken, the same on each."""
    if accelerator.num_processes == 1:
        return dict(broken)
    from accelerate.utils import gather_object

    return dict(sorted(gather_object(list(broken.items()))))
