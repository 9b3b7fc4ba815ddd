"""Read state dicts that `torch.save` wrote, without running any code in the file.

`torch.load(weights_only=True)` builds tensors and plain containers. It refuses every other function
or class before it is called. No other code here opens a pickle.
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
    "if you trust the author, load it in Python and save only its tensors: "
    '`safetensors.torch.save_file(model.state_dict(), "model.safetensors")`'
)
# Largest ratio of the bytes of all tensors to the bytes of the file. A file stores shared weights
# once (12 blocks in ALBERT). In a larger ratio, one number is expanded over a large shape.
MAX_EXPANSION = 16
MAX_WRAPPINGS = 8
# Keys under which programs store the state dict, best first. Averaged weights are evaluated (timm,
# DINO, I-JEPA), so they come first; a student comes last.
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
    """Return True if the suffix or the first bytes show a file of `torch.save` or `pickle`."""
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
    """Return the protocol of a pickle without a zip archive; 0 for any other file."""
    start = _start(path)
    # safetensors starts with the 64-bit length of its header, and a length of 640 is 80 02 too.
    if start[:1] != b"\x80" or start[4:] == b"\0\0\0\0{":
        return 0
    return start[1] if start[1:2] in (b"\2", b"\3", b"\4", b"\5") else 0


def _start(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(9)


def load_pickle(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the state dict in a file of `torch.save`, and notes on which one was chosen.

    A zip archive is memory-mapped. Tensors that share memory are copied.

    Raises:
        VitcliError: the file holds code, a whole module or no state dict, it is truncated, or its
            tensors are sparse, quantised or far larger than the file.
    """
    path = Path(path)
    tensors, notes = _state_dict(_unpickled(path), str(path))
    if wrong := [f"{name} ({_kind(t)})" for name, t in tensors.items() if _kind(t)]:
        raise VitcliError(
            f"`{path}` holds tensors that are not dense weights: {', '.join(wrong[:5])}",
            hint="use the dense float32 file",
        )
    _check_size(tensors, path)
    return _own_memory(tensors), notes


def _unpickled(path: Path) -> Any:
    try:
        mapped = _start(path).startswith(ZIP)
    except OSError as error:
        raise VitcliError(
            f"cannot read `{path}`: {error.strerror or error}", hint="check the file permissions"
        ) from error
    try:
        # Many checkpoints hold the arguments of their training program: data without code.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about old tensor types
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged or hostile file may raise anything
        raise _refusal(path, str(error)) from error


def _refusal(path: Path, words: str) -> VitcliError:
    """Return the error for a file that torch refused, derived from torch's message."""
    found = re.search(r"(?:GLOBAL|instruction:|class) ([\w.]+\.\w+)", words)
    named = found[1] if found else None
    if "TorchScript" in words:
        return VitcliError(
            f"`{path}` is a TorchScript program, not a state dict; no code was run",
            hint=CONVERT_HINT.replace("load it in Python", "load it with `torch.jit.load`"),
        )
    if named and re.search(
        r"(^|\.)(nn|models?|modules?|networks?|layers|timm|transformers)\.", named
    ):
        return VitcliError(
            f"`{path}` is the pickle of a whole module (`{named}`), which needs its own code; it "
            "was not opened",
            hint=CONVERT_HINT,
        )
    if named:
        return VitcliError(
            f"`{path}` is a pickle that calls `{named}`, so it is refused; no code was run",
            hint=CONVERT_HINT,
        )
    if _protocol(path) >= 4 or "Unsupported operand 149" in words:  # 149: frame
        return VitcliError(
            f"`{path}` is a pickle of protocol 4 or later, which `torch.save` does not write; it "
            "is refused, and no code was run",
            hint=CONVERT_HINT,
        )
    if _begins_as_pickle(path):
        reason = words.rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
        reason = printable(reason.partition(". This")[0])[:150]
        why = f": {reason}" if reason else ""
        return VitcliError(
            f"`{path}` is truncated, or `torch.save` did not write it{why}",
            hint="copy or download the file again",
        )
    return VitcliError(
        f"`{path}` was not written by `torch.save`", hint=f"check its type: `file {path}`"
    )


def _state_dict(value: Any, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """Return the state dict inside the content of a file, and a note on which one was chosen."""
    trail: list[str] = []
    notes: list[str] = []
    while isinstance(value, Mapping):
        inner = [k for k in WRAPPINGS if isinstance(value.get(k), Mapping) and value[k]]
        if not inner:
            break
        value, others = value[inner[0]], inner[1:]
        trail.append(inner[0])
        if len(trail) > MAX_WRAPPINGS:  # a dictionary that contains itself has no end
            raise VitcliError(
                f"`{source}` nests its state dict in more than {MAX_WRAPPINGS} dictionaries",
                hint="save `model.state_dict()`",
            )
        if others:
            ignored = ", ".join(f"`{name}`" for name in others)
            notes.append(f"loaded the weights under `{'.'.join(trail)}`, not those under {ignored}")
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
            hint="store the tensors at the top level, or under `model` or `state_dict`",
        )
    return tensors, notes


def _kind(tensor: Tensor) -> str | None:
    """Return the kind of a tensor that is not a dense array of numbers; None for a dense one."""
    if tensor.is_quantized:
        return "quantised"
    if tensor.layout != torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    return "without data" if tensor.is_meta else None


def _check_size(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise a VitcliError if the tensors would be far larger than their file."""
    sizes = {name: math.prod(t.shape) * t.element_size() for name, t in tensors.items()}
    total, file = sum(sizes.values()), path.stat().st_size
    if total > MAX_EXPANSION * file:
        largest = max(sizes, key=lambda name: sizes[name])
        raise VitcliError(
            f"`{path}` has {file} bytes, but its tensors would take {total} bytes; the largest, "
            f"`{printable(largest)}`, has the shape {tuple(tensors[largest].shape)} and takes "
            f"{tensors[largest].untyped_storage().nbytes()} bytes in the file",
            hint="the file is damaged or malicious; if you trust it, load it in Python and save "
            "its tensors after `.contiguous()`",
        )


def _own_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy the tensors that share memory or are not contiguous; return the others unchanged."""
    seen: set[int] = set()
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        place = tensor.untyped_storage().data_ptr()
        alone = tensor.untyped_storage().nbytes() == tensor.nbytes and place not in seen
        seen.add(place)
        own[name] = tensor if alone and tensor.is_contiguous() else tensor.clone().contiguous()
    return own
