"""Files in the Hub's cache whose checksums have been verified, so that no start hashes 100 GB."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from vitcli.errors import VitcliError
from vitcli.files import read_json, write_text
from vitcli.hub.http import cache_folder


class VerifiedFiles:
    """`with VerifiedFiles(FOLDER) as verified:` reads the record, and writes it at the end.

    A file counts as verified until its size, its modification time or its change time is another.
    Damage by the disk itself changes none of them and is not noticed. The record is in vitcli's
    cache; without one, or if it cannot be read, each file is verified once more.

    Args:
        folder: a repository in the Hub's cache.
    """

    def __init__(self, folder: Path) -> None:
        name = hashlib.sha256(str(folder).encode()).hexdigest()[:32]
        self.record = cache_folder() / "verified" / f"{name}.json"
        self.stamps: dict[str, Any] = {}
        self.changed = False

    def __enter__(self) -> Self:
        with suppress(OSError, ValueError, TypeError):
            self.stamps = dict(read_json(self.record))
        return self

    def __exit__(self, *_: object) -> None:
        if self.changed:
            with suppress(OSError, VitcliError):  # a read-only cache
                self.record.parent.mkdir(parents=True, exist_ok=True)
                write_text(self.record, json.dumps(self.stamps))

    def __contains__(self, path: Path) -> bool:
        return self.stamps.get(path.resolve().name) == _stamp(path)

    def add(self, path: Path) -> None:
        """Record a file whose checksum is right."""
        self.stamps[path.resolve().name] = _stamp(path)  # a blob has the name of its checksum
        self.changed = True


def _stamp(path: Path) -> list[int]:
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]
