"""The only training loop.

What an update computes is a function of the weights, the seed and the step: the order of the
images, their augmentation and the dropout masks come from (seed, position), never from a generator
that lives on. So a run that resumes from step n does what it would have done.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor, nn

from vitcli.config import Recipe
from vitcli.data.batch import Batch, onto
from vitcli.data.loader import TrainLoader
from vitcli.data.mix import soft_targets
from vitcli.data.stream_loader import StreamLoader
from vitcli.data.transforms import Preprocess
from vitcli.errors import VitcliError
from vitcli.run import Run
from vitcli.train.checkpoint import TrainState, save_checkpoint
from vitcli.train.optim import schedule_factor, set_rates
from vitcli.train.pace import Pace, is_filling, warning
from vitcli.watch import Watcher

CHECKPOINT_SECONDS = 60.0

Validate = Callable[[], dict[str, float]]


class Stopped(Exception):
    """The run was asked to stop by `signal`, and has saved its state at `step`."""

    def __init__(self, number: int, step: int, run: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}, state saved")
        self.number = number
        self.run = run


class SignalFlag:
    """Notes SIGTERM and Ctrl-C while its block runs; a second Ctrl-C acts at once."""

    received: int | None = None

    def __enter__(self) -> Self:
        self._old: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


@dataclass
class Meter:
    """Means of what the steps since the last record reported, summed where they were computed."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, figures: dict[str, Tensor]) -> None:
        """Take in the figures of one step."""
        for name, value in figures.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1

    def read(self) -> dict[str, float]:
        """The means."""
        return {name: float(value) / self.steps for name, value in self.sums.items()}


