"""What a long computation tells the person who waits for it.

Library code knows only these two small interfaces; `report.py` draws them on a terminal.
"""

from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self


class Bar(Protocol):
    """One running measure of progress, closed by leaving its `with` block."""

    def __enter__(self) -> "Bar": ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def advance(self, n: int = 1, **figures: float) -> None:
        """`n` more units are done; `figures` are the latest numbers to show beside the bar."""

    def extend(self, total: int) -> None:
        """It will be so many units in all."""


class Watcher(Protocol):
    """Receives notes, warnings and progress."""

    def note(self, message: str) -> None:
        """One line of ordinary information."""

    def warn(self, message: str) -> None:
        """One line that the user should not miss."""

    def progress(self, label: str, total: int | None = None, done: int = 0) -> Bar:
        """Start a bar over `total` units (None when unknown), `done` of which are behind us."""


class QuietBar:
    """A bar that nobody sees."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def advance(self, n: int = 1, **figures: float) -> None:
        return None

    def extend(self, total: int) -> None:
        return None


class Quiet:
    """A watcher that says nothing: the default of every library function."""

    def note(self, message: str) -> None:
        return None

    def warn(self, message: str) -> None:
        return None

    def progress(self, label: str, total: int | None = None, done: int = 0) -> Bar:
        return QuietBar()


class Logged:
    """Passes everything on to `inner`, and keeps notes and warnings in a file as well."""

    def __init__(self, inner: Watcher, path: Path) -> None:
        self.inner = inner
        self.path = path

    def write(self, line: str) -> None:
        """Append one line with its time to the file, for nobody's eyes now.

        Where that fails the line is lost: a full disk is told of by what matters more.
        """
        text = f"{datetime.now().isoformat(timespec='seconds')} {line}\n"
        with suppress(OSError), self.path.open("ab") as file:
            file.write(text.encode("utf-8", "backslashreplace"))

    def note(self, message: str) -> None:
        self.write(message)
        self.inner.note(message)

    def warn(self, message: str) -> None:
        self.write(f"warning: {message}")
        self.inner.warn(message)

    def progress(self, label: str, total: int | None = None, done: int = 0) -> Bar:
        return self.inner.progress(label, total, done)
