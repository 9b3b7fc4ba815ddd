"""The only training loop.

What an update computes is a function of the weights, the seed and the step: the order of the
images, their augmentation and the dropout masks come from (seed, position), never from a generator
that lives on. So a run that resumes from step n does what it would have done.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitcli.config.schema import Recipe
from vitcli.data.augment.mixing import soft_targets
from vitcli.data.batch import Batch, onto
from vitcli.data.loader import TrainLoader
from vitcli.data.stream_loader import StreamLoader
from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.progress import Watcher
from vitcli.run import Run
from vitcli.train.budget import Deadline, Timeline
from vitcli.train.checkpoint import (
    Team,
    TrainState,
    amend_checkpoint,
    is_finite,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from vitcli.train.data_wait import Pace, is_filling, warning
from vitcli.train.meter import Meter, peak_memory
from vitcli.train.oom import fitting
from vitcli.train.optimizers.registry import set_rates
from vitcli.train.schedules import schedule_factor
from vitcli.train.signals import AtOnce, SignalFlag, Stopped
from vitcli.train.validate import Outcome

__all__ = ["Loop", "SignalFlag", "Stopped", "Validate", "averaged"]

CHECKPOINT_SECONDS = 60.0
MOST_REWINDS, REWIND_FACTOR = 3, 0.5
TIME_IS_UP = 1 + max(signal.Signals)  # among the numbers of signals that processes agree on
NOTHING = -(2**62)  # stands for None there, below whatever else is agreed on

Validate = Callable[..., dict[str, float]]
Track = Callable[[dict[str, Any]], None]


class NotFinite(VitcliError):
    """The loss or the weights are not finite any more."""


@dataclass
class Loop:
    """One training run in progress.

    Attributes:
        module: the prepared objective, whose call gives (loss, figures).
        state: what a checkpoint holds; its module and optimizers are the unwrapped ones.
        optimizers: the prepared ones, which skip a step whose fp16 gradients overflowed.
        accelerator: accelerate's.
        validate: figures of a held-out split; called every `eval_steps` and at the end.
        outcomes: what it predicted of each image when it was called last.
        deadline: of a run with a budget.
        track: is given every record that is logged.
        peak_flops: of this machine, all processes together, for `mfu`; None where not measured.
        flops_per_image: of forward and backward pass; 0 where not known, and then no `mfu`.
    """

    module: nn.Module
    state: TrainState
    optimizers: Sequence[Any]
    loader: TrainLoader | StreamLoader
    preprocess: Preprocess
    recipe: Recipe
    run: Run
    accelerator: Any
    watch: Watcher
    validate: Validate | None = None
    outcomes: list[Outcome] = field(default_factory=list)
    eval_steps: int | None = None
    deadline: Deadline | None = None
    track: Track | None = None
    peak_flops: float | None = None
    flops_per_image: float = 0.0
    settled: bool = False
    told: bool = False
    fitted: set[tuple[Any, ...]] = field(default_factory=set)

    @property
    def timeline(self) -> Timeline:
        """How long the run is."""
        return self.state.timeline

    @property
    def total_steps(self) -> int:
        """The steps of the whole run, as they stand."""
        return self.timeline.total

    def fit(self) -> None:
        """Train from `state.step` to `total_steps`.

        Raises:
            Stopped: a signal asked for it; the state is saved.
            VitcliError: the loss is not finite, or a checkpoint cannot be written.
        """
        rewinds = self.recipe.train.on_nan == "rewind"
        if rewinds and not list_checkpoints(self.run.checkpoints):
            self.save()  # there must be something to go back to
        with SignalFlag() as flag:
            while True:
                try:
                    self._train(flag)
                    self.save()
                    break
                except NotFinite as error:
                    if not rewinds:
                        raise
                    self._rewind(error)

    def _train(self, flag: SignalFlag) -> None:
        state, train = self.state, self.recipe.train
        meter = Meter()
        pace, first = Pace(self.accelerator.device), state.step
        saved = time.monotonic()
        # A budget may make it more steps than are known now; the loader is asked for enough.
        todo = self.total_steps - state.step if self.deadline is None else 10**9
        self.module.train()
        if state.step >= self.total_steps:
            return
        with self.watch.progress("train", self.total_steps, state.step) as bar:
            batches = self.loader.batches(state.step * train.batch_size, todo)
            for batch in pace.over(onto(batches, self.accelerator.device)):
                place = self.timeline.at(state.step)
                factor = schedule_factor(self.recipe.schedule, place, self.timeline.planned)
                factor *= state.lr_scale * self.recipe.optim.rate_factor(train.batch_size)
                set_rates(state.optimizers, factor)
                meter.add(self.update(batch))
                state.step += 1
                if state.ema is not None:
                    state.ema.update(state.module, state.step)
                pace.done()
                stop = self.agree(self._asked(flag))
                if stop == TIME_IS_UP:
                    self.timeline.settle(state.step, state.step)
                last = state.step >= self.total_steps
                ends = last or (stop is not None and stop != TIME_IS_UP)
                save = self._due(saved) or ends
                evaluate = bool(self.eval_steps) and state.step % (self.eval_steps or 1) == 0
                if state.step % train.log_steps == 0 or save or evaluate:
                    figures = self._record(meter, factor, pace)
                    self._tell_of(pace, (state.step - first) * train.batch_size)
                    bar.advance(meter.steps, **figures)
                    meter = Meter()
                if stop != TIME_IS_UP and self._resettled():
                    bar.extend(self.total_steps)
                    last = state.step >= self.total_steps
                if last:
                    return
                if save:
                    self.save()
                    saved = time.monotonic()
                if ends and stop is not None:
                    raise Stopped(stop, state.step, str(self.run.path))
                if evaluate:
                    bar.advance(0, **self._evaluate_between(flag))

    def _asked(self, flag: SignalFlag) -> int | None:
        """The signal that came, or that the time is up."""
        if flag.received is not None:
            return flag.received
        up = self.deadline is not None and self.deadline.is_up()
        return TIME_IS_UP if up else None

    def _resettled(self) -> bool:
        """Whether the machine's speed made it another number of steps."""
        if self.deadline is None or not self.deadline.is_due(self.timeline, self.state.step):
            return False
        # All processes make as many steps as the slowest of them has time for.
        total = self.least(self.deadline.total(self.timeline, self.state.step))
        if total == self.total_steps:
            return False
        self.timeline.settle(self.state.step, total)
        if self.accelerator.is_main_process:
            self.run.log({"step": self.state.step, "event": "settle", "steps": total})
        return True

    def _rewind(self, error: NotFinite) -> None:
        """Back to the last good state, with a lower rate from there.

        Raises:
            VitcliError: it has been done too often.
        """
        state, run = self.state, self.run
        found = list_checkpoints(run.checkpoints)
        if state.rewinds >= MOST_REWINDS or not found:
            raise VitcliError(
                f"{error.message}, after {state.rewinds} rewinds",
                "a lower `--lr`, a longer warm-up or `--set optim.grad_clip=1.0`",
            ) from None
        failed, rewinds, scale = state.step, state.rewinds + 1, state.lr_scale * REWIND_FACTOR
        left = self.total_steps - failed
        load_checkpoint(found[-1], state)
        if self.deadline is not None:  # the steps that there is time for are no more than before
            state.timeline.settle(state.step, state.step + left)
            self.deadline.forget()
        state.rewinds, state.lr_scale = rewinds, scale
        if self.accelerator.is_main_process:
            run.drop_records_after(state.step)
            record = {"step": state.step, "event": "rewind", "from": failed, "lr_scale": scale}
            run.log(record)
            amend_checkpoint(found[-1], state)  # a resume from here knows of it
        self.watch.warn(
            f"{error.message}: back to step {state.step}, with {scale:g} of the learning rate"
        )

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One optimizer step over this process's share of a batch."""
        self._fit_memory(batch)
        if not self.settled and self.accelerator.num_processes > 2:
            # DDP regroups the gradients after its first pass, and then three summands or more are
            # added in another order. A first pass for nothing, and resumed runs add as whole ones.
            self.gradients(batch)
        self.settled = True
        figures = fitting(self, batch, self.gradients)
        if self.recipe.optim.grad_clip is not None:
            self.accelerator.clip_grad_norm_(self.module.parameters(), self.recipe.optim.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        return figures

    def _fit_memory(self, batch: Batch) -> None:
        """Of several processes on GPUs: a pass by each alone, before they wait for each other.

        One that ran out of memory inside a common backward pass would leave the others waiting.
        """
        accelerator = self.accelerator
        stage = self._stage()
        if stage in self.fitted or accelerator.num_processes == 1:
            return
        self.fitted.add(stage)
        if accelerator.device.type == "cuda":
            fitting(self, batch, lambda part: self.gradients(part, alone=True))
            size = self.state.micro_batch or self.recipe.train.micro_batch_size
            self.state.micro_batch = self.least(size or len(batch.labels))

    def _stage(self) -> tuple[int | None, float]:
        """What decides the memory that a step takes, besides the recipe."""
        train, place = self.recipe.train, self.timeline.at(self.state.step)
        planned = self.timeline.planned
        return train.side_at(place, planned), train.patch_drop_at(place, planned)

    def gradients(self, batch: Batch, alone: bool = False) -> dict[str, Tensor]:
        """The gradients of a step, computed in as many parts as asked, and its figures."""
        train, state, accelerator = self.recipe.train, self.state, self.accelerator
        torch.manual_seed(step_seed(train.seed, state.step, accelerator.process_index))
        count = len(batch.labels)
        size = state.micro_batch or train.micro_batch_size or count
        model: Any = state.module.model
        side, model.patch_drop_rate = self._stage()
        figures: dict[str, Tensor] = {}
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for start in range(0, count, size):
            part = batch.part(start, min(start + size, count)).to(accelerator.device)
            share = len(part.labels) / count
            last = start + size >= count and not alone
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

    def evaluate(self, flag: SignalFlag | None = None) -> dict[str, float]:
        """Figures of the validation pass, logged; with averaged weights where there are.

        Raises:
            AtOnce: `flag` was given and noted a signal. Not with several processes, which would
                have to stop together.
        """
        if self.validate is None:
            return {}
        self.module.eval()
        alone = self.accelerator.num_processes == 1
        at_once = flag.at_once() if flag is not None and alone else nullcontext()
        # The last of the three, so that the weights are back in their place whenever it comes.
        with averaged(self.state), gathered(self.state.module), at_once:
            figures = self.validate()
        self.module.train()
        self._log({"step": self.state.step, **{f"test/{k}": v for k, v in figures.items()}})
        return {f"test_{name}": value for name, value in figures.items()}

    def _evaluate_between(self, flag: SignalFlag) -> dict[str, float]:
        """The same between two steps; a signal ends it, since it may take longer than one gives.

        Raises:
            Stopped: a signal came; the state is saved.
        """
        try:
            return self.evaluate(flag)
        except AtOnce as signalled:
            self.save()
            raise Stopped(signalled.number, self.state.step, str(self.run.path)) from None

    def save(self) -> None:
        """Write a checkpoint of the present step.

        Raises:
            NotFinite: there is nothing worth keeping, and what was kept before is.
        """
        if self.agree(int(not is_finite(self.state))):
            raise self._not_finite(
                f"the weights are not finite after step {self.state.step}, and no loss would be"
            )
        accelerator, keep = self.accelerator, self.recipe.train.keep_checkpoints
        parts = accelerator.num_processes if self.recipe.train.fully_shard else 1
        team = Team(accelerator.process_index, parts, accelerator.wait_for_everyone)
        save_checkpoint(self.run.checkpoints, self.state, keep, team)

    def _log(self, record: dict[str, Any]) -> None:
        """Into metrics.jsonl, and to whoever tracks the run."""
        if self.accelerator.is_main_process:
            self.run.log(record)
            if self.track is not None:
                self.track(record)

    def _record(self, meter: Meter, factor: float, pace: Pace) -> dict[str, float]:
        """Log the means since the last record.

        Raises:
            NotFinite: the loss is not finite.
        """
        train, step = self.recipe.train, self.state.step
        figures = self.mean(meter.read())
        seconds = time.perf_counter() - meter.started
        speed = meter.steps * train.batch_size / seconds
        if not math.isfinite(figures["loss"]):
            raise self._not_finite(
                f"the loss is not finite ({figures['loss']}) in steps {step - meter.steps + 1} "
                f"to {step}"
            )
        spent = pace.read()
        waits = {"data/wait_fraction": round(spent.fraction, 4)} if spent.steps else {}
        used: dict[str, float] = {"memory_mb": round(peak_memory(self.accelerator.device) / 2**20)}
        if self.peak_flops and self.flops_per_image and self._stage() == (None, 0.0):
            used["mfu"] = round(speed * self.flops_per_image / self.peak_flops, 4)
        self._log(
            {
                "step": step,
                "images": step * train.batch_size,
                "seconds": round(seconds, 4),
                **{f"train/{name}": value for name, value in figures.items()},
                "lr": self.recipe.optim.lr * factor,
                "images_per_second": round(speed, 2),
                **used,
                **waits,
            }
        )
        return {**figures, "images_per_second": speed, **used}

    def _not_finite(self, message: str) -> NotFinite:
        kept = f"the last checkpoint is kept in `{self.run.checkpoints}`; "
        return NotFinite(
            message,
            f"{kept if list_checkpoints(self.run.checkpoints) else ''}a lower `--lr`, a longer "
            "warm-up or `--set optim.grad_clip=1.0` usually mends it, and "
            "`--set train.on_nan=rewind` goes on by itself",
        )

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

    def mean(self, figures: dict[str, float]) -> dict[str, float]:
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
        mine = torch.tensor(NOTHING if value is None else value, device=self.accelerator.device)
        largest = int(self.accelerator.gather(mine[None]).max())
        return None if largest == NOTHING else largest

    def least(self, value: int) -> int:
        """The smallest of all processes' values."""
        largest = self.agree(-value)
        assert largest is not None
        return -largest


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
            learning = {name: parameters[name] for name in ema.tensors}
            self.kept = {name: p.detach().clone() for name, p in learning.items()}
            copy_into(learning, ema.tensors)

    def __exit__(self, *exc: object) -> None:
        if self.state.ema is not None:
            parameters = dict(self.state.module.named_parameters())
            copy_into({name: parameters[name] for name in self.kept}, self.kept)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """For the length of a block, what is outside of the blocks is whole, where it is shared out."""
    shared: Any = module if hasattr(module, "unshard") else None
    if shared is not None:
        shared.unshard()
    try:
        yield
    finally:
        if shared is not None:
            shared.reshard()


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
