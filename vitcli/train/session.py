"""One training run from its recipe to its result: what `pretrain` and `finetune` share."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitcli.config import Recipe
from vitcli.data.augment import TrainTransform
from vitcli.data.loader import TrainLoader, eval_batches
from vitcli.data.sources import ImageSet, Source, load_data
from vitcli.devices import pick_device, resolve_precision
from vitcli.errors import VitcliError
from vitcli.run import Run, create_run, reopen_run
from vitcli.train.checkpoint import TrainState, list_checkpoints, load_checkpoint
from vitcli.train.ema import Ema
from vitcli.train.loop import Loop, Stopped, averaged
from vitcli.train.objectives import build_objective
from vitcli.train.optim import build_optimizers
from vitcli.vit import VisionTransformer
from vitcli.watch import Logged, Watcher
from vitcli.weights.store import save_model

EVALUATIONS = 5  # of a run that does not say how often
EVAL_BATCH = 256


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
    make_model: Callable[[Source], VisionTransformer],
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
    from accelerate.utils import set_seed

    if recipe.data.name is None:
        raise VitcliError("the recipe names no data", "add DATA after the command")
    old = reopen_run(out, recipe) if resume else None
    if old is not None and old.finished:
        watch.note(f"`{out}` is already finished")
        return Trained(**{**old.result(), "already_finished": True})
    device = pick_device()
    precision = resolve_precision(recipe.train.precision, device)
    if old is not None:  # `auto` is measured; a resumed run computes as it began
        precision = old.provenance().get("precision", precision)
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
    source = open_source(recipe, watch)
    images = source.splits["train"]
    set_seed(recipe.train.seed)
    model = make_model(source)
    total = recipe.train.total_steps(len(images))
    if old is None:
        if resume:
            watch.note(f"nothing to resume at `{out}`: starting from step 0")
        run = create_run(out, recipe) if accelerator.is_main_process else Run(out)
    else:
        run = old
    accelerator.wait_for_everyone()
    logged = Logged(watch, run.path / "log.txt")
    logged.note(f"run `{run.path}`: {total} steps of {recipe.train.batch_size} images, {precision}")
    if accelerator.is_main_process and old is None:
        run.write_provenance(
            {
                "data": {"name": recipe.data.name, "fingerprint": source.fingerprint},
                "steps": total,
                "parameters": count_parameters(model),
                "precision": precision,
                "device": str(accelerator.device),
                "processes": accelerator.num_processes,
                "threads": torch.get_num_threads(),
            }
        )
    try:
        return _train(recipe, model, source, run, total, accelerator, logged)
    except VitcliError as error:
        logged.write(f"error: {error.message}")
        raise
    except Stopped as stopped:
        logged.write(str(stopped))
        raise


def open_source(recipe: Recipe, watch: Watcher) -> Source:
    """The data of a recipe, with a note for each thing that was decided about it."""
    section = recipe.data
    source = load_data(
        section.name or "",
        label_column=section.label_column,
        image_column=section.image_column,
        test_fraction=section.test_fraction,
        seed=section.split_seed,
    )
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


def _train(
    recipe: Recipe,
    model: VisionTransformer,
    source: Source,
    run: Run,
    total: int,
    accelerator: Any,
    watch: Logged,
) -> Trained:
    """Training proper, in a run directory that is there."""
    images = source.splits["train"]
    preprocess = model.preprocess
    assert preprocess is not None
    objective = build_objective(model, recipe.objective, recipe.train.seed)
    optimizers = build_optimizers(objective, recipe.optim)
    module, *optimizers = accelerator.prepare(objective, *optimizers)
    inner = [getattr(o, "optimizer", o) for o in optimizers]
    objective = accelerator.unwrap_model(module)
    decay = recipe.train.ema_decay
    state = TrainState(
        objective, inner, Ema(objective, decay) if decay else None, accelerator.scaler
    )
    if found := list_checkpoints(run.checkpoints):
        load_checkpoint(found[-1], state)
        watch.note(f"resuming from step {state.step} of {total}")
    elif run.metrics_file.is_file():
        watch.note("no checkpoint was written before: starting from step 0")
    if accelerator.is_main_process and run.metrics_file.is_file():
        run.forget_after(state.step)
    loader = TrainLoader(
        images,
        TrainTransform(preprocess, recipe.augment),
        batch_size=recipe.train.batch_size,
        seed=recipe.train.seed,
        views=objective.views,
        workers=recipe.data.workers,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        strict=recipe.data.strict,
    )
    held_out = held_out_split(source)
    test = source.splits[held_out] if held_out else None

    def validate() -> dict[str, float]:
        assert test is not None
        return measure(model, test, accelerator, watch)

    measurable = test is not None and model.config.num_classes > 0
    evals = recipe.train.eval_steps or max(1, total // EVALUATIONS)
    loop = Loop(
        module,
        state,
        optimizers,
        loader,
        preprocess,
        recipe.model_copy(update={"train": recipe.train.model_copy(update={"eval_steps": evals})}),
        total,
        run,
        accelerator,
        watch,
        validate if measurable else None,
    )
    started, first = time.perf_counter(), state.step
    loop.fit()
    seconds = time.perf_counter() - started
    figures = {k.removeprefix("test_"): v for k, v in loop.evaluate().items()}
    if loader.broken:
        watch.warn(f"{len(loader.broken)} images could not be read and were replaced")
    with averaged(state):
        model.eval()
        model.head_trained = model.config.num_classes > 0
        if accelerator.is_main_process:
            save_model(run.weights_file, model, recipe_hash=recipe.fingerprint())
    done = (total - first) * recipe.train.batch_size
    result = Trained(
        run=str(run.path),
        command=recipe.command,
        data=str(recipe.data.name),
        model=str(recipe.model.name),
        parameters=count_parameters(model),
        steps=total,
        images=total * recipe.train.batch_size,
        seconds=round(seconds, 2),
        images_per_second=round(done / seconds, 1) if done else 0.0,
        figures=figures or last_figures(run),
        labels=model.config.num_classes,
        broken=dict(loader.broken),
    )
    if accelerator.is_main_process:
        from vitcli.train.curves import draw_curves

        draw_curves(run)
        run.finish(result.to_json())
    accelerator.wait_for_everyone()
    return result


def held_out_split(source: Source) -> str | None:
    """The split that figures come from: `validation`, else `test`, else none."""
    return next((name for name in ("validation", "test") if name in source.splits), None)


def last_figures(run: Run) -> dict[str, float]:
    """The last record's training figures."""
    for record in reversed(run.records()):
        if "train/loss" in record:
            return {k: v for k, v in record.items() if k.startswith("train/")}
    return {}


@torch.inference_mode()
def measure(
    model: VisionTransformer, images: ImageSet, accelerator: Any, watch: Watcher
) -> dict[str, float]:
    """Top-1 accuracy and cross-entropy over a split; every readable image counts once.

    Each process takes its own part, and only sums travel, so the number of processes changes
    nothing.
    """
    preprocess = model.preprocess
    assert preprocess is not None
    device = accelerator.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    batches = eval_batches(
        images,
        preprocess,
        batch_size=EVAL_BATCH,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    with watch.progress("test", len(images)) as bar:
        for batch in batches:
            batch = batch.to(device)
            with accelerator.autocast():
                logits = model(preprocess.normalize(batch.images)).float()  # (B, K)
            loss = nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
            correct = (logits.argmax(dim=1) == batch.labels).sum()
            sums += torch.stack([loss.double(), correct.double(), sums.new_tensor(len(logits))])
            bar.advance(len(logits))
    loss_sum, correct_sum, count = accelerator.reduce(sums, reduction="sum").tolist()
    if not count:
        raise VitcliError("no image of the test split could be read")
    return {"loss": loss_sum / count, "accuracy": correct_sum / count, "images": count}
