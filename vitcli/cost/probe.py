"""A few real steps of a run on this machine: seconds per step, evaluation and writing."""

import os
import time
from pathlib import Path
from typing import Any

from vitcli.cost.plan import ProbeResult
from vitcli.cost.planned_run import PlannedRun
from vitcli.devices import matrix_peak, peak_memory
from vitcli.progress import Logged, Watcher
from vitcli.run import Run
from vitcli.train.agreement import max_over_processes
from vitcli.train.budget import stage_fractions, time_steps_and_reset
from vitcli.train.build import build_loop, held_out_images
from vitcli.train.loop import Loop
from vitcli.train.validate import eval_batch_size

MAX_STEPS = 1000
WARMUP_STEPS = 3  # they fill queues and caches, and allocate the state of the optimizers
MAX_EVAL_SECONDS = 1.5  # a slower evaluation batch is estimated, not measured
DISK_SPEED = 300e6  # bytes/s, assumed for writing a checkpoint


def unsaved_loop(planned: PlannedRun, accelerator: Any, watch: Watcher) -> Loop:
    """The training loop of `planned`, whose model has weights, without a run directory.

    Raises:
        VitcliError: as training itself would raise.
    """
    nowhere = Path(os.devnull)
    return build_loop(
        planned.recipe,
        planned.source,
        lambda _: planned.model,
        Run(nowhere),
        accelerator,
        Logged(watch, nowhere),
    )


def time_steps(loop: Loop, seconds: float, warmup: int = WARMUP_STEPS) -> tuple[float, ...]:
    """The mean seconds per step in each stage; takes about `seconds` for all stages together."""
    stages = stage_fractions(loop.recipe.train)
    limit = seconds / len(stages)
    found = []
    for position, _ in stages:
        start, end = time.perf_counter(), time.monotonic() + limit
        time_steps_and_reset(loop, position, 0.0, max_steps=1, warmup=0)
        # If one step takes half of the time, there is no time for warm-up steps. All processes
        # must agree, because each step averages gradients over all of them.
        slow = max_over_processes(loop.accelerator, int(time.perf_counter() - start > limit / 2))
        steps = {"max_steps": MAX_STEPS, "warmup": 0 if slow else warmup}
        found.append(time_steps_and_reset(loop, position, end, **steps))
    return tuple(found)


def probe(planned: PlannedRun, loop: Loop, seconds: float, startup: float) -> ProbeResult:
    """Measure steps for about `seconds`, and a part of the evaluation.

    Args:
        startup: seconds that the program needed before the first step.
    """
    device = loop.accelerator.device
    peak = matrix_peak(device, planned.precision)
    times = time_steps(loop, seconds)
    parameters = sum(p.numel() for p in planned.model.network.parameters())
    images, last = held_out_images(planned.source)
    evaluation = _evaluation_seconds(planned, loop, times[-1])
    return ProbeResult(
        startup=startup,
        steps=times,
        evaluation=evaluation,
        last_evaluation=evaluation * last / images if images else 0.0,
        writing=0.5 + 3 * 4 * parameters / DISK_SPEED,
        peak_flops=peak * loop.accelerator.num_processes,
        memory=peak_memory(device) if device.type == "cuda" else None,
    )


def _evaluation_seconds(planned: PlannedRun, loop: Loop, step: float) -> float:
    """Seconds of a pass over the held-out split, measured on a part of it.

    If that is slow, a forward pass is assumed to take a third of a training step.
    """
    images = held_out_images(planned.source)[0]
    validate = next(iter(loop.evaluations.values()), None)
    if validate is None or not images:
        return 0.0
    per_image = step / planned.recipe.train.batch_size / 3
    size = eval_batch_size(loop.device)
    batch = per_image * min(images, size)
    if max_over_processes(loop.accelerator, int(batch > MAX_EVAL_SECONDS)):
        return per_image * images
    loop.wrapped.eval()
    few = min(images, size * loop.accelerator.num_processes)
    validate(loop.loaded, limit=few)  # warm-up
    start = time.perf_counter()
    validate(loop.loaded, limit=few)
    measured = time.perf_counter() - start
    loop.wrapped.train()
    return measured * images / few
