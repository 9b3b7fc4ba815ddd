"""State dicts that `torch.save` wrote: read without running anything that is in the file.

`torch.load(weights_only=True)` builds tensors and plain containers and refuses every other
function or class that a pickle names, before it is called. There is no other way to open one here.
"""

import argparse
import math
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitcli.errors import VitcliError, printable

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".tar", ".joblib")
ZIP = b"PK\x03\x04"
CONVERT_HINT = (
    "where you trust whoever made it, load it in Python and save only its tensors: "
    '`safetensors.torch.save_file(model.state_dict(), "model.safetensors")`'
)
# Of all tensors together, beside the bytes of their file. Tied weights lie in a file once, as do
# blocks that share theirs (12 of ALBERT's); more than that is one number spread over a large shape.
LARGEST_SHARE = 16
# Where programs keep the state dict, in the order of preference: averaged weights are what is
# evaluated (timm, DINO, I-JEPA), and a student is what is left of a training.
WRAPPINGS = (
    "state_dict_ema",
    "model_ema",
    "ema",
    "ema_state_dict",
    "teacher",
    "target_encoder",
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "module",
    "weights",
    "params",
    "encoder",
    "student",
)


def is_pickle(path: str | os.PathLike[str]) -> bool:
    """Whether a file is named like one of `torch.save` or `pickle`, or begins like one."""
    path = Path(path)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        return True
    try:
        return _begins_as_pickle(path)
    except OSError:
        return False


def _begins_as_pickle(path: Path) -> bool:
    return _start(path).startswith(ZIP) or _protocol(path) > 0


def _protocol(path: Path) -> int:
    """Of a pickle that lies bare in its file; 0 where none does."""
    start = _start(path)
    # A safetensors file begins with the 64-bit length of its header: 640 bytes are 80 02, too.
    if start[:1] != b"\x80" or start[4:] == b"\0\0\0\0{":
        return 0
    return start[1] if start[1:2] in (b"\2", b"\3", b"\4", b"\5") else 0


def _start(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(9)


def load_pickle(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict in a file of `torch.save`, unwrapped, and notes on what was chosen.

    A zip archive is mapped into memory, so tensors are read when they are first used; tensors
    that share memory become copies.

    Raises:
        VitcliError: code or a whole module in it, no state dict, truncated, or tensors that are
            no plain weights (sparse, quantised) or far larger than the file, by name.
    """
    path = Path(path)
    tensors, notes = _state_dict(_unpickled(path), str(path))
    if wrong := [f"{name} ({_kind(t)})" for name, t in tensors.items() if _kind(t)]:
        raise VitcliError(
            f"`{path}` holds tensors that are no plain weights: {', '.join(wrong[:5])}",
            hint="take the dense float32 file",
        )
    _check_size(tensors, path)
    return _own_memory(tensors), notes


def _unpickled(path: Path) -> Any:
    try:
        mapped = _start(path).startswith(ZIP)
    except OSError as error:
        raise VitcliError(
            f"cannot read `{path}`: {error.strerror or error}", hint="see to its permissions"
        ) from error
    try:
        # The arguments of a training program, which many checkpoints carry: data without code.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about old types of tensors
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged or hostile file fails in any way that it likes
        raise _refusal(path, str(error)) from error


def _refusal(path: Path, words: str) -> VitcliError:
    """The one error for a file that torch did not read, from torch's own words."""
    found = re.search(r"(?:GLOBAL|instruction:|class) ([\w.]+\.\w+)", words)
    named = found[1] if found else None
    if "TorchScript" in words:
        return VitcliError(
            f"`{path}` is a TorchScript program, not a state dict; nothing of it was run",
            hint=CONVERT_HINT.replace("load it in Python", "load it with `torch.jit.load`"),
        )
    if named and re.search(
        r"(^|\.)(nn|models?|modules?|networks?|layers|timm|transformers)\.", named
    ):
        return VitcliError(
            f"`{path}` is the pickle of a whole module (`{named}`), which only its own code could "
            "open; it was not opened",
            hint=CONVERT_HINT,
        )
    if named:
        return VitcliError(
            f"`{path}` is a pickle that calls `{named}`, so it is refused; nothing of it was run",
            hint=CONVERT_HINT,
        )
    if _protocol(path) >= 4 or "Unsupported operand 149" in words:  # a frame, which 4 begins with
        return VitcliError(
            f"`{path}` is a pickle of protocol 4 or later, not of `torch.save`'s own; such a one "
            "can hold more than tensors, so it is refused; nothing of it was run",
            hint=CONVERT_HINT,
        )
    if _begins_as_pickle(path):
        reason = words.rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
        reason = printable(reason.partition(". This")[0])[:150]
        why = f": {reason}" if reason else ""
        return VitcliError(
            f"`{path}` is truncated, or a pickle that `torch.save` did not write{why}",
            hint="copy or download it again",
        )
    return VitcliError(
        f"`{path}` is no file that `torch.save` wrote", hint="what does `file` say it is?"
    )


def _state_dict(value: Any, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """The mapping of names to tensors inside what the file held, and which one it is."""
    trail: list[str] = []
    notes: list[str] = []
    while isinstance(value, Mapping):
        inner = [k for k in WRAPPINGS if isinstance(value.get(k), Mapping) and value[k]]
        if not inner:
            break
        value, others = value[inner[0]], inner[1:]
        trail.append(inner[0])
        if others:
            beside = ", ".join(f"`{name}`" for name in others)
            notes.append(f"the weights under `{'.'.join(trail)}` were taken, not {beside}")
    if isinstance(value, Tensor) or not isinstance(value, Mapping):
        kind = type(value).__name__
        raise VitcliError(
            f"`{source}` holds a {kind}, not a state dict", hint="save `model.state_dict()`"
        )
    tensors = {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        keys = ", ".join(f"`{printable(str(k))}`" for k in list(value)[:6]) or "none"
        raise VitcliError(
            f"`{source}` holds no state dict; its keys are {keys}",
            hint="the tensors may lie directly in it, or under `model` or `state_dict`",
        )
    return tensors, notes


def _kind(tensor: Tensor) -> str | None:
    """What makes a tensor something else than an array of numbers; None for a plain one."""
    if tensor.is_quantized:
        return "quantised"
    if tensor.layout != torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    return "without data" if tensor.is_meta else None


def _check_size(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises a VitcliError where copies of the tensors would be far larger than their file."""
    sizes = {name: math.prod(t.shape) * t.element_size() for name, t in tensors.items()}
    total, file = sum(sizes.values()), path.stat().st_size
    if total > LARGEST_SHARE * file:
        largest = max(sizes, key=lambda name: sizes[name])
        raise VitcliError(
            f"`{path}` has {file} bytes, its tensors would take {total}; the largest is "
            f"{printable(largest)} {tuple(tensors[largest].shape)}, of "
            f"{tensors[largest].untyped_storage().nbytes()} bytes in the file",
            hint="it is damaged or made to fill the memory; where you trust it, save its tensors "
            "after `.contiguous()`",
        )


def _own_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor contiguous and in memory of its own, copied only where it is not."""
    seen: set[int] = set()
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        place = tensor.untyped_storage().data_ptr()
        alone = tensor.untyped_storage().nbytes() == tensor.nbytes and place not in seen
        seen.add(place)
        own[name] = tensor if alone and tensor.is_contiguous() else tensor.clone().contiguous()
    return own
