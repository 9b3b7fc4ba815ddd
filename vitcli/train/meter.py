"""Means of what a few steps reported, and what the machine gives for them."""

import sys
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor


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


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that the device's allocator held; on a CPU, that the process occupied."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
