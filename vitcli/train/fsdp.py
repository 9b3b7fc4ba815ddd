"""Fully sharded data parallel (FSDP2): sharded tensors, and checkpoint files with one shard each.

Each process stores some rows of every tensor and gathers a whole block only while it computes with
it. A checkpoint has one file per process. Any number of processes can read it, one included.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vitcli.config.schema import Recipe
from vitcli.errors import VitcliError
from vitcli.files import parse_json
from vitcli.train.optimizers import OPTIMIZERS, find_optimizer
from vitcli.weights.store import write_tensors

SHARDS = "parts"  # the metadata key: name -> (first row, rows of the whole tensor)


def check_sharding(recipe: Recipe, processes: int) -> None:
    """Check that `train.fully_shard`, if set, works with the rest of the recipe."""
    if not recipe.train.fully_shard:
        return
    # A launcher may start one process, in which FSDP works on its one device.
    if processes == 1 and not torch.distributed.is_initialized():
        raise VitcliError(
            "`train.fully_shard` needs several processes, and there is one",
            "add `--processes N`, or remove `train.fully_shard`",
        )
    # A bf16 momentum is written as a plain tensor, which FSDP cannot shard like the weights.
    if not find_optimizer(recipe.optim).elementwise or recipe.optim.momentum_dtype != "fp32":
        able = ", ".join(f"`{name}`" for name, entry in OPTIMIZERS.items() if entry.elementwise)
        raise VitcliError(
            f"`train.fully_shard` splits the matrices that optimizer `{recipe.optim.name}` needs "
            "whole",
            f"`--set optim.name=` one of {able}, with `optim.momentum_dtype=fp32`",
        )
    train = recipe.train
    if train.compile or recipe.lora.rank is not None or train.on_nan == "rewind":
        raise VitcliError(
            "`train.fully_shard` cannot be combined with `train.compile`, `lora` or "
            "`--on-nan rewind`",
            "remove one of them",
        )


def shard_module(objective: nn.Module) -> None:
    """Shard every tensor of `objective` over the processes; each block is gathered on its own."""
    from torch.distributed.fsdp import fully_shard

    model: Any = objective.model
    for block in getattr(model, "blocks", ()):
        fully_shard(block)
    fully_shard(objective)


def is_sharded(tensor: Any) -> bool:
    """True if the processes share `tensor`."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def gather_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors, gathered from all processes; every process must call this."""
    return {name: t.full_tensor() if is_sharded(t) else t for name, t in tensors.items()}  # type: ignore[attr-defined]


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Inside the block the tensors outside of the encoder blocks are whole, if they are sharded."""
    shared: Any = module if hasattr(module, "unshard") else None
    if shared is not None:
        shared.unshard()
    try:
        yield
    finally:
        if shared is not None:
            shared.reshard()


def local_rows(tensor: Tensor) -> tuple[int, int]:
    """(first row, number of rows) of the local shard, or of the whole of an unsharded tensor."""
    if not is_sharded(tensor):
        return 0, len(tensor) if tensor.ndim else 0
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    size = -(-tensor.shape[0] // count)  # FSDP2 cuts as torch.chunk does
    first = min(rank * size, tensor.shape[0])
    return first, min(size, tensor.shape[0] - first)


def shard_file(folder: Path, name: str, rank: int, num_shards: int) -> Path:
    """`module-0-of-2.safetensors`, or `module.safetensors` if there is one shard."""
    ending = "" if num_shards == 1 else f"-{rank}-of-{num_shards}"
    return folder / f"{name}{ending}.safetensors"


def write_shard(
    folder: Path, name: str, tensors: dict[str, Tensor], rank: int, num_shards: int
) -> None:
    """Write the local shards of `tensors`; process 0 writes the unsharded ones as well."""
    local, places = {}, {}
    for key, tensor in tensors.items():
        if not is_sharded(tensor) and rank:
            continue
        local[key] = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
        places[key] = [local_rows(tensor)[0], tensor.shape[0] if tensor.ndim else 0]
    # One metadata entry only: safetensors writes several in a random order, and equal states must
    # give equal bytes.
    metadata = {SHARDS: json.dumps(places, sort_keys=True)} if num_shards > 1 else None
    write_tensors(shard_file(folder, name, rank, num_shards), local, metadata)


class ShardReader:
    """Reads tensors, or rows of them, from all shard files of one name."""

    def __init__(self, folder: Path, name: str) -> None:
        paths = sorted(folder.glob(f"{name}-*-of-*.safetensors"))
        self.files: list[Any] = [
            safe_open(path, "pt") for path in paths or [folder / f"{name}.safetensors"]
        ]
        self.places: dict[str, list[tuple[Any, int]]] = {}  # name -> (file, first row), …
        for file in self.files:
            places = dict(parse_json((file.metadata() or {}).get(SHARDS, "{}")))
            for key in file.keys():  # noqa: SIM118  # not a mapping
                self.places.setdefault(key, []).append((file, places.get(key, [0, 0])[0]))

    def names(self) -> Iterator[str]:
        """The names of all tensors."""
        return iter(self.places)

    def read(self, name: str, like: Tensor | None = None) -> Tensor:
        """A whole tensor, or the rows that the local shard of `like` holds.

        Raises:
            KeyError: no such tensor, or rows are missing.
        """
        pieces = []
        # The number of processes may have changed since the checkpoint was written, so a local
        # shard may need rows of several files.
        first, count = local_rows(like) if like is not None and is_sharded(like) else (0, None)
        reached = first
        for file, start in sorted(self.places[name], key=lambda place: place[1]):
            stored = file.get_slice(name)
            shape = stored.get_shape()
            if not shape:
                return file.get_tensor(name)
            low = max(reached, start) - start
            high = shape[0] if count is None else min(shape[0], first + count - start)
            if low < high and low >= 0:
                if start + low != reached:
                    raise KeyError(f"rows {reached} to {start + low} of {name}")
                pieces.append(stored[low:high])
                reached = start + high
        if not pieces:
            return self.places[name][0][0].get_slice(name)[0:0]
        return torch.cat(pieces)


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Local rows -> a sharded tensor with the placement of `like`."""
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
