"""A learning-rate range test: the rate rises from step to step until the loss does too."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitcli.config.schema import Recipe
from vitcli.errors import VitcliError
from vitcli.files import replacing, write_text
from vitcli.progress import Watcher
from vitcli.run import Run
from vitcli.train.agreement import mean_over_processes, min_over_processes
from vitcli.train.budget import Timeline
from vitcli.train.build import MakeModel, build_loop, open_source, start_accelerator
from vitcli.train.loop import Loop
from vitcli.train.param_groups import set_lr

SECONDS = 40.0  # of steps; with the start it is less than a minute
FEWEST, MOST = 40, 200  # steps
WARM_STEPS, TIMED_STEPS = 1, 2
LOWEST, HIGHEST = 1e-3, 10**1.5  # of the recipe's own rate
WINDOW = 16  # of so many parts of the test the running mean looks at one
WORSE = 0.25  # of what was gained: when the loss has risen by so much again, it is over
NOISE = 0.03  # of the first loss: what says nothing
FOREVER = 10**9  # a timeline so long that every step lies at its beginning


@dataclass(frozen=True)
class FoundRate:
    """The outcome of a range test.

    Attributes:
        lr: what to try: where the smoothed loss falls fastest.
        matrix_lr: Muon's rate beside it; None under another optimizer.
        lowest: the rate with the smallest smoothed loss, beyond which it grew or the test ended.
        rates, losses, smoothed: of each step.
        given: the recipe's own rate.
        folder: holds the curve as `lr.png` and all of this as `lr.json`.
    """

    lr: float
    matrix_lr: float | None
    lowest: float
    given: float
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    seconds: float
    folder: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}


def find_rate(recipe: Recipe, make_model: MakeModel, *, out: Path, watch: Watcher) -> FoundRate:
    """Try rates from a thousandth to thirty times the recipe's, each for a step (Smith, 2017).

    Steps, batches, pictures and precision are those of the recipe's beginning; the weights are
    thrown away. All rates of a recipe rise together, Muon's with the others.

    Args:
        out: a new folder for the curve.

    Raises:
        VitcliError: bad input, or a loss that never falls.
    """
    began = time.monotonic()
    accelerator, _ = start_accelerator(recipe)
    source = open_source(recipe, watch)
    loop = build_loop(recipe, source, make_model, Run(out), accelerator, watch)
    loop.state.timeline = Timeline.of(FOREVER)
    factors, losses, smoothed = _climb(loop, watch)
    chosen, lowest = suggest_lr(factors, smoothed)
    scale = recipe.optim.rate_factor(recipe.train.batch_size)
    found = FoundRate(
        lr=chosen * recipe.optim.lr,
        matrix_lr=chosen * recipe.optim.matrix_lr if recipe.optim.name == "muon" else None,
        lowest=lowest * recipe.optim.lr,
        given=recipe.optim.lr,
        rates=tuple(f * recipe.optim.lr * scale for f in factors),
        losses=tuple(losses),
        smoothed=tuple(smoothed),
        seconds=round(time.monotonic() - began, 2),
        folder=str(out),
    )
    if accelerator.is_main_process:
        _keep(found, out)
    accelerator.wait_for_everyone()
    return found


def _climb(loop: Loop, watch: Watcher) -> tuple[list[float], list[float], list[float]]:
    """(factor on the rates, loss, running mean) of each step, until the loss has clearly risen."""
    loop.module.train()
    batch_size, state = loop.recipe.train.batch_size, loop.state
    scale = loop.recipe.optim.rate_factor(batch_size)
    set_lr(state.optimizers, 0.0)
    total, timer = MOST, time.perf_counter()
    factors: list[float] = []
    losses: list[float] = []
    with watch.progress("rates", total) as bar:
        batches = loop.loader.batches(0, WARM_STEPS + TIMED_STEPS + MOST)
        for number, batch in enumerate(batches):
            if number == WARM_STEPS:
                timer = time.perf_counter()
            if number < WARM_STEPS + TIMED_STEPS:
                loop.step(batch)
                continue
            if number == WARM_STEPS + TIMED_STEPS:
                fit = SECONDS * TIMED_STEPS / (time.perf_counter() - timer)
                total = min_over_processes(loop.accelerator, min(MOST, max(FEWEST, int(fit))))
                bar.extend(total)
                for optimizer in state.optimizers:
                    optimizer.state.clear()
            factor = LOWEST * (HIGHEST / LOWEST) ** (len(factors) / (total - 1))
            set_lr(state.optimizers, factor * scale)
            seen = {name: float(value) for name, value in loop.step(batch).items()}
            state.step += 1
            loss = mean_over_processes(loop.accelerator, seen)["loss"]
            factors.append(factor)
            losses.append(loss)
            bar.advance(1, loss=loss)
            if len(factors) == total or is_over(losses, total):
                break
    return factors, losses, running_means(losses, total)


def running_means(losses: Sequence[float], total: int) -> list[float]:
    """Exponential means of the losses of a test of `total` steps, corrected for their beginning."""
    means, mean, keep = [], 0.0, 1.0 - WINDOW / max(total, 2 * WINDOW)
    for number, loss in enumerate(losses, start=1):
        mean = keep * mean + (1.0 - keep) * loss
        means.append(mean / (1.0 - keep**number))
    return means


def is_over(losses: Sequence[float], total: int) -> bool:
    """Whether the loss is no number any more, or has risen well above where it had fallen to."""
    if not math.isfinite(losses[-1]):
        return True
    if len(losses) < FEWEST // 2:
        return False
    means = running_means(losses, total)
    gained, lost = means[0] - min(means), means[-1] - min(means)
    return lost > WORSE * gained + NOISE * abs(means[0])


def suggest_lr(factors: Sequence[float], smoothed: Sequence[float]) -> tuple[float, float]:
    """(where the smoothed loss falls fastest with the logarithm of the rate, where it is lowest).

    Raises:
        VitcliError: it never falls.
    """
    finite = [i for i, mean in enumerate(smoothed) if math.isfinite(mean)]
    if not finite:
        raise VitcliError("the loss is not finite even at the smallest rate", "a lower `--lr`")
    lowest = min(finite, key=lambda i: smoothed[i])
    width = max(1, len(factors) // 20)
    falls = {
        i: smoothed[i - width] - smoothed[i + width]
        for i in range(width, lowest - width + 1)
        if i + width in finite
    }
    if not falls or max(falls.values()) <= 0:
        raise VitcliError(
            "the loss does not fall at any rate that was tried",
            "more images a step (`--batch-size`), or another `--lr` to start from",
        )
    return factors[max(falls, key=lambda i: falls[i])], factors[lowest]


def _keep(found: FoundRate, out: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "lr.json", json.dumps(found.to_json(), indent=2) + "\n")
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(found.rates, found.losses, color="0.75", linewidth=1.0, label="loss of a step")
    axes.plot(found.rates, found.smoothed, linewidth=2.0, label="running mean")
    scale = found.rates[0] / (LOWEST * found.given)
    for rate, style, color, label in (
        (found.lr, "--", "C2", f"falls fastest: {found.lr:.2g}"),
        (found.given, ":", "C3", f"the recipe: {found.given:g}"),
    ):
        axes.axvline(rate * scale, linestyle=style, color=color, label=label)
    axes.set_xscale("log")
    finite = [mean for mean in found.smoothed if math.isfinite(mean)]
    room = 0.1 * (max(finite) - min(finite))
    axes.set_ylim(min(finite) - room, max(finite) + room)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with replacing(out / "lr.png") as temporary:
        figure.savefig(temporary, format="png", dpi=110)
