"""What decides the bits of a run besides recipe and data: restored, or named."""

import json
import os
import shutil

import pytest
import torch
from support.tiny import train_tiny, vitcli, weights, write_tiny
from support.watching import Told

from vitcli.run import RESUMES, Run
from vitcli.train.checkpoint import list_checkpoints
from vitcli.train.exactness import bit_deciding, machine_facts, use_threads

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of 4 steps, as a SIGKILL after step 2 leaves it."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    train_tiny(run, train={"steps": 4, "checkpoint_steps": 2})
    shutil.rmtree(list_checkpoints(run / "checkpoints")[-1])
    (run / "result.json").unlink()
    return run


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vitcli", "0.0.1"),
        ("instructions", "ALTIVEC"),  # of no processor that runs these tests
        ("cpu", "another processor"),
        ("device", "cuda:0"),
        ("libraries", {"torch": "2.0.0"}),
    ],
)
def test_what_has_changed_is_named_and_recorded(stopped, tmp_path, key, value):
    run, told = tmp_path / "run", Told()
    shutil.copytree(stopped, run)
    Run(run).update_provenance({key: value})
    train_tiny(run, resume=True, watch=told, train={"steps": 4, "checkpoint_steps": 2})
    (line,) = told.warnings
    name, before = (key, str(value).partition(":")[0]) if key != "libraries" else ("torch", "2.0.0")
    assert "not exact" in line and f"{name} {before} -> " in line
    (entry,) = Run(run).provenance()[RESUMES]
    assert entry["step"] == 2 and entry["changed"][0].startswith(name)


def test_the_number_of_threads_is_restored(tmp_path):
    now, told = torch.get_num_threads(), Told()
    Run(tmp_path).write_provenance({**machine_facts(CPU, "fp32", 1), "threads": now + 1})
    try:
        use_threads(Run(tmp_path), CPU, told)
        assert torch.get_num_threads() == now + 1
        assert f"with {now + 1} threads" in told.notes[0]
    finally:
        torch.set_num_threads(now)


def test_facts_that_an_early_version_did_not_record_are_not_compared():
    known = bit_deciding({"vitcli": "1.0", "device": "cpu"})
    assert known["torch"] is None and known["threads"] is None


def test_a_damaged_provenance_is_noticed(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    file = tmp_path / "run/provenance.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "window": [0, 1]}))
    with pytest.raises(Exception, match="its checksum does not match"):
        Run(tmp_path / "run").provenance()
    del values["checksum"]  # of an early version
    file.write_text(json.dumps(values))
    assert Run(tmp_path / "run").provenance() == values


@pytest.mark.slow
def test_another_number_of_threads_ends_with_the_same_bits(tmp_path):
    # Wide enough that the sums are cut at other places with two threads than with one.
    wide = {"embed_dim": 256, "num_heads": 4, "mlp_dim": 512, "image_size": 16}
    write_tiny(
        tmp_path / "t.toml", model=wide, train={"steps": 6, "checkpoint_steps": 2, "batch_size": 64}
    )
    start = ("pretrain", "--recipe", "t.toml", "--out")
    for name, threads in (("one", 1), ("two", 2)):
        done = vitcli(
            *start, name, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
        )
        assert done.returncode == 0, done.stderr
    whole = weights(tmp_path / "two")
    assert weights(tmp_path / "one") != whole  # else the test shows nothing
    for path in list_checkpoints(tmp_path / "two/checkpoints")[1:]:
        shutil.rmtree(path)
    (tmp_path / "two/result.json").unlink()
    done = vitcli(
        "pretrain", "--resume", "two", cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "with 2 threads per process" in done.stderr
    assert weights(tmp_path / "two") == whole
