"""This machine, its parts and their measured speed."""

import io
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from vitcli.devices import synchronize
from vitcli.vit.blocks import attend_explicit, uses_explicit_attention

MATRIX_SIDE = 1024
RUNS = 5  # the best one counts
DISK_BYTES = 64 * 2**20
JPEG_SIZE = (1600, 1200)
# Images, heads, tokens and head width of an S/16 at 224 px.
ATTENTION_SHAPE = (8, 6, 197, 64)


def cpu_name() -> str:
    """The name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> float:
    """Cores that this process may use: its affinity, and the CPU share of a container."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return min(float(mine or 1), int(quota) / int(period))
    except (OSError, ValueError):  # not in a container, or without a limit
        return float(mine or 1)


def system_memory() -> tuple[int, int]:
    """(total bytes, bytes available to a new program), within the limit of a container."""
    memory = psutil.virtual_memory()
    total, available = int(memory.total), int(memory.available)
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8"))
        return min(total, limit), min(available, limit - used)
    except (OSError, ValueError):
        return total, available


def best_seconds(work: Callable[[], object]) -> float:
    """The seconds of the fastest of `RUNS` calls, after one warm-up call."""
    work()
    found = []
    for _ in range(RUNS):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def matmul_flops(dtype: torch.dtype, threads: int) -> float:
    """FLOP/s of large matrix products on the CPU; a multiply-add is two FLOPs."""
    before = torch.get_num_threads()
    x = torch.ones(MATRIX_SIDE, MATRIX_SIDE, dtype=dtype)
    torch.set_num_threads(threads)
    try:
        return 2.0 * MATRIX_SIDE**3 / best_seconds(lambda: x @ x)
    finally:
        torch.set_num_threads(before)


def attention_seconds(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of forward and backward pass of attention: `explicit` and torch's `fused` kernel.

    `chosen` is the one of both that the models use on this device.
    """
    q, k, v = (
        torch.randn(ATTENTION_SHAPE, device=device, dtype=dtype, requires_grad=True)
        for _ in range(3)
    )

    def timed(attention: Callable[..., Tensor]) -> float:
        def work() -> None:
            attention(q, k, v).sum().backward()  # type: ignore[no-untyped-call]
            synchronize(device)

        return best_seconds(work)

    fused = timed(torch.nn.functional.scaled_dot_product_attention)
    explicit = timed(attend_explicit)
    return {
        "explicit": explicit,
        "fused": fused,
        "chosen": explicit if uses_explicit_attention(q) else fused,
    }


def gpu_facts() -> list[dict[str, Any]]:
    """Name, memory and capability of each GPU that torch sees."""
    found = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        found.append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    return found


def disk_rates(folder: Path) -> dict[str, float] | None:
    """Bytes/s written to the disk of `folder` and read back; None if it cannot be written.

    The system drops the file from its cache before the read, where it supports that.
    """
    block = os.urandom(2**20)
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            start = time.perf_counter()
            for _ in range(DISK_BYTES // len(block)):
                file.write(block)
            os.fsync(file.fileno())
            written = time.perf_counter() - start
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            start = time.perf_counter()
            while file.read(len(block)):
                pass
            read = time.perf_counter() - start
    except OSError:
        return None
    return {"write": DISK_BYTES / written, "read": DISK_BYTES / read}


def jpeg_rate() -> float:
    """JPEGs of 2 megapixels that one core decodes per second."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (JPEG_SIZE[1] // 8, JPEG_SIZE[0] // 8, 3))
    buffer = io.BytesIO()
    Image.fromarray(noise.astype(np.uint8)).resize(JPEG_SIZE).save(buffer, "JPEG", quality=85)

    def work() -> None:
        buffer.seek(0)
        Image.open(buffer).load()

    return 1.0 / best_seconds(work)


def pillow_features() -> dict[str, bool]:
    """Formats that the installed Pillow reads, and True for the fast JPEG library."""
    from PIL import features

    names = {"libjpeg_turbo": features.check_feature}
    names |= dict.fromkeys(("webp", "avif"), features.check)
    return {name: bool(check(name)) for name, check in names.items()}
