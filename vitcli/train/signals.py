"""SIGTERM, Ctrl-C and Slurm's SIGUSR1 while a run trains: noted, and acted on between steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

# Slurm sends it some minutes before the end of a job that asked for it: `--signal=USR1@120`.
WATCHED = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)


class Stopped(Exception):
    """The run was asked to stop by `signal`, and has saved its state at `step`."""

    def __init__(self, number: int, step: int, run: str) -> None:
        when = f"after step {step}, state saved" if step else "before the first step"
        super().__init__(f"stopped by {signal.Signals(number).name} {when}")
        self.number = number
        self.run = run


class AtOnce(BaseException):
    """A signal came where nothing need be finished first."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class SignalFlag:
    """Notes the signals while its block runs; a second Ctrl-C acts at once."""

    received: int | None = None
    _at_once = False

    def __enter__(self) -> Self:
        self._old: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in WATCHED:
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None and number == signal.SIGINT
        self.received = number
        if self._at_once:
            self._at_once = False
            raise AtOnce(number)
        if again:
            raise KeyboardInterrupt(number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """For the length of a block a signal is not only noted.

        Raises:
            AtOnce: it came.
        """
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False
