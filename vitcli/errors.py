"""`VitcliError`, the exception for users, and helpers that word its messages."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


class VitcliError(Exception):
    """A problem that the user can fix: a wrong setting, bad input, a full disk.

    The command line prints it as one `error:` line and, if there is a hint, one `hint:` line, and
    exits with status 2.

    Args:
        message: what is wrong, with the value that is wrong.
        hint: what to type or to do.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def unknown(kind: str, name: str, known: Iterable[str], prefix: str = "") -> VitcliError:
    """Return the error for a value that is not in a list; the hint names the nearest and the list.

    `raise unknown("optimizer", "adam", OPTIMIZERS)` prints

        error: unknown optimizer `adam`
        hint: did you mean `adamw`? Available: `adamw`, `sgd`

    Args:
        prefix: text before every name that is shown, such as the section of a setting.
    """
    names = list(known)
    close = nearest(name, names)
    available = ", ".join(f"`{prefix}{entry}`" for entry in names)
    meant = f"did you mean `{prefix}{close}`? Available" if close else "available"
    return VitcliError(f"unknown {kind} `{prefix}{printable(name)}`", f"{meant}: {available}")


def quoted(names: Iterable[str], most: int | None = None) -> str:
    """Names in one line: `a`, `b`; with `most`, the first ones and `and 3 more`."""
    names = list(names)
    more = f" and {len(names) - most:,} more" if most is not None and len(names) > most else ""
    return ", ".join(f"`{printable(str(name))}`" for name in names[:most]) + more


def counted(count: int, one: str, more: str, of: int | None = None) -> str:
    """`1 image is …` or `2 images are …`; with `of`, `1 of 9 …` before the word for the count."""
    share = f" of {of:,}" if of is not None else ""
    return f"{count:,}{share} {one if count == 1 else more}"


def nearest(word: str, words: Iterable[str]) -> str | None:
    """Return the entry of `words` that is most similar to `word`, or None if none is close."""
    from difflib import get_close_matches

    found = get_close_matches(word, list(words), n=1, cutoff=0.6)
    return found[0] if found else None


def nearest_path(path: str | os.PathLike[str]) -> str | None:
    """Return the existing path that is most similar to `path`, or None; a folder ends with `/`.

    A wrong parent folder is corrected too: `flower/labels.csv` -> `flowers/labels.csv`.
    """
    path = Path(path)
    try:
        parent = path.parent
        if not parent.is_dir():
            if parent == path or (close := nearest_path(parent)) is None:
                return None
            parent = Path(close)
        found = parent / path.name
        if not found.exists():
            names = (name for name in os.listdir(parent) if name != path.name)  # noqa: PTH208
            if (name := nearest(path.name, names)) is None:
                return None
            found = parent / name
        return f"{found}/" if found.is_dir() else str(found)
    except (OSError, ValueError):  # not permitted, or not a possible path
        return None


def printable(text: str | bytes | os.PathLike[str]) -> str:
    r"""Escape text for one line: bytes that are not UTF-8 as `\xe9`, control codes as `\n`."""
    text = os.fspath(text)
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape")
    if text.isprintable():  # nearly always, and the rest takes ten times as long
        return text
    with suppress(UnicodeEncodeError):  # a lone surrogate that does not come from a byte
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
