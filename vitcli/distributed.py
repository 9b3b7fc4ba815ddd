"""Several processes of one command, and how they speak with one voice.

`--processes N` starts this program N times, with the environment that torch's launchers set and
Accelerate reads. Not by `accelerate launch`: with `--cpu` that starts one process whatever N is,
and otherwise the exit status and the last words are those of torch's launcher.

Process 0 writes files and talks. All make the same mistakes together, so it tells those of the
user too; another process speaks only of what it alone has met, see `hold`.

Slurm: `srun vitcli …` on any number of machines, and a job that goes on after its time is up.
"""

import atexit
import os
import shutil
import signal
import socket
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
END_SECONDS = 1.0  # to end by oneself after another process failed; less than HOLD_SECONDS
HOLD_SECONDS = 3.0
LIFELINE = "VITCLI_LIFELINE"
FORWARDED = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)
# Of `time.monotonic`: when the command was started; a budget counts from it.
began: float | None = None
BEGAN = "VITCLI_BEGAN"  # the same, told to the processes of one command
LONGEST_START = 60.0  # seconds that Python may take to come as far as `start`

# By torchrun and accelerate, then by the MPIs that Accelerate knows.
RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")
SIZE = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
LOCAL_SIZE = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE")


def size() -> int:
    """How many processes a launcher started for this command; 1 alone."""
    return _given(SIZE, 1)


def local_size() -> int:
    """How many of them are on this machine."""
    return _given(LOCAL_SIZE, 1)


def rank() -> int:
    """The number of this process among them."""
    return _given(RANK, 0) if size() > 1 else 0


def _given(names: Sequence[str], default: int) -> int:
    for name in names:
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return default


def lonely() -> str | None:
    """A warning where `accelerate launch` was asked for several processes and started one."""
    asked = "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ
    if not asked or any(name in os.environ for name in SIZE):
        return None
    return (
        "`accelerate launch` started one process: without several GPUs it does so for any "
        "`--num_processes`; `vitcli … --processes N` starts N, `accelerate launch --multi_gpu` too"
    )


def several(number: int, arguments: Sequence[str], tell: Callable[[VitcliError], None]) -> int:
    """Run the command line `arguments` in `number` processes; the exit status of them all.

    Args:
        tell: shows an error when a process ended without a word.
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
        **({} if began is None else {BEGAN: repr(began)}),
    }
    return Team(
        [sys.executable, "-m", "vitcli", *arguments],
        [{**environment, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(number)],
    ).wait(tell)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Team:
    """Processes of one command, which end together.

    Each is in a session of its own, so that Ctrl-C in a terminal reaches it once, through here.
    """

    def __init__(self, command: Sequence[str], environments: Sequence[dict[str, str]]) -> None:
        self.received: int | None = None
        self.members = [
            subprocess.Popen(command, env=env, stdin=subprocess.PIPE, start_new_session=True)
            for env in environments
        ]

    def wait(self, tell: Callable[[VitcliError], None]) -> int:
        """The exit status of the first that fails, 128 + the number where a signal ended it."""
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
        status = int(failed.returncode)
        if status >= 0:
            return status
        if self.received is None:
            name = signal.Signals(-status).name
            tell(
                VitcliError(
                    f"process {self.members.index(failed)} of {len(self.members)} was ended by "
                    f"{name}",
                    "the system does that when memory runs out: fewer `--processes`, or a "
                    "smaller `--batch-size`",
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


def start() -> None:
    """Note when the command was started: before Python was loaded, where the system tells."""
    global began
    now = time.monotonic()
    given = os.environ.pop(BEGAN, None)
    age = now - float(given) if given else _age()
    began = now - age if 0.0 <= age <= LONGEST_START else now


def _age() -> float:
    """Seconds that this process has been running; 0 where only the system knows."""
    try:
        told = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        born = int(told[19]) / os.sysconf("SC_CLK_TCK")  # field 22: since the machine started
        return time.clock_gettime(time.CLOCK_BOOTTIME) - born
    except (OSError, ValueError, AttributeError, IndexError):
        return 0.0


def follow() -> None:
    """Stop, as after SIGTERM, when the process that started this one is no more."""
    if os.environ.pop(LIFELINE, None) is None:
        return

    def watch() -> None:
        if os.read(0, 1) == b"":
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def hold(mistake: bool) -> None:
    """Wait before telling of a failure that is another process's to tell.

    Process 0 tells of the user's mistakes at once, and its end makes the launcher end the rest in
    the meantime. An unexpected exception may be the echo of a process that has just gone; then
    that one has spoken, and the launcher ends this one.
    """
    if size() > 1 and not (mistake and rank() == 0):
        time.sleep(HOLD_SECONDS)


def together(status: int) -> int:
    """The exit status of this process at an end that all come to: process 0 gives it for all."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.barrier()  # nobody leaves while another waits for its last answer
    return status if rank() == 0 else 0


def leave(status: int) -> NoReturn:
    """End this process, without the interpreter's tear-down.

    That of torch takes most of a second, and with several processes its threads hang or abort now
    and then, also after a good end. Every file is closed by now, and what is left is memory.
    """
    if size() == 1:
        atexit._run_exitfuncs()  # temporary folders of libraries, what trackers still hold
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        sys.exit(status)  # the interpreter has its own words for it
    os._exit(status)


# Set for the tasks that srun starts; the whole job's SLURM_NTASKS stands in shells too.
SLURM_TASKS, SLURM_RANK, SLURM_LOCAL_RANK = "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"
NODES, JOB = "SLURM_STEP_NODELIST", "SLURM_JOB_ID"
PORTS = 15_000, 20_000  # where those for a job's processes begin, and how many there are


def join() -> None:
    """Put what torch's launchers would have set into the environment, where srun started us.

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
    """The machine of the first task."""
    nodes = os.environ.get(NODES, "")
    if nodes and shutil.which("scontrol"):
        command = ["scontrol", "show", "hostnames", nodes]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    return os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")


def requeue(number: int) -> str | None:
    """Queue the job again, where Slurm's signal before the end of its time stopped it.

    Slurm sends SIGUSR1 to a job that asked for it: `#SBATCH --signal=USR1@120`.

    Returns:
        What to tell; None where there is nothing to do.
    """
    asked = hasattr(signal, "SIGUSR1") and number == signal.SIGUSR1
    if not asked or not (job := os.environ.get(JOB)):
        return None
    if not shutil.which("scontrol"):
        return f"job {job} cannot be queued again: there is no `scontrol` here"
    command = ["scontrol", "requeue", job]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"job {job} could not be queued again: {done.stderr.strip()}"
    return f"job {job} is queued again"
