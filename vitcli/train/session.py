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

from vitcli import distributed
from vitcli.config.schema import Recipe, parse_duration
from vitcli.data.source import Source
from vitcli.errors import VitcliError
from vitcli.evals.near_copies import SECONDS, warn_of_copies
from vitcli.evals.regression import regression_intervals
from vitcli.files import exclusive, read_json, write_text
from vitcli.progress import Logged, Quiet, Watcher
from vitcli.report.page import REPORT_FILE, write_report
from vitcli.run import (
    OUTCOMES,
    RUNS,
    Run,
    check_free,
    create_numbered_run,
    create_run,
    of_first_process,
)
from vitcli.train.agreement import gather
from vitcli.train.best_weights import evaluate_at_end, write_final_weights
from vitcli.train.budget import NoStepFits
from vitcli.train.build import (
    MakeModel,
    build_loop,
    open_source,
    start_accelerator,
)
from vitcli.train.checkpoint import list_checkpoints, step_of
from vitcli.train.defaults import Defaults
from vitcli.train.exactness import machine_facts, record_changes, use_threads, warn_of_changes
from vitcli.train.loop import Loop
from vitcli.train.objectives import objective_class
from vitcli.train.recorded_images import (
    ROWS_FILE,
    check_same_data,
    record_images,
    rows_text,
)
from vitcli.train.report import HeldOut, draw_curves, run_page
from vitcli.train.resuming import (
    changes_length,
    check_resumable,
    choose_steps,
    num_parameters,
    reopen_run,
)
from vitcli.train.signals import Stopped
from vitcli.train.trackers import check_tracker, tracking
from vitcli.train.validate import best_fewshot
from vitcli.weights.store import save_tensors

LOCK, HOLDER = ".lock", ".holder.json"
CHECK_FRACTION = 0.1  # of a time budget, at most, goes into the check for copies


