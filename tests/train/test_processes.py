"""Several processes on this machine: one result, one voice, one exit status."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.launching import ENVIRONMENT, PLAIN
from support.tiny import records, train_tiny, vitcli, write_tiny

from vitcli import distributed as launch
from vitcli.cli import main as cli
from vitcli.commands import evaluate
from vitcli.data.sampler import images_at
from vitcli.data.source import load_data
from vitcli.errors import VitcliError
from vitcli.progress import Quiet
from vitcli.run import Run
from vitcli.train.exactness import machine_facts, warn_of_changes
from vitcli.weights.load import load_model

RECIPES = {
    "two": {**PLAIN, "train": {"steps": 6}},
    "two, accumulating": {**PLAIN, "train": {"steps": 6, "micro_batch_size": 8}},
    "two, mixed and repeated": {
        **PLAIN,
        "augment": {"preset": "medium2", "cutmix_alpha": 1.0, "erase_rate": 0.5, "repeats": 2},
        "data": {"name": "builtin:digits", "sampler": "square_root"},
        "objective": {"class_weights": [0.2, 5.0, *[1.0] * 8], "focal_gamma": 1.0},
        "train": {"steps": 6},
    },
    "whole": {"train": {"steps": 4, "batch_size": 24}, "model": {"embed_dim": 160, "mlp_dim": 640}},
}
# Trains the RECIPES that it is given, evaluates "two", and trains "whole" once more, stopped after
# 2 steps and resumed. All in one start, because torch takes longer to load than they do.
JOB = """
import sys
import test_processes as t
from support.tiny import train_tiny
from vitcli import distributed as launch
from vitcli.cli import main as cli
from vitcli.train import loop, session
from vitcli.train.signals import Stopped

session.draw_curves = session.write_report = lambda *_: None
for name in sys.argv[1:]:
    train_tiny(name, **t.RECIPES[name])
if "two" in sys.argv:
    words = ["evaluate", "builtin:digits", "--model", "two", "--out", "both", "--json"]
    assert cli.run(words) == 0
real, asked = loop.max_over_processes, iter(range(1000))
def stopping(accelerator, value):
    return real(accelerator, 15 if next(asked) == 2 and launch.rank() else value)
loop.max_over_processes = stopping
try:
    train_tiny("parts", **t.RECIPES["whole"])
except Stopped as stopped:
    assert "SIGTERM after step 2" in str(stopped), stopped
