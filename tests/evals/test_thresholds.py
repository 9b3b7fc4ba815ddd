"""A threshold per class: the best on the images of the fit, stored, and used by `predict`."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import f1_score, precision_score, recall_score

from vitcli.commands import evaluate, export, predict
from vitcli.errors import VitcliError
from vitcli.evals.thresholds import ThresholdRule, fit_threshold
from vitcli.preprocess import Preprocess
from vitcli.progress import Quiet
from vitcli.weights.load import load_model
from vitcli.weights.loaded import create_model, model_hash
from vitcli.weights.store import read_header, save_model, update_header

CHANNELS = ("red", "green", "blue")


def drawn(seed, ties=False):
    rng = np.random.default_rng(seed)
    y = (rng.random(80) < 0.25).astype(np.uint8)
    p = 1 / (1 + np.exp(-(rng.normal(size=80) + 1.5 * y - 2)))
    return (np.round(p, 1) if ties else p), y


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_no_other_threshold_is_better(seed, ties):
    p, y = drawn(seed, ties)
    grid = np.concatenate([[0.0], p, p + 1e-9, [1.0]])
    at = fit_threshold(p, y, ThresholdRule("f1"))
    best = max(f1_score(y, p >= t, zero_division=0) for t in grid)
    assert f1_score(y, p >= at) == pytest.approx(best)
    at = fit_threshold(p, y, ThresholdRule("recall", 0.9))
    assert recall_score(y, p >= at) >= 0.9
    assert all(recall_score(y, p >= t) < 0.9 for t in p[p > at + 1e-9] + 1e-9)
    at = fit_threshold(p, y, ThresholdRule("precision", 0.5))
    assert precision_score(y, p >= at) >= 0.5
    assert all(precision_score(y, p >= t) < 0.5 for t in p[p < at])
    assert at not in p or ties  # between two scores


def test_what_no_threshold_reaches():
    p, y = np.array([0.9, 0.8, 0.1]), np.array([0, 1, 0])
    assert fit_threshold(p, y, ThresholdRule("precision", 0.9)) is None
    assert fit_threshold(p, np.zeros(3), ThresholdRule("f1")) is None


@pytest.mark.parametrize("text", ["f2", "f1=0.5", "recall", "recall=0", "recall=1.2", "recall=x"])
def test_a_rule_that_is_none(text):
    with pytest.raises(VitcliError, match="`--thresholds` is") as caught:
        ThresholdRule.parse(text)
    assert "recall=0.95" in caught.value.hint


def noisy_channels(folder, n, seed):
    """Images whose labels are the bright channels, with noise; the rows of a table."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(n):
        on = rng.random(3) < (0.5, 0.3, 0.2)
        pixels = np.clip(np.where(on, 150, 100) + rng.normal(0, 30, 3), 0, 255)
        Image.fromarray(np.broadcast_to(pixels, (8, 8, 3)).astype(np.uint8)).save(
            folder / f"{seed}-{i}.png"
        )
        names = ";".join(name for name, yes in zip(CHANNELS, on, strict=True) if yes)
        rows.append((f"{seed}-{i}.png", names))
    return rows


