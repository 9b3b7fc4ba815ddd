"""Abstaining, strangeness and several views, from `predict` and from the command line."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import vitcli
from vitcli.cli.main import run as command_line
from vitcli.commands import predict
from vitcli.errors import VitcliError
from vitcli.evals.predictor import AbstainRules
from vitcli.preprocess import Preprocess
from vitcli.weights.loaded import create_model, model_hash
from vitcli.weights.store import load_weights, save_model

NAMES = ("ant", "bee", "cat")


def make_model(seed=0):
    net = create_model("Pico/8", num_classes=3, image_size=16, depth=1, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(net.network.head.weight, generator=generator)
    net.preprocess = Preprocess(image_size=(16, 16), crop_fraction=0.8)
    net.labels, net.head_trained = NAMES, True
    return net.eval()


@pytest.fixture(autouse=True)
def cache(here, monkeypatch):
    monkeypatch.setenv("VITCLI_CACHE", "cache")


@pytest.fixture
def model(here):
    save_model("m.safetensors", net := make_model())
    return net


@pytest.fixture
def pictures(here):
    """Shaded pictures of three colours as DATA, others of their kind, and noise."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 90, 20, dtype=np.int64)[:, None, None] + np.zeros((20, 20, 3), int)
    for number in range(48):
        label = number % 3
        colour = np.eye(3, dtype=int)[label] * 100 + rng.integers(0, 60, (1, 1, 3))
        folder = here / ("data" if number < 36 else "p")
        folder = folder / NAMES[label] if number < 36 else folder
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (ramp + colour).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (here / "noise").mkdir()
    for number in range(8):
        pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(here / f"noise/{number}.png")
    return here / "p"


def test_abstaining(model, pictures):
    (pictures / "bad.png").write_bytes(b"no image")
    plain = vitcli.predict("p", "m.safetensors")
    middle = sorted(row["probability"] for row in plain if row["error"] is None)[6]
    result = predict.run(["p"], model="m.safetensors", threshold=middle)
    rows = list(result)
    assert result.counts.abstained == 6 and result.counts.count == 13 and result.failed == 1
    for row, before in zip(rows, plain, strict=True):
        below = before["error"] is None and before["probability"] < middle
        assert row["abstained"] is below
        assert row["label"] == (None if below else before["label"])
        assert {k: v for k, v in row.items() if k not in ("label", "abstained")} == {
            k: v for k, v in before.items() if k != "label"
        }
    assert not any("abstained" in row or "ood" in row for row in plain)


def test_no_number_is_no_answer(model, pictures):
    model.network.head.bias.data[:] = torch.nan
    with pytest.raises(VitcliError, match="not finite"):
        list(predict.run(["p"], model=model, threshold=0.0))
    row = {"label": "ant", "probability": float("nan"), "error": None}
    assert AbstainRules(threshold=0.0).apply(row, None, None)["label"] is None


@pytest.mark.parametrize("flag", ["threshold", "ood_threshold"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), 70])
def test_shares_that_are_none(flag, value, model, pictures):
    with pytest.raises(VitcliError, match="--" + flag.replace("_", "-")):
        predict.run(["p"], model=model, **{flag: value})


def test_strangeness(model, pictures, capfd):
    with pytest.raises(VitcliError, match="no OOD reference") as error:
        predict.run(["p"], model="m.safetensors", ood=True)
    assert "--reference" in error.value.hint
    usual = vitcli.predict("p", "m.safetensors", reference="data")
    (kept,) = Path("reference").glob("*.safetensors")
    assert kept.stem == model_hash(model, head=False)[:16]
    time = kept.stat().st_mtime_ns
    noise = vitcli.predict("noise", "m.safetensors", ood=True)
    far = vitcli.predict("noise", "m.safetensors", ood_threshold=0.99, reference="data")
    assert kept.stat().st_mtime_ns == time  # made once
    assert all(row["ood"] == 1.0 and row["label"] for row in noise)
    assert all(row["abstained"] and row["label"] is None for row in far)
    assert np.mean([row["ood"] for row in usual]) < 0.9
    assert max(row["ood_distance"] for row in usual) < min(row["ood_distance"] for row in noise)
    assert list(usual[0]) == [
        *("path", "label", "probability", "top", "error"),
        *("ood", "ood_distance"),
    ]


def test_the_distance_is_that_of_the_plain_view(model, pictures):
    plain = vitcli.predict("p", model, reference="data")
    seen = vitcli.predict("p", model, reference="data", tta="crops:10")
    for one, other in zip(plain, seen, strict=True):
        assert other["ood_distance"] == pytest.approx(one["ood_distance"], rel=1e-4)


def test_other_data_and_other_weights_have_their_own(model, pictures):
    vitcli.predict("p", "m.safetensors", reference="data")
    (kept,) = Path("reference").iterdir()
    before = load_weights(kept)["held_out"].clone()
    (Path("data") / "cat/2.png").unlink()
    vitcli.predict("p", "m.safetensors", reference="data")
    assert not torch.equal(load_weights(kept)["held_out"], before)
    save_model("other.safetensors", make_model(seed=1))
    with pytest.raises(VitcliError, match="no OOD reference"):
        predict.run(["p"], model="other.safetensors", ood=True)
    # Another head does not change the features.
    net = make_model()
    net.network.head.weight.data.add_(1)
    save_model("head.safetensors", net)
    assert vitcli.predict("p", "head.safetensors", ood=True)[0]["ood"] is not None
    kept.write_bytes(b"damaged")
    with pytest.raises(VitcliError, match="not a safetensors file"):
        predict.run(["p"], model="m.safetensors", ood=True)
    vitcli.predict("p", "m.safetensors", reference="data")  # made again
    assert len(load_weights(kept)["held_out"])


