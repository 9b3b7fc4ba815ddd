"""Checkpoints: everything that an exact resume needs, and nothing that must be unpickled.

Data order, augmentation and dropout are functions of (seed, step), so that a checkpoint holds only
tensors and a few numbers: no generator states, no loader states. `state.json` is written last. It
holds a checksum of itself and of each other file, and a resume verifies them.
"""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from vitcli.errors import VitcliError, quoted
from vitcli.files import file_checksum, read_json, replacing, seal, unseal, write_text
from vitcli.run import EXTENSIONS, RESUMES, Run
from vitcli.train.budget import Timeline
from vitcli.train.ema import Ema
from vitcli.train.fsdp import ShardReader, is_sharded, shard_like, write_shard
from vitcli.train.objectives.base import Objective

MAX_REWINDS, REWIND_FACTOR = 3, 0.5
STATE, FILES = "state.json", "files"  # the key: name of each other file -> its checksum


class NonFiniteError(VitcliError):
    """The loss or a weight is NaN or infinite."""


def non_finite_error(message: str, checkpoints: Path) -> NonFiniteError:
    """The error, with a hint that says where the last good state is."""
    kept = f"the last checkpoint is in `{checkpoints}`; " if list_checkpoints(checkpoints) else ""
    return NonFiniteError(
        message,
        f"{kept}use a lower `--lr`, a longer warm-up or `--set optim.grad_clip=1.0`, or "
        "`--set train.on_nan=rewind` to go back and continue automatically",
    )


@dataclass(frozen=True)
class ShardWriter:
    """How the processes of a run write a checkpoint together.

    Attributes:
        rank: of this process.
        num_shards: files per kind of tensors: one per process if tensors are sharded, else 1.
        barrier: waits for all other processes.
    """

    rank: int = 0
    num_shards: int = 1
    barrier: Callable[[], None] = lambda: None


SINGLE_PROCESS = ShardWriter()


@dataclass
class TrainState:
    """What changes during training.

    Attributes:
        objective: the objective, with the network inside.
        scaler: the gradient scaler of fp16, else None.
        step: finished updates.
        timeline: the length of the run.
        micro_batch_size: the size that fits after memory ran out; None for that of the recipe.
        num_rewinds: how often the run went back to an earlier checkpoint.
        lr_scale: the factor on all rates after those rewinds.
    """

    objective: Objective
    optimizers: Sequence[torch.optim.Optimizer]
    ema: Ema | None = None
    scaler: Any = None
    step: int = 0
    timeline: Timeline = field(default_factory=Timeline)
    micro_batch_size: int | None = None
    num_rewinds: int = 0
    lr_scale: float = 1.0

    def values(self) -> dict[str, Any]:
        """Everything except the tensors, under the names that `state.json` uses."""
        values: dict[str, Any] = {
            "step": self.step,
            "timeline": self.timeline.values(),
            "micro_batch": self.micro_batch_size,
            "rewinds": self.num_rewinds,
            "lr_scale": self.lr_scale,
        }
        if self.scaler is not None:
            values["scaler"] = self.scaler.state_dict()
        return values

    def restore(self, values: dict[str, Any]) -> None:
        """Take over the result of `values`; early versions of vitcli wrote the step only."""
        if self.scaler is not None and "scaler" in values:
            self.scaler.load_state_dict(values["scaler"])
        if "timeline" in values:
            self.timeline.restore(values["timeline"])
        self.micro_batch_size = values.get("micro_batch")
        self.num_rewinds = int(values.get("rewinds", 0))
        self.lr_scale = float(values.get("lr_scale", 1.0))
        self.step = int(values["step"])

    def has_finite_weights(self) -> bool:
        """True if every weight that this process stores is finite."""
        p: Any
        for p in self.objective.parameters():
            if not torch.isfinite(p.to_local() if is_sharded(p) else p).all():
                return False
        return True


