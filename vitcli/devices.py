"""Which device computes, and in which precision."""

import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch

from vitcli import distributed as launch
from vitcli.errors import VitcliError

Precision = Literal["fp32", "bf16", "fp16"]


def pick_device() -> torch.device:
    """The accelerator that torch sees, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    # Accelerate knows no way for several processes to share an Apple GPU.
    if torch.backends.mps.is_available() and launch.size() == 1:
        return torch.device("mps")
    return torch.device("cpu")


def join_processes(device: torch.device) -> Any:
    """Accelerate's `PartialState`: the place of this process among all of the command.

    Raises:
        VitcliError: there are more processes than GPUs.
    """
    from accelerate import PartialState

    if device.type == "cuda" and launch.local_size() > torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise VitcliError(
            f"{launch.local_size()} processes on {count} GPU{'s' if count > 1 else ''}",
            f"`--processes {count}`",
        )
    return PartialState(cpu=device.type == "cpu")


PROBE_SIZE = (1024, 384)  # rows and width of the products that are timed
PROBE_RUNS = 12
WORTH_IT = 1.2  # bf16 rounds more coarsely: it must be so many times as fast


@cache
def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are clearly faster than fp32 ones there.

    GPUs from Ampere on have units for it. On a CPU it is measured, in some milliseconds, because
    the flags do not tell: with the same `avx512_bf16` it is five times as fast as fp32 on one
    processor and half as fast on another (recipes/LOG.md).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine say nothing
    try:
        single, half = (_product(dtype) for dtype in (torch.float32, torch.bfloat16))
        pairs = [(_seconds(single), _seconds(half)) for _ in range(PROBE_RUNS)]
    finally:
        torch.set_num_threads(threads)
    return min(s for s, _ in pairs) > WORTH_IT * min(h for _, h in pairs)


def _product(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    rows, width = PROBE_SIZE
    x, w = torch.ones(rows, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
    return lambda: torch.nn.functional.linear(x, w)


def _seconds(work: Callable[[], torch.Tensor]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def resolve_precision(name: str, device: torch.device) -> Precision:
    """`auto` -> bf16 where it is fast, else fp32; other names are checked against the device.

    Raises:
        VitcliError: the device has no such precision.
    """
    if name == "auto":
        return "bf16" if has_fast_bf16(device) else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise VitcliError(
            "precision `fp16` needs a GPU", "take `--precision bf16`, or `auto`, on a CPU"
        )
    if name not in ("fp32", "bf16", "fp16"):
        raise VitcliError(f"no precision `{name}`", "`auto`, `fp32`, `bf16` or `fp16`")
    return name  # type: ignore[return-value]


PEAK_SIZE = {"cpu": 1024, "cuda": 8192}
PEAK_RUNS = 5


@cache
def matrix_peak(device: torch.device, precision: str) -> float:
    """Operations a second of large matrix products there, the best of a few: what MFU refers to.

    Measured in some hundredths of a second; two operations a multiply-add.
    """
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    size = PEAK_SIZE.get(device.type, 2048)
    x = torch.ones(size, size, dtype=dtypes[precision], device=device)

    def work() -> torch.Tensor:
        y = x @ x
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return y

    work()
    return 2.0 * size**3 / min(_seconds(work) for _ in range(PEAK_RUNS))


# The message of torch's allocator on a CPU. On a GPU torch raises an exception of its own.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """True if `error` says that the memory of the device is exhausted."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(s in str(error).lower() for s in OUT_OF_MEMORY)


def peak_memory(device: torch.device) -> int:
    """The most bytes allocated so far: on a GPU by torch, else by the process; 0 if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