loop.max_over_processes = real
train_tiny("parts", **t.RECIPES["whole"], resume=True)
launch.exit_process(launch.agree_on_status(0))
"""


def weights(run):
    return (Path(run) / "model.safetensors").read_bytes()


def run_job(number, folder, *names):
    """What process 0 prints. They start as with `--processes`; torchrun takes seconds to load."""
    (folder / "job.py").write_text(JOB)
    size, port = str(number), str(launch._free_port())
    shared = {**ENVIRONMENT, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    members = [
        subprocess.Popen(
            [sys.executable, "job.py", *names],
            cwd=folder,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(number)
    ]
    try:
        said = [member.communicate(timeout=300) for member in members]
    finally:
        for member in members:
            member.kill()
    assert not any(member.returncode for member in members), said
    return said[0][0]


def test_two_processes_compute_what_one_does_and_resume_exactly(here):
    said = run_job(2, here, *RECIPES)
    train_tiny("one", **RECIPES["two"])
    expected = load_model("one").state_dict()
    train_tiny("one, mixed", **RECIPES["two, mixed and repeated"])
    mixed = load_model("one, mixed").state_dict()
    for key, value in load_model("two, mixed and repeated").state_dict().items():
        torch.testing.assert_close(mixed[key], value, rtol=0, atol=1e-5)
    for name in ("two", "two, accumulating"):
        found = load_model(name).state_dict()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5)
        pairs = zip(records(Path("one")), records(Path(name)), strict=True)
        for a, b in pairs:  # the loss that is logged is that of the whole batch
            assert a["step"] == b["step"]
            assert a.get("train/loss") == pytest.approx(b.get("train/loss"), abs=1e-5)
    assert weights("whole") == weights("parts")
    assert json.loads(Path("whole/provenance.json").read_text())["processes"] == 2
    every_image_counts_once(said)


def every_image_counts_once(said):
    """`evaluate` in two processes says and writes once what it does in one."""
    alone = evaluate.run("builtin:digits", model="two", out=Path("alone"))
    names = {"confusion": "confusion.csv", "confusion_picture": "confusion.png"}
    names |= {"reliability_picture": "reliability.png", "mistakes_picture": "mistakes.png"}
    names |= {"mistakes": "mistakes.csv", "report": "report.html"}
    there = {key: f"both/{name}" for key, name in names.items()}
    assert json.loads(said) == {**alone.to_json(), **there}
    assert {path.name for path in Path("both").iterdir()} == set(names.values())
    assert Path("both/confusion.csv").read_text() == Path("alone/confusion.csv").read_text()


@pytest.mark.slow
def test_three_processes_resume_exactly(here):
    """Of three summands the order matters, and DDP changes it after its first pass."""
    run_job(3, here, "whole")
    assert weights("whole") == weights("parts")


def test_another_number_of_processes_is_told(tmp_path):
    warned = []

    class Watch(Quiet):
        def warn(self, message):
            warned.append(message)

    run, cpu = Run(tmp_path), torch.device("cpu")
    warn_of_changes(run, machine_facts(cpu, "fp32", 2), Watch())  # killed before it wrote any
    run.write_provenance(machine_facts(cpu, "fp32", 2))
    warn_of_changes(run, machine_facts(cpu, "fp32", 2), Watch())
    assert not warned
    warn_of_changes(run, machine_facts(cpu, "fp32", 1), Watch())
    assert "processes 2 -> 1" in warned[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a recipe and what `pretrain --processes 2 --json` left and said."""
    folder = tmp_path_factory.mktemp("processes")
    write_tiny(folder / "tiny.toml", train={"steps": 12, "checkpoint_steps": 1})
    return folder, command(folder, "pretrain", "--recipe", "tiny.toml", "--out", "run", "--json")


def command(folder, *arguments, number=2):
    environment = {**ENVIRONMENT, "VITCLI_CACHE": str(folder / "cache")}
    return vitcli(*arguments, "--processes", number, cwd=folder, env=environment)


def test_one_voice(trained):
    folder, done = trained
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # one document
    assert result == json.loads((folder / "run/result.json").read_text())
    assert result["figures"]["images"] == 359
    said = done.stderr.splitlines()
    assert len(said) == 2 and "1,438 train" in said[0] and "run `run`: 12 steps" in said[1]
    assert len((folder / "run/log.txt").read_text().splitlines()) == 1
    steps = [r["step"] for r in records(folder / "run") if "train/loss" in r]
    assert steps == list(range(1, 13))
    provenance = json.loads((folder / "run/provenance.json").read_text())
    assert provenance["argv"][-2:] == ["--processes", "2"] and provenance["processes"] == 2


@pytest.mark.slow
def test_a_temperature_is_the_same_and_stored_once(trained):
    folder, _ = trained
    for name in ("one", "two"):
        shutil.copy(folder / "run/model.safetensors", folder / f"{name}.safetensors")
    words = ("evaluate", "builtin:digits", "--calibrate", "--json", "--out", "report")
    said = {}
    for number, name in ((1, "one"), (2, "two")):
        done = command(folder, *words, "--model", f"{name}.safetensors", number=number)
        assert done.returncode == 0, done.stderr
        said[name] = json.loads(done.stdout)
    assert said["one"]["temperature"] != 1.0
    assert said["one"]["calibration"].pop("stored") == "one.safetensors"
    assert said["two"]["calibration"].pop("stored") == "two.safetensors"
    assert said["one"] == {**said["two"], "model": "one.safetensors"}
    assert (folder / "one.safetensors").read_bytes() == (folder / "two.safetensors").read_bytes()


