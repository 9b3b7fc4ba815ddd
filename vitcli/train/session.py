"""One training run from its recipe to its result: what `pretrain` and `finetune` share."""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitcli import distributed as launch
from vitcli.config.schema import Recipe, parse_duration
from vitcli.data.image_set import Source
from vitcli.devices import matrix_peak
from vitcli.errors import VitcliError
from vitcli.progress import Logged, Quiet, Watcher
from vitcli.run import OUTCOMES, Run, check_free, create_run, reopen_run
from vitcli.train.budget import Timeline
from vitcli.train.budget_steps import NoStepFits, settle_budget
from vitcli.train.build import build_parts, held_out_images, make_loop, start_accelerator
from vitcli.train.checkpoint import list_checkpoints, load_checkpoint, step_of
from vitcli.train.curves import draw_curves
from vitcli.train.fsdp import whole
from vitcli.train.loop import Loop, Stopped, averaged
from vitcli.train.lora import ADAPTER, merged, passes, save_adapters
from vitcli.train.run_lock import holding
from vitcli.train.tracking import check_tracker, tracking
from vitcli.train.validate import Outcome
from vitcli.vit import Model
from vitcli.vit.macs import macs
from vitcli.weights.store import save_model, save_tensors

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
    track: str | None = None,
) -> Trained:
    """Run `recipe` in the directory `out`; `make_model` builds the model for the data.

    Args:
        track: `tensorboard`, `wandb` or `trackio`, which is given every record.

    Raises:
        VitcliError: bad input, a loss that is not finite, a disk that is full.
        Stopped: a signal came; the state is saved.
    """
    began = launch.began or time.monotonic()
    if track is not None:
        check_tracker(track)
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
    accelerator, precision = start_accelerator(
        recipe,
        # `auto` is measured; a resumed run computes as it began.
        precision=old.provenance().get("precision") if old is not None else None,
        track=track,
        folder=out / "tracking" if track else None,
    )
    if old is not None:
        warn_of_other_processes(old, accelerator.num_processes, watch)
    parts = build_parts(recipe, make_model, accelerator.num_processes, watch)
    source, model, objective = parts.source, parts.model, parts.objective
    images = source.splits["train"]
    if old is None:
        if resume:
            watch.note(f"nothing to resume at `{out}`: starting from step 0")
        run = create_run(out, recipe) if accelerator.is_main_process else Run(out)
    else:
        run = old
    accelerator.wait_for_everyone()
    main = accelerator.is_main_process
    logged = Logged(watch, run.path / "log.txt") if main else Logged(Quiet(), Path(os.devnull))
    factor = recipe.optim.rate_factor(recipe.train.batch_size)
    if factor != 1.0:
        watch.note(
            f"lr {recipe.optim.lr:g} is meant for {recipe.optim.lr_batch_size} images a step: "
            f"{recipe.optim.lr * factor:g} for {recipe.train.batch_size}"
        )
    facts = {
        "lr_factor": factor,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
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
    with holding(run, main), tracking(accelerator, track, recipe) as record:
        try:
            if main:
                run.remove_temporary_files()
            loop = make_loop(recipe, objective, source, run, accelerator, logged)
            loop.track = record
            loop.peak_flops = matrix_peak(accelerator.device, precision)
            loop.peak_flops *= accelerator.num_processes
            # `mae` encodes a part of the patches and decodes besides: its count is another one.
            if recipe.objective.name != "mae":
                loop.flops_per_image = 2.0 * passes(model) * macs(model.config)
            # Only epochs need the number of training images, which a stream does not know.
            images_of_an_epoch = 0 if recipe.train.epochs is None else len(images)
            settle_steps(loop, facts, began, images_of_an_epoch, held_out_images(source))
            return finish(loop, model, *run_through(loop))
        except NoStepFits:
            if main and old is None:  # nothing is in it that a resume could go on with
                run.remove()
            raise
        except VitcliError as error:
            logged.write(f"error: {error.message}")
            raise
        except Stopped as stopped:
            logged.write(str(stopped))
            raise
        except KeyboardInterrupt as interrupt:  # before the first step, or after the last
            if accelerator.num_processes > 1 or not interrupt.args:
                raise
            outside = stopped_outside(run, interrupt.args[0])
            logged.write(str(outside))
            raise outside from None


def stopped_outside(run: Run, number: int) -> Stopped:
    """What to tell of a signal that came while no step was made: what is on the disk is saved."""
    found = list_checkpoints(run.checkpoints)
    return Stopped(number, step_of(found[-1]) if found else 0, str(run.path))


def warn_of_other_processes(run: Run, number: int, watch: Watcher) -> None:
    """Tell that a resume is not exact where `run` was begun with another number of processes."""
    before = run.provenance().get("processes", number)
    if before != number:
        watch.warn(
            f"`{run.path}` was begun with {before} process{'es' * (before > 1)}, and goes on with "
            f"{number}: the same images in the same order, but sums and dropout differ"
        )


def count_parameters(model: nn.Module) -> int:
    """Numbers that a model holds in its parameters; adapters become part of them at the end."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.endswith(ADAPTER))


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
        budget = settle_budget(loop, left, test_images)
        total = loop.least(budget.steps)  # all make as many as the slowest of them
        loop.deadline = budget.deadline
        watch.note(f"budget {train.budget}: about {total} steps, measured on this machine")
    if known is None and loop.accelerator.is_main_process:
        run.write_provenance({**facts, "steps": total})
    loop.state.timeline = Timeline.of(total)
    # A budget has time for the evaluation at its end; others only where they are asked for.
    often = None if train.budget else max(1, total // EVALUATIONS)
    loop.eval_steps = train.eval_steps or often
    watch.note(
        f"run `{run.path}`: {total} steps of {train.batch_size} images, {facts['precision']}"
    )
    if found := list_checkpoints(run.checkpoints):
        load_checkpoint(found[-1], loop.state)
        watch.note(f"resuming from step {loop.state.step} of {loop.total_steps}")
    elif run.metrics_file.is_file():
        watch.note("no checkpoint was written before: starting from step 0")
    if loop.accelerator.is_main_process and run.metrics_file.is_file():
        run.drop_records_after(loop.state.step)


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
    tensors: dict[str, torch.Tensor] | None = None
    if recipe.train.fully_shard:
        with averaged(loop.state):
            tensors = whole(model.state_dict())
    predicted = united_outcomes(loop.outcomes, loop.accelerator)
    if loop.accelerator.is_main_process:
        if predicted:
            save_outcomes(run, predicted)
        run.update_provenance({"steps": loop.total_steps})
        model.eval()
        model.head_trained = model.config.num_classes > 0
        with averaged(loop.state):
            adapted = run.path / "lora.safetensors"
            save_adapters(adapted, model, recipe.lora, str(recipe.model.name))
            with merged(model):
                hashed = recipe.fingerprint()
                save_model(run.weights_file, model, recipe_hash=hashed, tensors=tensors)
        draw_curves(run)
        run.finish(result.to_json())
    loop.accelerator.wait_for_everyone()
    return result


def united_outcomes(outcomes: list[Outcome], accelerator: Any) -> list[Outcome]:
    """What all processes predicted, by image."""
    if accelerator.num_processes == 1:
        return sorted(outcomes)
    from accelerate.utils import gather_object

    return sorted(gather_object(outcomes))


def save_outcomes(run: Run, outcomes: list[Outcome]) -> None:
    """Keep what was predicted of each held-out image: `vitcli compare` pairs runs by it."""
    index, label, predicted = torch.tensor(outcomes).unbind(dim=1)
    columns = {"index": index, "label": label, "predicted": predicted}
    save_tensors(run.path / OUTCOMES, columns)


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
