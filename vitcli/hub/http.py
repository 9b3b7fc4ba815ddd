"""Receiving a file: what came before a break is kept, and only a whole file gets its name."""

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vitcli.errors import VitcliError
from vitcli.progress import Watcher

MEGA = 1_000_000
PAUSES = (0.0, 1.0, 3.0)  # seconds before the next try, after tries that brought nothing
BUSY = {408, 425, 429, 500, 502, 503, 504}  # statuses after which one tries again
PLACES = "free some space, or set HF_HOME (the Hub's files) or VITCLI_CACHE (others) elsewhere"
AGAIN = "the same command goes on where this one stopped"


class Unreachable(Exception):
    """Nobody answers, or not with anything that tells: what is in the cache is as good as it gets.

    Its text is the reason, a part of a sentence.
    """


class Part:
    """The unfinished file of a download, beside the place where it will be.

    Args:
        path: of the unfinished file.
        name: of the finished one, as the user is told it.
        watch: told when the download begins, and how far it is.
    """

    def __init__(self, path: Path, name: str, watch: Watcher) -> None:
        self.path, self.name, self.watch = path, name, watch
        self.announced = False

    @property
    def size(self) -> int:
        """Bytes that have arrived."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def drop(self) -> None:
        """Begin anew."""
        self.path.unlink(missing_ok=True)

    @contextmanager
    def writing(self, start: int, total: int | None) -> Iterator[Callable[[bytes], None]]:
        """What takes the bytes from `start` on, of `total` if that is known.

        Raises:
            VitcliError: the disk has no room for the rest.
        """
        if total is not None:
            self._check_space(total - start)
        if not self.announced:
            size = f" ({size_text(total)})" if total is not None else ""
            rest = f", {size_text(start)} of it here already" if start else ""
            self.watch.note(f"downloading {self.name}{size}{rest} …")
            self.announced = True
        megabytes = -(-total // MEGA) if total is not None else None
        with (
            self.watch.progress(f"{self.name}, MB", megabytes, start // MEGA) as bar,
            self.path.open("r+b" if start else "wb") as file,
        ):
            done, shown = file.seek(start), start // MEGA

            def write(data: bytes) -> None:
                nonlocal done, shown
                file.write(data)
                done += len(data)
                now = megabytes if megabytes is not None and done == total else done // MEGA
                if now > shown:
                    bar.advance(now - shown)
                    shown = now

            yield write

    def finish(self, target: Path, size: int | None, digest: tuple[str, str] | None) -> None:
        """Give the file its name, when its size and (algorithm, hexadecimal) digest are right.

        Raises:
            VitcliError: they are not; nothing of it is kept, since nothing could mend it.
        """
        wrong = None
        if size is not None and self.size != size:
            wrong = f"came with {self.size:,} bytes, not the {size:,} that were announced"
        elif digest is not None:
            with self.path.open("rb") as file:
                seen = hashlib.file_digest(file, digest[0]).hexdigest()
            if seen != digest[1]:
                wrong = f"came damaged: its {digest[0]} is {seen[:12]}…, not {digest[1][:12]}…"
        if wrong is not None:
            self.drop()
            raise VitcliError(
                f"`{self.name}` {wrong}",
                hint="try again; if it stays so, the server or a proxy on the way alters it",
            )
        with suppress(OSError), self.path.open("rb") as file:
            os.fsync(file.fileno())  # a name must not outlive the bytes on a power cut
        self.path.replace(target)

    def _check_space(self, needed: int) -> None:
        folder = self.path.parent
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise VitcliError(
                f"`{self.name}` needs {size_text(needed)} in `{folder}`, where {size_text(free)} "
                "are free",
                hint=PLACES,
            )


def persist(part: Part, attempt: Callable[[], str | None]) -> None:
    """Repeat `attempt` until it gives None, as long as `part` grows now and then.

    Args:
        attempt: one request; None, or the reason why it was not enough.

    Raises:
        Unreachable: several tries in a row brought nothing.
    """
    failures = 0
    while True:
        before = part.size
        reason = attempt()
        if reason is None:
            return
        failures = 0 if part.size > before else failures + 1
        if failures >= len(PAUSES):
            raise Unreachable(reason)
        time.sleep(PAUSES[failures])


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock of a process that died is free."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path, mode=0o664):
        yield


def cache_folder() -> Path:
    """Where downloads are kept: `VITCLI_CACHE`, else the platform's folder for caches."""
    if given := os.environ.get("VITCLI_CACHE"):
        return Path(given).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/vitcli"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "vitcli"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitcli"


def size_text(size: int) -> str:
    """346_293_852 -> 346 MB."""
    return f"{size / MEGA:.0f} MB" if size >= MEGA else f"{max(1, round(size / 1000))} kB"


def cannot_write(name: str, folder: Path, error: OSError) -> VitcliError:
    """The error for a disk that is full or may not be written to."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return VitcliError(f"cannot keep `{name}` in `{folder}`: {reason}", hint=PLACES)
