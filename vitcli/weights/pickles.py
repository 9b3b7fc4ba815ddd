"""Read state dicts that `torch.save` wrote, without running any code in the file.

`torch.load(weights_only=True)` builds tensors and plain containers. It refuses every other function
or class before it is called. No other code here opens a pickle.
"""

import argparse
import math
import os
import re
import warnings
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitcli.errors import VitcliError, printable, quoted

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".tar", ".joblib")
ZIP = b"PK\x03\x04"
CONVERT_HINT = (
    "if you trust the author, load it in Python and save only its tensors: "
    '`safetensors.torch.save_file(model.state_dict(), "model.safetensors")`'
)
# Largest ratio of the bytes of all tensors to the bytes of the file. A file stores shared weights
# once (12 blocks in ALBERT). In a larger ratio, one number is expanded over a large shape.
MAX_EXPANSION = 16


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


def load_pickle(path: str | os.PathLike[str]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors in a file of `torch.save`: path of the dictionary -> name -> tensor.

    `{"state_dict": {…}, "ema": {…}}` has the paths `state_dict` and `ema`, a list has the paths
    `0`, `1` …, and the path of a plain state dict is empty. A zip archive is memory-mapped. Call
    `own_tensors` before you compute with the tensors.

    Raises:
        VitcliError: the file holds code, a whole module or no state dict, or it is truncated.
    """
    path = Path(path)
    value = _unpickled(path)
    if found := _tensor_dictionaries(value):
        return found
    if not isinstance(value, Mapping):
        raise VitcliError(
            f"`{path}` holds a {type(value).__name__}, not a state dict",
            hint="save `model.state_dict()`",
        )
    keys = quoted(value, 6) or "none"
    raise VitcliError(
        f"`{path}` holds no state dict; its keys are {keys}",
        hint="save the tensors of the model: `torch.save(model.state_dict(), PATH)`",
    )


def own_tensors(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Check tensors of the pickle `path`, and copy those that share memory.

    Raises:
        VitcliError: tensors are sparse, quantised or far larger than the file.
    """
    if wrong := [f"{name} ({_kind(t)})" for name, t in tensors.items() if _kind(t)]:
        raise VitcliError(
            f"`{path}` holds tensors that are not dense weights: {quoted(wrong, 5)}",
            hint="use the dense float32 file",
        )
    _check_size(tensors, path)
    return _own_memory(tensors)


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


def _tensor_dictionaries(value: Any) -> dict[str, dict[str, Tensor]]:
    """Return path -> tensors of each dictionary in the content of a file, each one once."""
    found: dict[str, dict[str, Tensor]] = {}
    seen: set[int] = set()  # a dictionary may contain itself, or have two keys in its parent
    left: deque[tuple[str, Any]] = deque([("", value)])
    while left:
        path, value = left.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        items: dict[str, Any] = {}
        if isinstance(value, Mapping):
            items = {key: inner for key, inner in value.items() if isinstance(key, str)}
            if tensors := {k: v for k, v in items.items() if isinstance(v, Tensor)}:
                found[path] = tensors
        elif isinstance(value, (list, tuple)):
            items = {str(i): inner for i, inner in enumerate(value)}
        at = f"{path}." if path else ""
        left += [(at + k, v) for k, v in items.items() if isinstance(v, (Mapping, list, tuple))]
    return found


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
