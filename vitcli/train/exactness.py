"""What decides the bits of a run besides its recipe and data, and what of it has changed."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vitcli.progress import Watcher
from vitcli.run import RESUMES, Run, describe_environment

# Pixels come from Pillow and NumPy, sums from torch; Accelerate wraps precision and processes.
LIBRARIES = ("torch", "numpy", "pillow", "accelerate")
THREADS = "threads"


def machine_facts(device: torch.device, precision: str, processes: int) -> dict[str, Any]:
    """What provenance.json says about the machine."""
    is_cuda = device.type == "cuda"
    return {
        "precision": precision,
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if is_cuda else None,
        "cuda": torch.version.cuda if is_cuda else None,
        "cudnn": torch.backends.cudnn.version() if is_cuda else None,  # type: ignore[no-untyped-call]
        # Matrix libraries choose their kernels by the model and by the instruction set.
        "cpu": _cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "processes": processes,
        THREADS: torch.get_num_threads(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def use_threads(run: Run | None, device: torch.device, watch: Watcher) -> None:
    """Compute with as many threads as the run started with: sums depend on their number."""
    now = torch.get_num_threads()
    known = run.provenance().get(THREADS) if run is not None else None
    wanted = known if isinstance(known, int) and known > 0 and device.type == "cpu" else now
    # Also at the start: only a number that was set keeps MKL from taking fewer when it likes.
    torch.set_num_threads(wanted)
    if wanted != now:
        watch.note(f"computing with {wanted} threads per process as at the start, not with {now}")


def bit_deciding(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Those facts of provenance.json that decide the bits; early versions lack some."""
    libraries = facts.get("libraries") or {}
    device = str(facts.get("device", "")).partition(":")[0]
    keys = ["vitcli", "commit", "processes", "precision", "gpu", "cuda", "cudnn"]
    if device == "cpu":
        keys += ["cpu", "instructions", THREADS]
    return {
        **{key: facts.get(key) for key in keys},
        **{name: libraries.get(name) for name in LIBRARIES},
        "device": device or None,
    }


def warn_of_changes(run: Run, facts: Mapping[str, Any], watch: Watcher) -> list[str]:
    """One warning if a resume is not exact; returns what has changed.

    Args:
        facts: `machine_facts` of now.
    """
    before = bit_deciding(run.provenance())
    now = bit_deciding({**describe_environment(), **facts})
    changed = [
        f"{key} {before[key]} -> {now[key]}"
        for key in before.keys() & now.keys()
        if None not in (before[key], now[key]) and before[key] != now[key]
    ]
    if changed := sorted(changed):
        watch.warn(
            f"this resume of `{run.path}` is not exact to the last bit, because these have changed "
            f"since the start: {'; '.join(changed)}. The images and their order are the same"
        )
    return changed


def record_changes(run: Run, step: int, changed: list[str]) -> None:
    """Note in provenance.json that the run continued with other bits from `step` on."""
    if changed:
        earlier = run.provenance().get(RESUMES, [])
        run.update_provenance({RESUMES: [*earlier, {"step": step, "changed": changed}]})
