"""Several models in one table."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.colours import COLOURS, noisy_colours

from vitcli.cli.main import run as vitcli
from vitcli.commands import evaluate
from vitcli.evals.comparison import compare_models, compare_paired
from vitcli.weights.load import load_model
from vitcli.weights.store import save_model


@pytest.fixture
def noisy(here):
    return noisy_colours()


def test_several_models_beside_each_other(noisy, here, capsys):
    net = load_model("m.safetensors")
    with torch.no_grad():
        net.network.head.bias[0] += 8
    save_model("other.safetensors", net)
    words = ["evaluate", noisy, "--model", "m.safetensors", "-m", "other.safetensors"]
    assert vitcli([*words, "--json", "--out", "both"]) == 0
    facts = json.loads(capsys.readouterr().out)
    one = evaluate.run(noisy, model="m.safetensors", out=Path("both/m"))
    two = evaluate.run(noisy, model="other.safetensors", out=Path("both/other"))
    assert two.metrics.top1 - one.metrics.top1 == pytest.approx(facts["paired"][0]["difference"])
    assert facts["models"] == [one.to_json(), two.to_json()]
    pair = compare_paired(one.details.correct, two.details.correct)
    assert facts["paired"][0]["difference"] == pair.difference
    assert facts["paired"][0]["p_value"] == pair.p_value
    assert facts["paired"][0]["against"] == "m.safetensors"
    assert vitcli(words) == 0
    shown = capsys.readouterr().out
    assert "other.safetensors compared with m.safetensors" in shown and "McNemar" in shown
    assert Path("runs/evaluate/other/confusion.csv").is_file()


def test_models_on_other_images_are_not_paired(noisy, here):
    for name, colour in COLOURS.items():
        (here / "few/test" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(here / "few/test" / name / "0.png")
    one, two = (evaluate.run(data, model="m.safetensors") for data in (noisy, "few"))
    assert compare_models(noisy, [one, two]).paired == ("measured on other images",)
