"""The entry point: signals, processes, and the exit status of a command line.

Typer, Rich and the commands are imported inside of functions: their import takes most of the start,
and a signal that comes meanwhile finds its handler installed.

Exit status: 0 done, 1 a bug (traceback), 2 a user error, 3 done but some inputs were unreadable,
130 interrupted, 143 terminated.
"""

import errno
import gc
import io
import os
import re
import signal
import sys
import threading
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

from vitcli import distributed
from vitcli.errors import VitcliError
from vitcli.malloc import keep_freed_memory

COMPLETION = "_VITCLI_COMPLETE"  # Typer's variable for `prog_name="vitcli"`
EXIT_BUG, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130
OS_HINTS = {
    errno.ENOSPC: "free some disk space",
    errno.EDQUOT: "free some disk space",
    errno.EACCES: "check its permissions, or choose another path",
    errno.EPERM: "check its permissions, or choose another path",
    errno.EROFS: "choose a path on a writable file system",
    errno.ENAMETOOLONG: "choose a shorter name",
}
INTERRUPT_SECONDS = 3.0  # how long an interrupted command may take to clean up
# The first signal, and the timer that ends the process; both stay unset outside of a signal.
_received = signal.SIGINT
_timer: threading.Timer | None = None
_python_warning = warnings.showwarning


def main() -> None:
    """Run the command line of this process and exit with its status."""
    try:
        _handle_signals()
        _collect_rarely()
        # Spinning OpenMP threads make two busy cores slower than one (recipes/LOG.md). OpenMP reads
        # this when torch is imported.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        if COMPLETION in os.environ:  # the shell asks; no command runs
            from vitcli.cli.app import app

            app(prog_name="vitcli")
        keep_freed_memory()
        distributed.record_start()
        distributed.join_slurm_job()
        if distributed.world_size() > 1:  # the launcher reports SIGTERM
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        distributed.exit_with_launcher()
        _open_streams()
        distributed.exit_process(run(sys.argv[1:]))
    except KeyboardInterrupt:  # outside of the command itself
        distributed.exit_process(_end_interrupted())


def _handle_signals() -> None:
    # Slurm may send SIGUSR1 before training or after the last step.
    for number in distributed.FORWARDED:
        signal.signal(number, _interrupt)


def _collect_rarely() -> None:
    """Let Python look through all objects for garbage a tenth as often as by default.

    The imports of torch make half a million objects that stay. Three full collections of them take
    a tenth of the start (recipes/LOG.md). Young objects are collected as often as before, so images
    and tensors do not stay longer.
    """
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, 10 * old)


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit status."""
    import typer

    from vitcli.cli import console
    from vitcli.cli.app import app

    if distributed.rank():
        console.mute()
    warnings.showwarning = _show_warning
    if warning := distributed.launch_warning():
        console.Terminal().warn(warning)
    try:
        status = app(args=arguments, prog_name="vitcli", standalone_mode=False, obj=arguments)
        if status == EXIT_INTERRUPTED:  # Typer has caught a KeyboardInterrupt
            status = _end_interrupted()
        return distributed.agree_on_status(status if isinstance(status, int) else 0)
    except typer.Exit as done:
        return distributed.agree_on_status(done.exit_code)
    except VitcliError as error:
        return _report(error)
    except (KeyboardInterrupt, typer.Abort):
        return _end_interrupted()
    except (BrokenPipeError, SystemExit) as end:  # Typer and Rich turn the first into the second
        if getattr(end, "code", 1) in (0, None):  # `--show-completion`
            return 0
        # The reader of the output (`| head`) has gone, so nothing more can be printed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if (stopped := _stopped_training(error)) is not None:
            return distributed.agree_on_status(stopped)
        mistake = _usage_error(error) or _os_error(error) or _memory_error(error)
        mistake = mistake or _device_error(error)
        if mistake is not None:
            return _report(mistake)
        distributed.wait_before_error(mistake=False)
        if distributed.world_size() == 1:
            raise
        sys.excepthook(type(error), error, error.__traceback__)
        return EXIT_BUG


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Handle a signal outside of training: unwind, so that no file is half-written.

    Some imports swallow the exception; a timer then ends the process anyway. Later signals do
    nothing: a second exception would interrupt the handling of the first.
    """
    global _received, _timer
    if _timer is not None:
        return
    _received = signal.Signals(number)

    def end() -> None:
        sys.stderr.write(f"{_interrupted()}\n")
        sys.stderr.flush()
        if distributed.rank() == 0:
            distributed.requeue_slurm_job(number)
        os._exit(128 + number)

    _timer = threading.Timer(INTERRUPT_SECONDS, end)
    _timer.daemon = True
    _timer.start()
    raise KeyboardInterrupt(number)


