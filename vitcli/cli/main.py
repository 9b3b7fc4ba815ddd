"""From what happened in a command to an exit status, and a word about it on stderr."""

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import typer

from vitcli import distributed as launch
from vitcli import distributed as slurm
from vitcli.errors import VitcliError

REFUSALS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EACCES: "see to its permissions, or take another place",
    errno.EPERM: "see to its permissions, or take another place",
    errno.EROFS: "take another place",
    errno.ENAMETOOLONG: "take a shorter name",
}
EXIT_BUG, EXIT_MISTAKE, EXIT_UNREADABLE, EXIT_INTERRUPTED = 1, 2, 3, 130
INTERRUPT_SECONDS = 3.0  # for what runs to put its files away
_received = signal.SIGINT  # of those that `_interrupt` was called for


def unreadable(broken: Iterable[str]) -> None:
    """Name the inputs that could not be read, and end with the status that says so."""
    from vitcli.cli import console as report

    lines = list(broken)
    for line in lines:
        report.print_error(VitcliError(line))
    if lines:
        raise typer.Exit(EXIT_UNREADABLE)


def show(result: Any, as_json: bool, draw: Any) -> None:
    """The result for a program, or for a person."""
    from vitcli.cli import console as report

    if as_json:
        report.print_json(result.to_json())
    else:
        draw(result)


def main(app: Callable[..., Any]) -> None:
    """Run the command line of this process with `app`, and end with its exit status."""
    # Threads that spin while another process works make two cores slower than one; read by
    # OpenMP when torch is loaded (recipes/LOG.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    launch.start()
    slurm.join()
    launch.follow()
    _open_streams()
    signal.signal(signal.SIGINT, _interrupt)
    if launch.size() == 1:  # of several, whoever started them tells of it
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        status = run(app, sys.argv[1:])
    except KeyboardInterrupt:  # before the command has begun
        sys.stderr.write(f"{_word()}\n")
        status = 128 + _received
    launch.leave(status)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C and SIGTERM outside of training: unwind, so that nothing is left half-written.

    Where some import swallows that, end all the same.
    """
    global _received
    _received = signal.Signals(number)

    def end() -> None:
        sys.stderr.write(f"{_word()}\n")
        sys.stderr.flush()
        os._exit(128 + number)

    timer = threading.Timer(INTERRUPT_SECONDS, end)
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt(number)


def _word() -> str:
    return "interrupted" if _received == signal.SIGINT else f"stopped by {_received.name}"


def _open_streams() -> None:
    """Streams that take every text, and be it into nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started this
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):  # maybe of an encoding without some letters
            stream.reconfigure(errors="backslashreplace")


def run(app: Callable[..., Any], arguments: list[str]) -> int:
    """Run one command line with `app`, a typer program; the exit status."""
    from vitcli.cli import console as report

    if launch.rank():
        report.mute()
    if warning := launch.lonely():
        report.Terminal().warn(warning)
    try:
        status = app(args=arguments, prog_name="vitcli", standalone_mode=False, obj=arguments)
        if status == EXIT_INTERRUPTED:  # typer has caught a KeyboardInterrupt
            report.err.print(_word())
            status = 128 + _received
        return launch.together(status if isinstance(status, int) else 0)
    except typer.Exit as done:
        return launch.together(done.exit_code)
    except VitcliError as error:
        return _tell(error)
    except (KeyboardInterrupt, typer.Abort):
        report.err.print(_word())
        return 128 + _received if launch.rank() == 0 else 0
    except (BrokenPipeError, SystemExit):  # the second is how typer and Rich tell of the first
        # The reader of our output (`| head`) is gone; nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if (stopped := _stopped(error)) is not None:
            return launch.together(stopped)
        if (usage := _usage_error(error) or _refused(error)) is not None:
            return _tell(usage)
        launch.hold(mistake=False)
        if launch.size() == 1:
            raise
        sys.excepthook(type(error), error, error.__traceback__)
        return EXIT_BUG


def _tell(error: VitcliError) -> int:
    """Print an error; the exit status for it."""
    from vitcli.cli import console as report

    launch.hold(mistake=True)
    report.err.quiet = False
    report.print_error(error)
    return EXIT_MISTAKE


def _usage_error(error: Exception) -> VitcliError | None:
    """What is wrong with a command line that cannot be parsed; None for any other exception.

    Known by its method: typer brings click along under a name that depends on typer's version.
    """
    message = getattr(error, "format_message", None)
    if message is None:
        return None
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "vitcli"
    return VitcliError(message(), f"see `{command} --help`")


def _refused(error: Exception) -> VitcliError | None:
    """What the system refuses, where no command had a better word for it; None for the rest."""
    if not isinstance(error, OSError) or error.errno not in REFUSALS:
        return None
    place = f"`{error.filename}`" if error.filename else "the output"
    return VitcliError(f"{place}: {error.strerror}", REFUSALS[error.errno])


def _stopped(error: Exception) -> int | None:
    """128 + the signal's number, when `error` says that a signal stopped a training run."""
    from vitcli.cli import console as report

    loop = sys.modules.get("vitcli.train.loop")
    if loop is None or not isinstance(error, loop.Stopped):
        return None
    report.err.print(
        f"{error}; to go on: the same command with `--out {error.run} --resume`", soft_wrap=True
    )
    if launch.rank() == 0 and (told := slurm.requeue(error.number)):
        report.err.print(told, soft_wrap=True)
    return 128 + error.number
