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
            if file.is_file():  # safetensors leaves out what the user's umask allows
                file.chmod(0o666 & ~_umask())
            _sync(file)
        if temporary.is_dir() and target.is_dir():
            shutil.rmtree(target)
        temporary.replace(target)
        _sync(target.parent)
    except OSError as error:
        if not target.parent.is_dir():
            raise VitcliError(
                f"cannot write `{target}`: `{target.parent}` is no folder", "make it first"
            ) from error
        raise VitcliError(
            f"cannot write `{target}`: {os.strerror(error.errno) if error.errno else error}",
            "free some space or choose another place; what was there is still whole",
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


def check_folder(out: Path) -> None:
    """`out` can become a folder, as far as can be seen before the work.

    Raises:
        VitcliError: it, or what it would lie in, is something else.
    """
    for place in (out, *out.parents):
        if os.path.lexists(place):
            if not place.is_dir():
                raise VitcliError(
                    f"`--out {out}`: `{place}` is no folder", hint="give the name of a folder"
                )
            return


def _umask() -> int:
    mask = os.umask(0o077)  # there is no reading without setting
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