def _end_interrupted() -> int:
    """Say which signal stopped the command, requeue its Slurm job, and return the exit status."""
    _say(_interrupted())
    _requeue(_received)
    # Process 0 reports it; a failure of another one would end process 0 meanwhile.
    return 128 + _received if distributed.rank() == 0 else 0


def _requeue(number: int) -> None:
    """Requeue the Slurm job if SIGUSR1 stopped this command."""
    if _timer is not None:
        _timer.cancel()  # `scontrol` may be slow
    if distributed.rank() == 0 and (message := distributed.requeue_slurm_job(number)):
        _say(message)


def _say(message: str) -> None:
    """Print a line on stderr in process 0; Rich may not be imported yet."""
    if distributed.rank():
        return
    if console := sys.modules.get("vitcli.cli.console"):
        console.err.print(message, soft_wrap=True)
    else:
        sys.stderr.write(f"{message}\n")


def _interrupted() -> str:
    return "interrupted" if _received == signal.SIGINT else f"stopped by {_received.name}"


def _open_streams() -> None:
    """Make stdout and stderr accept any text, and replace streams that are closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the parent process
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):  # its encoding may lack some characters
            stream.reconfigure(errors="backslashreplace")


def _report(error: VitcliError) -> int:
    """Print a user error and return its exit status."""
    from vitcli.cli import console

    distributed.wait_before_error(mistake=True)
    console.err.quiet = False
    console.print_error(error)
    return EXIT_USER_ERROR


def _usage_error(error: Exception) -> VitcliError | None:
    """The error for a command line that cannot be parsed; None for other exceptions.

    It is recognised by its method, because Typer vendors click under a name that varies.
    """
    message = getattr(error, "format_message", None)
    if message is None:
        return None
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "vitcli"
    return VitcliError(message(), _extra_hint(message(), context) or f"see `{command} --help`")


def _extra_hint(message: str, context: Any) -> str | None:
    """What to type for arguments too many: `model=weights` means `--model weights`."""
    extra = re.search(r"unexpected extra argument\S* \((.*)\)$", message)
    if extra is None or context is None:
        return None
    flags = {flag for parameter in context.command.params for flag in parameter.opts}
    words = []
    for word in extra[1].split():
        key, equals, value = word.partition("=")
        if equals and (flag := f"--{key.replace('_', '-')}") in flags:
            words.append(f"{flag} {value}")
        elif equals and "." in key and "--set" in flags:
            words.append(f"--set {word}")
        elif word.lower() in ("true", "false", "yes", "no", "on", "off"):
            return f"a switch takes no value: remove `{word}`; see `{context.command_path} --help`"
    return f"settings are flags: write `{' '.join(words)}`" if words else None


def _os_error(error: Exception) -> VitcliError | None:
    """The error for a refusal of the operating system that no command handled; else None."""
    if not isinstance(error, OSError) or error.errno not in OS_HINTS:
        return None
    place = f"`{error.filename}`" if error.filename else "the output"
    return VitcliError(f"{place}: {error.strerror}", OS_HINTS[error.errno])


def _memory_error(error: Exception) -> VitcliError | None:
    """The error for more memory than the machine has; None for other exceptions."""
    devices = sys.modules.get("vitcli.devices")
    if not isinstance(error, MemoryError) and not (devices and devices.is_out_of_memory(error)):
        return None
    reason = str(error).partition("allocate memory: ")[2] or str(error) or "no more memory"
    return VitcliError(
        f"out of memory: {reason.splitlines()[0].partition('. Error code')[0]}",
        "use a smaller batch, image size or model",
    )


def _device_error(error: Exception) -> VitcliError | None:
    """The error for a fault of the GPU or of its driver; None for other exceptions."""
    devices = sys.modules.get("vitcli.devices")
    found: VitcliError | None = devices.device_fault(error) if devices else None
    return found


def _show_warning(
    message: Warning | str, category: type[Warning], *place: Any, **words: Any
) -> None:
    """Print a warning of the devices as the commands print theirs, and others as Python does."""
    from vitcli.cli import console

    if category.__name__ == "UnusedGpuWarning":
        console.Terminal().warn(str(message))
    else:
        _python_warning(message, category, *place, **words)


def _stopped_training(error: Exception) -> int | None:
    """128 + the signal number when a signal stopped a training run; else None."""
    loop = sys.modules.get("vitcli.train.loop")
    if loop is None or not isinstance(error, loop.Stopped):
        return None
    _say(f"{error}; to resume, run the same command with `--out {error.run} --resume`")
    _requeue(error.number)
    return 128 + error.number
