"""Zip archives of class folders. Nothing is extracted: images are read from the archive."""

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np

from vitcli.data.folder_tree import named, tree_of
from vitcli.data.image_set import Integers
from vitcli.data.layout import read_layout
from vitcli.data.readers.folder import (
    WalkReport,
    is_image_name,
    is_system_name,
    source_of_layout,
)
from vitcli.data.source import DataRequest, Source
from vitcli.decode import ImageError
from vitcli.errors import VitcliError, printable

HEADER_BYTES = 30  # of a member, before its name (APPNOTE.TXT 6.3.10, section 4.3.7)
MAX_IMAGE_BYTES = 2**30  # an image that claims more is an error, not an allocation
ENCRYPTED = 1  # bit of `flag_bits`


class ZipStore:
    """Images inside a zip archive. Threads and processes share no file position.

    Args:
        file: the archive.
        members: the images.
    """

    def __init__(self, file: Path, members: Sequence[ZipInfo]) -> None:
        self.file = file
        self.names = [member.filename for member in members]
        self.places = np.array(
            [(m.header_offset, m.compress_size, m.file_size, m.CRC) for m in members],
            dtype=np.int64,
        ).reshape(-1, 4)
        self.deflated = np.array([m.compress_type == ZIP_DEFLATED for m in members], dtype=bool)

    def __len__(self) -> int:
        return len(self.names)

    def content_keys(self, rows: Integers) -> Integers:
        """Checksums."""
        return self.places[rows, 3]

    def content(self, row: int) -> bytes:
        offset, compressed, size, crc = (int(value) for value in self.places[row])
        if size > MAX_IMAGE_BYTES:
            raise ImageError(self.describe(row), f"it has {size:,} bytes, more than an image has")
        try:
            with self.file.open("rb") as file:
                file.seek(offset)
                header = file.read(HEADER_BYTES)
                # The lengths of the name and of the extra field, which the content follows.
                file.seek(sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28)), 1)
                content = file.read(compressed)
            if self.deflated[row]:
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
        except (OSError, zlib.error) as error:
            raise ImageError(self.describe(row), str(error)) from None
        if len(content) != size or zlib.crc32(content) != crc:
            raise ImageError(self.describe(row), "its checksum is wrong: the archive is damaged")
        return content

    def describe(self, row: int) -> str:
        return printable(f"{self.file}:{self.names[row]}")

    def file_name(self, row: int) -> str:
        return self.names[row].rpartition("/")[2]


def load_zip(request: DataRequest) -> Source:
    """A zip archive with the layout of an image folder; see `load_folder`.

    Raises:
        VitcliError: it is damaged or encrypted, or its layout is not understood.
    """
    report = WalkReport()
    members = _image_members(request.path, report)
    paths = sorted(members, key=os.fsencode)  # the order of a walk through the extracted folder
    layout = read_layout(
        tree_of(request.path.stem, paths), request.shown, request.settings.class_level
    )
    notes = [*report.notes(request.shown), *layout.notes]
    if report.tables:
        notes.append(
            f"{request.shown}: tables in an archive are not read ({named(report.tables)}); to use "
            "them, extract it"
        )

    def store_of(base: str, below: Sequence[str]) -> ZipStore:
        return ZipStore(request.path, [members[base + path] for path in below])

    def sizes(split: str, base: str, below: Sequence[str]) -> Iterator[bytes]:
        for path in below:
            size = members[base + path].file_size.to_bytes(8, "little")
            yield f"{split}/".encode() + os.fsencode(path) + size

    return source_of_layout(request, layout, notes, store_of, sizes)


def _image_members(file: Path, report: WalkReport) -> Mapping[str, ZipInfo]:
    """Path -> member, for all images whose path stays inside of the archive."""
    shown = printable(file)
    try:
        with ZipFile(file) as archive:
            infos = archive.infolist()
    except (BadZipFile, NotImplementedError, ValueError) as error:
        raise VitcliError(
            f"`{shown}` is not a zip archive, or it is damaged: {error}",
            f"test it with `unzip -t {shown}`, or download it again",
        ) from None
    found: dict[str, ZipInfo] = {}
    for info in infos:
        path = info.filename.replace("\\", "/")  # as some programs on Windows write it
        parts = path.split("/")
        system = next((part for part in parts if is_system_name(part) and part != ".."), None)
        if path.endswith("/"):
            continue
        if path.startswith("/") or ".." in parts or ":" in parts[0]:
            report.outside.append(path)
        elif system is not None:
            report.add_system(system)
        elif not is_image_name(parts[-1]):
            report.add_other(path)
        else:
            found[path] = info
    locked = next((path for path, info in found.items() if info.flag_bits & ENCRYPTED), None)
    if locked is not None:
        raise VitcliError(
            f"`{shown}` is encrypted (`{printable(locked)}`)", "extract it, and give the folder"
        )
    methods = {info.compress_type for info in found.values()} - {ZIP_STORED, ZIP_DEFLATED}
    if methods:
        raise VitcliError(
            f"`{shown}` is compressed by method {min(methods)}; only stored and deflated images "
            "can be read",
            "extract it, and give the folder",
        )
    return found
