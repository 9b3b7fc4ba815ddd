"""One process at a time in a run directory."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.tiny import vitcli, write_tiny

from vitcli.errors import VitcliError
from vitcli.run import Run
from vitcli.train.session import run_locked

HOLD = """
import sys, time
from pathlib import Path
from vitcli.run import Run
from vitcli.train.session import run_locked
with run_locked(Run(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that trains in `tmp_path`."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_and_told_who_is_there(tmp_path, holder):
    words = f"process {holder.pid} on `.+` is training in"
    with pytest.raises(VitcliError, match=words), run_locked(Run(tmp_path)):
        raise AssertionError("entered")
    with run_locked(Run(tmp_path), is_main=False):  # not the first of its launch
        pass


def test_what_a_killed_process_held_is_free(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    time.sleep(0.05)
    with run_locked(Run(tmp_path)):
        pass
    assert not any(tmp_path.iterdir())


def test_resume_beside_a_running_one(tmp_path):
    write_tiny(tmp_path / "tiny.toml", train={"steps": 3})
    command = ("pretrain", "--recipe", "tiny.toml", "--out", "run")
    assert vitcli(*command, cwd=tmp_path).returncode == 0
    (tmp_path / "run/result.json").unlink()  # as if it were not finished
    with run_locked(Run(tmp_path / "run")):
        done = vitcli(*command, "--resume", cwd=tmp_path)
    assert done.returncode == 2
    assert f"error: process {os.getpid()}" in done.stderr and "hint: wait for it" in done.stderr


def test_a_symbolic_link_leads_to_the_same_lock(tmp_path, holder):
    link = tmp_path.with_name(f"{tmp_path.name}-link")
    link.symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(VitcliError, match=f"process {holder.pid} on"), run_locked(Run(link)):
        raise AssertionError("entered")
