"""The one exception that is meant for the person at the keyboard."""


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
