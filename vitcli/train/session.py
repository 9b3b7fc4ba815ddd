"""A training run from start to result: what `pretrain` and `finetune` have in common."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vitcli import distributed
from vitcli.config.schema import Recipe, parse_duration
from vitcli.data.source import Source
from vitcli.errors import VitcliError
from vitcli.evals.regression import regression_intervals
from vitcli.files import exclusive, read_json, write_text
from vitcli.progress import Logged, Quiet, Watcher
from vitcli.run import (
    OUTCOMES,
    RUNS,
    Run,
    check_free,
    check_resumable,
    create_numbered_run,
    create_run,
    of_first_process,
    reopen_run,
)
from vitcli.train.agreement import gather, min_over_processes
from vitcli.train.best_weights import write_weights
from vitcli.train.budget import NoStepFits, Timeline, plan_budget
from vitcli.train.build import (
    MakeModel,
    build_loop,
    held_out_images,
    open_source,
    start_accelerator,
)
from vitcli.train.checkpoint import list_checkpoints, load_checkpoint, step_of
from vitcli.train.ema import averaged
from vitcli.train.loop import Loop
from vitcli.train.lora import ADAPTER, save_adapters
from vitcli.train.recorded_images import (
    ROWS_FILE,
    RecordedImages,
    check_same_data,
    record_images,
    rows_text,
)
from vitcli.train.recorder import draw_curves
from vitcli.train.signals import Stopped
from vitcli.train.trackers import check_tracker, tracking
from vitcli.train.validate import best_fewshot
from vitcli.weights.store import save_tensors

NUM_EVALUATIONS = 5  # in a run without `train.eval_steps`
LOCK, HOLDER = ".lock", ".holder.json"


@dataclass
class TrainResult:
    """The result of a finished run, as `result.json` and `--json` have it.

    Attributes:
        run: its directory.
        seconds: time of the training steps, summed over all parts of an interrupted run.
        figures: metrics of the test split, else of the validation split; `split` names it. Without
            both, those of the last training steps.
        validation: metrics of the validation split, if there is a test split as well.
        best: metric, value and step of the weights in best.safetensors, with `train.best_metric`.
        broken: images that could not be read, with the reason.
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
    figures: dict[str, Any]
    labels: int
    already_finished: bool = False
    broken: dict[str, str] = field(default_factory=dict)
    validation: dict[str, Any] | None = None
    best: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def train(
    recipe: Recipe,
    make_model: MakeModel,
    *,
    out: Path | None,
    stem: str = "run",
    resume: bool,
    watch: Watcher,
    track: str | None = None,
) -> TrainResult:
    """Train as `recipe` says, in the run directory `out`.

    Args:
        make_model: builds the model for the data.
        out: None takes `runs/STEM`, or the next number that is free when training starts.
        track: `tensorboard`, `wandb` or `trackio`, which receives every record.

    Raises:
        VitcliError: bad input, a loss that is not finite, or a full disk.
        Stopped: a signal came; the state is saved.
    """
    # A budget counts from the start of the program, imports included.
    started = distributed.started_at or time.monotonic()
    if track is not None:
        check_tracker(track)
    if recipe.data.name is None:
        raise VitcliError("the recipe names no data", "add DATA after the command")
    if resume:
        check_resumable(out)
    old = reopen_run(out, recipe) if resume and out is not None else None
    if out is not None and old is None:
        check_free(out)  # before anything that takes time
    if old is not None and old.finished:
        watch.note(f"`{old.path}` is already finished")
        return read_result(old)

    planned = Run(out or RUNS / stem)
    accelerator, precision = start_accelerator(
        recipe,
        # `auto` measures, and a second measurement may choose otherwise: resume as it began.
        precision=old.provenance().get("precision") if old is not None else None,
        track=track,
        folder=planned.path / "tracking" if track else None,
    )
    if old is not None:
        warn_of_other_processes(old, accelerator.num_processes, watch)
    is_main = accelerator.is_main_process
    # Until the directory exists, nothing is written to its log.txt.
    log = Logged(watch if is_main else Quiet(), Path(os.devnull))
    source = open_source(recipe, watch)
    images = record_images(source, watch) if is_main else None
    if old is not None and is_main:
        check_same_data(old, source, images)
    loop = build_loop(recipe, source, make_model, planned, accelerator, log, old)

    if old is None:  # only now, so that bad settings and bad data leave no directory
        if resume:
            watch.note(f"nothing to resume at `{out}`: starting from step 0")
        create = partial(create_run, out) if out else partial(create_numbered_run, stem)
        loop.run = loop.recorder.run = Run(of_first_process(lambda: create(recipe).path))
    if is_main:
        log.path = loop.run.path / "log.txt"
        if old is not None and old.recipe().data.name != recipe.data.name:  # the data have moved
            write_text(old.recipe_file, recipe.to_toml())
    loop.loaded.split_record = None if images is None else images.record
    if track:
        accelerator.project_configuration.set_directories(str(loop.run.path / "tracking"))
    accelerator.wait_for_everyone()  # the directory exists now, for all processes
    with (
        run_locked(loop.run, is_main),
        tracking(accelerator, track, recipe) as loop.recorder.track,
        errors_logged(loop, log, is_new=old is None),
    ):
        if is_main:
            loop.run.remove_temporary_files()  # only under the lock: they may belong to a live run
            if images is not None and old is None:
                write_text(loop.run.path / ROWS_FILE, rows_text(images.rows))
        choose_steps(loop, started, source, precision, images)
        loop.fit()
        return finish(loop)


