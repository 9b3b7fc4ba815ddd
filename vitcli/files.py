"""Atomic writes, locks, checksums, and readers of JSON and TOML with limits.

A reader of a file finds its old content or its new one, never a part.
"""

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from vitcli.errors import VitcliError

T = TypeVar("T")

MAX_DEPTH = 100  # levels of JSON and TOML; real files have fewer than ten
MAX_FILE_BYTES = 256 << 20
CHECKSUM = "checksum"  # the key of a JSON object that holds the checksum of the others
CHECKSUM_LINE = "# Checksum of the lines above: "
READ_BYTES = 4 << 20
MAX_BITS = 1000  # of an integer; larger ones do not fit into a float
TOO_DEEP = f"it is nested more than {MAX_DEPTH} levels deep"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; rename it to `path` when the block succeeds.

    The block creates a file or a folder there. If it fails, the temporary path is removed and
    `path` stays as it was. The content is flushed to the disk before the rename. A file replaces
    an older file. A folder replaces only an empty folder, so that of two commands that create the
    same folder, one gets it and the other gets an error.

    Raises:
        VitcliError: the path cannot be written (no permission, disk full, a folder with content).
    """
    target = Path(path)
    temporary = temporary_path(target)
    try:
        yield temporary
        for file in [temporary, *temporary.rglob("*")]:
            if file.is_file():  # safetensors ignores the user's umask
                file.chmod(0o666 & ~_umask())
            _sync(file)
        temporary.replace(target)
        _sync(target.parent)
    except OSError as error:
        _check_parent(target, error)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise VitcliError(
                f"`{target}` exists already", "choose another path with `--out`"
            ) from error
        raise VitcliError(
            f"cannot write `{target}`: {os.strerror(error.errno) if error.errno else error}",
            "free some space or choose another path; the previous content is unchanged",
        ) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):
                temporary.unlink()


def temporary_path(target: Path) -> Path:
    """A free name beside `target`; `claimed` removes it after a kill."""
    # Process numbers repeat on the machines and in the containers that share a disk.
    return target.with_name(f".{target.name[:80]}.{secrets.token_hex(6)}.tmp")


@contextmanager
def claimed(path: Path, busy: Callable[[], VitcliError]) -> Iterator[None]:
    """Hold a lock on the name `path`, and remove the temporary files that killed processes left.

    Raises:
        VitcliError: as `exclusive`.
    """
    with exclusive(path.with_name(f".{path.name[:80]}.lock"), busy):
        remove_leftovers(path)
        yield


def release_claim(path: Path) -> None:
    """Remove the lock of a process that was killed after it had made `path`."""
    if path.with_name(f".{path.name[:80]}.lock").is_file():
        with suppress(VitcliError), claimed(path, lambda: VitcliError("it is in use")):
            pass


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`replacing` for an output that the user has named; one command at a time writes it.

    Raises:
        VitcliError: as `replacing`, or another command writes the same path.
    """
    target, hint = Path(path), "wait for it, or choose another path"
    _check_parent(target)
    busy = partial(VitcliError, f"another command is writing `{target}`", hint)
    with claimed(target, busy), replacing(target) as temporary:
        yield temporary


def _check_parent(target: Path, error: OSError | None = None) -> None:
    if not target.parent.is_dir():
        raise VitcliError(
            f"cannot write `{target}`: `{target.parent}` is not a folder",
            "create the folder first",
        ) from error


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of `replacing` for `path` that killed processes have left.

    The caller holds a lock, because the temporary files of a live process look the same.
    """
    start = f".{path.name[:80]}."
    for entry in path.parent.iterdir():
        end = entry.name.removeprefix(start)
        if end != entry.name and re.fullmatch(r"[0-9a-f]{12}\.tmp|\d+\.parts", end):
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a small text file atomically; raises as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def parse_json(text: str | bytes) -> Any:
    """A JSON value of any origin; its types are for the caller to check.

    Raises:
        ValueError: it is not JSON or not UTF-8, or a value is too deep, or an integer too large.
    """
    try:
        return _checked_depth(json.loads(text))
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def read_json(path: str | os.PathLike[str]) -> Any:
    """The JSON value in a file.

    Raises:
        ValueError: as `parse_json`, or the file is larger than `MAX_FILE_BYTES`.
        OSError: the file cannot be read.
    """
    with Path(path).open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"it is larger than {MAX_FILE_BYTES >> 20} MiB")
    return parse_json(content.decode("utf-8"))


def checksum(content: bytes | memoryview, *more: bytes | memoryview) -> str:
    """XXH3-128 of the parts, as 32 hexadecimal digits.

    It finds damage, not forgery. On a CPU it is 6 times as fast as SHA-256 (recipes/RESULTS.md).
    """
    import xxhash

    digest = xxhash.xxh3_128(content)
    for part in more:
        digest.update(part)
    return str(digest.hexdigest())


def file_checksum(path: str | os.PathLike[str], blank: tuple[int, int] = (0, 0)) -> str:
    """The `checksum` of a file, in which the bytes from `blank[0]` to `blank[1]` count as zeros.

    Raises:
        OSError: the file cannot be read.
    """
    import xxhash

    digest, buffer, (first, last) = xxhash.xxh3_128(), bytearray(READ_BYTES), blank
    view, position = memoryview(buffer), 0
    with Path(path).open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            low, high = max(first - position, 0), min(last - position, size)
            if low < high:
                view[low:high] = bytes(high - low)
            digest.update(view[:size])
            position += size
    return str(digest.hexdigest())


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values with their checksum under `CHECKSUM`."""
    plain = {key: value for key, value in values.items() if key != CHECKSUM}
    return {**plain, CHECKSUM: _json_checksum(plain)}


