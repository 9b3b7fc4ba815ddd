"""One process at a time trains in a run directory."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from vitcli.errors import VitcliError
from vitcli.run import Run

LOCK, HOLDER = ".lock", ".holder.json"


@contextmanager
def holding(run: Run, main: bool = True) -> Iterator[None]:
    """Keep every other process from training in `run` for the length of the block.

    The system lets go of the lock when its holder ends, however that may be: nothing is left
    behind that a resume would have to remove.

    Args:
        main: only the first process of a launch holds it.

    Raises:
        VitcliError: another process trains there; it is named.
    """
    if not main:
        yield
        return
    lock = FileLock(run.path / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise VitcliError(
            f"{_holder(run)} is training in `{run.path}`",
            "wait for it, stop it, or choose another place with `--out`",
        ) from None
    except OSError as error:
        raise VitcliError(
            f"cannot lock `{run.path}`: {error.strerror}", "choose another place with `--out`"
        ) from None
    try:
        here = {"host": socket.gethostname(), "process": os.getpid()}
        (run.path / HOLDER).write_text(json.dumps(here), encoding="utf-8")
        yield
    finally:
        for name in (HOLDER, LOCK):
            (run.path / name).unlink(missing_ok=True)
        lock.release()


def _holder(run: Run) -> str:
    try:
        there = json.loads((run.path / HOLDER).read_text(encoding="utf-8"))
        return f"process {there['process']} on `{there['host']}`"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