def read_result(run: Run) -> TrainResult:
    """The result of a finished run."""
    try:
        return TrainResult(**{**run.result(), "already_finished": True})
    except TypeError:
        raise VitcliError(
            f"`{run.result_file}` is not the result of a training run", "remove the file"
        ) from None


def warn_of_other_processes(run: Run, number: int, watch: Watcher) -> None:
    """Warn that a resume with another number of processes is not exact."""
    before = run.provenance().get("processes", number)
    if before != number:
        watch.warn(
            f"`{run.path}` started with {before} process{'es' * (before > 1)} and continues with "
            f"{number}: the images and their order are the same, but sums and dropout differ"
        )


@contextmanager
def run_locked(run: Run, is_main: bool = True) -> Iterator[None]:
    """Keep all other commands from training in `run` inside the block.

    Args:
        is_main: only the first process of a command holds the lock.
    """

    def busy() -> VitcliError:
        return VitcliError(
            f"{_holder(run)} is training in `{run.path}`",
            "wait for it, stop it, or choose another path with `--out`",
        )

    if not is_main:
        yield
        return
    # The lock says that somebody trains here. The second file says who, for the error message.
    with exclusive(run.path / LOCK, busy):
        here = {"host": socket.gethostname(), "process": os.getpid()}
        (run.path / HOLDER).write_text(json.dumps(here), encoding="utf-8")
        try:
            yield
        finally:
            (run.path / HOLDER).unlink(missing_ok=True)


def _holder(run: Run) -> str:
    try:
        holder = read_json(run.path / HOLDER)
        return f"process {holder['process']} on `{holder['host']}`"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


@contextmanager
def errors_logged(loop: Loop, log: Logged, is_new: bool) -> Iterator[None]:
    """Write to log.txt why the run ended, if it did not end as planned."""
    run = loop.run
    try:
        yield
    except NoStepFits:
        if loop.accelerator.is_main_process and is_new:  # it holds nothing that a resume could use
            run.remove()
        raise
    except VitcliError as error:
        log.write(f"error: {error.message}")
        raise
    except Stopped as stopped:
        log.write(str(stopped))
        raise
    except KeyboardInterrupt as interrupt:  # a signal before the first step or after the last
        if loop.accelerator.num_processes > 1 or not interrupt.args:
            raise
        found = list_checkpoints(run.checkpoints)
        step = step_of(found[-1]) if found else 0
        outside = Stopped(interrupt.args[0], step, str(run.path))
        log.write(str(outside))
        raise outside from None


