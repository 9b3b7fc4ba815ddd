"""SIGTERM, Ctrl-C and Slurm's SIGUSR1 while a run trains: noted, and acted on between steps."""

import signal
import threading
from types import FrameType
from typing import Any, Self

# Slurm sends it some minutes before the end of a job that asked for it: `--signal=USR1@120`.
WATCHED = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)


class Stopped(Exception):
    """The run was asked to stop by `signal`, and has saved its state at `step`."""

    def __init__(self, number: int, step: int, run: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}, state saved")
        self.number = number
        self.run = run


class SignalFlag:
    """Notes the signals while its block runs; a second Ctrl-C acts at once."""

    received: int | None = None

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
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
