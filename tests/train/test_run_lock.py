"""One process at a time in a run directory."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.tiny import write_tiny

from vitcli.cli import main as cli
from vitcli.errors import VitcliError
from vitcli.run import Run
from vitcli.train.session import run_locked

# Holds each folder that it reads, one after the other.
HOLD = """
import sys
from pathlib import Path
from vitcli.run import Run
from vitcli.train.session import run_locked
print(flush=True)
for line in sys.stdin:
    with run_locked(Run(Path(line.rstrip("\\n")))):
        print("held", flush=True)
        sys.stdin.readline()
    print("free", flush=True)
"""


@pytest.fixture(scope="module")
def started():
    """A process that holds folders. One for all tests, because torch takes seconds to load."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    ) as process:
        assert process.stdout.readline() == "\n"
        yield process
        process.kill()


def say(process, line):
    """What the process answers to a line."""
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    return process.stdout.readline().rstrip()


@pytest.fixture
def holder(started, tmp_path):
    """Another process that trains in `tmp_path`."""
    assert say(started, tmp_path) == "held"
    yield started
    if started.poll() is None:
        assert say(started, "") == "free"


def test_a_second_process_is_refused_and_told_who_is_there(tmp_path, holder):
    words = f"process {holder.pid} on `.+` is training in"
    with pytest.raises(VitcliError, match=words), run_locked(Run(tmp_path)):
        raise AssertionError("entered")
    with run_locked(Run(tmp_path), is_main=False):  # not the first of its launch
        pass


def test_resume_beside_a_running_one(tmp_path, started, capfd):
    recipe = write_tiny(tmp_path / "tiny.toml", train={"steps": 3})
    command = ["pretrain", "--recipe", str(recipe), "--out", str(tmp_path / "run")]
    assert cli.run(command) == 0
    (tmp_path / "run/result.json").unlink()  # as if it were not finished
    assert say(started, tmp_path / "run") == "held"
    capfd.readouterr()
    assert cli.run([*command, "--resume"]) == 2
    assert say(started, "") == "free"
    said = capfd.readouterr().err
    assert f"error: process {started.pid}" in said and "hint: wait for it" in said


def test_a_symbolic_link_leads_to_the_same_lock(tmp_path, holder):
    link = tmp_path.with_name(f"{tmp_path.name}-link")
    link.symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(VitcliError, match=f"process {holder.pid} on"), run_locked(Run(link)):
        raise AssertionError("entered")


def test_what_a_killed_process_held_is_free(tmp_path, holder):
    """The last test here: nobody else has a use for the process."""
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    time.sleep(0.05)
    with run_locked(Run(tmp_path)):
        pass
    assert not any(tmp_path.iterdir())