@dataclass
class TrainResult:
    """The result of a finished run, as `result.json` and `--json` have it.

    Attributes:
        run: its directory.
        seconds: time of the training steps, summed over all parts of an interrupted run.
        figures: metrics of the test split, else of the validation split; `split` names it. Without
            both, those of the last training steps.
        validation: metrics of the validation split, if there is a test split as well.
        best: metric, value and step of the best evaluation, with `train.best_metric`.
        weights: those in model.safetensors, which the figures belong to: `best` or `last`, and
            their step.
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
    weights: dict[str, Any] | None = None

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
    check: bool = True,
    opened: Source | None = None,
    defaults: Defaults | None = None,
) -> TrainResult:
    """Train as `recipe` says, in the run directory `out`.

    Args:
        make_model: builds the model for the data.
        out: None takes `runs/STEM`, or the next number that is free when training starts.
        track: `tensorboard`, `wandb` or `trackio`, which receives every record.
        check: look for near copies between the splits, see `warn_of_copies`.
        opened: the data of the recipe, if they are open.
        defaults: why the recipe has its settings, for provenance.json.

    Raises:
        VitcliError: bad input, a loss that is not finite, or a full disk.
        Stopped: a signal came; the state is saved.
    """
    # A budget counts from the start of the program, imports included.
    started = distributed.started_at or time.monotonic()
    _check_request(recipe, track)
    old = _run_to_resume(out, recipe, resume)
    extends = old is not None and changes_length(old, recipe)
    if old is not None and old.finished and not extends:
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
    is_main = accelerator.is_main_process
    use_threads(old, accelerator.device, watch)
    facts = machine_facts(accelerator.device, precision, accelerator.num_processes)
    changed = warn_of_changes(old, facts, watch) if old is not None else []
    # Until the directory exists, nothing is written to its log.txt.
    log = Logged(watch if is_main else Quiet(), Path(os.devnull))
    source = open_source(recipe, watch, opened)
    images = record_images(source, watch) if is_main else None
    if old is not None and is_main:
        check_same_data(old, source, images)
    loop = build_loop(recipe, source, make_model, planned, accelerator, log, old)
    loop.state.objective.prepare(source, log)

    if old is None:  # only now, so that bad settings and bad data leave no directory
        if resume:
            watch.note(f"nothing to resume at `{out}`: starting from step 0")
        create = partial(create_run, out) if out else partial(create_numbered_run, stem)
        loop.run = loop.recorder.run = Run(of_first_process(lambda: create(recipe).path))
    if is_main:
        log.path = loop.run.path / "log.txt"
        if old is not None and not extends:  # the data may have moved
            old.write_recipe(recipe)
    loop.loaded.split_record = None if images is None else images.record
    if track:
        accelerator.project_configuration.set_directories(str(loop.run.path / "tracking"))
    accelerator.wait_for_everyone()  # the directory exists now, for all processes
    with (
        run_locked(loop.run, is_main),
        tracking(accelerator, track, recipe) as loop.recorder.track,
        errors_logged(loop, log, is_new=old is None),
    ):
        if images is not None and old is None:
            write_text(loop.run.path / ROWS_FILE, rows_text(images.rows))
        if check and is_main:
            source = _check_copies(recipe, source, log if old is None else Quiet())
        choose_steps(loop, started, source, facts, images, extends=extends)
        if is_main:
            _record_start(loop, None if old else defaults, changed)
        loop.fit()
        return finish(loop, source)


def _check_copies(recipe: Recipe, source: Source, watch: Watcher) -> Source:
    budget, limit = recipe.train.budget, SECONDS
    if budget is not None:
        limit = min(limit, CHECK_FRACTION * parse_duration(budget))
    labels = objective_class(recipe.objective.name).supervised
    return warn_of_copies(source, watch, labels=labels, seconds=limit)


def _check_request(recipe: Recipe, track: str | None) -> None:
    if track is not None:
        check_tracker(track)
    if recipe.data.name is None:
        raise VitcliError("the recipe names no data", "add DATA after the command")


def _record_start(loop: Loop, defaults: Defaults | None, changed: list[str]) -> None:
    """Clear the run directory, and record why the settings were chosen and what has changed."""
    if defaults is not None:
        loop.run.update_provenance({"defaults": defaults.to_json()})
    loop.run.remove_temporary_files()  # only under the lock: they may belong to a live run
    record_changes(loop.run, loop.state.step, changed)


def _run_to_resume(out: Path | None, recipe: Recipe, resume: bool) -> Run | None:
    """The run that goes on, or None for a new one; raises if `out` can be neither."""
    if resume:
        check_resumable(out)
    old = reopen_run(out, recipe) if resume and out is not None else None
    if out is not None and old is None:
        check_free(out)
    return old


def read_result(run: Run) -> TrainResult:
    """The result of a finished run."""
    try:
        return TrainResult(**{**run.result(), "already_finished": True})
    except TypeError:
        raise VitcliError(
            f"`{run.result_file}` is not the result of a training run", "remove the file"
        ) from None


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


def finish(loop: Loop, source: Source) -> TrainResult:
    """Evaluate, write weights and the report, and then the result, which marks a finished run."""
    recipe, run, accelerator, model = loop.recipe, loop.run, loop.accelerator, loop.loaded
    # The test images come last: their predictions are the `outcomes` that stay.
    chosen = evaluate_at_end(loop)
    metrics = chosen.metrics
    broken = dict(sorted(gather(list(loop.loader.broken.items()), accelerator)))
    if broken:
        loop.watch.warn(f"unreadable images, which were not used: {len(broken)}")
    images = loop.total_steps * recipe.train.batch_size
    seconds = run.trained_seconds()
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
        weights={"name": chosen.weights, "step": chosen.step},
    )
    # Weights come before result.json: a run that is killed here evaluates again after a resume.
    write_final_weights(loop, chosen.weights)
    outcomes = sorted(gather(loop.outcomes, accelerator))
    if model.is_regression and outcomes:
        result.figures["intervals"] = regression_intervals(*np.array(outcomes).T[1:]).to_json()
    if accelerator.is_main_process:
        if outcomes:  # `vitcli compare` pairs two runs image by image
            kind = torch.float64 if model.is_regression else torch.int64
            columns = torch.tensor([one[:3] for one in outcomes], dtype=kind).unbind(dim=1)
            names = ("index", "target" if model.is_regression else "label", "predicted")
            save_tensors(run.path / OUTCOMES, dict(zip(names, columns, strict=True)))
        run.update_provenance({"steps": loop.total_steps})
        records = run.records()
        draw_curves(run, records)
        held_out = None
        if metrics and model.preprocess is not None:
            split = list(loop.evaluations)[-1]
            held_out = HeldOut(source.splits[split], outcomes, model.preprocess.pixel_format)
        page = partial(run_page, run, records, result.to_json(), source, held_out)
        write_report(run.path / REPORT_FILE, page, loop.watch)
        run.finish(result.to_json())
    accelerator.wait_for_everyone()
    return result


def last_training_metrics(run: Run) -> dict[str, float]:
    """The training metrics of the last record."""
    for record in reversed(run.records()):
        if "train/loss" in record:
            return {k: v for k, v in record.items() if k.startswith("train/")}
    return {}
