"""Tensors shared out among processes (FSDP2), and checkpoints in parts.

Each process keeps a part of the rows of every tensor, and has the whole of a block only while it
computes. A checkpoint has one file a process; any number of processes reads it again, one too.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vitcli.config.schema import Recipe
from vitcli.errors import VitcliError
from vitcli.weights.store import write_tensors

ALLOWED = ("adamw", "sgd")  # what they compute for a part does not depend on the rest
PARTS = "parts"  # the metadata entry: name -> (first row, rows of the whole)


def check_sharding(recipe: Recipe, processes: int) -> None:
    """Whether this recipe's tensors can be shared out.

    Raises:
        VitcliError: an optimizer that needs whole matrices; averaged weights or adapters.
    """
    if not recipe.train.fully_shard:
        return
    if processes == 1:
        raise VitcliError(
            "`train.fully_shard` shares the model out among processes, and there is one",
            "`--processes N`, or leave it out",
        )
    if recipe.optim.name not in ALLOWED or recipe.optim.momentum_dtype != "fp32":
        raise VitcliError(
            f"`train.fully_shard` parts matrices that optimizer `{recipe.optim.name}` needs whole",
            f"`--set optim.name=` one of {', '.join(ALLOWED)}, with an fp32 momentum",
        )
    train = recipe.train
    if train.compile or recipe.lora.rank is not None or train.on_nan == "rewind":
        raise VitcliError(
            "`train.fully_shard` does not go with `train.compile`, `lora` or `--on-nan rewind`",
            "leave one of them out",
        )


def share_out(objective: nn.Module) -> None:
    """Make every tensor of `objective` one of parts; blocks are gathered one at a time."""
    from torch.distributed.fsdp import fully_shard

    model: Any = objective.model
    for block in getattr(model, "blocks", ()):
        fully_shard(block)
    fully_shard(objective)


def is_part(tensor: Any) -> bool:
    """Whether a tensor is one of those that processes share."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors, gathered from all processes; all must call it."""
    return {name: t.full_tensor() if is_part(t) else t for name, t in tensors.items()}  # type: ignore[attr-defined]


def rows_of(tensor: Tensor) -> tuple[int, int]:
    """(first row, number of rows) that this process keeps; all of one that is not shared."""
    if not is_part(tensor):
        return 0, len(tensor) if tensor.ndim else 0
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    size = -(-tensor.shape[0] // count)  # as torch.chunk cuts
    first = min(rank * size, tensor.shape[0])
    return first, min(size, tensor.shape[0] - first)


def part_file(folder: Path, name: str, rank: int, count: int) -> Path:
    """`module-0-of-2.safetensors`, or `module.safetensors` of one that is whole."""
    return folder / (
        f"{name}.safetensors" if count == 1 else f"{name}-{rank}-of-{count}.safetensors"
    )


def write_part(folder: Path, name: str, tensors: dict[str, Tensor], rank: int, count: int) -> None:
    """Write what this process keeps of `tensors`; what is not shared is process 0's to write."""
    mine, places = {}, {}
    for key, tensor in tensors.items():
        if not is_part(tensor) and rank:
            continue
        mine[key] = tensor.to_local() if is_part(tensor) else tensor  # type: ignore[attr-defined]
        places[key] = [rows_of(tensor)[0], tensor.shape[0] if tensor.ndim else 0]
    # safetensors writes several entries in a random order, and equal states are to be equal bytes.
    said = {PARTS: json.dumps(places, sort_keys=True)} if count > 1 else None
    write_tensors(part_file(folder, name, rank, count), mine, said)


class Parts:
    """The tensors of all part files of one name, by name and rows."""

    def __init__(self, folder: Path, name: str) -> None:
        found = sorted(folder.glob(f"{name}-*-of-*.safetensors"))
        self.files: list[Any] = [
            safe_open(path, "pt") for path in found or [folder / f"{name}.safetensors"]
        ]
        self.places: dict[str, list[tuple[Any, int]]] = {}
        for file in self.files:
            said = json.loads((file.metadata() or {}).get(PARTS, "{}"))
            for key in file.keys():  # noqa: SIM118  # no mapping
                self.places.setdefault(key, []).append((file, said.get(key, [0, 0])[0]))

    def names(self) -> Iterator[str]:
        """Of all tensors."""
        return iter(self.places)

    def read(self, name: str, like: Tensor | None = None) -> Tensor:
        """A whole tensor, or those rows of it that this process keeps of `like`.

        Raises:
            KeyError: there is none of that name, or rows are missing.
        """
        pieces = []
        first, count = rows_of(like) if like is not None and is_part(like) else (0, None)
        reached = first
        for file, start in sorted(self.places[name], key=lambda place: place[1]):
            held = file.get_slice(name)
            shape = held.get_shape()
            if not shape:
                return file.get_tensor(name)
            low = max(reached, start) - start
            high = shape[0] if count is None else min(shape[0], first + count - start)
            if low < high and low >= 0:
                if start + low != reached:
                    raise KeyError(f"rows {reached} to {start + low} of {name}")
                pieces.append(held[low:high])
                reached = start + high
        if not pieces:
            return self.places[name][0][0].get_slice(name)[0:0]
        return torch.cat(pieces)


def like_part(tensor: Tensor, like: Tensor) -> Tensor:
    """Rows that this process keeps, as a shared tensor placed as `like`."""
    from torch.distributed.tensor import DTensor

    other: Any = like
    return DTensor.from_local(
        tensor.to(other.to_local().device),
        other.device_mesh,
        other.placements,
        run_check=False,
        shape=other.shape,
        stride=other.stride(),
    )
