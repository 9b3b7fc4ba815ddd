"""Everything that an exact resume needs, and nothing that has to be unpickled.

Order, augmentation and dropout are functions of (seed, position), so a checkpoint holds only
tensors and the number of steps: no generator states, no loader states.
"""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vitcli.errors import VitcliError
from vitcli.files import replacing, write_text
from vitcli.train.budget import Timeline
from vitcli.train.ema import Ema
from vitcli.train.fsdp import Parts, is_part, like_part, write_part


@dataclass(frozen=True)
class Team:
    """The processes of a run, as far as checkpoints go.

    Attributes:
        rank: of this one.
        parts: files that a checkpoint has of each kind: one a process where tensors are shared.
        wait: for all others.
    """

    rank: int = 0
    parts: int = 1
    wait: Callable[[], None] = lambda: None


ALONE = Team()


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
    """Whether every weight that this process keeps is a number."""
    held: Any
    for held in state.module.parameters():
        mine = held.to_local() if is_part(held) else held
        if not torch.isfinite(mine).all():
            return False
    return True


def checkpoint_path(folder: Path, step: int) -> Path:
    """`checkpoints/step_000100`."""
    return folder / f"step_{step:06d}"


def save_checkpoint(folder: Path, state: TrainState, keep: int, team: Team = ALONE) -> Path:
    """Write the checkpoint of `state.step`, then remove all but the newest `keep`.

    A reader sees it whole or not at all, whenever a process is killed. With shared tensors every
    process writes its part; else those of process 0 are all there is.

    Raises:
        VitcliError: it cannot be written; the older ones are untouched.
    """
    path = checkpoint_path(folder, state.step)
    if team.parts > 1:
        _save_parts(path, state, team)
    elif team.rank == 0:
        _make(folder)
        with replacing(path) as temporary:
            temporary.mkdir()
            _write(temporary, state, ALONE)
            _write_values(temporary, state)
    if team.rank == 0:
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
        for ending in ("tmp", "parts"):  # of processes that were killed while writing
            for left in folder.glob(f".step_*.{ending}"):
                shutil.rmtree(left, ignore_errors=True)
    team.wait()
    return path


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VitcliError(
            f"cannot make `{folder}`: {error.strerror}", "`--out` takes a place that can be written"
        ) from None


def _save_parts(path: Path, state: TrainState, team: Team) -> None:
    """All processes write into one folder, which process 0 then moves to its place."""
    shared = path.parent / f".{path.name}.parts"
    if team.rank == 0:
        _make(path.parent)
        shutil.rmtree(shared, ignore_errors=True)
        shared.mkdir()
    team.wait()
    _write(shared, state, team)
    team.wait()
    if team.rank == 0:
        with replacing(path) as temporary:
            shared.rename(temporary)
            _write_values(temporary, state)


def _write(folder: Path, state: TrainState, team: Team) -> None:
    def write(name: str, tensors: dict[str, Tensor]) -> None:
        write_part(folder, name, tensors, team.rank, team.parts)

    write("module", state.module.state_dict())
    for number, optimizer in enumerate(state.optimizers):
        write(f"optimizer_{number}", _optimizer_tensors(optimizer))
    if state.ema is not None:
        write("ema", state.ema.state())


def _write_values(folder: Path, state: TrainState) -> None:
    (folder / "state.json").write_text(json.dumps(state.values()), encoding="utf-8")


def amend_checkpoint(path: Path, state: TrainState) -> None:
    """Change what is not a tensor in the checkpoint at `path`, of the same step."""
    write_text(path / "state.json", json.dumps(state.values()))


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if re.fullmatch(r"step_\d{6,}", p.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step of the checkpoint at `path`."""
    return int(path.name.removeprefix("step_"))


def load_checkpoint(path: Path, state: TrainState) -> None:
    """Put the checkpoint at `path` into `state`.

    Raises:
        VitcliError: it is damaged, or was written by a run of another shape.
    """
    try:
        values = json.loads((path / "state.json").read_text(encoding="utf-8"))
        _read_into(state.module.state_dict(), Parts(path, "module"))
        for number, optimizer in enumerate(state.optimizers):
            _load_optimizer(optimizer, Parts(path, f"optimizer_{number}"))
        if state.ema is not None:
            _read_into(state.ema.state(), Parts(path, "ema"))
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


@torch.no_grad()
def _read_into(tensors: dict[str, Tensor], parts: Parts) -> None:
    """Overwrite `tensors` by what `parts` hold under the same names, all of them."""
    if missing := tensors.keys() ^ set(parts.names()):
        raise KeyError(f"{', '.join(sorted(missing)[:3])} on one side only")
    for name, tensor in tensors.items():
        held: Any = tensor
        (held.to_local() if is_part(tensor) else held).copy_(parts.read(name, tensor))


def _load_optimizer(optimizer: torch.optim.Optimizer, parts: Parts) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name in parts.names():
        index, _, key = name.partition(".")
        p = params[int(index)]
        # As large as the weights: shared as they are. The rest, such as a step, is everybody's.
        shared = is_part(p) and key != "step"
        value = parts.read(name, p if shared else None)
        state.setdefault(int(index), {})[key] = like_part(value, p) if shared else value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
