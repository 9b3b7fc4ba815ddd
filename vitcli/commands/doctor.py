"""`vitcli doctor`: this machine and this installation, and what slows them."""

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

import torch

from vitcli.cost import machine
from vitcli.devices import pick_device, resolve_precision
from vitcli.errors import VitcliError
from vitcli.progress import Quiet, Watcher
from vitcli.run import LIBRARIES, package_version

OPTIONAL = ("onnx", "onnxruntime", "transformers", "timm", "tensorboard", "wandb", "trackio")
TESTED_TORCH = ((2, 9), (2, 14))  # from, and below
GIB = 2**30
LITTLE_MEMORY, LITTLE_DISK = 2 * GIB, 5 * GIB
SLOW_DISK = 50e6  # bytes a second
WORTH_IT = 1.2  # threads, or another kernel, that are not so many times as fast are no faster


@dataclass(frozen=True)
class Finding:
    """Something that makes this set-up slower than it need be, or will break it."""

    what: str
    remedy: str


@dataclass(frozen=True)
class Diagnosis:
    """What was seen, by topic, and what follows from it."""

    facts: dict[str, dict[str, Any]]
    findings: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        """The object of `doctor --json`: rates in operations, bytes and images a second."""
        return {**self.facts, "findings": [asdict(finding) for finding in self.findings]}


def run(folder: Path | None = None, watch: Watcher | None = None) -> Diagnosis:
    """Look at this machine and this installation; about ten seconds.

    Args:
        folder: whose disk is measured; None takes the present one.

    Raises:
        VitcliError: there is no such folder.
    """
    watch = watch or Quiet()
    folder = folder or Path.cwd()
    if not folder.is_dir():
        raise VitcliError(f"no folder `{folder}`", "`--out` names one whose disk is to be measured")
    looks: dict[str, Callable[[], dict[str, Any]]] = {
        "versions": versions,
        "devices": devices,
        "threads": threads,
        "attention": attention,
        "images": images,
        "disk": lambda: disk(folder),
    }
    facts: dict[str, dict[str, Any]] = {}
    with watch.progress("looking", len(looks)) as bar:
        for topic, look in looks.items():
            facts[topic] = look()
            bar.advance(1)
    return Diagnosis(facts, tuple(findings(facts)))


def versions() -> dict[str, Any]:
    """Of everything that matters; None where it is not installed."""
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
    if find_spec("torchvision") is not None:
        found["torchvision_imports"] = imports("torchvision")
    return found


def imports(module: str) -> bool:
    """Whether `module` can be imported, tried in a process of its own."""
    done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True)
    return done.returncode == 0


def devices() -> dict[str, Any]:
    """The device that training takes, its memory, and what it makes of precisions."""
    device = pick_device()
    total, free = machine.memory_bytes()
    return {
        "device": str(device),
        "precision": resolve_precision("auto", device),
        "gpus": machine.gpus(),
        "gpu_without_torch": not torch.cuda.is_available()
        and shutil.which("nvidia-smi") is not None,
        "cpu": machine.cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": machine.usable_cores(),
        "memory_bytes": total,
        "memory_free_bytes": free,
    }


