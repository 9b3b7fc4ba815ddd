"""Slurm's environment and its `scontrol`, as a stand-in on the PATH plays them."""

import os
import signal
import subprocess
import sys
import time

import pytest
from support.tiny import records, write_tiny

from vitcli import distributed as slurm
from vitcli.commands.suite import INTERRUPTED

SCONTROL = """#!/bin/sh
echo "$@" >> "$SCONTROL_LOG"
case "$1" in
  show) printf 'alpha\\nbeta\\n' ;;
  requeue) [ "$2" = 13 ] && { echo 'Job is held' >&2; exit 1; }; exit 0 ;;
esac
"""


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "scontrol").write_text(SCONTROL)
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SCONTROL_LOG", str(tmp_path / "log"))
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return tmp_path / "log"


def test_tasks_of_srun_find_each_other(scontrol, monkeypatch):
    given = {
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "alpha,beta",
        "SLURM_JOB_ID": "20007",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    }
    monkeypatch.setattr(os, "environ", {**os.environ, **given})
    slurm.join_slurm_job()
    found = {k: os.environ[k] for k in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    assert found == {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert os.environ["MASTER_ADDR"] == "alpha" and os.environ["MASTER_PORT"] == "15007"


@pytest.mark.parametrize(
    "given",
    [
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a shell inside of a job
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"SLURM_STEP_NUM_TASKS": "4", "WORLD_SIZE": "2"},  # torchrun under srun
    ],
)
def test_elsewhere_nothing_changes(scontrol, monkeypatch, given):
    environment = {**os.environ, **given}
    monkeypatch.setattr(os, "environ", dict(environment))
    slurm.join_slurm_job()
    assert os.environ == environment


def test_only_slurms_signal_queues_again(scontrol, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert slurm.requeue_slurm_job(signal.SIGTERM) is None and not scontrol.exists()
    assert slurm.requeue_slurm_job(signal.SIGUSR1) == "requeued job 7"
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    assert "cannot requeue job 13: Job is held" in (slurm.requeue_slurm_job(signal.SIGUSR1) or "")
    monkeypatch.delenv("SLURM_JOB_ID")
    assert slurm.requeue_slurm_job(signal.SIGUSR1) is None


@pytest.mark.slow
def test_a_job_whose_time_is_up_saves_and_is_queued_again(scontrol, tmp_path):
    """The script's line is the same each time: `vitcli pretrain … --out run --resume`."""
    write_tiny(tmp_path / "tiny.toml", train={"steps": 3000, "checkpoint_steps": 1})
    command = [sys.executable, "-m", "vitcli", "pretrain", "--recipe", "tiny.toml"]
    process = subprocess.Popen(
        [*command, "--out", "run", "--resume"],
        cwd=tmp_path,
        env={**os.environ, "SLURM_JOB_ID": "7"},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not any((tmp_path / "run/checkpoints").glob("step_*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGUSR1
    assert "starting from step 0" in said and "stopped by SIGUSR1" in said
    assert said.rstrip().endswith("requeued job 7")
    assert scontrol.read_text() == "requeue 7\n"
    step = records(tmp_path / "run")[-1]["step"]
    assert (tmp_path / f"run/checkpoints/step_{step:06d}").is_dir()


IN_A_COMMAND = """
import os, signal, sys
from vitcli.cli import app as commands, console, main
number, again = int(sys.argv[1]), int(sys.argv[2])
said = console.err.print

def hit():
    for _ in range(again):
        os.kill(os.getpid(), number)

def app(**_):
    try:
        os.kill(os.getpid(), number)
    finally:
        hit()

def print_slowly(*words, **how):
    hit()
    said(*words, **how)
    hit()

commands.app, console.err.print = app, print_slowly
main.main()
"""


def stopped_by(number, again=0, **environment):
    return subprocess.run(
        [sys.executable, "-c", IN_A_COMMAND, str(int(number)), str(again)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_slurms_signal_outside_of_training_queues_the_job_again(scontrol):
    done = stopped_by(signal.SIGUSR1, SLURM_JOB_ID="7")
    assert done.returncode == 128 + signal.SIGUSR1
    assert done.stderr == "stopped by SIGUSR1\nrequeued job 7\n"
    assert scontrol.read_text() == "requeue 7\n"


def test_ctrl_c_again_and_again_is_one_line():
    done = stopped_by(signal.SIGINT, again=5)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


AT_AN_IMPORT = """
import os, signal, sys
number, module = int(sys.argv[1]), sys.argv[2]

class Finder:
    def find_spec(name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), number)

sys.meta_path.insert(0, Finder)
sys.argv = ["vitcli", "--version"]
from vitcli.cli.main import main
main()
"""


@pytest.mark.parametrize("module", ["typer", "vitcli.cli.options"])
@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGINT, "interrupted\n"),
        (signal.SIGTERM, "stopped by SIGTERM\n"),
        (signal.SIGUSR1, "stopped by SIGUSR1\nrequeued job 7\n"),
    ],
)
def test_a_signal_during_the_first_imports_is_handled(scontrol, number, said, module):
    done = subprocess.run(
        [sys.executable, "-c", AT_AN_IMPORT, str(int(number)), module],
        env={**os.environ, "SLURM_JOB_ID": "7"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", said)


BEFORE_TRAINING = """
import os, signal, sys, threading
from vitcli import distributed
from vitcli.cli import app as commands, main
number, member = int(sys.argv[1]), sys.argv[2]

def app(**_):
    members = [{**os.environ, "RANK": str(rank)} for rank in range(2)]
    team = distributed.LaunchedProcesses([sys.executable, "-c", member], members)
    threading.Timer(1.0, os.kill, (os.getpid(), number)).start()
    return team.wait(print)

commands.app = app
main.main()
"""
DIES = "import time; time.sleep(60)"
HANDLES = """
import os, signal, sys, time
def stop(number, frame):
    rank = int(os.environ["RANK"])
    if rank == 0:
        print("stopped in process 0", file=sys.stderr, flush=True)
    os._exit(0 if rank else 128 + number)
signal.signal(signal.SIGUSR1, stop)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("member", "said", "requeued"),
    [
        (DIES, "stopped by SIGUSR1\nrequeued job 7\n", "requeue 7\n"),
        (HANDLES, "stopped in process 0\n", None),  # it requeues too
    ],
)
def test_slurms_signal_before_several_processes_handle_it(scontrol, member, said, requeued):
    done = subprocess.run(
        [sys.executable, "-c", BEFORE_TRAINING, str(int(signal.SIGUSR1)), member],
        env={**os.environ, "SLURM_JOB_ID": "7"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (128 + signal.SIGUSR1, said), done.stdout
    assert (scontrol.read_text() if scontrol.exists() else None) == requeued


def test_a_task_of_a_suite_that_slurms_signal_stopped_has_not_failed():
    assert {138, -10, 130, -2, 143, -15} <= set(INTERRUPTED)
