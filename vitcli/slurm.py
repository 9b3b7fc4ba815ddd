"""Slurm: `srun vitcli …` on any number of machines, and a job that goes on after its time is up."""

import os
import shutil
import signal
import subprocess

# Set for the tasks that srun starts; the whole job's SLURM_NTASKS stands in shells too.
TASKS, RANK, LOCAL_RANK = "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"
NODES, JOB = "SLURM_STEP_NODELIST", "SLURM_JOB_ID"
PORTS = 15_000, 20_000  # where those for a job's processes begin, and how many there are


def join() -> None:
    """Put what torch's launchers would have set into the environment, where srun started us.

    Nothing happens outside of srun, for a single task, or under another launcher.
    """
    tasks = os.environ.get(TASKS, "")
    if not tasks.isdecimal() or int(tasks) < 2 or "WORLD_SIZE" in os.environ:
        return
    first, count = PORTS
    job = os.environ.get(JOB, "0")
    os.environ |= {
        "WORLD_SIZE": tasks,
        "RANK": os.environ.get(RANK, "0"),
        "LOCAL_RANK": os.environ.get(LOCAL_RANK, "0"),
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