def threads() -> dict[str, Any]:
    """How fast large products are on one thread and on all, and what may be in their way."""
    number = torch.get_num_threads()
    half, full = torch.bfloat16, torch.float32
    return {
        "threads": number,
        "fp32_one_thread": machine.product_rate(full, 1),
        "fp32": machine.product_rate(full, number),
        "bf16_one_thread": machine.product_rate(half, 1),
        "bf16": machine.product_rate(half, number),
        "load": machine.load_average(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }


def attention() -> dict[str, Any]:
    """Seconds of both ways of attention, in the precision that training takes."""
    device = pick_device()
    precision = resolve_precision("auto", device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return {"precision": precision, **machine.attention_seconds(device, dtype)}


def images() -> dict[str, Any]:
    """What Pillow can read, and how fast."""
    return {**machine.pillow_features(), "jpegs_per_second": machine.decode_rate()}


def disk(folder: Path) -> dict[str, Any]:
    """Room and speed where runs are written."""
    rates: dict[str, Any] = machine.disk_rates(folder) or {"write": None, "read": None}
    return {"folder": str(folder), "free_bytes": shutil.disk_usage(folder).free, **rates}


def findings(facts: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    """What is slow or will break, the gravest first."""
    yield from _installation(facts["versions"], facts["devices"])
    yield from _threads(facts["threads"], facts["devices"])
    yield from _room(facts["devices"], facts["disk"])
    a = facts["attention"]
    best = min(a["explicit"], a["fused"])
    if a["chosen"] > WORTH_IT * best:
        yield Finding(
            f"attention as it is chosen takes {a['chosen'] / best:.1f} times as long as the other "
            f"way here, in {a['precision']}",
            "other work may have disturbed this: look again; if it stays, it is worth an issue",
        )
    if not facts["images"]["libjpeg_turbo"]:
        yield Finding(
            "Pillow is built without libjpeg-turbo: JPEGs are decoded several times as slowly",
            "`pip install --force-reinstall pillow` takes the wheel, which has it",
        )
    for name in ("webp", "avif"):
        if not facts["images"][name]:
            yield Finding(
                f"Pillow reads no {name.upper()} here", "`pip install -U pillow` may bring it"
            )


def _installation(versions: dict[str, Any], devices: dict[str, Any]) -> Iterator[Finding]:
    if devices["gpu_without_torch"]:
        yield Finding(
            f"there is an NVIDIA GPU, and torch {versions['torch']} does not see it",
            "a CUDA build of torch (`pip install torch` on Linux) and a driver that fits it",
        )
    if versions.get("torchvision_imports") is False:
        yield Finding(
            f"torchvision {versions.get('torchvision')} cannot be imported beside torch "
            f"{versions['torch']}: vitcli does not need it, transformers and timm break on it",
            "`pip uninstall torchvision`, or the release made for this torch",
        )
    number = tuple(int(part) for part in versions["torch"].split("+")[0].split(".")[:2])
    if not TESTED_TORCH[0] <= number < TESTED_TORCH[1]:
        low, high = (".".join(map(str, end)) for end in TESTED_TORCH)
        yield Finding(
            f"torch {versions['torch']} is outside of what is tested ({low} to below {high})",
            f"`pip install 'torch>={low},<{high}'`",
        )


def _threads(threads: dict[str, Any], devices: dict[str, Any]) -> Iterator[Finding]:
    cores, number, load = devices["cores"], threads["threads"], threads["load"]
    if devices["device"] != "cpu":
        return
    kind = devices["precision"]
    gain = threads[kind] / threads[f"{kind}_one_thread"]
    if number > 1 and gain < WORTH_IT:
        busy = f" (load {load:.1f})" if load is not None else ""
        yield Finding(
            f"{number} threads are {gain:.2f} times as fast as one: other work keeps the cores "
            f"busy{busy}, and threads wait for each other",
            f"`--processes {number}` suffers less, `OMP_NUM_THREADS=1` too; or wait for the rest",
        )
    elif load is not None and load > cores + 1:
        yield Finding(
            f"{load:.1f} processes want the {cores:g} cores at once", "times measured now are long"
        )
    if number > cores:
        yield Finding(
            f"{number} threads on {cores:g} usable cores: they take turns and wait",
            f"`OMP_NUM_THREADS={max(1, int(cores))}`",
        )
    if (threads["wait_policy"] or "").upper() == "ACTIVE":
        yield Finding(
            "OMP_WAIT_POLICY=ACTIVE: waiting threads spin, and collapse beside other work",
            "`unset OMP_WAIT_POLICY`; vitcli then sets PASSIVE",
        )
    if devices["instructions"] in ("DEFAULT", "NO AVX"):
        yield Finding(
            "the processor has no AVX2, or torch is told not to use it: several times as slow",
            "`unset ATEN_CPU_CAPABILITY`, or another machine",
        )


def _room(devices: dict[str, Any], disk: dict[str, Any]) -> Iterator[Finding]:
    free = devices["memory_free_bytes"]
    if free is not None and free < LITTLE_MEMORY:
        yield Finding(
            f"{free / GIB:.1f} GiB of memory are free",
            "a smaller `--batch-size`, or `--set train.activation_checkpointing=true`",
        )
    if disk["free_bytes"] < LITTLE_DISK:
        yield Finding(
            f"{disk['free_bytes'] / GIB:.1f} GiB are free under `{disk['folder']}`",
            "`--out` elsewhere; `--set train.keep_checkpoints=1`",
        )
    if disk["write"] is None:
        yield Finding(f"`{disk['folder']}` cannot be written to", "`--out` elsewhere")
    elif min(disk["write"], disk["read"]) < SLOW_DISK:
        yield Finding(
            f"the disk under `{disk['folder']}` writes {disk['write'] / 1e6:.0f} and reads "
            f"{disk['read'] / 1e6:.0f} MB/s",
            "`vitcli patchify DATA --out DIR` onto a faster one; `--set train.checkpoint_steps=N`",
        )
