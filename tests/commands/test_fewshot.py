import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitcli.commands import fewshot, predict
from vitcli.data.source import load_data
from vitcli.errors import VitcliError
from vitcli.evals.features import extract
from vitcli.evals.fewshot.protocol import fewshot as accuracy
from vitcli.preprocess import Preprocess
from vitcli.run import Run
from vitcli.weights.load import load_model
from vitcli.weights.loaded import create_model
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
    assert json.loads(json.dumps(facts)) == facts and result.broken == ()


def test_the_classifier_is_a_run_that_predict_takes(weights, here):
    result = fewshot.run(model=weights, settings=SETTINGS)
    assert result.run == "runs/w-fewshot"
    run = Run(Path(result.run))
    assert run.finished and 'command = "fewshot"' in run.recipe_file.read_text()
    model = load_model(result.run)
    assert model.labels == tuple(str(i) for i in range(10)) and model.config.pool == "quadrants"
    test = load_data("builtin:digits").splits["test"]
    logits = extract(model, test, output="logits").outputs
    assert np.mean(logits.argmax(1) == test.labels) == result.accuracies[5][0]
    test.read(0).save("digit.png")
    (row,) = predict.run(["digit.png"])
    assert row["label"] == str(logits[0].argmax()) and 0.1 < row["probability"] < 1
    again = fewshot.run(model=weights, settings=SETTINGS)
    assert again.run == "runs/w-fewshot-2" and again.accuracies == result.accuracies


def test_a_run_appears_with_all_its_files(weights, here, monkeypatch):
    """A command that is killed while it writes leaves no run, so it can be repeated."""

    def finish(run, result):
        assert not (here / "out").exists()
        finished(run, result)

    finished = Run.finish
    monkeypatch.setattr(Run, "finish", finish)
    (here / ".out.0123456789ab.tmp").mkdir()
    fewshot.run(model=weights, settings={"fewshot": {"shots": [1], "seeds": 1}}, out=here / "out")
    assert Run(here / "out").finished
    assert {path.name for path in here.iterdir()} == {"out", weights}


def test_pooling_can_be_chosen(weights):
    result = fewshot.run(model=weights, settings={**SETTINGS, "model": {"pool": "gap"}})
    assert result.dim == 128 and load_model(result.run).config.pool == "mean"


@pytest.mark.parametrize("method", ["ridge", "logistic", "mean"])
@pytest.mark.parametrize("name", ["cls", "layer:1", "concat:2"])
def test_a_classifier_on_any_representation_is_kept(method, name, here):
    net = create_model("Pico/4", image_size=8, num_channels=1, depth=2, representation_size=6)
    net.preprocess = Preprocess(image_size=(8, 8), num_channels=1)
    save_model(here / "w.safetensors", net)
    section = {"method": method, "shots": [3, 20], "seeds": 1, "representation": name}
    result = fewshot.run(model="w.safetensors", settings={"fewshot": section})
    assert result.dim == {"cls": 128, "layer:1": 128, "concat:2": 256}[name]
    model, test = load_model(result.run), load_data("builtin:digits").splits["test"]
    logits = extract(model, test, output="logits").outputs
    assert np.mean(logits.argmax(1) == test.labels) == result.accuracies[20][0] > 0.3
    test.read(0).save("digit.png")
    (row,) = predict.run(["digit.png"], model=result.run)
    assert row["label"] == str(logits[0].argmax()) and 0.1 < row["probability"] < 1


def test_neighbours_are_measured_and_not_kept(weights):
    from sklearn.neighbors import KNeighborsClassifier

    section = {"method": "knn", "shots": [2, "all"], "seeds": 2}
    result = fewshot.run(model=weights, settings={"fewshot": section})
    facts = result.to_json()
    assert (result.run, facts["run"], facts["method"]) == (None, None, "knn")
    assert len(facts["shots"]["all"]["accuracy"]["seeds"]) == 1 and not Path("runs").exists()
    model, source = load_model(weights), load_data("builtin:digits")
    train, test = (extract(model, source.splits[s]) for s in ("train", "test"))
    theirs = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    theirs.fit(train.outputs, train.labels)
    expected = theirs.score(test.outputs, test.labels)
    assert facts["shots"]["all"]["accuracy"]["mean"] == pytest.approx(expected, abs=1.5 / 359)


