"""The paths that this process creates, changes or removes."""

import os
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path

CHANGING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# Audit events of Python (docs.python.org/3/library/audit_events.html): the places of the paths in
# their arguments, and of the descriptors of the folders that these are relative to.
EVENTS = {
    "open": {0: None}, "os.truncate": {0: None}, "sqlite3.connect": {0: None},
    "os.mkdir": {0: 2}, "os.remove": {0: 1}, "os.rmdir": {0: 1}, "os.chmod": {0: 2},
    "os.chown": {0: 3}, "os.utime": {0: 3}, "os.rename": {0: 2, 1: 3}, "os.link": {1: 3},
    "os.symlink": {1: 2},
}  # fmt: skip
_records: list[set[str]] = []


def _hook(event, values):
    if not _records or event not in EVENTS or (event == "open" and not values[2] & CHANGING):
        return
    for place, folder in EVENTS[event].items():
        if not isinstance(values[place], str | bytes | os.PathLike):
            continue  # an open file
        path = os.fsdecode(values[place])
        if folder is not None and values[folder] != -1:
            path = str(Path(f"/proc/self/fd/{values[folder]}").resolve() / path)
        for record in _records:
            record.add(os.path.realpath(path))


@cache
def _watch_process():
    """Call the hook for the life of the process: each `id()` of a tensor calls it, too."""
    sys.addaudithook(_hook)


@contextmanager
def written_paths():
    """Yield a set that receives the real paths that are written to during the block."""
    record: set[str] = set()
    _watch_process()
    _records.append(record)
    try:
        yield record
    finally:
        _records.remove(record)