@dataclass
class Loop:
    """One training run in progress.

    Attributes:
        module: the prepared objective, whose call gives (loss, figures).
        state: what a checkpoint holds; its module and optimizers are the unwrapped ones.
        optimizers: the prepared ones, which skip a step whose fp16 gradients overflowed.
        accelerator: accelerate's.
        validate: figures of a held-out split; called every `eval_steps` and at the end.
    """

    module: nn.Module
    state: TrainState
    optimizers: Sequence[Any]
    loader: TrainLoader | StreamLoader
    preprocess: Preprocess
    recipe: Recipe
    total_steps: int
    run: Run
    accelerator: Any
    watch: Watcher
    validate: Validate | None = None
    eval_steps: int | None = None
    settled: bool = False
    told: bool = False

    def fit(self) -> None:
        """Train from `state.step` to `total_steps`.

        Raises:
            Stopped: a signal asked for it; the state is saved.
            VitcliError: the loss is not finite, or a checkpoint cannot be written.
        """
        state, train = self.state, self.recipe.train
        meter = Meter()
        pace, first = Pace(self.accelerator.device), state.step
        saved = time.monotonic()
        todo = self.total_steps - state.step
        self.module.train()
        with (
            SignalFlag() as flag,
            self.watch.progress("train", self.total_steps, state.step) as bar,
        ):
            batches = self.loader.batches(state.step * train.batch_size, todo)
            for batch in pace.over(onto(batches, self.accelerator.device)):
                factor = schedule_factor(self.recipe.schedule, state.step, self.total_steps)
                set_rates(state.optimizers, factor)
                meter.add(self.update(batch))
                state.step += 1
                if state.ema is not None:
                    state.ema.update(state.module, state.step)
                pace.done()
                last = state.step == self.total_steps
                stop = self.agree(flag.received)
                save = self._due(saved) or stop is not None
                if state.step % train.log_steps == 0 or last or save:
                    figures = self._record(meter, factor, pace)
                    self._tell_of(pace, (state.step - first) * train.batch_size)
                    bar.advance(meter.steps, **figures)
                    meter = Meter()
                if save and not last:
                    self.save()
                    saved = time.monotonic()
                if stop is not None and not last:
                    raise Stopped(stop, state.step, str(self.run.path))
                if self.eval_steps and state.step % self.eval_steps == 0 and not last:
                    bar.advance(0, **self.evaluate())
        self.save()

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One optimizer step over this process's share of a batch."""
        if not self.settled and self.accelerator.num_processes > 2:
            # DDP regroups the gradients after its first pass, and then three summands or more are
            # added in another order. A first pass for nothing, and resumed runs add as whole ones.
            self.gradients(batch)
        self.settled = True
        figures = self.gradients(batch)
        if self.recipe.optim.grad_clip is not None:
            self.accelerator.clip_grad_norm_(self.module.parameters(), self.recipe.optim.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        return figures

    def gradients(self, batch: Batch) -> dict[str, Tensor]:
        """The gradients of a step, computed in as many parts as asked, and its figures."""
        train, state, accelerator = self.recipe.train, self.state, self.accelerator
        torch.manual_seed(step_seed(train.seed, state.step, accelerator.process_index))
        count = len(batch.labels)
        size = train.micro_batch_size or count
        side = train.side_at(state.step, self.total_steps)
        figures: dict[str, Tensor] = {}
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for start in range(0, count, size):
            part = batch.part(start, min(start + size, count)).to(accelerator.device)
            share = len(part.labels) / count
            last = start + size >= count
            # Gradients are averaged over processes once, with the last part.
            with nullcontext() if last else accelerator.no_sync(self.module):
                images, targets = self.inputs(part)
                loss, seen = self.module(shrink(images, side), targets, part.factors)
                accelerator.backward(loss * share)
            for name, value in seen.items():
                figures[name] = figures.get(name, 0.0) + value.detach() * share
        return figures

    def inputs(self, part: Batch) -> tuple[Tensor, Tensor]:
        """Normalised images (B, C, Y, X) and labels (B,); mixed, where asked, and then (B, K)."""
        images = self.preprocess.normalize(part.images)
        if part.mix is None:
            return images, part.labels
        model: Any = self.state.module.model
        targets = soft_targets(part.labels, model.config.num_classes)
        return part.mix.images(images), part.mix.targets(targets)

    def evaluate(self) -> dict[str, float]:
        """Figures of the validation pass, logged; with averaged weights where there are."""
        if self.validate is None:
            return {}
        self.module.eval()
        with averaged(self.state):
            figures = self.validate()
        self.module.train()
        if self.accelerator.is_main_process:
            self.run.log({"step": self.state.step, **{f"test/{k}": v for k, v in figures.items()}})
        return {f"test_{name}": value for name, value in figures.items()}

    def save(self) -> None:
        """Write a checkpoint of the present step."""
        if self.accelerator.is_main_process:
            save_checkpoint(self.run.checkpoints, self.state, self.recipe.train.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _record(self, meter: Meter, factor: float, pace: Pace) -> dict[str, float]:
        """Log the means since the last record, and stop the run when the loss is not finite."""
        train, step = self.recipe.train, self.state.step
        figures = self._mean(meter.read())
        seconds = time.perf_counter() - meter.started
        speed = meter.steps * train.batch_size / seconds
        if not math.isfinite(figures["loss"]):
            raise VitcliError(
                f"the loss is not finite ({figures['loss']}) in steps {step - meter.steps + 1} "
                f"to {step}",
                f"the last checkpoint is kept in `{self.run.checkpoints}`; a lower `--lr`, a "
                "longer warm-up or `--set optim.grad_clip=1.0` usually mends it",
            )
        spent = pace.read()
        waits = {"data/wait_fraction": round(spent.fraction, 4)} if spent.steps else {}
        if self.accelerator.is_main_process:
            self.run.log(
                {
                    "step": step,
                    "images": step * train.batch_size,
                    "seconds": round(seconds, 4),
                    **{f"train/{name}": value for name, value in figures.items()},
                    "lr": self.recipe.optim.lr * factor,
                    "images_per_second": round(speed, 2),
                    **waits,
                }
            )
        return {**figures, "images_per_second": speed}

    def _tell_of(self, pace: Pace, seen: int) -> None:
        """Warn, once in a run, when the model waits for images that could come faster."""
        spent = pace.verdict()
        if spent is None or self.told or is_filling(self.loader, seen):
            return
        self.told = True
        self.watch.warn(warning(spent, self.loader, str(self.recipe.data.name)))

    def _due(self, saved: float) -> bool:
        """Whether a checkpoint is to be written after this step."""
        interval = self.recipe.train.checkpoint_steps
        if interval is not None:
            return self.state.step % interval == 0
        return self.agree(int(time.monotonic() - saved > CHECKPOINT_SECONDS)) == 1

    def _mean(self, figures: dict[str, float]) -> dict[str, float]:
        """The means over all processes, so that each draws the same conclusions."""
        if self.accelerator.num_processes == 1:
            return figures
        mine = torch.tensor([*figures.values()], device=self.accelerator.device).double()
        means = self.accelerator.reduce(mine, reduction="mean").tolist()
        return dict(zip(figures, means, strict=True))

    def agree(self, value: int | None) -> int | None:
        """The largest of all processes' values: they must save and stop at the same step."""
        if self.accelerator.num_processes == 1:
            return value
        mine = torch.tensor(-1 if value is None else value, device=self.accelerator.device)
        largest = int(self.accelerator.gather(mine[None]).max())
        return None if largest < 0 else largest


def shrink(images: Tensor, side: int | None) -> Tensor:
    """(B, C, Y, X) -> (B, C, S, S): averaged down to `side` pixels; None leaves them as they are.

    Most of what a small model learns of an image it learns at a quarter of the cost first (Touvron
    et al., 2019; Tan and Le, 2021).
    """
    if side is None:
        return images
    return torch.nn.functional.interpolate(
        images, size=(side, side), mode="bilinear", antialias=True, align_corners=False
    )


class averaged:
    """Puts the averaged weights into the module for the length of a block, where there are any."""

    def __init__(self, state: TrainState) -> None:
        self.state = state

    def __enter__(self) -> None:
        ema = self.state.ema
        if ema is not None:
            parameters = dict(self.state.module.named_parameters())
            self.kept = {name: p.detach().clone() for name, p in parameters.items()}
            copy_into(parameters, ema.tensors)

    def __exit__(self, *exc: object) -> None:
        if self.state.ema is not None:
            copy_into(dict(self.state.module.named_parameters()), self.kept)


@torch.no_grad()
def copy_into(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Overwrite parameters by name."""
    for name, p in parameters.items():
        p.copy_(values[name])


def step_seed(seed: int, step: int, process: int) -> int:
    """The seed of what is random inside update `step` (dropout, stochastic depth)."""
    # Odd multipliers of the splitmix64 and Weyl kind keep neighbours apart.
    mixed = seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + process * 0x94D049BB133111EB
    return mixed & 0x7FFF_FFFF_FFFF_FFFF
