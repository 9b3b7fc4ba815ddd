"""A damaged checkpoint is noticed, and an older good one is named."""

import json
import shutil

import pytest
import torch
from support.flipping import flip, flips
from support.tiny import train_tiny, weights

from vitcli.config.schema import OptimSection
from vitcli.errors import VitcliError
from vitcli.run import Run
from vitcli.train.checkpoint import TrainState, list_checkpoints, load_checkpoint, save_checkpoint
from vitcli.train.ema import Ema
from vitcli.train.optimizers import build_optimizers
from vitcli.vit import create_network

SIZES = {"depth": 1, "embed_dim": 8, "num_heads": 1, "mlp_dim": 8}


def state(seed=0, steps=0):
    model = create_network("Pico/8", image_size=16, num_classes=3, seed=seed, **SIZES).train()
    made = TrainState(model, build_optimizers(model, OptimSection(name="adamw")), Ema(model, 0.9))
    for step in range(steps):
        torch.manual_seed(step)
        model(torch.randn(2, 3, 16, 16)).square().sum().backward()
        made.optimizers[0].step()
        made.step += 1
        made.ema.update(model, made.step)
    return made


def everything(s):
    """All tensors and numbers of a state, as bytes."""
    parts = [json.dumps(s.values()).encode()]
    tensors = [*s.objective.state_dict().values(), *s.ema.state_dict().values()]
    found = s.optimizers[0].state_dict()["state"]
    for values in (found[index] for index in sorted(found)):
        tensors += [values[key] for key in sorted(values)]
    return b"".join(parts + [t.detach().numpy().tobytes() for t in tensors])


NAMES = ("module.safetensors", "optimizer_0.safetensors", "ema.safetensors", "state.json")


@pytest.mark.parametrize("name", NAMES)
def test_each_flipped_bit_is_detected_or_harmless(tmp_path, name):
    path = save_checkpoint(tmp_path, state(steps=2), keep=1)
    assert {file.name for file in path.iterdir()} == set(NAMES)
    whole = state(seed=1)
    load_checkpoint(path, whole)
    expected, detected = everything(whole), 0

    def check(position):
        nonlocal detected
        fresh = state(seed=1)
        try:
            load_checkpoint(path, fresh)
        except VitcliError as error:
            assert name in error.message and "rm -r" in error.hint
            detected += 1
        else:
            assert everything(fresh) == expected, f"byte {position} of {name}"

    flips(path / name, check)
    assert detected >= 45
    load_checkpoint(path, state())


def test_a_missing_file_is_named(tmp_path):
    path = save_checkpoint(tmp_path, state(steps=1), keep=1)
    (path / "ema.safetensors").unlink()
    with pytest.raises(VitcliError, match=r"`ema.safetensors` is missing"):
        load_checkpoint(path, state())


def test_a_checkpoint_without_checksums_loads(tmp_path):
    path = save_checkpoint(tmp_path, state(steps=2), keep=1)
    values = json.loads((path / "state.json").read_text())
    for key in ("files", "checksum"):
        del values[key]
    (path / "state.json").write_text(json.dumps(values))
    fresh = state(seed=1)
    load_checkpoint(path, fresh)
    assert everything(fresh) == everything(state(steps=2))


def test_the_way_out_is_the_newest_good_checkpoint_and_ends_with_the_same_bits(tmp_path):
    sections = {"train": {"checkpoint_steps": 2, "keep_checkpoints": 4}}
    run = tmp_path / "run"
    train_tiny(run, **sections)
    expected = weights(run)
    (run / "model.safetensors").unlink()
    (run / "result.json").unlink()
    saved = list_checkpoints(run / "checkpoints")
    flip(saved[-1] / "module.safetensors", 5000)
    flip(saved[-2] / "optimizer_0.safetensors", 5000)
    with pytest.raises(VitcliError, match=r"`module.safetensors` is damaged") as caught:
        train_tiny(run, resume=True, **sections)
    assert "resumes from step 4" in caught.value.hint
    assert caught.value.hint.startswith(f"`rm -r {saved[-1]} {saved[-2]}`")
    for path in saved[-2:]:
        shutil.rmtree(path)
    train_tiny(run, resume=True, **sections)
    assert weights(run) == expected


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A run whose last checkpoint, of step 8, is damaged; the one before is of step 4."""
    run = tmp_path_factory.mktemp("damaged") / "run"
    train_tiny(run, train={"checkpoint_steps": 4, "keep_checkpoints": 2})
    flip(list_checkpoints(run / "checkpoints")[-1] / "module.safetensors", 5000)
    return run


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({}, "and the result is the same"),
        ({"extensions": [{"step": 4}]}, "and the result is the same"),  # it starts from there again
        (
            {"extensions": [{"step": 6}]},
            "made longer at step 6, and its schedule changes at step 4",
        ),
        ({"resumes": [{"step": 2, "changed": ["torch 2.0 -> 2.1"]}]}, "not the same to the last"),
        ({"device": "cuda:0"}, "not the same to the last bit"),
    ],
)
def test_the_way_out_says_if_the_result_is_the_same(damaged, tmp_path, facts, words):
    run = tmp_path / "run"
    shutil.copytree(damaged, run)
    Run(run).update_provenance(facts)
    with pytest.raises(VitcliError) as caught:
        load_checkpoint(list_checkpoints(run / "checkpoints")[-1], state())
    assert "resumes from step 4" in caught.value.hint and words in caught.value.hint


def test_without_an_older_one_the_run_starts_from_step_0(tmp_path):
    path = save_checkpoint(tmp_path, state(steps=1), keep=1)
    flip(path / "module.safetensors", 2000)
    with pytest.raises(VitcliError) as caught:
        load_checkpoint(path, state())
    assert "starts from step 0" in caught.value.hint
