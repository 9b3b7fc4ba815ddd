"""`vitcli doctor`: check this machine and this installation for problems."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch

from vitcli.cost import machine
from vitcli.devices import (
    cuda_fault,
    hides_gpu,
    pick_device,
    resolve_precision,
    sees_gpu,
)
from vitcli.errors import VitcliError
from vitcli.malloc import allocator, malloc_settings
from vitcli.progress import Quiet, Watcher
from vitcli.run import LIBRARIES, package_version

OPTIONAL = ("onnx", "onnxruntime", "transformers", "timm", "tensorboard", "wandb", "trackio")
TESTED_TORCH = ((2, 9), (2, 14))  # first tested version, first untested version
GIB = 2**30
MIN_MEMORY, MIN_DISK = 2 * GIB, 5 * GIB
MIN_DISK_RATE = 50e6  # bytes/s
MIN_SPEEDUP = 1.2  # smaller speed-ups are within the noise of the measurement


@dataclass(frozen=True)
class Finding:
    """A problem that makes this installation slow or breaks it, and its remedy."""

    what: str
    remedy: str


@dataclass(frozen=True)
class Diagnosis:
    """The result of `doctor`: facts by topic, and the problems that follow from them."""

    facts: dict[str, dict[str, Any]]
    findings: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; rates are in FLOP/s, bytes/s and images/s."""
        return {**self.facts, "findings": [asdict(finding) for finding in self.findings]}


def run(folder: Path | None = None, watch: Watcher | None = None) -> Diagnosis:
    """Check this machine and this installation. It takes about ten seconds.

    Args:
        folder: its disk is measured; None takes the current folder.

    Raises:
        VitcliError: the folder does not exist.
    """
    watch = watch or Quiet()
    folder = folder or Path.cwd()
    if not folder.is_dir():
        raise VitcliError(
            f"the folder `{folder}` does not exist", "give an existing folder with `--folder`"
        )
    checks: dict[str, Callable[[], dict[str, Any]]] = {
        "versions": check_versions,
        "devices": check_devices,
        "threads": check_threads,
        "malloc": check_malloc,
        "attention": check_attention,
        "images": check_images,
        "disk": lambda: check_disk(folder),
    }
    facts: dict[str, dict[str, Any]] = {}
    with watch.progress("checks", len(checks)) as bar:
        for topic, check in checks.items():
            facts[topic] = check()
            bar.advance(1)
    return Diagnosis(facts, tuple(find_problems(facts)))


def check_versions() -> dict[str, Any]:
    """Versions of all libraries; None for those that are not installed."""
    found: dict[str, Any] = {
        "vitcli": package_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for name in (*LIBRARIES, "huggingface_hub", *OPTIONAL):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__  # with its build (`+cu130`), which the metadata may lack
    if find_spec("torchvision") is not None:
        # In a process of its own: a build for another torch may crash the interpreter.
        done = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True)
        found["torchvision_imports"] = done.returncode == 0
    return found


def check_devices() -> dict[str, Any]:
    """The device and precision that training uses, memory and cores."""
    device = pick_device()
    total, available = machine.system_memory()
    return {
        "device": str(device),
        "precision": resolve_precision("auto", device),
        "gpus": machine.gpu_facts(),
        "gpu_without_torch": hides_gpu(),
        "gpu_fault": None if sees_gpu() else cuda_fault(),
        "cpu": machine.cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": machine.usable_cores(),
        "memory_bytes": total,
        "memory_free_bytes": available,
    }


def check_threads() -> dict[str, Any]:
    """The speed of large matrix products on one thread and on all, and the load."""
    number = torch.get_num_threads()
    bf16, fp32 = torch.bfloat16, torch.float32
    return {
        "threads": number,
        "fp32_one_thread": machine.matmul_flops(fp32, 1),
        "fp32": machine.matmul_flops(fp32, number),
        "bf16_one_thread": machine.matmul_flops(bf16, 1),
        "bf16": machine.matmul_flops(bf16, number),
        "load": psutil.getloadavg()[0],
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }


def check_malloc() -> dict[str, Any]:
    """The memory allocator, and the environment variables that set it."""
    return {"allocator": allocator(), "variables": malloc_settings()}