@pytest.mark.slow
def test_fewshot_and_finetune(trained):
    folder, _ = trained
    base = ("fewshot", "--model", "run", "--shots", "2,5", "--json")
    said = []
    # Two processes each add their part to the cache, in which one then finds everything.
    for name, number, more in (("alone", 1, "--no-cache"), ("both", 2, ""), ("again", 1, "")):
        arguments = (*base, "--out", f"shots-{name}", *filter(None, [more]))
        done = command(folder, *arguments, number=number)
        assert done.returncode == 0, done.stderr
        said.append({**json.loads(done.stdout), "run": None})
    assert said[0] == said[1] == said[2]
    assert "359 of 359 features are cached" in done.stderr
    assert weights(folder / "shots-both") == weights(folder / "shots-again")
    arguments = ("finetune", "builtin:digits", "--model", "run", "--steps", 4, "--json")
    for name, more in (("tuned", ()), ("again", ("--resume",))):
        done = command(folder, *arguments, "--out", name, *more)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["figures"]["images"] == 359
    assert weights(folder / "tuned") == weights(folder / "again")


def test_a_mistake_is_told_once_and_leaves_nothing(trained):
    folder, _ = trained
    done = command(folder, "pretrain", "--recipe", "tiny.toml", "--batch-size", 31, "--out", "odd")
    assert done.returncode == 2
    said = done.stderr.splitlines()
    assert said[0] == "error: a batch of 31 images does not divide among 2 processes"
    assert said[1].startswith("hint: ") and len(said) == 2
    assert not (folder / "odd").exists()


@pytest.mark.slow
def test_a_mistake_that_only_one_process_meets(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(20):
        path = tmp_path / f"photos/{'ab'[i % 2]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    data = {"name": str(tmp_path / "photos"), "strict": True, "test_fraction": 0.2}
    write_tiny(tmp_path / "tiny.toml", data=data, train={"batch_size": 16, "steps": 3})
    images = load_data(str(tmp_path / "photos")).splits["train"]
    _, order = images_at(0, len(images), len(images), 0)
    broken = images.describe(int(order[-1]))  # of the first batch, the second process's
    Path(broken).write_bytes(b"")
    done = command(tmp_path, "pretrain", "--recipe", "tiny.toml", "--out", "run")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert Path(broken).name in done.stderr
    assert not (tmp_path / "run/result.json").exists()


def start(folder, out, *more):
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "vitcli", "pretrain", "--recipe", "tiny.toml", "--out", out),
            *("--steps", "400", "--processes", "2", *more),
        ],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_a_checkpoint(run):
    deadline = time.monotonic() + 120
    while not any((run / "checkpoints").glob("step_*")):
        assert time.monotonic() < deadline, "no checkpoint was written in two minutes"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_group_saves_once(trained, number, status):
    folder, _ = trained
    out = f"stopped-{status}"
    process = start(folder, out)
    wait_for_a_checkpoint(folder / out)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == status, said
    assert said.count("state saved") == 1 and f"--out {out} --resume" in said
    assert "Traceback" not in said and "error" not in said
    step = records(folder / out)[-1]["step"]
    assert (folder / out / f"checkpoints/step_{step:06d}").is_dir()


@pytest.mark.slow
def test_killed_without_warning_nobody_is_left_behind(trained):
    """The processes notice that who started them is gone, and save, so that a resume is alone."""
    folder, _ = trained
    process = start(folder, "orphans")
    wait_for_a_checkpoint(folder / "orphans")
    process.kill()
    _, said = process.communicate(timeout=60)  # ends when nobody holds the pipe any more
    assert "state saved" in said


