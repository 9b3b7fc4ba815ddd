"""Checkpoints: whole or not there, and everything in them."""

import errno

import pytest
import torch
from torch import nn

import vitcli.train.checkpoint as checkpoint
from vitcli.config.schema import OptimSection
from vitcli.errors import VitcliError
from vitcli.train.checkpoint import TrainState, list_checkpoints, load_checkpoint, save_checkpoint
from vitcli.train.ema import Ema
from vitcli.train.optimizers import OPTIMIZERS, build_optimizers
from vitcli.vit import create_network


def state(name="adamw", seed=0):
    model = create_network("Pico/8", image_size=16, num_classes=3, seed=seed).train()
    return TrainState(model, build_optimizers(model, OptimSection(name=name)), Ema(model, 0.9))


def advance(s, steps):
    for _ in range(steps):
        torch.manual_seed(s.step)
        loss = s.objective(torch.randn(4, 3, 16, 16)).square().sum() + s.objective.head.bias.sum()
        loss.backward()
        for optimizer in s.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        s.step += 1
        s.ema.update(s.objective, s.step)


def equal(a, b):
    return all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_four_steps_are_two_and_a_resume_and_two(name, tmp_path):
    whole = state(name)
    advance(whole, 4)
    first = state(name)
    advance(first, 2)
    save_checkpoint(tmp_path, first, keep=2)
    second = state(name, seed=9)  # other weights: all must come from the checkpoint
    load_checkpoint(list_checkpoints(tmp_path)[-1], second)
    assert second.step == 2
    advance(second, 2)
    assert equal(whole.objective.state_dict(), second.objective.state_dict())
    assert equal(whole.ema.state_dict(), second.ema.state_dict())


def test_only_the_last_ones_are_kept(tmp_path):
    s = state()
    (tmp_path / ".step_000009.123.tmp").mkdir()  # of a process that was killed while writing
    for step in (1, 2, 200000, 1000000):
        s.step = step
        save_checkpoint(tmp_path, s, keep=2)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step_1000000", "step_200000"]


def test_a_full_disk_leaves_the_last_good_one(tmp_path, monkeypatch):
    s = state()
    advance(s, 1)
    save_checkpoint(tmp_path, s, keep=1)

    def full(*arguments, **settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_shard", full)
    advance(s, 1)
    with pytest.raises(VitcliError, match="No space left"):
        save_checkpoint(tmp_path, s, keep=1)
    monkeypatch.undo()
    fresh = state(seed=9)
    load_checkpoint(list_checkpoints(tmp_path)[-1], fresh)
    assert fresh.step == 1 and len(list(tmp_path.iterdir())) == 1


def test_a_damaged_checkpoint_is_one_clear_error(tmp_path):
    s = state()
    path = save_checkpoint(tmp_path, s, keep=1)
    (path / "module.safetensors").write_bytes(b"short")
    with pytest.raises(VitcliError, match="cannot read checkpoint") as caught:
        load_checkpoint(path, s)
    assert f"rm -r {path}" in caught.value.hint


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, state(), keep=1)
    other = TrainState(nn.Linear(2, 2), [])
    with pytest.raises(VitcliError, match="cannot read checkpoint"):
        load_checkpoint(path, other)


def test_parts_of_processes_that_were_killed_are_removed(tmp_path):
    (tmp_path / ".step_000009.parts").mkdir()
    save_checkpoint(tmp_path, state(), keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000000"]
