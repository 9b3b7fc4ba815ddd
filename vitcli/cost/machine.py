"""What this machine is and how fast its parts are, in a few seconds.

Devices by name: what their makers say they can do at most, and how much of it training gets.
"""

import io
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitcli.errors import VitcliError, nearest
from vitcli.vit.blocks import attend_explicit, uses_explicit_attention

PRODUCT = 1024  # side of the matrices that are multiplied
RUNS = 5  # of which the best counts
DISK_BYTES = 64 * 2**20
PICTURE = (1600, 1200)
# Images, heads, tokens and head width of an S/16 at 224 pixels.
ATTENTION = (8, 6, 197, 64)


def cpu_name() -> str:
    """The processor's own name, where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> float:
    """Cores that this process may keep busy: its affinity, and a container's share of time."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return min(float(mine or 1), int(quota) / int(period))
    except (OSError, ValueError):  # no container, or one without a limit
        return float(mine or 1)


def memory_bytes() -> tuple[int | None, int | None]:
    """(all memory, what is free for a new program); None where the system does not tell."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        rows = dict(line.split(":", 1) for line in text.splitlines())
        total, free = (int(rows[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return None, None
    try:  # a container may have less than its machine
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8"))
        return min(total, limit), min(free, limit - used)
    except (OSError, ValueError):
        return total, free


def best_seconds(work: Callable[[], object], runs: int = RUNS) -> float:
    """The shortest of a few runs, after one that does not count."""
    work()
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def product_rate(dtype: torch.dtype, threads: int) -> float:
    """Operations a second of large matrix products on the CPU, two a multiply-add."""
    before = torch.get_num_threads()
    x = torch.ones(PRODUCT, PRODUCT, dtype=dtype)
    torch.set_num_threads(threads)
    try:
        return 2.0 * PRODUCT**3 / best_seconds(lambda: x @ x)
    finally:
        torch.set_num_threads(before)


def attention_seconds(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of attention, forward and backward, written out and by torch's kernel.

    `chosen` is the one of both that the models take there.
    """
    q, k, v = (
        torch.randn(ATTENTION, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
    )

    def timed(attention: Callable[..., Tensor]) -> float:
        def work() -> None:
            attention(q, k, v).sum().backward()  # type: ignore[no-untyped-call]
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return best_seconds(work)

    fused = timed(torch.nn.functional.scaled_dot_product_attention)
    explicit = timed(attend_explicit)
    return {
        "explicit": explicit,
        "fused": fused,
        "chosen": explicit if uses_explicit_attention(q) else fused,
    }


def gpus() -> list[dict[str, Any]]:
    """Name, memory and capability of each GPU that torch sees."""
    found = []
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        found.append(
            {
                "name": facts.name,
                "memory_bytes": facts.total_memory,
                "capability": f"{facts.major}.{facts.minor}",
            }
        )
    return found


def disk_rates(folder: Path) -> dict[str, float] | None:
    """Bytes a second written to the disk under `folder` and read back; None if it refuses.

    What is read has been dropped from memory before, where the system lets us ask for that.
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


def decode_rate() -> float:
    """JPEGs of two megapixels that one core decodes a second."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (PICTURE[1] // 8, PICTURE[0] // 8, 3))
    buffer = io.BytesIO()
    Image.fromarray(noise.astype(np.uint8)).resize(PICTURE).save(buffer, "JPEG", quality=85)

    def work() -> None:
        buffer.seek(0)
        Image.open(buffer).load()

    return 1.0 / best_seconds(work)


def pillow_features() -> dict[str, bool]:
    """What the Pillow that is installed can read, and whether its JPEG is the fast one."""
    from PIL import features

    names = {"libjpeg_turbo": features.check_feature}
    names |= dict.fromkeys(("webp", "avif"), features.check)
    return {name: bool(check(name)) for name, check in names.items()}


def load_average() -> float | None:
    """Processes that wanted to run, on average over the last minute."""
    return os.getloadavg()[0] if sys.platform != "win32" else None


TERA, GIGA = 1e12, 2**30
# The share of its peak that a device spends on the model (MFU). For GPUs an assumption, wide enough
# for well-fed training of ViTs in mixed precision: small models and slow data fall below it.
ASSUMED_MFU = (0.25, 0.5)
# TPUv3: what the paper's own figures imply. Exaflops of its table 6 over the core-days of its table
# 2 are 26.7 (L/16, JFT), 23.8 (L/16, ImageNet-21k) and 19.7 (H/14) TFLOP/s of 61.5 a core.
PAPER_MFU = (0.32, 0.44)


@dataclass(frozen=True)
class Hardware:
    """One device.

    Attributes:
        peak_flops: operations a second of dense bf16 (T4: fp16) products, without sparsity.
        memory: bytes.
        bandwidth: of its memory, bytes a second.
        source: where these figures stand.
        mfu: the least and the largest share of `peak_flops` that an estimate assumes.
    """

    name: str
    peak_flops: float
    memory: float
    bandwidth: float
    source: str
    mfu: tuple[float, float] = ASSUMED_MFU


HARDWARE = {
    "t4": Hardware("T4", 65 * TERA, 16 * GIGA, 320e9, "NVIDIA T4 datasheet (fp16)"),
    "l4": Hardware("L4", 121 * TERA, 24 * GIGA, 300e9, "NVIDIA L4 datasheet"),
    "rtx4090": Hardware(
        "RTX 4090", 165.2 * TERA, 24 * GIGA, 1008e9, "NVIDIA Ada whitepaper, fp32 accumulation"
    ),
    "a100": Hardware("A100 80GB SXM", 312 * TERA, 80 * GIGA, 2039e9, "NVIDIA A100 datasheet"),
    "h100": Hardware("H100 SXM", 989 * TERA, 80 * GIGA, 3350e9, "NVIDIA H100 datasheet"),
    "h200": Hardware("H200 SXM", 989 * TERA, 141 * GIGA, 4800e9, "NVIDIA H200 datasheet"),
    "tpuv3": Hardware(
        "TPUv3 core",
        61.5 * TERA,
        16 * GIGA,
        450e9,
        "Google Cloud TPU v3 documentation: 123 TFLOP/s, 32 GiB and 900 GB/s a chip of two cores",
        PAPER_MFU,
    ),
}
ALIASES = {"4090": "rtx4090", "rtx-4090": "rtx4090", "tpuv3-core": "tpuv3", "tpu-v3": "tpuv3"}
HERE = ("this", "here", "cpu")  # the machine at hand: measured, not assumed


def find_hardware(names: str) -> list[Hardware]:
    """`h100`, `a100,h100`, `all` -> devices; names of `HERE` are left out.

    Raises:
        VitcliError: an unknown name.
    """
    if names.strip().lower() == "all":
        return list(HARDWARE.values())
    found = []
    for name in names.lower().replace(" ", "").split(","):
        if name in HERE:
            continue
        key = ALIASES.get(name, name)
        if key not in HARDWARE:
            known = [*HARDWARE, "cpu", "all"]
            close = nearest(key, known)
            hint = f"did you mean `{close}`?" if close else f"there are {', '.join(known)}"
            raise VitcliError(f"no device `{name}` in the table", hint)
        found.append(HARDWARE[key])
    return found
