"""Several processes of one command: start, rank, common exit status, and Slurm.

`--processes N` starts this program N times with the environment variables that torchrun sets and
Accelerate reads. It does not use `accelerate launch`: with `--cpu` that starts one process for any
N, and otherwise its own exit status and traceback replace ours.

Process 0 writes files and prints. A user error occurs in every process, so process 0 prints it; see
`wait_before_error` for errors that occur in one process only.
"""

import atexit
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from vitcli.errors import VitcliError

POLL_SECONDS = 0.05
END_SECONDS = 1.0  # grace period after another process failed; less than HOLD_SECONDS
HOLD_SECONDS = 3.0
LIFELINE = "VITCLI_LIFELINE"
FORWARDED = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)
# The value of `time.monotonic` when the command started; a budget counts from here.
started_at: float | None = None
STARTED_AT = "VITCLI_BEGAN"  # passes `started_at` to the processes of the command
LONGEST_START = 60.0  # a longer start means that the clocks cannot be compared

# torchrun and accelerate set the first variable, MPI versions that Accelerate supports the rest.
RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")
WORLD_SIZE_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
LOCAL_WORLD_SIZE_VARIABLES = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE")


def world_size() -> int:
    """Return the number of processes that a launcher started for this command, or 1."""
    return _given(WORLD_SIZE_VARIABLES, 1)


def local_world_size() -> int:
    """Return the number of these processes on this machine."""
    return _given(LOCAL_WORLD_SIZE_VARIABLES, 1)


def rank() -> int:
    """Return the rank of this process, from 0."""
    return _given(RANK_VARIABLES, 0) if world_size() > 1 else 0


def _given(names: Sequence[str], default: int) -> int:
    for name in names:
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return default


def launch_warning() -> str | None:
    """Return a warning if `accelerate launch` was asked for several processes and started one."""
    asked = "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ
    if not asked or any(name in os.environ for name in WORLD_SIZE_VARIABLES):
        return None
    return (
        "`accelerate launch` started one process. Without several GPUs it ignores "
        "`--num_processes`; use `vitcli … --processes N` or `accelerate launch --multi_gpu`"
    )


