"""Writing so that a reader finds the old or the new, never a part."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vitcli.errors import VitcliError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`: moved onto it when the block ends well, else removed.

    The block may make it a file or a folder. What it holds is on the disk before the move.

    Raises:
        VitcliError: it cannot be written (no permission, disk full).
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name[:80]}.{os.getpid()}.tmp")
    try:
        yield temporary
        for file in [temporary, *temporary.rglob("*")]:
            _sync(file)
        if temporary.is_dir() and target.is_dir():
            shutil.rmtree(target)
        temporary.replace(target)
        _sync(target.parent)
    except OSError as error:
        raise VitcliError(
            f"cannot write `{target}`: {error.strerror or error}",
            "free some space or choose another place with `--out`; what was there is still whole",
        ) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):
                temporary.unlink()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a small text file whole or not at all; raises as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