@pytest.fixture
def channels(here):
    """`several.csv` with validation and test images, and a model whose 0.5 is a bad threshold."""
    folder = here / "several"
    folder.mkdir()
    parts = {"train": 6, "validation": 120, "test": 90}
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        for seed, (split, n) in enumerate(parts.items()):
            writer.writerows([*row, split] for row in noisy_channels(folder, n, seed))
    net = create_model("Pico/8", image_size=8, num_classes=3, pool="mean", depth=1, position="none")
    net.preprocess, net.labels, net.head_trained = Preprocess(image_size=(8, 8)), CHANNELS, True
    net.head_activation = "sigmoid"
    colours = torch.rand(64, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        x = net.features(colours[:, :, None, None].expand(-1, -1, 8, 8))
        one = torch.cat([x, torch.ones(64, 1)], dim=1)
        solution = torch.linalg.lstsq(one, colours * 6 - 4).solution
        net.network.head.weight.copy_(solution[:-1].T)
        net.network.head.bias.copy_(solution[-1])
    save_model("m.safetensors", net)
    return "several/labels.csv"


def test_thresholds_are_fitted_on_other_images_stored_and_used(channels, here):
    before = evaluate.run(channels, model="m.safetensors")
    assert "threshold" not in before.per_class["red"] and before.split == "test"
    result = evaluate.run(channels, model="m.safetensors", thresholds="f1")
    done = result.thresholds
    assert (done.split, done.images, done.rule) == ("the validation images", 120, "f1")
    assert (result.split, result.metrics.images) == ("test", 90)
    assert done.micro_f1_before == pytest.approx(before.metrics.micro_f1)
    assert done.macro_f1_before == pytest.approx(before.averages.values["macro_f1"])
    assert result.averages.values["macro_f1"] > done.macro_f1_before + 0.1
    assert result.metrics.map == before.metrics.map
    facts = result.to_json()
    assert json.loads(json.dumps(facts)) == facts and facts["thresholds"]["stored"] == done.stored
    # Against scikit-learn, on the validation images alone.
    net = load_model("m.safetensors")
    assert read_header("m.safetensors")["thresholds_fitted_on"]["split"] == "validation"
    with Path(channels).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "validation"]
    with torch.no_grad():
        images = torch.stack([net.preprocess(f"several/{row['path']}") for row in rows])
        p = net.probabilities(net(images)).numpy()
    for k, name in enumerate(CHANNELS):
        y = np.array([name in row["label"] for row in rows])
        best = max(f1_score(y, p[:, k] >= t) for t in p[:, k])
        assert f1_score(y, p[:, k] >= net.thresholds[k]) == pytest.approx(best)
        assert result.per_class[name]["threshold"] == net.thresholds[k] < 0.5
    again = evaluate.run(channels, model="m.safetensors")
    assert again.metrics.micro_f1 == result.metrics.micro_f1 and again.thresholds is None


def test_predict_gives_the_labels_above_their_threshold(channels, here):
    image = "several/2-0.png"
    (plain,) = predict.predict(image, model="m.safetensors")
    assert "labels" not in plain
    unchanged = model_hash(load_model("m.safetensors"))
    update_header("m.safetensors", {"thresholds": [0.0, 1.0, 0.0]})
    assert model_hash(load_model("m.safetensors")) != unchanged
    rows = list(
        predict.run(
            [image, "several/labels.csv"],
            model="m.safetensors",
            csv_file=Path("p.csv"),
            parquet_file=Path("p.parquet"),
        )
    )
    assert rows[0]["labels"] == ["red", "blue"] and rows[0]["label"] == plain["label"]
    assert rows[1]["labels"] is None and rows[1]["error"]
    with Path("p.csv").open(newline="") as file:
        assert json.loads(next(csv.DictReader(file))["labels"]) == ["red", "blue"]
    import pyarrow.parquet as pq

    assert pq.read_table("p.parquet")["labels"].to_pylist() == [["red", "blue"], None]


def test_a_new_temperature_moves_the_thresholds(channels, here):
    first = evaluate.run(channels, model="m.safetensors", thresholds="recall=0.9")
    second = evaluate.run(channels, model="m.safetensors", calibrate=True)
    assert second.temperature != 1.0
    assert second.metrics.micro_f1 == first.metrics.micro_f1  # the decisions are the same
    assert second.per_class["red"]["threshold"] != first.per_class["red"]["threshold"]
    notes = export.run("timm", model="m.safetensors", out=Path("out")).notes
    assert any("thresholds of the classes are left out" in line for line in notes)


def test_reporting_the_images_of_the_fit_is_told(channels, here):
    watch = type("Warnings", (Quiet,), {"warn": lambda self, line: lines.append(line)})()
    lines = []
    table = Path(channels)
    kept = [line for line in table.read_text().splitlines() if "validation" not in line]
    table.write_text("\n".join(kept) + "\n")
    result = evaluate.run(channels, model="m.safetensors", thresholds="f1", watch=watch)
    assert result.thresholds.split == "half of the test images, drawn with seed 0"
    assert result.thresholds.images + result.metrics.images == 90
    assert not [line for line in lines if "of these images" in line]
    evaluate.run(channels, model="m.safetensors", watch=watch)
    assert "`--thresholds` reports only the others" in lines[-1]


def test_images_with_one_label_are_refused(channels, here):
    for name in CHANNELS:
        (here / "one/test" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(here / "one/test" / name / "0.png")
    with pytest.raises(VitcliError, match="`--thresholds` needs multi-label images"):
        evaluate.run("one", model="m.safetensors", thresholds="f1")
    update_header("m.safetensors", {"thresholds": [0.5, 2.0, 0.5]})
    with pytest.raises(VitcliError, match=r"header of `m\.safetensors` is invalid"):
        load_model("m.safetensors")