def unseal(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values without their checksum; early versions of vitcli wrote none.

    Raises:
        ValueError: the checksum does not match.
    """
    plain = dict(values)
    if CHECKSUM in plain and plain.pop(CHECKSUM) != _json_checksum(plain):
        raise ValueError("its checksum does not match its content")
    return plain


def seal_text(text: str) -> str:
    """A text of TOML with its checksum as the last line, which is a comment."""
    return f"{text}{CHECKSUM_LINE}{checksum(text.encode())}\n"


def is_intact(text: str) -> bool:
    """False if a text of `seal_text` has changed; texts without a checksum are taken as intact."""
    body, line, digest = text.rpartition(CHECKSUM_LINE)
    return not line or digest.strip() == checksum(body.encode())


def _json_checksum(values: Mapping[str, Any]) -> str:
    # Rounded through JSON once: a tuple becomes a list, and the key 1 becomes "1".
    text = json.dumps(json.loads(json.dumps(values, default=str)), sort_keys=True)
    return checksum(text.encode())


def parse_toml(text: str) -> dict[str, Any]:
    """The values of a TOML text.

    Raises:
        ValueError: the text is not TOML, or nested more than `MAX_DEPTH` levels deep.
    """
    import tomllib

    # `tomllib` needs memory that grows with the square of the number of levels in a dotted key.
    if any(part.count(".") > MAX_DEPTH for part in re.split(r"[,={}\[\]\n]", text)):
        raise ValueError(TOO_DEEP)
    try:
        return _checked_depth(tomllib.loads(text))
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def _checked_depth(value: T) -> T:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        if any(isinstance(part, int) and part.bit_length() > MAX_BITS for part in level):
            raise ValueError("it has an integer of more than 300 digits")
        level = [part for part in level if isinstance(part, dict | list)]
        if not level:
            return value
        level = [child for part in level for child in _children(part)]
    raise ValueError(TOO_DEEP)


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents, unless they exist.

    Raises:
        VitcliError: the folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        # `mkdir` found the folder, and then another command removed it (see `release_unused`).
        gone = folder.is_dir() or not os.path.lexists(folder)
        if isinstance(error, FileExistsError) and gone:
            make_folder(folder)
            return
        raise VitcliError(
            f"cannot create the folder `{folder}`: {error.strerror}",
            "choose another path with `--out`",
        ) from error


def take_first(paths: Iterable[Path], *, as_file: bool = False) -> Path:
    """Create the first of `paths` that does not exist, as an empty folder or file; return it.

    The system creates a name in one operation, so that no two commands take the same path.

    Raises:
        VitcliError: none is free, or it cannot be created.
    """
    for path in paths:
        while True:
            make_folder(path.parent)
            try:
                path.touch(exist_ok=False) if as_file else path.mkdir()
                return path
            except FileExistsError:
                break
            except FileNotFoundError:  # another command has just removed the empty parent
                continue
            except OSError as error:
                raise VitcliError(
                    f"cannot create `{path}`: {error.strerror}", "choose another path with `--out`"
                ) from error
    raise VitcliError(f"`{path}` exists already", "choose another path with `--out`")


def release_unused(path: Path) -> None:
    """Remove a path of `take_first` that is still empty."""
    with suppress(OSError):
        if path.is_dir():
            path.rmdir()  # fails if there is something in it
        elif path.stat().st_size == 0:
            path.unlink()


def check_folder(out: Path) -> None:
    """Check that `out` is a folder or can become one, before a command starts its work.

    Raises:
        VitcliError: `out` or one of its parents is a file.
    """
    for path in (out, *out.parents):
        if os.path.lexists(path):
            if not path.is_dir():
                raise VitcliError(
                    f"`--out {out}`: `{path}` is not a folder", hint="give the path of a folder"
                )
            return


@contextmanager
def exclusive(lock_file: Path, busy: Callable[[], VitcliError]) -> Iterator[None]:
    """Hold a lock during the block, so that one process at a time writes in its folder.

    The operating system releases the lock when its process ends, even after a kill, so no stale
    lock blocks a later command.

    Args:
        lock_file: created for the block and removed afterwards; its folder exists.
        busy: returns the error to raise if another process holds the lock.

    Raises:
        VitcliError: another process holds the lock, or the file cannot be written.
    """
    from filelock import FileLock, Timeout

    while True:
        lock = FileLock(lock_file)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise busy() from None
        except OSError as error:
            raise VitcliError(
                f"cannot lock `{lock_file.parent}`: {error.strerror}", "choose another path"
            ) from None
        if _has_its_name(lock, lock_file):
            break
        lock.release()
    try:
        yield
    finally:
        with suppress(OSError):
            lock_file.unlink(missing_ok=True)
        lock.release()


def _has_its_name(lock: Any, lock_file: Path) -> bool:
    """False if the last holder removed the locked file after this process had opened it.

    Another process may create and lock a new file of this name, and both would hold the lock.
    """
    handle = lock._context.lock_file_fd  # filelock has no public name for it
    try:
        return handle is None or os.path.samestat(os.fstat(handle), lock_file.stat())
    except FileNotFoundError:
        return False


def _umask() -> int:
    mask = os.umask(0o077)  # the umask can only be read by setting it
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_url(text: str) -> bool:
    """True for an address on the web, or in a bucket of Google Cloud Storage."""
    return text.startswith(("http:", "https:", "gs:"))
