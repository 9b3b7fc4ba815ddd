"""Everything that an exact resume needs, and nothing that has to be unpickled.

Order, augmentation and dropout are functions of (seed, position), so a checkpoint holds only
tensors and the number of steps: no generator states, no loader states.
"""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitcli.errors import VitcliError
from vitcli.files import replacing
from vitcli.train.ema import Ema


@dataclass
class TrainState:
    """What changes while training; `step` updates are finished."""

    module: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    ema: Ema | None = None
    scaler: Any = None
    step: int = 0


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
        try:
            _write(temporary, state)
        except SafetensorError as error:  # a full disk, as safetensors reports it
            raise OSError(str(error)) from error
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for left in folder.glob(".step_*.tmp"):  # of processes that were killed while writing
        shutil.rmtree(left, ignore_errors=True)
    return path


def _write(folder: Path, state: TrainState) -> None:
    save_file(_plain(state.module.state_dict()), folder / "module.safetensors")
    for number, optimizer in enumerate(state.optimizers):
        save_file(_optimizer_tensors(optimizer), folder / f"optimizer_{number}.safetensors")
    if state.ema is not None:
        save_file(_plain(state.ema.state()), folder / "ema.safetensors")
    values = {"step": state.step}
    if state.scaler is not None:
        values["scaler"] = state.scaler.state_dict()
    (folder / "state.json").write_text(json.dumps(values), encoding="utf-8")


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
        if state.scaler is not None and "scaler" in values:
            state.scaler.load_state_dict(values["scaler"])
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise VitcliError(
            f"checkpoint `{path}` cannot be read: {error}",
            "remove it, and `--resume` takes the one before",
        ) from error
    state.step = int(values["step"])


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`3.exp_avg` -> tensor. Rates are not kept: the schedule gives them from the step."""
    state = optimizer.state_dict()["state"]
    return _plain({f"{i}.{k}": torch.as_tensor(v) for i, s in state.items() for k, v in s.items()})


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
