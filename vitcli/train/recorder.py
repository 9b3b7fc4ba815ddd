"""Records of a run: metrics.jsonl and the progress bar."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vitcli.config.schema import Recipe
from vitcli.data.loader import TrainLoader
from vitcli.devices import peak_memory
from vitcli.progress import Bar, Watcher
from vitcli.run import Run
from vitcli.train.agreement import mean_over_processes
from vitcli.train.checkpoint import non_finite_error
from vitcli.train.meters import (
    AverageMeter,
    WaitTimer,
    is_filling_cache,
    slow_data_warning,
)
from vitcli.train.trackers import Track


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
    meter: AverageMeter = field(default_factory=AverageMeter)
    timer: WaitTimer = field(init=False)
    _warned: bool = False

    def __post_init__(self) -> None:
        self.start(0)

    def start(self, step: int) -> None:
        """Start to count at `step`."""
        self.first_step = step
        self.timer = WaitTimer(self.accelerator.device)
        self.meter = AverageMeter()

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

    def log_training(self, step: int, bar: Bar, is_full_image: bool) -> None:
        """Log the mean metrics since the last record, and show them beside the progress bar.

        Args:
            is_full_image: `flops_per_image` holds for this step, so it has an `mfu`.
        """
        batch_size, meter = self.recipe.train.batch_size, self.meter
        # Means over all processes, so that all of them see a loss that is not finite and stop.
        metrics = mean_over_processes(self.accelerator, meter.means())
        seconds = time.perf_counter() - meter.started
        images_per_second = meter.steps * batch_size / seconds
        # Before the record is written: a run that rewinds repeats these steps.
        # Every metric counts: an objective of two terms may report one of them as its loss.
        for name in sorted(metrics, key=lambda name: name != "loss"):
            if not math.isfinite(metrics[name]):
                steps = f"steps {step - meter.steps + 1} to {step}"
                text = f"the {name} is not finite ({metrics[name]}) in {steps}"
                raise non_finite_error(text, self.run.checkpoints)
        times = self.timer.read()
        waits = {"data/wait_fraction": round(times.wait_fraction, 4)} if times.steps else {}
        used: dict[str, float] = {"memory_mb": round(peak_memory(self.accelerator.device) / 2**20)}
        if self.peak_flops and self.flops_per_image and is_full_image:
            used["mfu"] = round(images_per_second * self.flops_per_image / self.peak_flops, 4)
        self.log(
            {
                "step": step,
                "images": step * batch_size,
                "seconds": round(seconds, 4),
                **{f"train/{name}": value for name, value in metrics.items()},
                "lr": self.lr,
                "images_per_second": round(images_per_second, 2),
                **used,
                **waits,
            }
        )
        self._warn_about_data((step - self.first_step) * batch_size)
        bar.advance(meter.steps, **metrics, images_per_second=images_per_second, **used)
        self.meter = AverageMeter()

    def _warn_about_data(self, seen: int) -> None:
        """Warn once if the model waits for images that could come faster."""
        times = self.timer.slow_window()
        # The first epoch may fill a cache of decoded images, and says nothing about later ones.
        if times is None or self._warned or is_filling_cache(self.loader, seen):
            return
        self._warned = True
        self.watch.warn(slow_data_warning(times, self.loader, str(self.recipe.data.name)))