def test_strengths_are_chosen_without_the_test_images(weights, here):
    section = {"shots": [1, 4], "seeds": 2, "l2": "path"}
    result = fewshot.run(model=weights, settings={"fewshot": section})
    four = result.to_json()["shots"]["4"]
    path = four["path"]
    assert len(path["l2"]) == len(path["accuracy"]) == 20 and path["left_out_images"] == [40, 40]
    for seed, l2 in enumerate(four["l2"]):
        at = path["l2"].index(l2)
        assert four["accuracy"]["seeds"][seed] == path["accuracy"][at]["seeds"][seed]
        section = {"shots": [4], "seeds": 2, "l2": l2}
        plain = fewshot.run(model=weights, settings={"fewshot": section})
        assert plain.accuracies[4][seed] == four["accuracy"]["seeds"][seed]
    one = result.to_json()["shots"]["1"]
    assert one["l2"] == [1024, 1024] and one["path"]["left_out_accuracy"] == [None, None]
    auto = fewshot.run(model=weights, settings={"fewshot": {**section, "seeds": 2, "l2": "auto"}})
    facts = auto.to_json()["shots"]["4"]
    assert facts["l2"] == four["l2"] and facts["path"]["accuracy"] == []
    assert facts["path"]["left_out_accuracy"] == path["left_out_accuracy"]


def test_features_are_computed_once(weights, here, monkeypatch):
    monkeypatch.setenv("VITCLI_CACHE", str(here / "cache"))
    first = fewshot.run(model=weights, settings=SETTINGS)

    def fail(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr("vitcli.evals.feature_cache.extract_batches", fail)
    again = fewshot.run(model=weights, settings=SETTINGS)
    assert (again.accuracies, again.raw_pixels) == (first.accuracies, first.raw_pixels)
    mean = {"fewshot": {"method": "mean", "shots": [1, 5], "seeds": 2}}
    assert set(fewshot.run(model=weights, settings=mean).accuracies) == {1, 5}
    with pytest.raises(AssertionError, match="computed again"):
        fewshot.run(model=weights, settings={"fewshot": {"shots": [5], "seeds": 5}})


def test_broken_images_are_left_out(weights, here):
    for split, count in (("train", 3), ("test", 2)):
        for name in ("a", "b"):
            folder = here / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("L", (8, 8), 40 * i + 100 * (name == "a")).save(folder / f"{i}.png")
    (here / "photos/train/a/0.png").write_bytes(b"cut")
    result = fewshot.run("photos", model=weights, settings={"fewshot": {"shots": [3], "seeds": 1}})
    assert len(result.broken) == 1 and "0.png" in result.broken[0] and result.test_images == 4


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


@pytest.mark.slow
def test_flowers_with_a_real_model(shared, here):
    """ImageNet features: 82.0 % is what the nearest class mean gives on another draw."""
    weights = shared / "data/weights/vit_tiny_patch16_224_in1k/timm.safetensors"
    settings = {"fewshot": {"shots": [5], "seeds": 1}}
    torch.set_num_threads(2)
    data = str(shared / "data/flower_photos")
    result = fewshot.run(data, model=str(weights), settings=settings)
    assert result.accuracies[5][0] == pytest.approx(0.847, abs=0.02)
    assert result.accuracies[5][0] > result.raw_pixels[5][0] + 0.3
    section = {"method": "mean", "shots": [5], "seeds": 1}
    result = fewshot.run(data, model=str(weights), settings={"fewshot": section})
    assert result.accuracies[5][0] == pytest.approx(0.82, abs=0.04)


@pytest.mark.slow
def test_a_linear_probe_of_a_real_model(shared, here):
    """The data's README gives 93.6 %, from a larger training set."""
    weights = shared / "data/weights/vit_tiny_patch16_224_in1k/timm.safetensors"
    section = {"method": "logistic", "shots": ["all"]}
    torch.set_num_threads(2)
    data = str(shared / "data/flower_photos")
    result = fewshot.run(data, model=str(weights), settings={"fewshot": section})
    assert result.accuracies["all"][0] == pytest.approx(0.936, abs=0.03)