def check_attention() -> dict[str, Any]:
    """Seconds of both implementations of attention, in the precision of training."""
    device = pick_device()
    precision = resolve_precision("auto", device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return {"precision": precision, **machine.attention_seconds(device, dtype)}


def check_images() -> dict[str, Any]:
    """The formats that Pillow reads, and its speed."""
    return {**machine.pillow_features(), "jpegs_per_second": machine.jpeg_rate()}


def check_disk(folder: Path) -> dict[str, Any]:
    """Free space and speed of the disk of `folder`."""
    rates: dict[str, Any] = machine.disk_rates(folder) or {"write": None, "read": None}
    return {"folder": str(folder), "free_bytes": shutil.disk_usage(folder).free, **rates}


def find_problems(facts: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    """Everything that is slow or will break, the most serious first."""
    yield from _installation_problems(facts["versions"], facts["devices"])
    yield from _thread_problems(facts["threads"], facts["malloc"], facts["devices"])
    yield from _space_problems(facts["devices"], facts["disk"])
    attention = facts["attention"]
    best = min(attention["explicit"], attention["fused"])
    if attention["chosen"] > MIN_SPEEDUP * best:
        yield Finding(
            f"the chosen attention takes {attention['chosen'] / best:.1f} times as long as the "
            f"other implementation, in {attention['precision']}",
            "run `vitcli doctor` again on an idle machine; if the result stays, report an issue",
        )
    if not facts["images"]["libjpeg_turbo"]:
        yield Finding(
            "Pillow is built without libjpeg-turbo, so it decodes JPEGs several times slower",
            "`pip install --force-reinstall pillow` installs a build with libjpeg-turbo",
        )
    for name in ("webp", "avif"):
        if not facts["images"][name]:
            yield Finding(
                f"the installed Pillow cannot read {name.upper()}",
                "`pip install -U pillow` may add it",
            )


def _installation_problems(versions: dict[str, Any], devices: dict[str, Any]) -> Iterator[Finding]:
    torch_version = versions["torch"]
    if devices["gpu_without_torch"]:
        yield Finding(
            f"torch {torch_version} does not see the NVIDIA GPU of this machine: "
            f"{devices['gpu_fault']}",
            "update the NVIDIA driver, or install a build of torch for its CUDA version "
            "(`nvidia-smi` shows it)",
        )
    if versions.get("torchvision_imports") is False:
        yield Finding(
            f"torchvision {versions.get('torchvision')} cannot be imported with torch "
            f"{torch_version}; vitcli does not need it, but transformers and timm fail",
            "`pip uninstall torchvision`, or install the release for this torch",
        )
    number = tuple(int(part) for part in torch_version.split("+")[0].split(".")[:2])
    if not TESTED_TORCH[0] <= number < TESTED_TORCH[1]:
        low, high = (".".join(map(str, end)) for end in TESTED_TORCH)
        yield Finding(
            f"torch {torch_version} is not tested; tested versions are {low} to below {high}",
            f"`pip install 'torch>={low},<{high}'`",
        )


def _thread_problems(
    threads: dict[str, Any], malloc: dict[str, Any], devices: dict[str, Any]
) -> Iterator[Finding]:
    cores, number, load = devices["cores"], threads["threads"], threads["load"]
    if devices["device"] != "cpu":
        return
    precision = devices["precision"]
    speedup = threads[precision] / threads[f"{precision}_one_thread"]
    if number > 1 and speedup < MIN_SPEEDUP:
        yield Finding(
            f"{number} threads are only {speedup:.2f} times as fast as one, because other programs "
            f"use the cores (load {load:.1f})",
            f"wait for the other programs, or use `--processes {number}` or `OMP_NUM_THREADS=1`",
        )
    elif load > cores + 1:
        yield Finding(
            f"{load:.1f} processes share {cores:g} cores",
            "do not trust time measurements until the load is lower",
        )
    if number > cores:
        yield Finding(
            f"{number} threads share {cores:g} usable cores and wait for each other",
            f"`OMP_NUM_THREADS={max(1, int(cores))}`",
        )
    if (threads["wait_policy"] or "").upper() == "ACTIVE":
        yield Finding(
            "OMP_WAIT_POLICY=ACTIVE lets waiting threads spin, which is slow on a busy machine",
            "`unset OMP_WAIT_POLICY`; vitcli then sets PASSIVE",
        )
    if malloc["allocator"] == "system" and malloc["variables"]:
        names = " ".join(malloc["variables"])
        yield Finding(
            f"with {names} vitcli does not let malloc keep freed memory, and a training step may "
            "wait for new pages (8 % of its time in a measurement)",
            f"`unset {names}`, unless its value lets malloc keep freed memory",
        )
    if devices["instructions"] in ("DEFAULT", "NO AVX"):
        yield Finding(
            "torch does not use AVX2 on this processor and is several times slower",
            "`unset ATEN_CPU_CAPABILITY`, or use another machine",
        )


def _space_problems(devices: dict[str, Any], disk: dict[str, Any]) -> Iterator[Finding]:
    available, folder = devices["memory_free_bytes"], disk["folder"]
    if available < MIN_MEMORY:
        yield Finding(
            f"only {available / GIB:.1f} GiB of memory are available",
            "use a smaller `--batch-size`, or `--set train.activation_checkpointing=true`",
        )
    if disk["free_bytes"] < MIN_DISK:
        yield Finding(
            f"only {disk['free_bytes'] / GIB:.1f} GiB are free on the disk of `{folder}`",
            "choose another disk with `--out`, or use `--set train.keep_checkpoints=1`",
        )
    if disk["write"] is None:
        yield Finding(f"cannot write to `{folder}`", "choose another folder with `--out`")
    elif min(disk["write"], disk["read"]) < MIN_DISK_RATE:
        yield Finding(
            f"the disk of `{folder}` writes {disk['write'] / 1e6:.0f} MB/s and reads "
            f"{disk['read'] / 1e6:.0f} MB/s",
            "`vitcli patchify DATA --out DIR` stores decoded images on a faster disk; "
            "`--set train.checkpoint_steps=N` writes fewer checkpoints",
        )
