"""Learning-rate range test (Smith, 2017): the rate rises in every step until the loss rises."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitcli.config.schema import Recipe
from vitcli.data.source import Source
from vitcli.errors import VitcliError
from vitcli.files import make_folder, writing
from vitcli.progress import Watcher
from vitcli.run import Run
from vitcli.train.agreement import mean_over_processes, min_over_processes
from vitcli.train.budget import Timeline
from vitcli.train.build import MakeModel, build_loop, open_source, start_accelerator
from vitcli.train.loop import Loop
from vitcli.train.param_groups import set_lr

TEST_SECONDS = 40.0  # with the start of the program it is less than a minute
MIN_STEPS, MAX_STEPS = 40, 200
WARMUP_STEPS, TIMED_STEPS = 1, 2
MIN_FACTOR, MAX_FACTOR = 1e-3, 10**1.5  # on the rate of the recipe
WINDOW = 16  # the running mean averages over 1/16 of the test
MAX_RISE = 0.25  # the test ends when the loss has risen by this fraction of what it had fallen
NOISE = 0.03  # fraction of the first loss that is noise
FOREVER = 10**9  # a timeline so long that every step is at its start: no warm-up, full images


@dataclass(frozen=True)
class FoundRate:
    """The result of a range test.

    Attributes:
        lr: the suggested rate, where the smoothed loss falls fastest.
        matrix_lr: the matching rate of Muon; None with another optimizer.
        lowest: the rate with the smallest smoothed loss.
        rates, losses, smoothed: the values of each step.
        given: the rate of the recipe.
        folder: contains the curve as `lr.png` and these values as `lr.json`.
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


def find_rate(
    recipe: Recipe,
    make_model: MakeModel,
    opened: Source | None = None,
    *,
    out: Path,
    watch: Watcher,
) -> FoundRate:
    """Try rates from 1/1000 to 30 times that of the recipe, each for one step.

    Batches, augmentation and precision are those at the start of the run; the weights are thrown
    away. All rates of a recipe rise together, that of Muon too.

    Args:
        opened: the data of the recipe, if they are open.
        out: a new folder for the curve.

    Raises:
        VitcliError: bad input, or a loss that does not fall at any rate.
    """
    began = time.monotonic()
    accelerator, _ = start_accelerator(recipe)
    source = open_source(recipe, watch, opened)
    loop = build_loop(recipe, source, make_model, Run(out), accelerator, watch)
    loop.state.objective.prepare(source, watch)
    loop.state.timeline = Timeline.of(FOREVER)
    factors, losses, smoothed = _run_test(loop, watch)
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
        _write(found, out)
    accelerator.wait_for_everyone()
    return found


def _run_test(loop: Loop, watch: Watcher) -> tuple[list[float], list[float], list[float]]:
    """(factors on the rates, losses, running means) of all steps until the loss clearly rises."""
    loop.wrapped.train()
    batch_size, state = loop.recipe.train.batch_size, loop.state
    scale = loop.recipe.optim.rate_factor(batch_size)
    set_lr(state.optimizers, 0.0)  # the timed steps move no weight
    total, timer = MAX_STEPS, time.perf_counter()
    factors: list[float] = []
    losses: list[float] = []
    with watch.progress("rates", total) as bar:
        batches = loop.loader.batches(0, WARMUP_STEPS + TIMED_STEPS + MAX_STEPS)
        for number, batch in enumerate(batches):
            if number == WARMUP_STEPS:
                timer = time.perf_counter()
            if number < WARMUP_STEPS + TIMED_STEPS:
                loop.step(batch)
                continue
            if number == WARMUP_STEPS + TIMED_STEPS:
                fit = TEST_SECONDS * TIMED_STEPS / (time.perf_counter() - timer)
                total = min_over_processes(
                    loop.accelerator, min(MAX_STEPS, max(MIN_STEPS, int(fit)))
                )
                bar.extend(total)
                for optimizer in state.optimizers:  # forget the timed steps
                    optimizer.state.clear()
            factor = MIN_FACTOR * (MAX_FACTOR / MIN_FACTOR) ** (len(factors) / (total - 1))
            set_lr(state.optimizers, factor * scale)
            seen = {name: float(value) for name, value in loop.step(batch).items()}
            state.step += 1
            means = mean_over_processes(loop.accelerator, seen)
            loss = means.get("objective", means["loss"])  # what the optimizer minimises
            factors.append(factor)
            losses.append(loss)
            bar.advance(1, loss=loss)
            if len(factors) == total or is_over(losses, total):
                break
    return factors, losses, running_means(losses, total)


def running_means(losses: Sequence[float], total: int) -> list[float]:
    """Exponential moving averages of the losses, with the bias correction of Adam."""
    means, mean, keep = [], 0.0, 1.0 - WINDOW / max(total, 2 * WINDOW)
    for number, loss in enumerate(losses, start=1):
        mean = keep * mean + (1.0 - keep) * loss
        means.append(mean / (1.0 - keep**number))
    return means


def is_over(losses: Sequence[float], total: int) -> bool:
    """True if the loss is not finite, or has risen well above its minimum."""
    if not math.isfinite(losses[-1]):
        return True
    if len(losses) < MIN_STEPS // 2:
        return False
    means = running_means(losses, total)
    fallen, risen = means[0] - min(means), means[-1] - min(means)
    return risen > MAX_RISE * fallen + NOISE * abs(means[0])


def suggest_lr(factors: Sequence[float], smoothed: Sequence[float]) -> tuple[float, float]:
    """(the factor where the smoothed loss falls fastest, the factor where it is lowest)."""
    finite = [i for i, mean in enumerate(smoothed) if math.isfinite(mean)]
    if not finite:
        raise VitcliError(
            "the loss is not finite even at the smallest rate", "start from a lower `--lr`"
        )
    lowest = min(finite, key=lambda i: smoothed[i])
    # A slope over a tenth of the test: neighbouring means differ by noise only.
    width = max(1, len(factors) // 20)
    # Steps are equally spaced on the logarithm of the rate, so a difference is a slope.
    falls = {
        i: smoothed[i - width] - smoothed[i + width]
        for i in range(width, lowest - width + 1)
        if i + width in finite
    }
    if not falls or max(falls.values()) <= 0:
        raise VitcliError(
            "the loss does not fall at any of the rates",
            "use a larger `--batch-size`, or start from another `--lr`",
        )
    return factors[max(falls, key=lambda i: falls[i])], factors[lowest]


def _write(found: FoundRate, out: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(found.rates, found.losses, color="0.75", linewidth=1.0, label="loss")
    axes.plot(found.rates, found.smoothed, linewidth=2.0, label="running mean")
    scale = found.rates[0] / (MIN_FACTOR * found.given)
    for rate, style, color, label in (
        (found.lr, "--", "C2", f"falls fastest: {found.lr:.2g}"),
        (found.given, ":", "C3", f"the recipe: {found.given:g}"),
    ):
        axes.axvline(rate * scale, linestyle=style, color=color, label=label)
    axes.set_xscale("log")
    finite = [mean for mean in found.smoothed if math.isfinite(mean)]
    # The last losses are huge and would flatten the curve, so the axis follows the running mean.
    room = 0.1 * (max(finite) - min(finite))
    axes.set_ylim(min(finite) - room, max(finite) + room)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    make_folder(out.parent)
    with writing(out) as temporary:
        temporary.mkdir()
        text = json.dumps(found.to_json(), indent=2) + "\n"
        (temporary / "lr.json").write_text(text, encoding="utf-8")
        figure.savefig(temporary / "lr.png", format="png", dpi=110)
