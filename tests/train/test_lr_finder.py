"""The range test: what it makes of a curve, and what it finds in training."""

import json
import math

import numpy as np
import pytest
from support.tiny import write_tiny

from vitcli.cli import main as cli
from vitcli.errors import VitcliError
from vitcli.train import lr_finder as find_lr
from vitcli.train.lr_finder import is_over, running_means, suggest_lr

FACTORS = np.geomspace(find_lr.MIN_FACTOR, find_lr.MAX_FACTOR, 100)


def curve(steepest, turn):
    """A loss that falls fastest at one rate and rises beyond another."""
    x = np.log10(FACTORS)
    falling = 2.3 - 1.0 / (1 + np.exp(-8 * (x - math.log10(steepest))))
    return falling + np.clip(x - math.log10(turn), 0, None) * 5


@pytest.mark.parametrize("steepest", [0.02, 0.3, 2.0])
def test_it_takes_the_steepest_fall(steepest):
    chosen, lowest = suggest_lr(FACTORS, curve(steepest, 8.0).tolist())
    assert chosen == pytest.approx(steepest, rel=0.15)
    assert lowest == pytest.approx(8.0, rel=0.3)


def test_what_is_not_finite_is_left_out():
    losses = curve(0.3, 100.0)
    losses[80:] = math.nan
    chosen, lowest = suggest_lr(FACTORS, losses.tolist())
    assert chosen == pytest.approx(0.3, rel=0.15) and lowest == FACTORS[79]


@pytest.mark.parametrize("losses", [np.full(100, math.nan), np.linspace(1, 2, 100)])
def test_a_loss_that_never_falls_is_an_error(losses):
    with pytest.raises(VitcliError) as caught:
        suggest_lr(FACTORS, losses.tolist())
    assert caught.value.hint


def test_running_means_of_a_constant_are_it():
    assert running_means([2.5] * 30, 200) == pytest.approx([2.5] * 30)
    assert running_means([1.0, 3.0], 2) == pytest.approx([1.0, (0.5 * 1.0 + 3.0) / 1.5])


def test_when_it_is_over():
    flat = [2.303] * 30
    assert not is_over(flat, 100)
    assert is_over([*flat, math.inf], 100)
    assert not is_over(np.linspace(2.3, 1.0, 50).tolist(), 100)
    assert is_over([*np.linspace(2.3, 1.0, 50), *[2.0] * 20], 100)
    assert not is_over([2.3, *[2.3 + 0.01 * (-1) ** i for i in range(60)]], 100)  # noise


def test_from_the_command_line(here, capfd, monkeypatch):
    monkeypatch.setattr(find_lr, "MAX_STEPS", 60)
    recipe = write_tiny(
        here / "tiny.toml",
        optim={"name": "adamw", "lr": 1e-2, "momentum": 0.9},
        train={"ema_decay": None, "precision": "fp32"},
    )
    words = ["pretrain", "--recipe", str(recipe), "--find-lr"]
    assert cli.run([*words, "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    kept = here / "runs/tiny-lr"
    assert facts == {**json.loads((kept / "lr.json").read_text())}
    assert (kept / "lr.png").stat().st_size > 1000
    assert {path.name for path in kept.iterdir()} == {"lr.json", "lr.png"}  # no run, no weights
    # A tiny ViT on digits learns at rates around 1e-3 to 1e-2 under AdamW, and not at 1e-5.
    assert 3e-4 < facts["lr"] < 5e-2 and facts["lr"] <= facts["lowest"]
    assert facts["matrix_lr"] is None and facts["given"] == 1e-2
    assert len(facts["rates"]) == len(facts["losses"]) == len(facts["smoothed"]) <= 60
    assert facts["losses"][0] == pytest.approx(math.log(10), abs=0.05)
    assert np.allclose(np.diff(np.log(facts["rates"])), np.log(facts["rates"][1] / 1e-5))
    assert cli.run(words) == 0
    assert "steepest descent" in capfd.readouterr().out and (here / "runs/tiny-lr-2").is_dir()
    assert cli.run([*words, "--out", str(kept)]) == 2
    assert cli.run([*words, "--resume"]) == 2


def test_fine_tuning_has_it_too(here, capfd, monkeypatch):
    monkeypatch.setattr(find_lr, "MAX_STEPS", 40)
    words = ["finetune", "--model", "mu/4", "--image-size", "8", "--batch-size", "32"]
    assert cli.run([*words, "--find-lr", "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["matrix_lr"] == pytest.approx(10 * facts["lr"])  # as the recipe has them: Muon's
    assert (here / "runs/finetune_digits-lr/lr.png").is_file()
