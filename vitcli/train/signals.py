"""SIGTERM, Ctrl-C and Slurm's SIGUSR1 during training: noted, and handled between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

# Slurm sends SIGUSR1 some time before the end of a job, if asked to: `--signal=USR1@120`.
HANDLED = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)


class Stopped(Exception):
    """A signal stopped the run, which has saved its state at `step`."""

    def __init__(self, number: int, step: int, run: str) -> None:
        when = f"after step {step}, state saved" if step else "before the first step"
        super().__init__(f"stopped by {signal.Signals(number).name} {when}")
        self.number = number
        self.run = run


class SignalReceived(BaseException):
    """A signal came while nothing had to be finished first.

    Not an `Exception`: no handler of ordinary errors on the way may swallow it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class SignalFlag:
    """Notes signals inside its `with` block; a second Ctrl-C interrupts at once."""

    received: int | None = None
    _interrupts = False

    def __enter__(self) -> Self:
        self._old: dict[int, Any] = {}
        # Python installs handlers in the main thread only. Elsewhere signals act as usual.
        if threading.current_thread() is threading.main_thread():
            for number in HANDLED:
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None and number == signal.SIGINT
        self.received = number
        if self._interrupts:
            self._interrupts = False  # once: the handler of the exception must not be interrupted
            raise SignalReceived(number)
        if again:
            raise KeyboardInterrupt(number)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Inside this block a signal raises `SignalReceived` at once."""
        self._interrupts = True
        try:
            yield
        finally:
            self._interrupts = False
