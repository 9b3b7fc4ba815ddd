"""The device and the precision of a computation."""

import os
import shutil
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from vitcli import distributed
from vitcli.errors import VitcliError, printable, unknown

Precision = Literal["fp32", "bf16", "fp16"]


_chosen: torch.device | None = None  # `--device` of this command


class UnusedGpuWarning(UserWarning):
    """This machine has a GPU that PyTorch cannot use."""


def sees_gpu() -> bool:
    """True if PyTorch can use an NVIDIA or AMD GPU."""
    with warnings.catch_warnings():  # torch warns of an old driver; `cuda_fault` has the reason
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


def cuda_fault() -> str:
    """Why PyTorch sees no GPU, in words."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:  # the text names the version of the driver
        return str(error).partition("Please ")[0].strip().rstrip(".") or "CUDA cannot start"
    return f"PyTorch {torch.__version__} sees no GPU"


def hides_gpu() -> bool:
    """True if this machine seems to have an NVIDIA GPU, and PyTorch does not see it."""
    return not sees_gpu() and shutil.which("nvidia-smi") is not None


@cache
def warn_of_unused_gpu() -> None:
    """Warn, once, if PyTorch does not see the GPU of this machine and the user did not hide it."""
    if hides_gpu() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        text = f"{cuda_fault()}, so the CPU computes; `vitcli doctor` shows what to do"
        warnings.warn(text, UnusedGpuWarning, stacklevel=3)


def _no_device(name: str) -> str:
    """The reason why this machine lacks a device that others have, or nothing."""
    if name == "mps":
        built = torch.backends.mps.is_built()
        return ": PyTorch sees no Apple GPU" if built else ": this PyTorch is built without MPS"
    if not name.startswith("cuda"):
        return ""
    if not sees_gpu():
        return f": {cuda_fault()}"
    count = torch.cuda.device_count()
    return f": PyTorch sees {count} GPU{'s' * (count > 1)}"


def available_devices() -> list[str]:
    """The names that `--device` takes on this machine."""
    gpus = torch.cuda.device_count() if sees_gpu() else 0
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
            f"this machine has no device `{printable(name)}`{_no_device(name)}",
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
    if sees_gpu():
        return torch.device("cuda")
    # Accelerate cannot share an Apple GPU between processes.
    if torch.backends.mps.is_available() and distributed.world_size() == 1:
        return torch.device("mps")
    warn_of_unused_gpu()
    return torch.device("cpu")


def join_processes(device: torch.device) -> Any:
    """Join the processes of this command: Accelerate's `PartialState`.

    Raises:
        VitcliError: there are more processes than GPUs, or nothing connects them.
    """
    from accelerate import PartialState

    if device.type == "cuda" and distributed.local_world_size() > torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise VitcliError(
            f"{distributed.local_world_size()} processes for {count} GPU{'s' if count > 1 else ''}",
            f"use `--processes {count}`",
        )
    if device.type == "cuda" and distributed.world_size() > 1 and not _has_nccl():
        raise VitcliError(
            f"PyTorch {torch.__version__} has no NCCL, which connects the processes of GPUs",
            "use one process, `--device cpu`, or a PyTorch for Linux with CUDA",
        )
    state = PartialState(cpu=device.type == "cpu")
    if device.index is not None:
        state.device = device  # Accelerate says `cuda`; provenance.json names the GPU
    return state


def _has_nccl() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_nccl_available()


def allow_tf32(allowed: bool) -> None:
    """Let matrix products and convolutions of fp32 numbers use TF32, or not."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    # torch allows it for convolutions by default, which have 10 bits of the mantissa then.
    torch.backends.cudnn.allow_tf32 = allowed


