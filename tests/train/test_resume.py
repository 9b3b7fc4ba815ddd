"""The command itself, killed and stopped for real."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from support.tiny import records, vitcli, write_tiny

# Checkpoints at every step, and steps enough that a kill meets reading, training and writing.
LONG = {"train": {"steps": 30, "checkpoint_steps": 1, "eval_steps": 10}}


def start(folder, out, *extra):
    return subprocess.Popen(
        [sys.executable, "-m", "vitcli", "pretrain", "--recipe", "tiny.toml", "--out", out, *extra],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(folder, out, step):
    """Until a checkpoint of `step` or later is there."""
    checkpoints = folder / out / "checkpoints"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if checkpoints.is_dir() and any(
            int(p.name[5:]) >= step for p in checkpoints.glob("step_*")
        ):
            return
        time.sleep(0.02)
    raise AssertionError("no checkpoint was written in two minutes")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with the recipe and a run that was never stopped."""
    folder = tmp_path_factory.mktemp("resume")
    write_tiny(folder / "tiny.toml", **LONG)
    done = vitcli("pretrain", "--recipe", "tiny.toml", "--out", "whole", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def kill_and_resume(folder, times, seed):
    """Kill a run `times` times at random moments, each time going on; the bytes of the weights."""
    rng = random.Random(seed)
    shutil.rmtree(folder / "killed", ignore_errors=True)
    for number in range(times):
        process = start(folder, "killed", "--resume")
        # Spread over the run; the rest of a step later, so also within the writing of a file.
        wait_for_step(folder, "killed", 2 + number * 24 // times)
        time.sleep(rng.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    done = vitcli("pretrain", "--recipe", "tiny.toml", "--out", "killed", "--resume", cwd=folder)
    assert done.returncode == 0, done.stderr
    steps = [r["step"] for r in records(folder / "killed") if "train/loss" in r]
    assert steps == list(range(1, 31))
    return (folder / "killed/model.safetensors").read_bytes()


@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_at_random_moments_ends_with_the_same_bits(whole, times):
    expected = (whole / "whole/model.safetensors").read_bytes()
    assert kill_and_resume(whole, times, seed=times) == expected


@pytest.mark.parametrize(
    ("number", "status"),
    [pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow), (signal.SIGINT, 130)],
)
def test_a_signal_saves_first_and_says_how_to_go_on(whole, number, status):
    out = f"stopped-{status}"
    process = start(whole, out)
    wait_for_step(whole, out, 3)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == status, said
    assert "state saved" in said and f"--out {out} --resume" in said
    assert "Traceback" not in said
    done = vitcli("pretrain", "--recipe", "tiny.toml", "--out", out, "--resume", cwd=whole)
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stderr
    expected = (whole / "whole/model.safetensors").read_bytes()
    assert (whole / out / "model.safetensors").read_bytes() == expected


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_an_unwritable_folder_is_one_clear_error(whole, tmp_path):
    tmp_path.chmod(0o500)
    done = vitcli("pretrain", "--recipe", whole / "tiny.toml", "--out", tmp_path / "run", cwd=whole)
    assert done.returncode == 2 and "error: cannot" in done.stderr
