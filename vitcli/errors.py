"""The one exception that is meant for the person at the keyboard, and words for it."""

import os
from contextlib import suppress


class VitcliError(Exception):
    """Something the user can mend: a wrong setting, bad input, a full disk.

    The command line prints it as one `error:` line and, where there is one, one `hint:` line, and
    ends with exit status 2.

    Args:
        message: what went wrong, with the value that was wrong.
        hint: what to do about it.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def nearest(word: str, words: list[str] | tuple[str, ...]) -> str | None:
    """The entry of `words` that `word` was most likely meant to be, or None when none is close."""
    from difflib import get_close_matches

    found = get_close_matches(word, words, n=1, cutoff=0.6)
    return found[0] if found else None


def printable(text: str | bytes | os.PathLike[str]) -> str:
    r"""A name or a text on one line: bytes that are not UTF-8 as `\xe9`, control codes as `\n`."""
    text = os.fspath(text)
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape")
    with suppress(UnicodeEncodeError):  # a surrogate that stands for no byte
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
