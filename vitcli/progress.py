"""Progress, notes and warnings of library code.

Library code knows only the protocols `Watcher` and `Bar`. `cli/console.py` implements them for a
terminal.
"""

from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Protocol, Self

from vitcli.errors import printable


class Bar(Protocol):
    """A progress bar; it closes at the end of its `with` block."""

    def __enter__(self) -> "Bar": ...

    def __exit__(self, *error: object) -> None: ...

    def advance(self, n: int = 1, **figures: float) -> None:
        """Advance by `n` units; `figures` are the latest metrics to show next to the bar."""

    def extend(self, total: int) -> None:
        """Change the total number of units."""


class Watcher(Protocol):
    """Receives notes, warnings and progress."""

    def note(self, message: str) -> None:
        """Print one line of information."""

    def warn(self, message: str) -> None:
        """Print one line of warning."""

    def progress(self, label: str, total: int | None = None, done: int = 0) -> Bar:
        """Start a progress bar over `total` units (None: unknown), `done` of them finished."""


class QuietBar:
    """A progress bar that prints nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def advance(self, n: int = 1, **figures: float) -> None:
        return None

    def extend(self, total: int) -> None:
        return None


class Quiet:
    """A watcher that prints nothing: the default of every library function."""

    def note(self, message: str) -> None:
        return None

    def warn(self, message: str) -> None:
        return None

    def progress(self, label: str, total: int | None = None, done: int = 0) -> Bar:
        return QuietBar()


class Warnings(Quiet):
    """A watcher that passes on the warnings only."""

    def __init__(self, inner: Watcher) -> None:
        self.inner = inner

    def warn(self, message: str) -> None:
        self.inner.warn(message)


class Logged:
    """A watcher that also writes notes and warnings to a log file."""

    def __init__(self, inner: Watcher, path: Path) -> None:
        self.inner = inner
        self.path = path

    def write(self, line: str) -> None:
        """Append one line with its time to the log file only.

        A line that cannot be written is lost; a full disk is reported by the checkpoint.
        """
        text = f"{datetime.now().isoformat(timespec='seconds')} {printable(line)}\n"
        with suppress(OSError), self.path.open("ab") as file:
            file.write(text.encode())

    def note(self, message: str) -> None:
        self.write(message)
        self.inner.note(message)

    def warn(self, message: str) -> None:
        self.write(f"warning: {message}")
        self.inner.warn(message)

    def progress(self, label: str, total: int | None = None, done: int = 0) -> Bar:
        return self.inner.progress(label, total, done)