def choose_steps(
    loop: Loop,
    started: float,
    source: Source,
    precision: str,
    images: RecordedImages | None = None,
) -> None:
    """Set the number of steps of the run, and load its last checkpoint if there is one.

    A budget becomes a number of steps once, at the start of the run. Provenance stores it, because
    a second measurement on resume would give another number and another schedule.
    """
    run, train, watch = loop.run, loop.recipe.train, loop.watch
    known = run.provenance().get("steps")
    # Only epochs need the number of training images, which a stream does not know.
    num_images = 0 if train.epochs is None else len(source.splits["train"])
    total = train.total_steps(num_images) or known
    if total is None:
        left = parse_duration(train.budget or "") - (time.monotonic() - started)
        budget = plan_budget(loop, left, held_out_images(source))
        # All processes make as many steps as the slowest of them has time for.
        total = min_over_processes(loop.accelerator, budget.steps)
        loop.deadline = budget.deadline
        watch.note(f"budget {train.budget}: about {total} steps, measured on this machine")
    if known is None and loop.accelerator.is_main_process:
        facts = facts_of(loop, source, precision)
        facts["data"]["content"] = None if images is None else images.content
        run.write_provenance({**facts, "steps": total})
    loop.state.timeline = Timeline.of(total)
    # A budget reserves time for the last evaluation only; others must be asked for.
    default = None if train.budget else max(1, total // NUM_EVALUATIONS)
    loop.eval_steps = train.eval_steps or default
    factor = loop.recipe.optim.rate_factor(train.batch_size)
    if factor != 1.0:
        optim = loop.recipe.optim
        watch.note(
            f"lr {optim.lr:g} is for {optim.lr_batch_size} images per step; for "
            f"{train.batch_size} it becomes {optim.lr * factor:g}"
        )
    watch.note(f"run `{run.path}`: {total} steps of {train.batch_size} images, {precision}")
    if found := list_checkpoints(run.checkpoints):
        load_checkpoint(found[-1], loop.state)
        watch.note(f"resuming from step {loop.state.step} of {loop.total_steps}")
    elif run.metrics_file.is_file():
        watch.note("there is no checkpoint yet: starting from step 0")
    if loop.accelerator.is_main_process and run.metrics_file.is_file():
        run.drop_records_after(loop.state.step)
    loop.accelerator.wait_for_everyone()  # all processes read the records that are left
    if loop.best is not None and run.metrics_file.is_file():
        loop.best.restore(run.records())


def facts_of(loop: Loop, source: Source, precision: str) -> dict[str, Any]:
    """What provenance.json says about model, data and machine."""
    recipe, model = loop.recipe, loop.loaded
    return {
        "lr_factor": recipe.optim.rate_factor(recipe.train.batch_size),
        "trained": sum(p.numel() for p in model.network.parameters() if p.requires_grad),
        "model": model.load_report.provenance() if model.load_report else None,
        "data": {
            "name": recipe.data.name,
            "fingerprint": source.fingerprint,
            **source.splitting,
        },
        "window": model.preprocess.window if model.preprocess else None,
        "parameters": num_parameters(model.network),
        "precision": precision,
        "device": str(loop.device),
        "processes": loop.accelerator.num_processes,
        "threads": torch.get_num_threads(),
    }


def num_parameters(model: nn.Module) -> int:
    """The number of parameters without adapters, which are merged into others at the end."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.endswith(ADAPTER))


def finish(loop: Loop) -> TrainResult:
    """Evaluate, write weights and curves, and then the result, which marks the run as finished."""
    recipe, run, accelerator, model = loop.recipe, loop.run, loop.accelerator, loop.loaded
    # The test images come last: their predictions are the `outcomes` that stay.
    metrics = [{"split": name, **loop.evaluate(name)} for name in loop.evaluations]
    broken = dict(sorted(gather(list(loop.loader.broken.items()), accelerator)))
    if broken:
        loop.watch.warn(f"unreadable images, which were not used: {len(broken)}")
    images = loop.total_steps * recipe.train.batch_size
    # From the records, so that a run that was interrupted counts all of its parts.
    seconds = sum(record["seconds"] for record in run.records() if "train/loss" in record)
    result = TrainResult(
        run=str(run.path),
        command=recipe.command,
        data=str(recipe.data.name),
        model=str(recipe.model.name),
        parameters=num_parameters(model.network),
        steps=loop.total_steps,
        images=images,
        seconds=round(seconds, 2),
        images_per_second=round(images / seconds, 1) if seconds else 0.0,
        figures={**(metrics[-1] if metrics else last_training_metrics(run)), **best_fewshot(run)},
        validation=metrics[0] if len(metrics) > 1 else None,
        labels=model.config.num_classes,
        broken=broken,
        best=None if loop.best is None else loop.best.to_json(),
    )
    # Weights come before result.json: a run that is killed here evaluates again after a resume.
    write_weights(run.weights_file, model, loop.state, recipe, is_main=accelerator.is_main_process)
    outcomes = sorted(gather(loop.outcomes, accelerator))
    if model.is_regression and outcomes:
        result.figures["intervals"] = regression_intervals(*np.array(outcomes).T[1:]).to_json()
    if accelerator.is_main_process:
        if outcomes:  # `vitcli compare` pairs two runs image by image
            kind = torch.float64 if model.is_regression else torch.int64
            columns = torch.tensor(outcomes, dtype=kind).unbind(dim=1)
            names = ("index", "target" if model.is_regression else "label", "predicted")
            save_tensors(run.path / OUTCOMES, dict(zip(names, columns, strict=True)))
        run.update_provenance({"steps": loop.total_steps})
        model.eval()
        model.head_trained = model.config.num_classes > 0
        with averaged(loop.state.objective, loop.state.ema):
            adapters = run.path / "lora.safetensors"
            save_adapters(adapters, model.network, recipe.lora, str(recipe.model.name))
        draw_curves(run)
        run.finish(result.to_json())
    accelerator.wait_for_everyone()
    return result


def last_training_metrics(run: Run) -> dict[str, float]:
    """The training metrics of the last record."""
    for record in reversed(run.records()):
        if "train/loss" in record:
            return {k: v for k, v in record.items() if k.startswith("train/")}
    return {}