@pytest.mark.slow
def test_other_launchers(trained):
    folder, _ = trained
    arguments = ["-m", "vitcli", "pretrain", "--recipe", "tiny.toml", "--json", "--out"]
    launchers = {
        "torchrun": ["torch.distributed.run", "--nproc-per-node=2", "--standalone"],
        "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2"],
    }
    for name, launcher in launchers.items():
        done = subprocess.run(
            [sys.executable, "-m", *launcher, *arguments, name],
            cwd=folder,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["run"] == name
        assert done.stderr.count("12 steps") == 1
        assert weights(folder / name) == weights(folder / "run")


TOLD = []


def team(*codes):
    TOLD.clear()
    environments = [{**ENVIRONMENT, "CODE": code} for code in codes]
    return launch.LaunchedProcesses(
        [sys.executable, "-c", "import os; exec(os.environ['CODE'])"], environments
    )


SLEEP = "import time; time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(15, lambda *_: None); print(flush=True); " + SLEEP


@pytest.mark.parametrize(
    ("codes", "status"),
    [
        (("pass", "pass"), 0),
        (("raise SystemExit(3)", "pass"), 3),
        ((SLEEP, "raise SystemExit(2)", STUBBORN), 2),
    ],
)
def test_the_first_to_fail_gives_the_status_and_ends_the_others(codes, status):
    started = time.monotonic()
    members = team(*codes)
    assert members.wait(TOLD.append) == status and not TOLD
    assert time.monotonic() - started < 20
    assert all(member.returncode is not None for member in members.members)


def test_a_process_that_was_killed_is_told_of():
    assert team(SLEEP, "os.kill(os.getpid(), 9)").wait(TOLD.append) == 137
    assert TOLD[0].message == "SIGKILL ended process 1 of 2" and "memory" in TOLD[0].hint


def test_threads_are_shared_and_the_environment_of_a_launcher_is_set(monkeypatch, tmp_path):
    seen = []

    class Team(launch.LaunchedProcesses):
        def __init__(self, command, environments):
            seen.append((command, environments))
            super().__init__([sys.executable, "-c", ""], environments)

    monkeypatch.setattr(launch, "LaunchedProcesses", Team)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert cli.run(["pretrain", "--processes", "3"]) == 0
    ((line, environments),) = seen
    assert line[1:] == ["-m", "vitcli", "pretrain", "--processes", "3"]
    assert [e["RANK"] for e in environments] == ["0", "1", "2"]
    assert {(e["WORLD_SIZE"], e["OMP_NUM_THREADS"]) for e in environments} == {("3", "2")}


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_clock_runs_from_the_start_of_the_program(monkeypatch):
    code = "import time; time.sleep(0.5); from vitcli import distributed as launch; "
    code += "launch.record_start(); "
    code += "print(time.monotonic() - launch.started_at)"
    if Path("/proc/self/stat").exists():
        assert 0.5 <= float(python(code).stdout) < 30.0
    told = python(code, **{launch.STARTED_AT: repr(time.monotonic() - 20.0)})
    assert 20.5 <= float(told.stdout) < 50.0
    assert (
        float(python(code, **{launch.STARTED_AT: "1e12"}).stdout) < 0.1
    )  # another machine's clock


def test_an_end_without_tear_down_still_writes_and_tidies():
    code = "import atexit, sys; from vitcli import distributed as launch; "
    code += "atexit.register(print, 'tidied'); "
    code += "atexit.register(sys.stdout.write, 'a word, '); launch.exit_process(5)"
    done = python(code)
    assert (done.returncode, done.stdout) == (5, "a word, tidied\n")


def test_a_number_of_processes_that_cannot_be(monkeypatch, capsys):
    assert cli.run(["pretrain", "--processes", "0"]) == 2
    assert "`--processes`" in capsys.readouterr().err.replace("'", "`")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.run(["pretrain", "--processes", "3"]) == 2
    assert "`--processes 3` does not match the launch of 2 processes" in capsys.readouterr().err


def test_who_holds_back(monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for size, rank, mistake, holds in [
        (1, 0, False, 0),
        (2, 0, True, 0),
        (2, 0, False, 1),
        (2, 1, True, 1),
        (2, 1, False, 1),
    ]:
        slept.clear()
        monkeypatch.setenv("WORLD_SIZE", str(size))
        monkeypatch.setenv("RANK", str(rank))
        launch.wait_before_error(mistake)
        assert len(slept) == holds, (size, rank, mistake)
    assert launch.END_SECONDS < launch.HOLD_SECONDS


def test_accelerate_that_started_one_process_of_several(monkeypatch):
    assert launch.launch_warning() is None
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert "--processes N" in launch.launch_warning()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch.launch_warning() is None


def test_more_processes_than_gpus(monkeypatch):
    from vitcli.devices import join_processes

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(VitcliError, match="2 processes for 1 GPU"):
        join_processes(torch.device("cuda"))
