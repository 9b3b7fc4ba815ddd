"""The only training loop. It reads top-down: `fit`, `step`, `gradients`.

An update is a function of the weights, the seed and the step: data order, augmentation and dropout
masks derive from (seed, step), never from a generator whose state lives on. Therefore a run that
resumes from step n computes exactly what it would have computed without the interruption.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitcli.config.schema import CUDA_GRAPHS, Recipe
from vitcli.data.augment.mixing import soft_targets
from vitcli.data.batch import Batch, downsample, move_to_device
from vitcli.data.loader import TrainLoader
from vitcli.devices import is_out_of_memory
from vitcli.progress import Bar, QuietBar, Watcher
from vitcli.run import Run
from vitcli.train.agreement import TIME_IS_UP, Decision, max_over_processes, min_over_processes
from vitcli.train.best_weights import SPLIT, BestWeights, catch_up, keep_best, stop_early
from vitcli.train.budget import Deadline, Timeline, compile_stages
from vitcli.train.checkpoint import (
    NonFiniteError,
    ShardWriter,
    TrainState,
    list_checkpoints,
    non_finite_error,
    rewind,
    save_checkpoint,
)
from vitcli.train.ema import averaged
from vitcli.train.fsdp import unsharded
from vitcli.train.micro_batch import fit_micro_batch, halve_micro_batch, micro_batch_size
from vitcli.train.objectives.class_losses import share_mean_weight
from vitcli.train.param_groups import set_lr
from vitcli.train.recorder import Recorder
from vitcli.train.schedules import schedule_factor, step_seed
from vitcli.train.signals import SignalFlag, SignalReceived, Stopped
from vitcli.train.validate import Outcome, Validation
from vitcli.weights.loaded import LoadedModel

CHECKPOINT_SECONDS = 60.0  # between two checkpoints, if `train.checkpoint_steps` is not set


@dataclass
class Loop:
    """A training run in progress.

    Attributes:
        wrapped: the objective as Accelerate wraps it; a call returns (loss, metrics).
        wrapped_optimizer: steps all optimizers, or none of them if fp16 gradients overflow.
        state: what a checkpoint holds: the objective and the optimizers without wrappers.
        loaded: the network inside the objective, with its labels and preprocessing.
        accelerator: the `accelerate.Accelerator`.
        evaluations: split -> what returns its metrics; the first runs every `eval_steps`.
        outcomes: the predictions of the last evaluation.
        deadline: of a run with a budget, else None.
        best: the best evaluation so far, if the recipe asks to keep its weights.
        saved_step: of the last checkpoint that this process wrote, or None.
        fitted_stages: those whose micro-batch several processes have agreed on.
    """

    wrapped: nn.Module
    wrapped_optimizer: Any
    state: TrainState
    loaded: LoadedModel
    loader: TrainLoader
    recipe: Recipe
    run: Run
    accelerator: Any
    watch: Watcher
    recorder: Recorder
    evaluations: Mapping[str, Callable[..., Validation]] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    eval_steps: int | None = None
    deadline: Deadline | None = None
    best: BestWeights | None = None
    saved_step: int | None = None
    _ddp_is_warm: bool = False
    _saved_at: float = 0.0
    fitted_stages: set[tuple[Any, ...]] = field(default_factory=set)

    @property
    def timeline(self) -> Timeline:
        """The length of the run."""
        return self.state.timeline

    @property
    def total_steps(self) -> int:
        """The number of steps of the whole run; a budget may change it."""
        return self.timeline.total

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return torch.device(self.accelerator.device)

    def fit(self) -> None:
        """Train from `state.step` to `total_steps` and write the last checkpoint.

        Raises:
            Stopped: a signal came; the state is saved.
            VitcliError: the loss is not finite, or a checkpoint cannot be written.
        """
        rewinds = self.recipe.train.on_nan == "rewind"
        if rewinds and not list_checkpoints(self.run.checkpoints):
            self.save()  # a rewind needs a checkpoint to go back to
        compile_stages(self)
        with SignalFlag() as signals:
            while True:
                try:
                    catch_up(self, self.best, signals)
                    with self._start() as bar:
                        for batch in self._batches():
                            lr, is_full_image = self._set_lr(), self.stage() == (None, 0.0)
                            self._count_step(self.step(batch), lr)
                            decision = self._decide(signals)
                            self._act(decision, is_full_image, bar, signals)
                            if self.state.step >= self.total_steps:
                                break
                    self.save()
                    return
                except NonFiniteError as error:
                    if not rewinds:
                        raise
                    self._rewind(error)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimizer step on this process's part of a batch; returns its metrics."""
        fit_micro_batch(self, batch)
        if not self._ddp_is_warm and self.accelerator.num_processes > 2:
            # DDP regroups its gradient buckets after the first pass. Three or more summands are
            # then added in another order, and sums of floats depend on it. With one pass for
            # nothing, resumed runs add in the same order as runs that were never interrupted.
            self.gradients(batch)
        self._ddp_is_warm = True
        metrics = self.gradients(batch)
        if self.recipe.optim.grad_clip is not None:
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.recipe.optim.grad_clip)
        self.wrapped_optimizer.step()
        return metrics

    def gradients(self, batch: Batch, alone: bool = False) -> dict[str, Tensor]:
        """Compute the gradients of a step, in micro-batches if asked; returns its metrics.

        If memory runs out, the micro-batch is halved and the step starts over. The result changes
        only by dropout masks, by the order of sums, and by what an objective computes over the
        micro-batch (`descriptors` standardises its targets). With `alone`, gradients are not
        averaged over the processes.
        """
        accelerator, num_images = self.accelerator, len(batch.labels)
        network: Any = self.loaded.network
        image_size, network.patch_drop_rate = self.stage()
        share_mean_weight(self.state.objective, batch, accelerator)
        while True:
            size = micro_batch_size(self, batch)
            metrics: dict[str, Tensor] = {}
            # Dropout masks are a function of (seed, step, process): a retry or a resume draws the
            # same ones.
            torch.manual_seed(
                step_seed(self.recipe.train.seed, self.state.step, accelerator.process_index)
            )
            self.wrapped_optimizer.zero_grad(set_to_none=True)
            if self.recipe.train.compile == CUDA_GRAPHS:  # may reuse the memory of the last step
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            try:
                for start in range(0, num_images, size):
                    part = batch.part(start, min(start + size, num_images)).to(self.device)
                    # Weighted by the images, as the last part may be smaller: the sum is the mean.
                    weight = len(part.labels) / num_images
                    # Averaging over processes is slow, and once, with the last part, is enough.
                    is_last = start + size >= num_images and not alone
                    with nullcontext() if is_last else accelerator.no_sync(self.wrapped):
                        images, targets = self.inputs(part)
                        images = downsample(images, image_size)
                        known = self.state.objective.known(part)
                        loss, values = self.wrapped(images, targets, *known)
                        accelerator.backward(loss * weight)
                    for name, value in values.items():
                        metrics[name] = metrics.get(name, 0.0) + value.detach() * weight
                return metrics
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # Not in the handler: there the exception still holds the tensors of the failed pass.
            halve_micro_batch(self, batch)

    def inputs(self, part: Batch) -> tuple[Tensor, Tensor]:
        """Normalised images (B, C, Y, X) and labels (B,); after mixing, targets (B, K)."""
        preprocess = self.loaded.preprocess
        assert preprocess is not None
        images = preprocess.normalize(part.images)
        if part.mix is None:
            return images, part.labels
        targets = soft_targets(part.labels, self.loaded.config.num_classes)
        return part.mix.images(images), part.mix.targets(targets)

    def _start(self) -> Bar:
        """Start to count, at the beginning of a run, after a resume or after a rewind."""
        self._saved_at = time.monotonic()
        self.recorder.start(self.state.step)
        self.wrapped.train()
        if self.state.step >= self.total_steps:  # resumed from the last checkpoint
            return QuietBar()
        return self.watch.progress("train", self.total_steps, self.state.step)

    def _batches(self) -> Iterator[Batch]:
        """The batches from `state.step` on, on the device; the loader seeks by images seen."""
        # A run with a budget may become longer than it is now, so it asks for more than enough.
        steps = self.total_steps - self.state.step if self.deadline is None else 10**9
        if self.state.step >= self.total_steps:
            return iter(())
        batches = self.loader.batches(self.state.step * self.recipe.train.batch_size, steps)
        return self.recorder.timer.over(move_to_device(batches, self.device))

    def _set_lr(self) -> float:
        """Set the rates of this step; returns the base rate."""
        position, planned = self.timeline.at(self.state.step), self.timeline.planned
        factor = schedule_factor(self.recipe.schedule, position, planned)
        factor *= self.state.lr_scale * self.recipe.optim.rate_factor(self.recipe.train.batch_size)
        set_lr(self.state.optimizers, factor)
        return self.recipe.optim.lr * factor

    def stage(self) -> tuple[int | None, float]:
        """(image size or None, patch dropout rate) of this step: they decide its memory."""
        train, planned = self.recipe.train, self.timeline.planned
        position = self.timeline.at(self.state.step)
        return train.side_at(position, planned), train.patch_drop_at(position, planned)

    def _count_step(self, metrics: dict[str, Tensor], lr: float) -> None:
        """Count the step that was made, and average its weights and metrics."""
        self.state.step += 1
        if self.state.ema is not None:
            self.state.ema.update(self.state.objective, self.state.step)
        self.recorder.add(metrics, lr)

    def _decide(self, signals: SignalFlag) -> Decision:
        """Decide what follows the step; all processes decide the same."""
        step, total = self.state.step, self.total_steps
        stop = max_over_processes(self.accelerator, self._stop_request(signals))
        if stop == TIME_IS_UP:
            self.timeline.replan(step, step)
        elif stop is None:
            self._replan()
        is_last = step >= self.total_steps
        number = None if stop == TIME_IS_UP else stop
        saves = self._checkpoint_is_due() or is_last or number is not None
        evaluates = self.eval_steps is not None and step % self.eval_steps == 0
        return Decision(
            signal=number,
            is_last=is_last,
            saves=saves,
            evaluates=evaluates,
            # A record belongs to every checkpoint and evaluation, so that a resume loses none.
            logs=step % self.recipe.train.log_steps == 0 or saves or evaluates,
            changes_length=self.total_steps != total,
        )

    def _act(self, decision: Decision, is_full_image: bool, bar: Bar, signals: SignalFlag) -> None:
        """Log, save, stop or evaluate; `fit` saves after the last step."""
        step = self.state.step
        if decision.logs:
            self.recorder.log_training(step, bar, is_full_image, decision.must_wait)
        if decision.changes_length:
            bar.extend(self.total_steps)
        if decision.signal is not None:  # in the last step too: the evaluation may take too long
            self.save()
            raise Stopped(decision.signal, step, str(self.run.path))
        if decision.is_last:
            return
        if decision.saves:
            self.save()
        if decision.evaluates:
            bar.advance(0, **self.evaluate_between_steps(signals))
            stop_early(self, self.best)
            bar.extend(self.total_steps)

    def _stop_request(self, signals: SignalFlag) -> int | None:
        """The number of a signal, or `TIME_IS_UP`; None to go on."""
        if signals.received is not None:
            return signals.received
        return TIME_IS_UP if self.deadline is not None and self.deadline.is_up() else None

    def _checkpoint_is_due(self) -> bool:
        if self.recipe.train.checkpoint_steps is not None:
            return self.state.step % self.recipe.train.checkpoint_steps == 0
        waited = time.monotonic() - self._saved_at > CHECKPOINT_SECONDS
        return max_over_processes(self.accelerator, int(waited)) == 1

    def _replan(self) -> None:
        """Adapt the number of steps to the measured speed."""
        if self.deadline is None or not self.deadline.is_due(self.timeline, self.state.step):
            return
        # All processes make as many steps as the slowest of them has time for.
        wanted = self.deadline.total(self.timeline, self.state.step)
        total = min_over_processes(self.accelerator, wanted)
        if total == self.total_steps:
            return
        self.timeline.replan(self.state.step, total)
        if self.accelerator.is_main_process:
            self.run.log({"step": self.state.step, "event": "settle", "steps": total})

    def evaluate(self, split: str, signals: SignalFlag | None = None) -> dict[str, float]:
        """Log and return metrics of a split, with averaged weights; signals may interrupt it."""
        self.wrapped.eval()
        # Several processes must stop together, so they finish the evaluation first.
        alone = self.accelerator.num_processes == 1
        interrupting = signals.interrupting() if signals is not None and alone else nullcontext()
        # `interrupting` is innermost: whenever a signal comes, the trained weights are put back.
        ema, objective = self.state.ema, self.state.objective
        with averaged(objective, ema), unsharded(objective), interrupting:
            metrics = self.measure(split, self.loaded)
        self.wrapped.train()
        if split == SPLIT:
            keep_best(self, self.best, metrics)
        self.recorder.log_evaluation(self.state.step, split, metrics)
        return metrics

    def measure(self, split: str, model: LoadedModel) -> dict[str, float]:
        """Metrics of `model` on a held-out split; its predictions become the `outcomes`."""
        found = self.evaluations[split](model)
        self.outcomes = found.outcomes
        return found.metrics

    def evaluate_between_steps(self, signals: SignalFlag) -> dict[str, float]:
        """Evaluate the first held-out split; a signal saves and raises `Stopped`."""
        # An evaluation may take longer than the time that a scheduler grants after SIGTERM.
        split = next(iter(self.evaluations), None)
        try:
            metrics = self.evaluate(split, signals) if split else {}
            figures = {f"{split}_{name}": value for name, value in metrics.items()}
            return {**figures, f"{split}_step": self.state.step} if split else figures
        except SignalReceived as received:
            self.save()
            raise Stopped(received.number, self.state.step, str(self.run.path)) from None

    def save(self) -> None:
        """Write a checkpoint; raises `NonFiniteError` for weights of NaN."""
        # A resume from such weights would fail again, and the good checkpoints would be gone.
        if max_over_processes(self.accelerator, int(not self.state.has_finite_weights())):
            text = f"the weights are not finite after step {self.state.step}"
            raise non_finite_error(text, self.run.checkpoints)
        accelerator, train = self.accelerator, self.recipe.train
        shards = accelerator.num_processes if train.fully_shard else 1
        writer = ShardWriter(accelerator.process_index, shards, accelerator.wait_for_everyone)
        save_checkpoint(self.run.checkpoints, self.state, train.keep_checkpoints, writer)
        self.saved_step, self._saved_at = self.state.step, time.monotonic()

    def _rewind(self, error: NonFiniteError) -> None:
        """Go back to the last checkpoint and continue with lower rates."""
        is_main, limited = self.accelerator.is_main_process, self.deadline is not None
        # With a budget there is no time to repeat the steps that are lost.
        rewind(self.state, self.run, error, is_main, limited)
        if self.deadline is not None:
            self.deadline.forget()
        if self.best is not None:
            self.best.forget_after(self.state.step)
        self.watch.warn(
            f"{error.message}: going back to step {self.state.step}, with "
            f"{self.state.lr_scale:g} of the learning rate"
        )
