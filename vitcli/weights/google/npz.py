"""Read `.npz` archives without trusting them, and write equal contents as equal bytes.

The official loaders refuse unknown arrays. So class names, preprocessing and other settings are
stored as JSON in the comment of the zip archive, which numpy and these loaders ignore.
"""

import base64
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from vitcli.errors import VitcliError
from vitcli.files import parse_json, replacing

Arrays = Mapping[str, NDArray[Any]]
# The optimizer state is twice the size of the weights. Flax's old optimizer, in big_vision's older
# files, also holds the weights.
OPTIMIZER = ("opt/", "opt_state/")
WEIGHTS = "opt/target/"
# zip allows comments of this size. A longer one is compressed, and limited when it is read.
COMMENT_BYTES = 65_535
UNPACKED_BYTES = 16 * 2**20
PACKED = b"vitcli+zlib:"
# Weights hardly compress. A small file that claims a huge content is an attack (a "zip bomb").
LARGEST_RATIO, HARMLESS_BYTES = 100, 64 * 2**20


@dataclass
class NpzContents:
    """The contents of an `.npz`.

    Attributes:
        arrays: name -> array, without the optimizer's arrays.
        skipped: names of the arrays that were not read.
        comment: the settings in our comment; `{}` if vitcli did not write the file.
    """

    arrays: dict[str, NDArray[Any]]
    skipped: list[str] = field(default_factory=list)
    comment: dict[str, Any] = field(default_factory=dict)


def read_npz(path: str | os.PathLike[str]) -> NpzContents:
    """Read the archive at `path`. Nothing is unpickled, and sizes are checked before allocation.

    Raises:
        VitcliError: the file is missing, truncated, not an archive of arrays, contains Python
            objects, or has sizes that contradict each other.
    """
    try:
        with Path(path).open("rb") as stream:
            with zipfile.ZipFile(stream) as packed:
                _check_sizes(packed, os.fstat(stream.fileno()).st_size)
                comment = _read_comment(packed.comment)
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as file:
                names = file.files
                needed = () if any(n.startswith("params/") for n in names) else (WEIGHTS,)
                skipped = [n for n in names if n.startswith(OPTIMIZER) and not n.startswith(needed)]
                wanted = set(names).difference(skipped)
                arrays = {n: file[n] for n in names if n in wanted}
                return NpzContents(arrays, skipped, comment)
    except FileNotFoundError as error:
        raise VitcliError(f"no such weights file: `{path}`", hint="check the path") from error
    except (
        OSError,
        ValueError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        TypeError,
        RuntimeError,  # encrypted
        NotImplementedError,  # a compression that zipfile does not know
    ) as error:
        raise VitcliError(
            f"`{path}` cannot be read as numpy arrays: {error}", hint="copy or download it again"
        ) from error


def _check_sizes(packed: zipfile.ZipFile, size: int) -> None:
    """Raise ValueError if an array claims another size than its entry has, or than the file."""
    entries = packed.infolist()
    claimed = sum(entry.file_size for entry in entries)
    if sum(entry.compress_size for entry in entries) > size:
        raise ValueError("its entries claim to be larger than the file")
    if claimed > max(HARMLESS_BYTES, LARGEST_RATIO * size):
        raise ValueError(f"{size} bytes claim to hold {claimed} bytes")
    for entry in entries:
        if entry.compress_type == zipfile.ZIP_STORED and entry.file_size != entry.compress_size:
            raise ValueError(f"`{entry.filename}` has two different sizes")
        with packed.open(entry) as stream:
            shape, dtype, header = _header(stream, entry.filename)
        if dtype.hasobject:
            raise ValueError(
                f"`{entry.filename}` holds Python objects, which vitcli does not unpickle"
            )
        expected = header + prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or expected != entry.file_size:
            raise ValueError(
                f"`{entry.filename}` has {entry.file_size} bytes, its header says {expected}"
            )


def _header(stream: IO[bytes], name: str) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Return shape, dtype and the length of the header of an array."""
    try:
        version = npy.read_magic(stream)
    except ValueError as error:
        raise ValueError(f"`{name}` is not an array") from error
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"`{name}` has the unsupported format version {version}")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    try:
        shape, _, dtype = read(stream)
    except TokenError as error:
        raise ValueError(f"the header of `{name}` is damaged") from error
    return shape, dtype, stream.tell()


def write_npz(path: Path, arrays: Arrays, settings: Mapping[str, Any]) -> list[str]:
    """Write `arrays` sorted by name and uncompressed, as in the released files; return notes.

    Equal contents give equal bytes. If the class names in `settings` do not fit into the comment,
    they are left out, with a note.

    Raises:
        VitcliError: the file exists, or is not writable.
    """
    if path.exists() and path.stat().st_size:  # an empty file is a name that the caller took
        raise VitcliError(f"`{path}` exists already", hint="choose another name, or remove it")
    comment, notes = _comment(settings)
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as packed:
        for name in sorted(arrays):
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            with packed.open(entry, "w", force_zip64=True) as stream:
                npy.write_array(stream, np.ascontiguousarray(arrays[name]), allow_pickle=False)
        packed.comment = comment
    return notes


def _comment(settings: Mapping[str, Any]) -> tuple[bytes, list[str]]:
    """Encode `settings` in at most 65,535 bytes, without class names if they do not fit."""
    text = json.dumps({"vitcli": settings}, sort_keys=True).encode()
    if len(text) <= COMMENT_BYTES:
        return text, []
    text = PACKED + base64.b64encode(zlib.compress(text, 9))
    if len(text) <= COMMENT_BYTES:
        return text, []
    shorter = {key: value for key, value in settings.items() if key != "labels"}
    note = "the class names do not fit into the file: give them with `--labels` when you load it"
    return _comment(shorter)[0], [note]


def _read_comment(comment: bytes) -> dict[str, Any]:
    """Return the settings that `_comment` wrote; a damaged comment of ours is a ValueError."""
    if comment.startswith(PACKED):
        unpacker = zlib.decompressobj()
        packed = base64.b64decode(comment.removeprefix(PACKED), validate=True)
        comment = unpacker.decompress(packed, UNPACKED_BYTES)
    elif not comment.startswith(b'{"vitcli":'):
        return {}
    settings = parse_json(comment)["vitcli"]
    if not isinstance(settings, dict):
        raise ValueError("its comment is damaged")
    return settings