def save_checkpoint(
    folder: Path, state: TrainState, keep: int, writer: ShardWriter = SINGLE_PROCESS
) -> Path:
    """Write the checkpoint of `state.step` and remove all but the newest `keep`.

    Raises:
        VitcliError: it cannot be written; the older checkpoints are unchanged.
    """
    path = folder / f"step_{state.step:06d}"
    # A temporary name, renamed at the end: a process that is killed while it writes leaves either
    # no checkpoint or a complete one.
    if writer.num_shards > 1:
        _save_shards(path, state, writer)
    elif writer.rank == 0:
        _make_folder(folder)
        with replacing(path) as temporary:
            temporary.mkdir()
            _write_tensors(temporary, state, SINGLE_PROCESS)
            _write_values(temporary, state)
            _set_aside(path)
    if writer.rank == 0:
        # Only now that the new one is complete: there is always one to resume from.
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
        for ending in ("tmp", "parts"):  # of processes that were killed while they wrote
            for left in folder.glob(f".step_*.{ending}"):
                shutil.rmtree(left, ignore_errors=True)
    writer.barrier()
    return path


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VitcliError(
            f"cannot create `{folder}`: {error.strerror}", "choose a writable path with `--out`"
        ) from None


def _save_shards(path: Path, state: TrainState, writer: ShardWriter) -> None:
    """All processes write into one folder, which process 0 then renames."""
    shared = path.parent / f".{path.name}.parts"
    if writer.rank == 0:
        _make_folder(path.parent)
        shutil.rmtree(shared, ignore_errors=True)
        shared.mkdir()
    writer.barrier()  # the folder exists
    _write_tensors(shared, state, writer)
    writer.barrier()  # every shard is written
    if writer.rank == 0:
        with replacing(path) as temporary:
            shared.rename(temporary)
            _write_values(temporary, state)
            _set_aside(path)


