"""A few real steps of a run on this machine, and what they say of the whole of it."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from vitcli.cost.plan import Speed, Subject
from vitcli.devices import matrix_peak, peak_memory
from vitcli.progress import Logged, Watcher
from vitcli.run import Run
from vitcli.train.agreement import max_over_processes
from vitcli.train.budget import seconds_per_step, stage_fractions
from vitcli.train.build import build_loop, held_out_images
from vitcli.train.loop import Loop
from vitcli.train.validate import EVAL_BATCH_SIZE

MOST_STEPS = 1000
WARM_STEPS = 3  # threads fill their queue, torch its caches, and the optimizers make their states
WHOLE_EVALUATION = (
    1.5  # seconds: a batch of the held-out split that is faster is evaluated in earnest
)
DISK_SPEED = 300e6  # bytes a second that writing a checkpoint is taken to reach


def loop_of(subject: Subject, accelerator: Any, watch: Watcher) -> Loop:
    """The loop of a run that is never saved: `subject.model` has weights.

    Raises:
        VitcliError: what `vitcli.train.session.train` would refuse.
    """
    nowhere = Path(os.devnull)
    return build_loop(
        subject.recipe,
        subject.source,
        lambda _: subject.model,
        Run(nowhere),
        accelerator,
        Logged(watch, nowhere),
    )


def step_times(loop: Loop, seconds: float, warm: int = WARM_STEPS) -> tuple[float, ...]:
    """The mean seconds of a step in each stage; about so many seconds are spent on all of them."""
    stages = stage_fractions(loop.recipe.train)
    found = []
    for place, _ in stages:
        enough = time.monotonic() + seconds / len(stages)
        first = time.perf_counter()
        # One slow step is enough to know that there is no time for several warm ones.
        seconds_per_step(loop, place, 0.0, max_steps=1, warmup=0)
        spent = time.perf_counter() - first
        slow = max_over_processes(
            loop.accelerator, int(spent > seconds / len(stages) / 2)
        )  # all processes together
        found.append(
            seconds_per_step(loop, place, enough, max_steps=MOST_STEPS, warmup=0 if slow else warm)
        )
    return tuple(found)


def probe(subject: Subject, loop: Loop, seconds: float, start: float) -> Speed:
    """Steps of each stage, a part of the evaluation, the machine's peak, and the memory.

    Args:
        seconds: for the steps; one of each stage is made however long it takes.
        start: that the program took to come so far, without what only a plan does.
    """
    device = loop.accelerator.device
    peak = matrix_peak(device, subject.precision)
    times = step_times(loop, seconds)
    return Speed(
        start=start,
        steps=times,
        evaluation=_evaluation(subject, loop, times[-1]),
        writing=0.5
        + 3 * 4 * sum(p.numel() for p in subject.model.network.parameters()) / DISK_SPEED,
        peak_flops=peak * loop.accelerator.num_processes,
        memory=peak_memory(device) if device.type == "cuda" else None,
    )


def _evaluation(subject: Subject, loop: Loop, step: float) -> float:
    """Seconds of a pass over the held-out split.

    By a part of it where that is quick; else a forward pass is a third of a training step.
    """
    images = held_out_images(subject.source)
    if loop.validate is None or not images:
        return 0.0
    rough = step / subject.recipe.train.batch_size / 3
    if max_over_processes(
        loop.accelerator, int(rough * min(images, EVAL_BATCH_SIZE) > WHOLE_EVALUATION)
    ):
        return rough * images
    loop.module.eval()
    few = min(images, EVAL_BATCH_SIZE * loop.accelerator.num_processes)
    loop.validate(limit=few)  # once to warm up
    start = time.perf_counter()
    loop.validate(limit=few)
    passed = time.perf_counter() - start
    loop.module.train()
    return passed * images / few


def base_memory() -> int:
    """Bytes that this process occupies now, once it has loaded all that a run loads; 0 unknown.

    Optimizers bring a compiler with them that they do not use, kernels their pages, and the curves
    at the end matplotlib: a small step is made, and a small picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layer = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.LayerNorm(64))
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.ones(256, 64)).sum().backward()
    optimizer.step()
    figure = Figure(figsize=(9.0, 3.2), layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    if not sys.platform.startswith("linux"):
        return peak_memory(torch.device("cpu"))
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def free_memory() -> int | None:
    """Bytes that are free on this machine; None where that is not known."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable")), None)
