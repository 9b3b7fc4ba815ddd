"""`--resume` with another length: what is exact, what is said, and what is refused."""

import json
import shutil

import pytest
from support.tiny import tiny_recipe, train_tiny, weights, write_tiny
from support.watching import Told

from vitcli.cli import main as cli
from vitcli.commands import pretrain
from vitcli.errors import VitcliError
from vitcli.files import is_intact
from vitcli.run import Run
from vitcli.train import loop as loops
from vitcli.train.checkpoint import list_checkpoints
from vitcli.train.resuming import reopen_run
from vitcli.train.schedules import schedule_factor

SMALL = {"embed_dim": 16, "num_heads": 1, "mlp_dim": 16, "depth": 1}


def go(out, resume=False, watch=None, schedule=None, **train):
    train = {"checkpoint_steps": 2, "batch_size": 64, **train}
    schedule = schedule or {"name": "cosine", "warmup_fraction": 0.25}
    return train_tiny(out, resume=resume, watch=watch, model=SMALL, schedule=schedule, train=train)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 4 steps."""
    run = tmp_path_factory.mktemp("finished") / "run"
    go(run, steps=4)
    return run


@pytest.fixture
def run(finished, tmp_path):
    return copied(finished, tmp_path / "run")


def copied(source, target):
    shutil.copytree(source, target)
    return target


def rates(run):
    """Step -> learning rate, of the records."""
    return {r["step"]: r["lr"] for r in Run(run).records() if "train/loss" in r}


def test_the_curve_of_the_new_length_continues(run):
    told = Told()
    result = go(run, resume=True, watch=told, steps=8)
    assert result.steps == 8 and not result.already_finished
    recipe = tiny_recipe(
        schedule={"name": "cosine", "warmup_fraction": 0.25}, train={"steps": 8, "batch_size": 64}
    )
    for step, rate in rates(run).items():
        planned = 4 if step <= 4 else 8
        expected = recipe.optim.lr * schedule_factor(recipe.schedule, step - 1, planned)
        assert rate == pytest.approx(expected), step
    said = next(line for line in told.lines if "instead of 4" in line)
    assert "not that of a run of this length" in said
    assert Run(run).recipe().train.steps == 8 and Run(run).provenance()["steps"] == 8


def test_restart_warms_up_again(run):
    schedule = {"name": "cosine", "warmup_fraction": 0.25, "extension": "restart"}
    go(run, resume=True, steps=12, schedule=schedule)
    found, before = rates(run), tiny_recipe().optim.lr
    recipe = tiny_recipe(schedule=schedule)
    for step in range(5, 13):
        assert found[step] == pytest.approx(before * schedule_factor(recipe.schedule, step - 5, 8))


def test_a_schedule_that_does_not_know_the_end_is_exact(tmp_path):
    constant = {"name": "constant", "warmup_fraction": 0.0}
    go(tmp_path / "whole", steps=8, schedule=constant)
    go(tmp_path / "parts", steps=4, schedule=constant)
    told = Told()
    go(tmp_path / "parts", resume=True, watch=told, steps=8, schedule=constant)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert any("the same bits as a run of 8 steps" in line for line in told.lines)


@pytest.mark.parametrize("mode", ["continue", "restart"])
def test_an_interrupted_extension_resumes_exactly_without_options(run, tmp_path, monkeypatch, mode):
    schedule = {"name": "cosine", "warmup_fraction": 0.25, "extension": mode}
    whole = copied(run, tmp_path / "whole")
    go(whole, resume=True, steps=8, schedule=schedule)
    count, original = iter(range(100)), loops.Loop.step

    def killed(loop, batch):
        if next(count) == 3:  # after step 7; no signal, so nothing is saved
            raise KeyError("killed")
        return original(loop, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loops.Loop, "step", killed)
        with pytest.raises(KeyError, match="killed"):
            go(run, resume=True, steps=8, schedule=schedule)
    assert not Run(run).finished
    pretrain.run(out=run, resume=True)
    assert weights(run) == weights(whole)
    assert rates(run) == rates(whole)


def test_fewer_steps_than_were_made_are_one_error(run):
    with pytest.raises(VitcliError) as caught:
        go(run, resume=True, steps=3)
    assert "`--steps 3` is less than the 4 steps" in caught.value.message
    assert Run(run).finished and Run(run).recipe().train.steps == 4  # nothing has changed
    with pytest.raises(VitcliError) as caught:
        go(run, resume=True, steps=None, epochs=0.1)
    assert "`--epochs 0.1` (3 steps)" in caught.value.message


def test_a_finished_run_without_checkpoint_cannot_train_longer(run):
    for path in list_checkpoints(run / "checkpoints"):
        shutil.rmtree(path)
    with pytest.raises(VitcliError, match="has no checkpoint"):
        go(run, resume=True, steps=8)
    assert Run(run).finished


def test_another_budget_counts_the_time_that_was_trained(run, monkeypatch):
    monkeypatch.setattr(Run, "trained_seconds", lambda run: 100.0)
    with pytest.raises(VitcliError, match="is less than the 100 s"):
        go(run, resume=True, steps=None, budget="90s")
    result = go(run, resume=True, steps=None, budget="104s")
    assert result.steps > 4 and Run(run).recipe().train.budget == "104s"


def test_a_resume_needs_no_other_option(here):
    write_tiny(
        here / "tiny.toml", model=SMALL, train={"steps": 4, "checkpoint_steps": 2, "batch_size": 64}
    )
    assert cli.run(["pretrain", "--recipe", "tiny.toml", "--out", "whole"]) == 0
    expected = weights(here / "whole")
    (here / "whole/result.json").unlink()
    shutil.rmtree(list_checkpoints(here / "whole/checkpoints")[-1])
    assert cli.run(["pretrain", "--resume", "whole"]) == 0
    assert weights(here / "whole") == expected
    (here / "whole/result.json").unlink()
    assert cli.run(["pretrain", "--out", "whole", "--resume"]) == 0
    assert weights(here / "whole") == expected
    assert cli.run(["pretrain", "--resume", "whole", "--steps", "6", "--json"]) == 0
    assert json.loads((here / "whole/result.json").read_text())["steps"] == 6


def test_a_run_of_another_command_or_with_other_settings_is_refused(run, capsys):
    assert cli.run(["finetune", "--resume", str(run)]) == 2
    assert f"vitcli pretrain --resume {run}" in capsys.readouterr().err
    assert cli.run(["pretrain", "--resume", str(run), "--lr", "0.5"]) == 2
    assert "these differ: optim.lr" in capsys.readouterr().err


def test_a_recipe_with_a_flipped_bit_is_noticed(run):
    file = Run(run).recipe_file
    text = file.read_text()
    assert is_intact(text)
    file.write_text(text.replace("lr = 0.001", "lr = 0.003"))
    with pytest.raises(VitcliError, match="has changed since vitcli wrote it"):
        reopen_run(run, Run(run).recipe())
    file.write_text("".join(text.splitlines(keepends=True)[:-1]))  # of an earlier version
    assert reopen_run(run, Run(run).recipe()) == Run(run)