def launch_processes(
    number: int, arguments: Sequence[str], tell: Callable[[VitcliError], None]
) -> int:
    """Run the command line `arguments` in `number` processes and return the exit status.

    `tell` prints an error when a signal ended a process before it could print one.
    """
    port = _free_port()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    environment = {
        "OMP_NUM_THREADS": str(max(1, (cores or 1) // number)),
        **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
        **os.environ,
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        LIFELINE: "stdin",
        **({} if started_at is None else {STARTED_AT: repr(started_at)}),
    }
    return LaunchedProcesses(
        [sys.executable, "-m", "vitcli", *arguments],
        [{**environment, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(number)],
    ).wait(tell)


def _free_port() -> int:
    import socket  # most commands start without it

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class LaunchedProcesses:
    """The processes of one command, which end together.

    Each has its own session, so that it gets Ctrl-C once: from this class, not from the terminal.
    """

    def __init__(self, command: Sequence[str], environments: Sequence[dict[str, str]]) -> None:
        self.received: int | None = None
        self.members = [
            subprocess.Popen(command, env=env, stdin=subprocess.PIPE, start_new_session=True)
            for env in environments
        ]

    def wait(self, tell: Callable[[VitcliError], None]) -> int:
        """Wait for all; return the status of the first that fails (128 + number for a signal)."""
        old = {number: signal.signal(number, self._forward) for number in FORWARDED}
        try:
            failed = None
            while failed is None and None in [member.poll() for member in self.members]:
                time.sleep(POLL_SECONDS)
                failed = next((m for m in self.members if m.poll()), None)
            failed = failed or next((m for m in self.members if m.returncode), None)
            self._end()
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
        if failed is None:
            return 0
        if self.received is not None and self.members[0].returncode not in (0, 128 + self.received):
            # It ended before process 0 could handle it, so this process reports it.
            signal.raise_signal(self.received)
        status = int(failed.returncode)
        if status >= 0:
            return status
        if self.received is None:
            name = signal.Signals(-status).name
            tell(
                VitcliError(
                    f"{name} ended process {self.members.index(failed)} of {len(self.members)}",
                    "the system may have run out of memory; use fewer `--processes` or a smaller "
                    "`--batch-size`",
                )
            )
        return 128 - status

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for member in self.members:
            member.send_signal(number)

    def _end(self) -> None:
        deadline = time.monotonic() + END_SECONDS
        for member in self.members:
            member.terminate()
        for member in self.members:
            try:
                member.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                member.kill()
                member.wait()
            assert member.stdin is not None
            member.stdin.close()


def record_start() -> None:
    """Record the time at which the command started; on Linux, the time before Python started."""
    global started_at
    now = time.monotonic()
    given = os.environ.pop(STARTED_AT, None)
    age = now - float(given) if given else _age()
    started_at = now - age if 0.0 <= age <= LONGEST_START else now


def _age() -> float:
    """Return the age of this process in seconds; 0 if the system does not show it."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        # Field 22 is the start of the process, in clock ticks since the machine started.
        born = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - born
    except (OSError, ValueError, AttributeError, IndexError):
        return 0.0


def exit_with_launcher() -> None:
    """Make this process stop as after SIGTERM when its launcher has ended."""
    if os.environ.pop(LIFELINE, None) is None:
        return

    def watch() -> None:
        if os.read(0, 1) == b"":
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def wait_before_error(mistake: bool) -> None:
    """Wait before printing an error that another process may print.

    Process 0 prints user errors (`mistake`) at once. Its exit makes the launcher end the others
    while they wait here. An unexpected exception may be the consequence of an error in another
    process. That process prints its error, and the launcher ends this one.
    """
    if world_size() > 1 and not (mistake and rank() == 0):
        time.sleep(HOLD_SECONDS)


def agree_on_status(status: int) -> int:
    """Wait for all processes; return `status` in process 0, and 0 in the others."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.barrier()  # no process may exit while another waits for its answer
    return status if rank() == 0 else 0


def exit_process(status: int) -> NoReturn:
    """Exit without the interpreter's tear-down.

    The tear-down of torch takes most of a second, and with several processes its threads sometimes
    hang or abort after a successful run. All files are closed at this point.
    """
    if world_size() == 1:
        atexit._run_exitfuncs()  # libraries remove temporary folders; trackers send records
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        sys.exit(status)  # the interpreter reports the error
    os._exit(status)


# srun sets these for the tasks that it starts. SLURM_NTASKS is also set in the shell of the job.
SLURM_TASKS, SLURM_RANK, SLURM_LOCAL_RANK = "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"
NODES, JOB = "SLURM_STEP_NODELIST", "SLURM_JOB_ID"
PORTS = 15_000, 20_000  # first port, number of ports


def join_slurm_job() -> None:
    """Set torchrun's environment variables if srun started this process.

    Nothing happens outside of srun, for a single task, or under another launcher.
    """
    tasks = os.environ.get(SLURM_TASKS, "")
    if not tasks.isdecimal() or int(tasks) < 2 or "WORLD_SIZE" in os.environ:
        return
    first, count = PORTS
    job = os.environ.get(JOB, "0")
    os.environ |= {
        "WORLD_SIZE": tasks,
        "RANK": os.environ.get(SLURM_RANK, "0"),
        "LOCAL_RANK": os.environ.get(SLURM_LOCAL_RANK, "0"),
        "MASTER_PORT": str(first + int(job if job.isdecimal() else 0) % count),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or _first_host(),
    }
    per_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0].partition(",")[0]
    if per_node.isdecimal():
        os.environ.setdefault("LOCAL_WORLD_SIZE", per_node)


def _first_host() -> str:
    """Return the host of the first task."""
    nodes = os.environ.get(NODES, "")
    if nodes and shutil.which("scontrol"):
        command = ["scontrol", "show", "hostnames", nodes]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    return os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")


def requeue_slurm_job(number: int) -> str | None:
    """Requeue the Slurm job if Slurm's warning signal stopped it; return a message or None.

    `#SBATCH --signal=USR1@120` sends SIGUSR1 120 s before the time limit.
    """
    asked = hasattr(signal, "SIGUSR1") and number == signal.SIGUSR1
    if not asked or not (job := os.environ.get(JOB)):
        return None
    if not shutil.which("scontrol"):
        return f"cannot requeue job {job}: `scontrol` is not installed here"
    command = ["scontrol", "requeue", job]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"cannot requeue job {job}: {done.stderr.strip()}"
    return f"requeued job {job}"
