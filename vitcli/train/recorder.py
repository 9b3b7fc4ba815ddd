"""Records of a run: metrics.jsonl and the progress bar."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vitcli.config.schema import Recipe
from vitcli.data.loader import TrainLoader
from vitcli.devices import peak_memory
from vitcli.errors import VitcliError
from vitcli.progress import Bar, Watcher
from vitcli.run import Run
from vitcli.train.agreement import mean_over_processes
from vitcli.train.checkpoint import non_finite_error
from vitcli.train.meters import (
    AverageMeter,
    Mark,
    WaitTimer,
    is_filling_cache,
    mark,
    seconds_between,
    slow_data_warning,
)
from vitcli.train.trackers import Track

# A scaler halves its factor whenever fp16 gradients overflow, and skips the step. Below this value,
# that of fairseq, the run ends; otherwise it would skip every step.
MIN_LOSS_SCALE = 1e-4


@dataclass(frozen=True)
class Interval:
    """The steps between two records, whose figures may still be on their way from the device.

    Attributes:
        step, lr: of the last step.
        meter: the number of steps, and when they began.
        sums: (M,) of the metrics; valid after `ended`.
        marks: of the `WaitTimer`.
    """

    step: int
    lr: float
    meter: AverageMeter
    sums: Tensor
    ended: Mark
    marks: list[tuple[Mark, Mark, Mark]]
    memory_mb: int
    is_full_image: bool

    @property
    def steps(self) -> int:
        """The number of steps."""
        return self.meter.steps

    def means(self) -> dict[str, float]:
        """The mean of each metric; call it when `ended` is passed."""
        found = zip(self.meter.sums, self.sums.tolist(), strict=True)
        return {name: total / self.steps for name, total in found}


@dataclass
class Recorder:
    """Averages the metrics of steps, and writes them as records.

    Attributes:
        track: receives every record as well, if a tracker is open (`tracking`).
        peak_flops: of this machine, all processes together; None if not measured.
        flops_per_image: of a forward and backward pass; 0 if unknown, and then there is no `mfu`.
        first_step, lr: where counting started, and the rate of the last step.
    """

    recipe: Recipe
    run: Run
    accelerator: Any
    watch: Watcher
    loader: TrainLoader
    track: Track | None = None
    peak_flops: float | None = None
    flops_per_image: float = 0.0
    first_step: int = 0
    lr: float = 0.0
    meter: AverageMeter = field(init=False)
    timer: WaitTimer = field(init=False)
    _pending: deque["Interval"] = field(default_factory=deque)
    _warned: bool = False

    def __post_init__(self) -> None:
        self.start(0)

    def start(self, step: int) -> None:
        """Start to count at `step`."""
        self.first_step = step
        self.timer = WaitTimer(self.accelerator.device)
        self.meter = AverageMeter(mark(self.accelerator.device))
        self._pending.clear()

    def log(self, record: dict[str, Any]) -> None:
        """Write a record to metrics.jsonl and to the tracker."""
        if self.accelerator.is_main_process:
            self.run.log(record)
            if self.track is not None:
                self.track(record)

    def log_evaluation(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a held-out split after `step` steps."""
        self.log({"step": step, **{f"{split}/{name}": value for name, value in metrics.items()}})

    def add(self, metrics: dict[str, Tensor], lr: float) -> None:
        """Add the metrics and the rate of a step."""
        self.meter.add(metrics)
        self.lr = lr
        self.timer.step_done()

    def log_training(self, step: int, bar: Bar, is_full_image: bool, wait: bool = True) -> None:
        """Log the mean metrics since the last record, and show them beside the progress bar.

        Args:
            is_full_image: `flops_per_image` holds for this step, so it has an `mfu`.
            wait: write the record now. Otherwise, on a GPU, it is written at the next call: the
                figures arrive meanwhile, and the loop does not wait for the GPU.
        """
        meter, device = self.meter, self.accelerator.device
        sums = meter.copy_sums()  # before the mark, which waits for the copy too
        self._pending.append(
            Interval(
                step,
                self.lr,
                meter,
                sums,
                mark(device),
                self.timer.take(),
                round(peak_memory(device) / 2**20),
                is_full_image,
            )
        )
        self.meter = AverageMeter(mark(device))
        while len(self._pending) > (0 if wait or not self.runs_ahead else 1):
            self._write(self._pending.popleft(), bar)

    @property
    def runs_ahead(self) -> bool:
        """True if steps are queued on the device, and the program goes on meanwhile."""
        return bool(self.accelerator.device.type == "cuda")

    def _write(self, interval: "Interval", bar: Bar) -> None:
        """Wait for the figures of an interval, check them and write the record."""
        batch_size, step, num_steps = self.recipe.train.batch_size, interval.step, interval.steps
        seconds = seconds_between(interval.meter.started, interval.ended)
        # Means over all processes, so that all of them see a loss that is not finite and stop.
        metrics = mean_over_processes(self.accelerator, interval.means())
        images_per_second = num_steps * batch_size / seconds
        # Before the record is written: a run that rewinds repeats these steps.
        # Every metric counts: an objective of two terms may report one of them as its loss.
        for name in sorted(metrics, key=lambda name: name != "loss"):
            if not math.isfinite(metrics[name]):
                steps = f"steps {step - num_steps + 1} to {step}"
                text = f"the {name} is not finite ({metrics[name]}) in {steps}"
                raise non_finite_error(text, self.run.checkpoints)
        times = self.timer.read(interval.marks)
        waits = {"data/wait_fraction": round(times.wait_fraction, 4)} if times.steps else {}
        used: dict[str, float] = {"memory_mb": interval.memory_mb, **self._loss_scale()}
        if self.peak_flops and self.flops_per_image and interval.is_full_image:
            used["mfu"] = round(images_per_second * self.flops_per_image / self.peak_flops, 4)
        self.log(
            {
                "step": step,
                "images": step * batch_size,
                "seconds": round(seconds, 4),
                **{f"train/{name}": value for name, value in metrics.items()},
                "lr": interval.lr,
                "images_per_second": round(images_per_second, 2),
                **used,
                **waits,
            }
        )
        self._warn_about_data((step - self.first_step) * batch_size)
        bar.advance(num_steps, **metrics, images_per_second=images_per_second, **used)

    def _loss_scale(self) -> dict[str, float]:
        """The factor on the loss in fp16, {} in other precisions.

        Raises:
            VitcliError: it fell below its minimum: the gradients overflow at any scale.
        """
        if (scaler := self.accelerator.scaler) is None:
            return {}
        scale = float(scaler.get_scale())
        if scale < MIN_LOSS_SCALE:
            raise VitcliError(
                f"the fp16 gradients overflow in every step, even with a loss scale of {scale:.1g}",
                "use `--precision bf16` or `--precision fp32`, or a lower `--lr`",
            )
        return {"loss_scale": scale}

    def _warn_about_data(self, seen: int) -> None:
        """Warn once if the model waits for images that could come faster."""
        times = self.timer.slow_window()
        # The first epoch may fill a cache of decoded images, and says nothing about later ones.
        if times is None or self._warned or is_filling_cache(self.loader, seen):
            return
        self._warned = True
        self.watch.warn(slow_data_warning(times, self.loader, str(self.recipe.data.name)))