def check_compiler(device: torch.device) -> None:
    """Check that torch.compile finds what it needs besides PyTorch itself.

    It generates C++ for a CPU. For a GPU, Triton compiles a small launcher in C. Both include
    Python.h, which distributions often have in a package of its own.

    Raises:
        VitcliError: there is no compiler, or no header of Python.
    """
    # On Windows the variables of Visual Studio name the compiler, and mps has its own.
    if sys.platform == "win32" or device.type not in ("cpu", "cuda"):
        return
    without = "or leave out `train.compile`"
    on_cpu = device.type == "cpu"
    clang = "clang++" if on_cpu else "clang"
    gcc = "g++" if on_cpu else "gcc"
    variable = "CXX" if on_cpu else "CC"
    # torch takes only one name on a CPU; Triton takes either.
    usual = ((clang,) if sys.platform == "darwin" else (gcc,)) if on_cpu else (gcc, clang)
    names = (os.environ[variable],) if os.environ.get(variable) else usual
    if not any(shutil.which(name) for name in names):
        raise VitcliError(
            f"`train.compile` needs the compiler {printable(' or '.join(names))}, "
            "which is not installed",
            f"install {usual[0]} (Debian and Ubuntu: `apt install build-essential`), or set "
            f"{variable}, {without}",
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if sys.platform == "linux" and not header.is_file():
        python = f"python{sys.version_info.major}.{sys.version_info.minor}"
        raise VitcliError(
            f"`train.compile` needs the header {header}, which does not exist",
            f"install the headers (Debian and Ubuntu: `apt install {python}-dev`), {without}",
        )


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


def _seconds(work: Callable[[], object]) -> float:
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
    # Random numbers: products of equal ones need less power, and a GPU then has a higher clock.
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(size, size, device=device, generator=generator).to(dtypes[precision])

    def work(x: torch.Tensor = x) -> None:
        x @ x
        synchronize(device)

    times: list[float] = []
    while len(times) <= PEAK_RUNS and sum(times) < PEAK_SECONDS:  # the first one warms up
        times.append(_seconds(work))
    del x, work
    free_memory(device)
    if device.type == "cuda":  # `peak_memory` is that of the run, without this measurement
        torch.cuda.reset_peak_memory_stats(device)
    return 2.0 * size**3 / min(times)


# The message of torch's allocator on a CPU. On a GPU torch raises an exception of its own.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "_alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """True if `error` says that the memory of the device is exhausted."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(s in str(error).lower() for s in OUT_OF_MEMORY)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU, which works behind the program, has done everything so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def free_memory(device: torch.device) -> None:
    """Give the memory that torch's allocator holds for later back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


class FittingForward:
    """A forward pass that continues with parts of a batch when memory runs out.

    Only for passes whose rows do not depend on each other.
    """

    def __init__(self, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.forward = forward
        self.size: int | None = None  # images that fit, once memory has run out

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(B, ...) -> (B, ...)."""
        while True:
            size = max(1, min(self.size or len(images), len(images)))
            try:
                parts = [self.forward(part) for part in torch.split(images, size)]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            except Exception as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
            # Not in the handler: there the exception still holds the tensors of the failed pass.
            parts, self.size = [], size // 2
            free_memory(images.device)


# The beginning of what CUDA and NCCL say -> what to do; the message of torch follows it.
DEVICE_FAULTS = {
    "no kernel image is available": "this PyTorch has no kernels for this GPU: install one that "
    "has, or use `--device cpu`",
    "driver on your system is too old": "update the NVIDIA driver, install a PyTorch for an older "
    "CUDA, or use `--device cpu`",
    "driver version is insufficient": "update the NVIDIA driver, install a PyTorch for an older "
    "CUDA, or use `--device cpu`",
    "ECC error": "`nvidia-smi` shows the state of the GPU; `--resume` continues a training run",
    "busy or unavailable": "another program uses this GPU: wait for it, or use another `--device`",
    "NCCL": "see the lines of NCCL with `NCCL_DEBUG=WARN`; one process does not need it",
}


def device_fault(error: BaseException) -> VitcliError | None:
    """The error for a fault of the GPU or of its driver; None for other exceptions."""
    text = str(error)
    hint = next((hint for sign, hint in DEVICE_FAULTS.items() if sign in text), None)
    if hint is None or not isinstance(error, RuntimeError):
        return None
    return VitcliError(text.strip().splitlines()[0], hint)


def peak_memory(device: torch.device) -> int:
    """The most bytes allocated so far: on a GPU by torch, else by the process; 0 if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
