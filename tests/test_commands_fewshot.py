import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitcli.commands import fewshot, predict
from vitcli.data.sources import load_data
from vitcli.data.transforms import Preprocess
from vitcli.errors import VitcliError
from vitcli.evals.features import extract
from vitcli.evals.fewshot import fewshot as accuracy
from vitcli.run import Run
from vitcli.vit import create_model
from vitcli.weights.load import load_model
from vitcli.weights.store import save_model

SETTINGS = {"fewshot": {"shots": [1, 5], "seeds": 2}}


@pytest.fixture
def weights(here):
    """A random little model for the digits, in a file."""
    net = create_model("Pico/2", image_size=8, num_channels=1, depth=1, pool="quadrants")
    net.preprocess = Preprocess(image_size=(8, 8), num_channels=1)
    save_model(here / "w.safetensors", net)
    return "w.safetensors"


def test_the_protocol_on_all_features(weights):
    """Only drawn images are looked at; the figures are those of the whole set's features."""
    result = fewshot.run("builtin:digits", model=weights, settings=SETTINGS)
    model, source = load_model(weights), load_data("builtin:digits")
    train, test = (extract(model, source.splits[s]) for s in ("train", "test"))
    for shots, seeds in result.accuracies.items():
        for seed, found in enumerate(seeds):
            parts = train.outputs, train.labels, test.outputs, test.labels
            assert found == accuracy(*parts, shots=shots, seed=seed)
    pixels = np.stack([np.asarray(source.splits["train"].read(i, "L")) for i in range(1438)])
    tested = np.stack([np.asarray(source.splits["test"].read(i, "L")) for i in range(359)])
    raw = accuracy(pixels.reshape(1438, -1), train.labels, tested.reshape(359, -1), test.labels)
    assert result.raw_pixels[5][0] == pytest.approx(raw, abs=2 / 359)
    facts = result.to_json()
    five = facts["shots"]["5"]
    assert five["l2"] == 1024 and five["accuracy"]["seeds"] == result.accuracies[5]
    assert five["accuracy"]["mean"] == pytest.approx(np.mean(result.accuracies[5]))
    assert (facts["dim"], facts["classes"], facts["test_images"]) == (512, 10, 359)
    assert json.loads(json.dumps(facts)) == facts and result.exit_code == 0


def test_the_classifier_is_a_run_that_predict_takes(weights, here):
    result = fewshot.run(model=weights, settings=SETTINGS)
    assert result.run == "runs/w-fewshot"
    run = Run(Path(result.run))
    assert run.finished and 'command = "fewshot"' in run.recipe_file.read_text()
    model = load_model(result.run)
    assert model.labels == tuple(str(i) for i in range(10)) and model.config.pool == "quadrants"
    test = load_data("builtin:digits").splits["test"]
    logits = extract(model, test, what="logits").outputs
    assert np.mean(logits.argmax(1) == test.labels) == result.accuracies[5][0]
    test.read(0).save("digit.png")
    (row,) = predict.run(["digit.png"])
    assert row["label"] == str(logits[0].argmax()) and 0.1 < row["probability"] < 1
    again = fewshot.run(model=weights, settings=SETTINGS)
    assert again.run == "runs/w-fewshot-2" and again.accuracies == result.accuracies


def test_pooling_can_be_chosen(weights):
    result = fewshot.run(model=weights, settings={**SETTINGS, "model": {"pool": "gap"}})
    assert result.dim == 128 and load_model(result.run).config.pool == "mean"


def test_broken_images_are_left_out(weights, here):
    for split, count in (("train", 3), ("test", 2)):
        for name in ("a", "b"):
            folder = here / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("L", (8, 8), 40 * i + 100 * (name == "a")).save(folder / f"{i}.png")
    (here / "photos/train/a/0.png").write_bytes(b"cut")
    result = fewshot.run("photos", model=weights, settings={"fewshot": {"shots": [3], "seeds": 1}})
    assert result.exit_code == 3 and "0.png" in result.broken[0] and result.test_images == 4


def test_errors(weights, here):
    with pytest.raises(VitcliError, match="no finished run"):
        fewshot.run()
    (here / "there").mkdir()
    (here / "there/file").write_text("")
    with pytest.raises(VitcliError, match="`there` exists already"):
        fewshot.run(model=weights, out=Path("there"))
    with pytest.raises(VitcliError, match=r"fewshot\.shot"):
        fewshot.run(model=weights, settings={"fewshot": {"shot": [5]}})
    assert not (here / "runs").exists()


def test_flowers_with_a_real_model(shared, here):
    """ImageNet features: 82.0 % is what the nearest class mean gives on another draw."""
    weights = shared / "data/weights/vit_tiny_patch16_224_in1k/timm.safetensors"
    settings = {"fewshot": {"shots": [5], "seeds": 1}}
    torch.set_num_threads(2)
    data = str(shared / "data/flower_photos")
    result = fewshot.run(data, model=str(weights), settings=settings)
    assert result.accuracies[5][0] == pytest.approx(0.847, abs=0.02)
    assert result.accuracies[5][0] > result.raw_pixels[5][0] + 0.3
