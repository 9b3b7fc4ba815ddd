"""The `.npz` archive itself: arrays read without trust, written with the same bytes every time.

What the arrays have no place for (class names, preprocessing, …) stands as JSON in the comment at
the end of the zip archive, where numpy and the official loaders, which refuse unknown arrays, do
not look.
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
from vitcli.files import replacing

Arrays = Mapping[str, NDArray[Any]]
# Not the model: what an optimiser keeps, twice the size of the weights. Flax's own optimiser, which
# big_vision's older files hold, kept the weights as well.
OPTIMIZER = ("opt/", "opt_state/")
WEIGHTS = "opt/target/"
# A comment longer than zip allows is packed; unpacked it is never longer than this.
COMMENT_BYTES = 65_535
UNPACKED_BYTES = 16 * 2**20
PACKED = b"vitcli+zlib:"
# Weights hardly shrink. What claims to be far larger than its file is no weights file.
LARGEST_RATIO, HARMLESS_BYTES = 100, 64 * 2**20


@dataclass
class Archive:
    """What an `.npz` holds.

    Attributes:
        arrays: name -> array, without the optimiser's.
        skipped: names of the arrays that were not read.
        said: what our comment says, `{}` for anybody else's file.
    """

    arrays: dict[str, NDArray[Any]]
    skipped: list[str] = field(default_factory=list)
    said: dict[str, Any] = field(default_factory=dict)


def read_npz(path: str | os.PathLike[str]) -> Archive:
    """The archive at `path`, nothing unpickled; memory is taken for what is there, not claimed.

    Raises:
        VitcliError: no such file, truncated, not an archive of arrays, one of Python objects, or
            sizes that contradict each other.
    """
    try:
        with Path(path).open("rb") as stream:
            with zipfile.ZipFile(stream) as packed:
                _check_sizes(packed, os.fstat(stream.fileno()).st_size)
                said = _read_comment(packed.comment)
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as file:
                names = file.files
                kept = () if any(n.startswith("params/") for n in names) else (WEIGHTS,)
                skipped = [n for n in names if n.startswith(OPTIMIZER) and not n.startswith(kept)]
                wanted = set(names).difference(skipped)
                return Archive({n: file[n] for n in names if n in wanted}, skipped, said)
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
    """Raises ValueError where an array claims another size than its entry, or that of the file."""
    entries = packed.infolist()
    claimed = sum(entry.file_size for entry in entries)
    if sum(entry.compress_size for entry in entries) > size:
        raise ValueError("its entries claim to be larger than the file")
    if claimed > max(HARMLESS_BYTES, LARGEST_RATIO * size):
        raise ValueError(f"{size} bytes claim to hold {claimed}")
    for entry in entries:
        if entry.compress_type == zipfile.ZIP_STORED and entry.file_size != entry.compress_size:
            raise ValueError(f"`{entry.filename}` has two sizes")
        with packed.open(entry) as stream:
            shape, dtype, header = _header(stream, entry.filename)
        if dtype.hasobject:
            raise ValueError(f"`{entry.filename}` holds Python objects, which are not unpickled")
        expected = header + prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or expected != entry.file_size:
            raise ValueError(
                f"`{entry.filename}` has {entry.file_size} bytes, its header says {expected}"
            )


def _header(stream: IO[bytes], name: str) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape and dtype of an array, and the length of the header that says them."""
    try:
        version = npy.read_magic(stream)
    except ValueError as error:
        raise ValueError(f"`{name}` is no array") from error
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"`{name}` is in a format that weights do not need: {version}")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    try:
        shape, _, dtype = read(stream)
    except TokenError as error:
        raise ValueError(f"the header of `{name}` is damaged") from error
    return shape, dtype, stream.tell()


def write_npz(path: Path, arrays: Arrays, said: Mapping[str, Any]) -> list[str]:
    """Write `arrays` sorted by name, uncompressed as the released files are, and `said` beside.

    Equal contents give equal bytes. Where the class names in `said` do not fit, they are left out
    and a note says so.

    Raises:
        VitcliError: there is a file already, or it cannot be written.
    """
    if path.exists():
        raise VitcliError(f"`{path}` is there already", hint="give another name, or remove it")
    comment, notes = _comment(said)
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as packed:
        for name in sorted(arrays):
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            with packed.open(entry, "w", force_zip64=True) as stream:
                npy.write_array(stream, np.ascontiguousarray(arrays[name]), allow_pickle=False)
        packed.comment = comment
    return notes


def _comment(said: Mapping[str, Any]) -> tuple[bytes, list[str]]:
    """`said` in at most 65,535 bytes, without the class names if need be; notes."""
    text = json.dumps({"vitcli": said}, sort_keys=True).encode()
    if len(text) <= COMMENT_BYTES:
        return text, []
    text = PACKED + base64.b64encode(zlib.compress(text, 9))
    if len(text) <= COMMENT_BYTES:
        return text, []
    shorter = {key: value for key, value in said.items() if key != "labels"}
    note = "the class names do not fit into the file: give them again with `--labels`"
    return _comment(shorter)[0], [note]


def _read_comment(comment: bytes) -> dict[str, Any]:
    """The inverse of `_comment`; a ValueError for a damaged one of ours."""
    if comment.startswith(PACKED):
        unpacker = zlib.decompressobj()
        packed = base64.b64decode(comment.removeprefix(PACKED), validate=True)
        comment = unpacker.decompress(packed, UNPACKED_BYTES)
    elif not comment.startswith(b'{"vitcli":'):
        return {}
    said = json.loads(comment)["vitcli"]
    if not isinstance(said, dict):
        raise ValueError("its comment is damaged")
    return said
