"""Everything that an exact resume needs, and nothing that has to be unpickled.

Order, augmentation and dropout are functions of (seed, position), so a checkpoint holds only
tensors and the number of steps: no generator states, no loader states.
"""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vitcli.errors import VitcliError
from vitcli.files import replacing, write_text
from vitcli.train.ema import Ema
from vitcli.train.timeline import Timeline
from vitcli.weights.store import write_tensors


@dataclass
class TrainState:
    """What changes while training.

    Attributes:
        step: finished updates.
        timeline: how long the run is.
        micro_batch: images at a time, where memory ran out with what the recipe asked for.
        rewinds: how often it went back to a good state.
        lr_scale: what is left of the learning rate after that.
    """

    module: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    ema: Ema | None = None
    scaler: Any = None
    step: int = 0
    timeline: Timeline = field(default_factory=Timeline)
    micro_batch: int | None = None
    rewinds: int = 0
    lr_scale: float = 1.0

    def values(self) -> dict[str, Any]:
        """What is not a tensor."""
        found: dict[str, Any] = {
            "step": self.step,
            "timeline": self.timeline.values(),
            "micro_batch": self.micro_batch,
            "rewinds": self.rewinds,
            "lr_scale": self.lr_scale,
        }
        if self.scaler is not None:
            found["scaler"] = self.scaler.state_dict()
        return found

    def restore(self, values: dict[str, Any]) -> None:
        """Take over what `values` gave; older checkpoints have the step only."""
        if self.scaler is not None and "scaler" in values:
            self.scaler.load_state_dict(values["scaler"])
        if "timeline" in values:
            self.timeline.restore(values["timeline"])
        self.micro_batch = values.get("micro_batch")
        self.rewinds = int(values.get("rewinds", 0))
        self.lr_scale = float(values.get("lr_scale", 1.0))
        self.step = int(values["step"])


def is_finite(state: TrainState) -> bool:
    """Whether every weight is a number."""
    return all(bool(torch.isfinite(p).all()) for p in state.module.parameters())


def checkpoint_path(folder: Path, step: int) -> Path:
    """`checkpoints/step_000100`."""
    return folder / f"step_{step:06d}"


def save_checkpoint(folder: Path, state: TrainState, keep: int) -> Path:
    """Write the checkpoint of `state.step`, then remove all but the newest `keep`.

    A reader sees it whole or not at all, whenever the process is killed.

    Raises:
        VitcliError: it cannot be written; the older ones are untouched.
    """
    path = checkpoint_path(folder, state.step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VitcliError(
            f"cannot make `{folder}`: {error.strerror}", "`--out` takes a place that can be written"
        ) from None
    with replacing(path) as temporary:
        temporary.mkdir()
        _write(temporary, state)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for left in folder.glob(".step_*.tmp"):  # of processes that were killed while writing
        shutil.rmtree(left, ignore_errors=True)
    return path


def _write(folder: Path, state: TrainState) -> None:
    write_tensors(folder / "module.safetensors", state.module.state_dict())
    for number, optimizer in enumerate(state.optimizers):
        write_tensors(folder / f"optimizer_{number}.safetensors", _optimizer_tensors(optimizer))
    if state.ema is not None:
        write_tensors(folder / "ema.safetensors", state.ema.state())
    (folder / "state.json").write_text(json.dumps(state.values()), encoding="utf-8")


def amend_checkpoint(path: Path, state: TrainState) -> None:
    """Change what is not a tensor in the checkpoint at `path`, of the same step."""
    write_text(path / "state.json", json.dumps(state.values()))


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if re.fullmatch(r"step_\d{6,}", p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def load_checkpoint(path: Path, state: TrainState) -> None:
    """Put the checkpoint at `path` into `state`.

    Raises:
        VitcliError: it is damaged, or was written by a run of another shape.
    """
    try:
        values = json.loads((path / "state.json").read_text(encoding="utf-8"))
        state.module.load_state_dict(load_file(path / "module.safetensors"))
        for number, optimizer in enumerate(state.optimizers):
            _load_optimizer(optimizer, load_file(path / f"optimizer_{number}.safetensors"))
        if state.ema is not None:
            state.ema.load(load_file(path / "ema.safetensors"))
        state.restore(values)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise VitcliError(
            f"checkpoint `{path}` cannot be read: {error}",
            "remove it, and `--resume` takes the one before",
        ) from error


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`3.exp_avg` -> tensor. Rates are not kept: the schedule gives them from the step."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{k}": torch.as_tensor(v) for i, s in state.items() for k, v in s.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
