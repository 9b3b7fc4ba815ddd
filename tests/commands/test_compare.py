"""Runs beside each other."""

import json

import numpy as np
import pytest
from support.tiny import train_tiny
from support.watching import Told

from vitcli.cli import main as exits
from vitcli.commands import compare
from vitcli.errors import VitcliError
from vitcli.evals.comparison import PairedAccuracy
from vitcli.weights.load import load_model


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")

    def go(name, **sections):
        train_tiny(folder / name, **sections)
        return folder / name

    return {
        "one": go("one"),
        "two": go("two", train={"seed": 1}),
        "long": go("long", train={"steps": 40}, optim={"lr": 2e-3}),
        "other": go("other", data={"folds": 4, "fold": 1}),
        "unlabelled": go("unlabelled", objective={"name": "masked_patch"}),
    }


def test_settings_results_and_a_paired_test(runs):
    found = compare.run([runs["one"], runs["long"]])
    assert found.settings == {"optim.lr": [1e-3, 2e-3], "train.steps": [8, 40]}
    a, b = found.results["accuracy"]
    (pair,) = found.paired
    assert isinstance(pair, PairedAccuracy)
    assert pair.difference == pytest.approx(b - a) and pair.images == 359
    assert found.results["images"] == [8 * 32, 40 * 32]  # in training; those of the test:
    assert found.results["test_images"] == [359, 359]
    assert pair.low > 0 and pair.p_value < 1e-6  # 40 steps are better than 8
    assert not found.seeds


def test_the_outcomes_are_those_of_the_weights(runs):
    from safetensors.numpy import load_file

    from vitcli.data.source import load_data
    from vitcli.evals.features import extract

    kept = load_file(runs["one"] / "outcomes.safetensors")
    images = load_data("builtin:digits").splits["test"]
    net = load_model(runs["one"])
    found = extract(net, images, output="logits")
    np.testing.assert_array_equal(kept["index"], found.indices)
    np.testing.assert_array_equal(kept["label"], found.labels)
    np.testing.assert_array_equal(kept["predicted"], found.outputs.argmax(axis=1))


def test_seeds_are_repetitions(runs):
    found = compare.run([runs["one"], runs["two"]])
    values = found.results["accuracy"]
    assert found.seeds["accuracy"] == pytest.approx((np.mean(values), np.std(values, ddof=1)))


def test_what_cannot_be_paired_says_why(runs):
    found = compare.run([runs["one"], runs["other"], runs["unlabelled"]])
    assert (
        "another split" in found.paired[0] and "no predictions of single images" in found.paired[1]
    )
    assert found.results["accuracy"][2] is None


def test_the_command(runs, capsys):
    names = [str(runs["one"]), str(runs["two"])]
    assert exits.run(["compare", *names, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["runs"] == names and said["settings"] == {"train.seed": [0, 1]}
    assert {"difference", "low", "high", "p_value", "run", "against"} <= set(said["paired"][0])
    assert exits.run(["compare", *names]) == 0
    shown = capsys.readouterr().out
    assert "settings that differ" in shown and "McNemar's p" in shown and "2 seeds" in shown


def test_mistakes(runs, tmp_path):
    with pytest.raises(VitcliError, match="at least two runs"):
        compare.run([runs["one"]])
    with pytest.raises(VitcliError, match="is not a run"):
        compare.run([runs["one"], tmp_path])


def test_folders_that_are_not_runs_are_left_out_with_a_note(runs, tmp_path):
    told = Told()
    found = compare.run([runs["one"], tmp_path, runs["two"]], told)
    assert found.runs == (str(runs["one"]), str(runs["two"]))
    assert any(tmp_path.name in line and "not runs" in line for line in told.lines)


def test_a_few_shot_run_is_named_as_such(runs, tmp_path):
    folder = tmp_path / "few"
    folder.mkdir()
    (folder / "recipe.toml").write_text('command = "fewshot"\n[fewshot]\nshots = [5]\n')
    (folder / "result.json").write_text("{}")
    with pytest.raises(VitcliError, match="belongs to a few-shot run") as caught:
        compare.run([runs["one"], folder])
    assert "`pretrain` or `finetune`" in caught.value.hint