def test_pictures_without_classes_are_a_reference(model, pictures):
    rows = vitcli.predict("noise", "m.safetensors", reference="p")
    assert all(row["ood"] is not None for row in rows)


def test_a_run_knows_what_it_learned_from(model, pictures, capfd):
    assert command_line(["fewshot", "data", "-m", "m.safetensors", "--out", "runs/few"]) == 0
    capfd.readouterr()
    assert command_line(["predict", "p", "noise", "-m", "runs/few", "--ood", "--json"]) == 0
    streams = capfd.readouterr()
    rows = [json.loads(line) for line in streams.out.splitlines()]
    assert len(rows) == 20 and all(0 <= row["ood"] <= 1 for row in rows)
    assert "(30 images of data, 6 held out) in runs/few/reference" in streams.err
    Path("data").rename("moved")
    assert command_line(["predict", "p", "-m", "runs/few", "--ood"]) == 0  # what was kept
    for kept in Path("runs/few/reference").iterdir():
        kept.unlink()
    assert command_line(["predict", "p", "-m", "runs/few", "--ood"]) == 2
    assert "give their new path, or other data, with `--reference DATA`" in capfd.readouterr().err


def test_where_the_weights_lie_nothing_may_be_written(model, pictures):
    Path("reference").write_text("in the way")
    vitcli.predict("p", "m.safetensors", reference="data")
    assert len(list(Path("cache/reference").iterdir())) == 1
    assert vitcli.predict("p", "m.safetensors", ood=True)


@pytest.mark.parametrize(("tta", "views"), [("flip", 2), ("crops:5", 5), ("crops:10", 10)])
def test_probabilities_of_several_views_are_averaged(tta, views, model, pictures):
    row = vitcli.predict("p/36.png", "m.safetensors", top=3, tta=tta)[0]
    with Image.open("p/36.png") as picture:
        large = picture.convert("RGB")
    pixels = torch.from_numpy(np.array(large)).permute(2, 0, 1)  # 20 x 20: resized to itself
    places = [(2, 2), (0, 0), (0, 4), (4, 0), (4, 4)][: 5 if "crops" in tta else 1]
    shown = [pixels[:, y : y + 16, x : x + 16] for y, x in places]
    shown += [] if tta == "crops:5" else [x.flip(-1) for x in shown]
    with torch.no_grad():
        shares = model(model.preprocess.normalize(torch.stack(shown))).softmax(dim=1).mean(dim=0)
    assert len(shown) == views
    for one in row["top"]:
        assert one["probability"] == pytest.approx(
            float(shares[NAMES.index(one["label"])]), abs=1e-6
        )


def test_the_command_line(model, pictures, capfd):
    Path("list").write_text("p/36.png\nnone.png\nnoise/1.png\n")
    line = "predict --from list -m m.safetensors --reference data --ood-threshold 0.99 --tta flip"
    tables = "--csv t.csv --jsonl t.jsonl --parquet t.parquet"
    assert command_line([*line.split(), *tables.split(), "--threshold", "0"]) == 3
    out, err = capfd.readouterr()
    assert "no label; best classes:" in out and "OOD score 1.000" in out
    assert "no label for 1 of 3 images (33.3 %)" in err and "none.png" in err
    assert "6 held-out images are too few for `--ood-threshold 0.99`" in err
    assert "one in 7 in-distribution images" in err
    rows = [json.loads(row) for row in Path("t.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == ["p/36.png", "none.png", "noise/1.png"]
    assert [row["abstained"] for row in rows] == [False, False, True]
    assert rows[1]["ood"] is None and rows[1]["error"]
    assert pq.read_table("t.parquet").to_pylist() == rows
    with Path("t.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert [cell["abstained"] for cell in cells] == ["false", "false", "true"]
    assert [cell["ood"] for cell in cells] == [str(rows[0]["ood"]), "", "1.0"]
    assert command_line(["predict", "-m", "m.safetensors"]) == 2
    assert "--from FILE" in capfd.readouterr().err
    assert command_line(["predict", "p", "-m", "m.safetensors", "--tta", "crops:7"]) == 2
    assert "crops:10" in capfd.readouterr().err
    assert command_line(["predict", "p", "-m", "m.safetensors", "--reference", "nowhere"]) == 2


def test_hash_of_a_model(model):
    same, head = make_model(), make_model()
    head.network.head.weight.data.add_(1)
    assert model_hash(same) == model_hash(model) != model_hash(head)
    assert model_hash(head, head=False) == model_hash(model, head=False)
    block = make_model()
    block.network.blocks[0].mlp.fc1.bias.data[0] = 1
    assert model_hash(block, head=False) != model_hash(model, head=False)
    block = make_model()
    block.preprocess = Preprocess(image_size=(16, 16))
    assert model_hash(block, head=False) != model_hash(model, head=False)
    block = make_model()
    block.head_activation = "sigmoid"
    assert model_hash(block) != model_hash(model)