def _set_aside(path: Path) -> None:
    """Rename an older checkpoint of the same step; the caller removes what ends in `.tmp`."""
    if path.is_dir():
        aside = path.with_name(f".{path.name}.old.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


def _write_tensors(folder: Path, state: TrainState, writer: ShardWriter) -> None:
    def write(name: str, tensors: dict[str, Tensor]) -> None:
        write_shard(folder, name, tensors, writer.rank, writer.num_shards)

    write("module", state.objective.state_dict())
    for number, optimizer in enumerate(state.optimizers):
        write(f"optimizer_{number}", _optimizer_tensors(optimizer))
    if state.ema is not None:
        write("ema", state.ema.state_dict())


def _write_values(folder: Path, state: TrainState) -> None:
    files = {path.name: file_checksum(path) for path in sorted(folder.iterdir())}
    values = seal({**state.values(), FILES: files})
    (folder / STATE).write_text(json.dumps(values), encoding="utf-8")


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    paths = [p for p in folder.iterdir() if re.fullmatch(r"step_\d{6,}", p.name)]
    return sorted(paths, key=step_of)  # by number: names of more than six digits sort differently


def step_of(path: Path) -> int:
    """The step of the checkpoint at `path`."""
    return int(path.name.removeprefix("step_"))


def load_checkpoint(path: Path, state: TrainState) -> None:
    """Load the checkpoint at `path` into `state`.

    Raises:
        VitcliError: it is damaged, or a run of another shape wrote it.
    """
    try:
        values = read_values(path)
        _read_into(state.objective.state_dict(), ShardReader(path, "module"))
        for number, optimizer in enumerate(state.optimizers):
            _load_optimizer(optimizer, ShardReader(path, f"optimizer_{number}"))
        if state.ema is not None:
            _read_into(state.ema.state_dict(), ShardReader(path, "ema"))
        state.restore(values)
    except (
        OSError, ValueError, LookupError, RuntimeError, TypeError, ArithmeticError, SafetensorError
    ) as error:  # fmt: skip
        raise VitcliError(f"cannot read checkpoint `{path}`: {error}", _way_out(path)) from error


def read_values(path: Path) -> dict[str, Any]:
    """The content of `state.json` of the checkpoint at `path`, after a check of all its files.

    Early versions of vitcli wrote no checksums.

    Raises:
        OSError, ValueError: the message names the file that is damaged or missing.
    """
    try:
        values = unseal(read_json(path / STATE))
    except (ValueError, TypeError) as error:
        raise ValueError(f"`{STATE}` is damaged: {error}") from error
    for name, digest in dict(values.pop(FILES, {})).items():
        if not (path / name).is_file():
            raise ValueError(f"`{name}` is missing")
        if file_checksum(path / name) != digest:
            raise ValueError(f"`{name}` is damaged: its checksum is not the recorded one")
    return values


def _way_out(path: Path) -> str:
    """What to type after an error in the checkpoint at `path`: the newest good one is named."""
    bad = [path]
    for older in reversed([p for p in list_checkpoints(path.parent) if step_of(p) < step_of(path)]):
        try:
            read_values(older)
        except (OSError, ValueError):
            bad.append(older)
            continue
        return (
            f"`rm -r {shlex.join(map(str, bad))}`, then repeat the command: it resumes from step "
            f"{step_of(older)}, and {_same_result(Run(path.parents[1]), step_of(older))}"
        )
    return (
        f"there is no older good checkpoint: `rm -r {shlex.join(map(str, bad))}`, then repeat the "
        "command, which starts from step 0"
    )


def _same_result(run: Run, step: int) -> str:
    """Say if a run that resumes from `step` ends as it would have without the damage."""
    try:
        facts, recipe = run.provenance(), run.recipe()
    except VitcliError:
        return "repeats the steps from there"
    if longer := [e["step"] for e in facts.get(EXTENSIONS, []) if e["step"] > step]:
        return (
            f"the result may differ: the run was made longer at step {longer[-1]}, and its "
            f"schedule changes at step {step} instead"
        )
    on_gpu = not str(facts.get("device", "cpu")).startswith("cpu")
    if facts.get(RESUMES) or recipe.data.streaming or (on_gpu and not recipe.train.deterministic):
        return "the result is close to that without the damage, but not the same to the last bit"
    return "the result is the same"


def rewind(
    state: TrainState, run: Run, error: NonFiniteError, is_main: bool, same_length: bool
) -> None:
    """Load the last checkpoint of a run into `state`, and lower all rates from there on.

    Args:
        error: what went wrong at `state.step`.
        is_main: this process writes the records.
        same_length: the run makes no more steps than without the rewind; a deadline needs this.
    """
    # Halved three times, the rate is an eighth. If that fails, the cause is another one.
    checkpoints = list_checkpoints(run.checkpoints)
    if state.num_rewinds >= MAX_REWINDS or not checkpoints:
        raise VitcliError(
            f"{error.message}, after {state.num_rewinds} rewinds",
            "use a lower `--lr`, a longer warm-up or `--set optim.grad_clip=1.0`",
        ) from None
    failed, left = state.step, state.timeline.total - state.step
    rewinds, scale = state.num_rewinds + 1, state.lr_scale * REWIND_FACTOR
    load_checkpoint(checkpoints[-1], state)
    if same_length:
        state.timeline.replan(state.step, state.step + left)
    state.num_rewinds, state.lr_scale = rewinds, scale
    if is_main:
        run.drop_records_after(state.step)
        run.log({"step": state.step, "event": "rewind", "from": failed, "lr_scale": scale})
        # Otherwise a resume from this checkpoint would repeat the rates that failed.
        file = checkpoints[-1] / STATE
        write_text(file, json.dumps(seal({**read_json(file), **state.values()})))


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`3.exp_avg` -> tensor. Rates are not stored: the schedule computes them from the step."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{k}": torch.as_tensor(v) for i, s in state.items() for k, v in s.items()}


@torch.no_grad()
def _read_into(tensors: dict[str, Tensor], reader: ShardReader) -> None:
    """Overwrite `tensors`, whose names must be those of the file."""
    if missing := tensors.keys() ^ set(reader.names()):
        raise KeyError(f"only one side has {quoted(sorted(missing), 3)}")
    # In place, so that optimizers, EMA and compiled code keep pointing to the same tensors.
    for name, tensor in tensors.items():
        local: Any = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
        local.copy_(reader.read(name, tensor))


def _load_optimizer(optimizer: torch.optim.Optimizer, reader: ShardReader) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name in reader.names():
        index, _, key = name.partition(".")
        p = params[int(index)]
        # Moments have the shape of the weight and are sharded like it; a step count is not.
        sharded = is_sharded(p) and key != "step"
        value = reader.read(name, p if sharded else None)
        state.setdefault(int(index), {})[key] = shard_like(value, p) if sharded else value
    # The settings of this run, not of the checkpoint: a resume may only continue with equal ones.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
