"""The device and the precision of a computation."""

import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch

from vitcli import distributed
from vitcli.errors import VitcliError, printable, unknown

Precision = Literal["fp32", "bf16", "fp16"]


_chosen: torch.device | None = None  # `--device` of this command


def available_devices() -> list[str]:
    """The names that `--device` takes on this machine."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{number}" for number in range(gpus))]
    return [*found, "mps"] if torch.backends.mps.is_available() else found


def choose_device(name: str | None) -> None:
    """Make `pick_device` return the device `name`; None restores the default.

    Raises:
        VitcliError: this machine has no such device, or several processes would share it.
    """
    global _chosen
    if name is None:
        _chosen = None
        return
    known = available_devices()
    if name not in known:
        raise VitcliError(
            f"this machine has no device `{printable(name)}`",
            f"use one of {', '.join(f'`{device}`' for device in known)}",
        )
    if (count := distributed.world_size()) > 1 and name not in ("cpu", "cuda"):
        raise VitcliError(
            f"`--device {name}` is one device, but there are {count} processes",
            "remove `--processes`, or use `--device cpu` or `--device cuda` (a GPU per process)",
        )
    _chosen = torch.device(name)
    if _chosen.type == "cuda" and _chosen.index is not None:
        torch.cuda.set_device(_chosen)  # libraries that say `cuda` mean this one too


def pick_device() -> torch.device:
    """The device that the user chose, else the GPU if PyTorch sees one, otherwise the CPU."""
    if _chosen is not None:
        return _chosen
    if torch.cuda.is_available():
        return torch.device("cuda")
    # Accelerate cannot share an Apple GPU between processes.
    if torch.backends.mps.is_available() and distributed.world_size() == 1:
        return torch.device("mps")
    return torch.device("cpu")


def join_processes(device: torch.device) -> Any:
    """Join the processes of this command: Accelerate's `PartialState`.

    Raises:
        VitcliError: there are more processes than GPUs.
    """
    from accelerate import PartialState

    if device.type == "cuda" and distributed.local_world_size() > torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise VitcliError(
            f"{distributed.local_world_size()} processes for {count} GPU{'s' if count > 1 else ''}",
            f"use `--processes {count}`",
        )
    state = PartialState(cpu=device.type == "cpu")
    if device.index is not None:
        state.device = device  # Accelerate says `cuda`; provenance.json names the GPU
    return state


PROBE_SIZE = (1024, 384)  # (rows, width) of the timed matrix product
PROBE_RUNS = 12
WORTH_IT = 1.2  # bf16 is less precise, so it must be at least this much faster


@cache
def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are clearly faster than fp32 on `device`.

    GPUs have bf16 units since Ampere. On a CPU it is measured in a few milliseconds, because the
    CPU flags are no guide: with the same `avx512_bf16`, bf16 is five times as fast as fp32 on one
    processor and half as fast on another (recipes/LOG.md).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, waiting threads distort the timing
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
    """Resolve `auto` to bf16 if it is fast, else fp32, and check other names.

    Raises:
        VitcliError: the precision is unknown, or the device does not support it.
    """
    if name == "auto":
        return "bf16" if has_fast_bf16(device) else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise VitcliError(
            "precision `fp16` needs a GPU", "on a CPU use `--precision bf16` or `--precision auto`"
        )
    if name not in ("fp32", "bf16", "fp16"):
        raise unknown("precision", name, ("auto", "fp32", "bf16", "fp16"))
    return name  # type: ignore[return-value]


PEAK_SIZE = {"cpu": 1024, "cuda": 8192}
PEAK_RUNS = 5
PEAK_SECONDS = 1.0


@cache
def matrix_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of large matrix products on `device`: the reference of the MFU.

    The best of a few runs; two operations per multiply-add. A slow machine makes fewer runs: bf16
    takes seconds on a processor without instructions for it.
    """
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    size = PEAK_SIZE.get(device.type, 2048)
    x = torch.ones(size, size, dtype=dtypes[precision], device=device)

    def work() -> torch.Tensor:
        y = x @ x
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return y

    times: list[float] = []
    while len(times) <= PEAK_RUNS and sum(times) < PEAK_SECONDS:  # the first one warms up
        times.append(_seconds(work))
    return 2.0 * size**3 / min(times)


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
