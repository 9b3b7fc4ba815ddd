"""Tensors shared out among processes, and checkpoints in parts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.launching import ENVIRONMENT, PLAIN
from support.tiny import tiny_recipe, train_tiny

from vitcli.errors import VitcliError
from vitcli.train.fsdp import ShardReader, check_sharding, shard_file, write_shard
from vitcli.weights.load import load_model
from vitcli.weights.store import write_tensors

SHARED = {
    **PLAIN,
    "optim": {"name": "adamw", "lr": 1e-3, "grad_clip": 1.0},
    "train": {"steps": 10, "batch_size": 24, "fully_shard": True, "ema_decay": 0.9},
}
JOB = """
import sys, torch
import test_fsdp as t
from vitcli import distributed as launch
from support.tiny import train_tiny
from vitcli.train.loop import Loop
from vitcli.train.signals import Stopped

name, stop, resume = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "resume"
if stop:
    Loop._stop_request = lambda run, _: 15 if run.state.step == stop else None
try:
    train_tiny(name, **t.SHARED, resume=resume)
except Stopped:
    assert stop
launch.exit_process(launch.agree_on_status(0))
"""


def job(folder, number, name, stop=0, resume=False):
    (folder / "job.py").write_text(JOB)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={number}"]
    done = subprocess.run(
        [*command, "--standalone", "job.py", name, str(stop), "resume" if resume else "new"],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def close(one, other, atol):
    a, b = (load_model(run).state_dict() for run in (one, other))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=atol)


@pytest.mark.slow
def test_shared_out_it_computes_what_one_process_does_and_resumes(tmp_path, monkeypatch):
    """On two; from a checkpoint of two on two again, bit for bit, and on three."""
    monkeypatch.chdir(tmp_path)
    job(tmp_path, 2, "two")
    train_tiny("one", **{**SHARED, "train": {**SHARED["train"], "fully_shard": False}})
    close("one", "two", 1e-5)
    job(tmp_path, 2, "again", stop=4)
    checkpoint = Path("again/checkpoints/step_000004")
    assert {p.name for p in checkpoint.iterdir()} == {
        *(f"{n}-{i}-of-2.safetensors" for n in ("module", "optimizer_0", "ema") for i in (0, 1)),
        "state.json",
    }
    subprocess.run(["cp", "-r", "again", "more"], check=True)
    job(tmp_path, 2, "again", resume=True)
    assert (
        Path("again/model.safetensors").read_bytes() == Path("two/model.safetensors").read_bytes()
    )
    job(tmp_path, 3, "more", resume=True)
    close("one", "more", 1e-5)


def test_parts_are_put_together_for_any_number(tmp_path, monkeypatch):
    tensors = {"a": torch.arange(35.0).reshape(7, 5), "b": torch.tensor(3.0), "c": torch.ones(1, 2)}
    for rank, count in ((0, 3), (1, 3), (2, 3)):
        mine = {"a": tensors["a"].chunk(3)[rank]}
        places = {"a": [[0, 3, 6][rank], 7]}
        if rank == 0:
            mine |= {"b": tensors["b"], "c": tensors["c"]}
            places |= {"b": [0, 0], "c": [0, 1]}
        write_tensors(
            shard_file(tmp_path, "module", rank, count), mine, {"parts": json.dumps(places)}
        )
    parts = ShardReader(tmp_path, "module")
    assert set(parts.names()) == {"a", "b", "c"}
    for name, tensor in tensors.items():
        assert torch.equal(parts.read(name), tensor)
    for first, count in ((0, 4), (4, 3), (2, 2), (6, 1), (0, 7)):
        monkeypatch.setattr("vitcli.train.fsdp.is_sharded", lambda t: True)
        monkeypatch.setattr("vitcli.train.fsdp.local_rows", lambda t, rows=(first, count): rows)
        found = parts.read("a", tensors["a"])
        assert torch.equal(found, tensors["a"][first : first + count]), (first, count)


def test_one_process_writes_one_file(tmp_path):
    tensors = {"a": torch.ones(2, 3)}
    write_shard(tmp_path, "module", tensors, 0, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["module.safetensors"]
    assert torch.equal(ShardReader(tmp_path, "module").read("a"), tensors["a"])


@pytest.mark.parametrize(
    ("sections", "processes", "words"),
    [
        ({}, 1, "and there is one"),
        ({"optim": {"name": "muon"}}, 2, "optimizer `muon` needs whole"),
        ({"train": {"compile": True}}, 2, "cannot be combined with"),
    ],
)
def test_what_cannot_be_shared_out(sections, processes, words):
    sections = {"optim": {"name": "adamw"}, **sections}
    sections["train"] = {"fully_shard": True, **sections.get("train", {})}
    with pytest.raises(VitcliError, match=words):
        check_sharding(tiny_recipe(**sections), processes)


def test_one_process_of_a_launcher_trains_on_its_device(tmp_path):
    """FSDP2 with a group of one process: the same weights as without it."""
    settings = {"optim": {"name": "adamw"}, "train": {"steps": 3, "ema_decay": None}}
    train_tiny(tmp_path / "plain", **settings)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        sharded = {**settings, "train": {**settings["train"], "fully_shard": True}}
        train_tiny(tmp_path / "sharded", **sharded)
    finally:
        torch.distributed.destroy_process_group()
    found, wanted = (load_model(tmp_path / n).state_dict() for n in ("sharded", "plain"))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
