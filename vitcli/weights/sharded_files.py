"""Weights in several safetensors files, with an index that says which tensor is where.

As `save_pretrained` writes them above its `max_shard_size`.
"""

import json
from pathlib import Path

from torch import Tensor

from vitcli.errors import VitcliError
from vitcli.weights.store import load_weights

INDEX = "model.safetensors.index.json"


def shards(index: Path) -> list[str]:
    """The files that an index names, beside it.

    Raises:
        VitcliError: it cannot be understood.
    """
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("it names no files beside it")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise VitcliError(
            f"`{index}` is no index of weights files: {error}", hint="copy or download it again"
        ) from error
    return sorted(names)


def load_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all files that `index` names, in memory that is read when it is first used.

    Raises:
        VitcliError: the index or one of the files cannot be read; one of them is not there.
    """
    tensors: dict[str, Tensor] = {}
    for name in shards(index):
        tensors |= load_weights(index.parent / name)
    return tensors
