"""Regression from a table to predictions: training, resume, evaluation, exports, refusals."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from support.tiny import records, train_recipe, train_tiny, weights
from support.tiny import tiny_recipe as recipe_of
from typer.testing import CliRunner

import vitcli
from vitcli.cli.app import app
from vitcli.commands import check, compare, evaluate, export, finetune, plan, predict
from vitcli.errors import VitcliError
from vitcli.weights.load import load_model
from vitcli.weights.store import read_header

SIZE = 8
UNIT = {"name": "mse"}
PLAIN = {"crop": "none", "flip_rate": 0.0}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Images of one brightness each, and their brightness in a unit with a mean far from 0."""
    folder = tmp_path_factory.mktemp("bright")
    rng = np.random.default_rng(0)
    with open(folder / "t.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "lux", "split"])
        for i in range(60):
            level = rng.integers(0, 256)
            pixels = np.clip(level + rng.normal(0, 5, (SIZE, SIZE)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            writer.writerow([f"{i}.png", 1000 + level / 8, "train" if i < 40 else "test"])
    return folder / "t.csv"


def rows_of(table):
    """(absolute path, number, split) of each row."""
    lines = table.read_text().splitlines()[1:]
    return [(f"{table.parent}/{path}", float(lux), split) for path, lux, split in csv.reader(lines)]


def write_rows(file, rows):
    lines = [f"{path},{lux!r},{split}" for path, lux, split in rows]
    file.write_text("\n".join(["path,lux,split", *lines]) + "\n")
    return file


def settings(table, **train):
    return {
        "data": {"name": str(table)},
        "objective": UNIT,
        "augment": PLAIN,
        "model": {"num_channels": 1, "class_token": True, "pool": "token"},
        "train": {"steps": 8, **train},
    }


@pytest.fixture(scope="module")
def run(table, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "a"
    result = train_tiny(out, **settings(table, steps=30, eval_steps=15))
    return out, result


def test_the_weights_know_the_name_and_the_scale(table, run):
    header = read_header(run[0] / "model.safetensors")
    train = np.array([lux for _, lux, split in rows_of(table) if split == "train"])
    assert header["labels"] == ["lux"] and header["activation"] == "identity"
    assert header["target"] == pytest.approx({"mean": train.mean(), "std": train.std()})
    assert header["format"] == 2  # versions that know no regression must refuse it


def test_training_reports_the_errors_of_scikit_learn(run):
    out, result = run
    found = {k: v.numpy() for k, v in load_file(out / "outcomes.safetensors").items()}
    targets, predicted = found["target"], found["predicted"]
    figures = result.figures
    assert figures["split"] == "test" and figures["images"] == 20
    assert figures["mae"] == pytest.approx(mean_absolute_error(targets, predicted))
    assert figures["rmse"] == pytest.approx(root_mean_squared_error(targets, predicted))
    assert figures["r2"] == pytest.approx(r2_score(targets, predicted))
    assert figures["r2"] > 0.2
    low, high = figures["intervals"]["mae"]
    assert low < figures["mae"] < high
    logged = [record for record in records(out) if "test/mae" in record]
    assert [record["step"] for record in logged] == [15, 30]
    assert all("train/mae" in r for r in records(out) if "train/loss" in r)


@pytest.mark.parametrize(("metric", "best"), [("mae", min), ("rmse", min), ("r2", max)])
def test_the_best_weights_are_those_of_the_best_error(table, tmp_path, metric, best):
    changes = settings(table, steps=6, eval_steps=2, best_metric=metric)
    changes["data"]["validation_fraction"] = 0.25
    result = train_tiny(tmp_path / "a", **changes)
    name = f"validation/{metric}"
    values = {r["step"]: r[name] for r in records(tmp_path / "a") if name in r}
    assert result.best["value"] == best(values.values()) == values[result.best["step"]]


def test_accuracy_cannot_choose_the_weights_of_a_regression(table, tmp_path):
    changes = settings(table, eval_steps=2, best_metric="accuracy")
    changes["data"]["validation_fraction"] = 0.25
    with pytest.raises(VitcliError, match="an evaluation of this run has loss, mae, rmse, r2"):
        train_tiny(tmp_path / "a", **changes)


def test_evaluate_predict_and_python_agree(table, run, here):
    out, result = run
    found = evaluate.run(str(table), model=str(out)).to_json()
    assert found["split"] == "test" and found["target"] == "lux"
    for name in ("mae", "rmse", "r2"):
        assert found[name] == pytest.approx(result.figures[name], rel=1e-6)
        assert found["intervals"][name] == pytest.approx(result.figures["intervals"][name])
    assert (here / found["scatter"]).is_file()
    worst = found["worst"][0]
    image = str(table.parent / worst["path"].rpartition("/")[2])
    (row,) = vitcli.predict(image, model=str(out))
    assert list(row) == ["path", "value", "error"] and row["error"] is None
    assert row["value"] == pytest.approx(worst["value"], abs=1e-4)
    model = vitcli.load_model(str(out))
    with torch.inference_mode():
        number = model(model.preprocess(image)[None])
    assert number.shape == (1, 1) and float(number) == pytest.approx(row["value"], abs=1e-3)
    assert abs(worst["target"] - worst["value"]) == pytest.approx(
        max(abs(one["target"] - one["value"]) for one in found["worst"])
    )


def test_predict_writes_one_number_per_row(table, run, here):
    (here / "broken.png").write_bytes(b"no image")
    shutil.copy(table.parent / "1.png", here / "a.png")
    flags = ["--model", str(run[0]), "--csv", "p.csv", "--parquet", "p.parquet", "--tta", "flip"]
    shown = CliRunner().invoke(app, ["predict", "a.png", "broken.png", "--json", *flags])
    assert shown.exit_code == 3
    first, second = [json.loads(line) for line in shown.stdout.splitlines()]
    assert set(first) == {"path", "value", "error"} and second["value"] is None
    with open("p.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "value", "error"]
    assert float(rows[0]["value"]) == first["value"] and rows[1]["value"] == ""
    import pyarrow.parquet as pq

    assert pq.read_table("p.parquet").to_pylist()[0]["value"] == first["value"]
    plain = CliRunner().invoke(app, ["predict", "a.png", "--model", str(run[0])])
    assert plain.exit_code == 0 and f"{first['value']:.4g}"[:3] in plain.stdout


def test_the_views_of_tta_are_averaged_as_numbers(table, run):
    image = Image.open(table.parent / "1.png").resize((16, 8))
    image = Image.fromarray(np.tile(np.arange(8, dtype=np.uint8) * 30, (8, 1)))
    flipped = Image.fromarray(np.asarray(image)[:, ::-1])
    model = load_model(run[0])
    one, other = (predict.predict(x, model=model)[0]["value"] for x in (image, flipped))
    (both,) = predict.predict(image, model=model, tta="flip")
    assert both["value"] == pytest.approx((one + other) / 2, rel=1e-9)


@pytest.mark.parametrize("flags", [["--threshold", "0.5"], ["--ood"], ["--ood-threshold", "0.9"]])
def test_predict_refuses_what_needs_classes(table, run, flags):
    image = str(table.parent / "1.png")
    shown = CliRunner().invoke(app, ["predict", image, "--model", str(run[0]), *flags])
    assert isinstance(shown.exception, VitcliError)
    assert "predicts a number (regression)" in str(shown.exception)


@pytest.mark.parametrize("options", [{"calibrate": True}, {"class_map": "map.json"}])
def test_evaluate_refuses_what_needs_classes(table, run, here, options):
    if "class_map" in options:
        (here / "map.json").write_text('{"a": "b"}')
        options = {"class_map": here / "map.json"}
    with pytest.raises(VitcliError, match=r"needs classes.*predicts a number"):
        evaluate.run(str(table), model=str(run[0]), **options)


def test_a_resumed_run_has_the_same_bits(table, tmp_path):
    whole = train_tiny(tmp_path / "whole", **settings(table, checkpoint_steps=2))
    half = train_tiny(tmp_path / "half", **settings(table, checkpoint_steps=2))
    out = tmp_path / "half"
    for step in (6, 8):
        shutil.rmtree(out / f"checkpoints/step_{step:06d}", ignore_errors=True)
    shutil.copytree(tmp_path / "whole/checkpoints", tmp_path / "kept")
    (out / "result.json").unlink()
    assert half.figures == whole.figures
    recipe = recipe_of(**settings(table, checkpoint_steps=2))
    again = train_recipe(out, recipe, resume=True)
    assert weights(out) == weights(tmp_path / "whole")
    assert again.figures == whole.figures


def test_finetune_compare_and_several_models(table, run, here):
    # `evaluate` computes in fp32, and `auto` would train in bf16 where that is faster.
    train = {"steps": 2, "batch_size": 8, "precision": "fp32"}
    common = {"objective": UNIT, "augment": PLAIN, "train": train}
    for name, seed in (("b", 0), ("c", 1)):
        train = {**common["train"], "seed": seed}
        finetune.run(
            str(table), model=str(run[0]), settings={**common, "train": train}, out=here / name
        )
    found = compare.run([here / "b", here / "c"]).to_json()
    assert found["paired"][0]["metric"] == "mae"
    assert found["results"]["mae"] == pytest.approx(
        [json.loads((here / n / "result.json").read_text())["figures"]["mae"] for n in "bc"]
    )
    both = evaluate.run(str(table), model=[str(here / "b"), str(here / "c")])
    pair = both.to_json()["paired"][0]
    assert pair["difference"] == pytest.approx(found["paired"][0]["difference"], abs=1e-6)
    assert pair["low"] <= pair["difference"] <= pair["high"]
    shown = CliRunner().invoke(app, ["compare", str(here / "b"), str(here / "c")])
    assert "difference of MAE" in shown.stdout


@pytest.mark.parametrize(
    "to", ["timm", "huggingface", pytest.param("onnx", marks=pytest.mark.slow)]
)
def test_exports_give_the_number_in_its_unit(table, run, here, to):
    out = {"onnx": here / "m.onnx"}.get(to, here / to)
    done = export.run(to, model=str(run[0]), out=out)
    assert done.compared == "values" and any("lux" in note for note in done.notes)
    model = load_model(run[0])
    pixels = model.preprocess(table.parent / "1.png")[None]
    expected = float(model(pixels).detach())
    if to == "timm":
        timm = pytest.importorskip("timm")
        theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        found = float(theirs(pixels).detach())
        assert json.loads((out / "config.json").read_text())["label_names"] == ["lux"]
    elif to == "huggingface":
        from transformers import AutoModelForImageClassification

        theirs = AutoModelForImageClassification.from_pretrained(out).eval()
        found = float(theirs(pixels).logits.detach())
        assert theirs.config.problem_type == "regression" and theirs.config.id2label == {0: "lux"}
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(out)
        (values,) = session.run(["values"], {"images": pixels.numpy()})
        found = float(values[0, 0])
    assert found == pytest.approx(expected, rel=1e-5)
    if to != "onnx":  # read back it is a regression again
        (row,) = predict.predict(str(table.parent / "1.png"), model=str(out))
        assert row["value"] == pytest.approx(expected, rel=1e-5)


def test_plan_with_and_without_data(table):
    model = [f"model.{k}={v}" for k, v in recipe_of().model.model_dump(exclude_none=True).items()]
    from vitcli.config.recipe import parse_overrides

    given = parse_overrides([*model, "objective.name=mse"])
    for data in (str(table), None):
        found = plan.run(
            "pretrain",
            data,
            settings=given,
            images=40 if data is None else None,
            probing=False,
            compare=False,
        )
        assert found.planned.config.num_classes == 1


def test_equal_numbers_have_nothing_to_learn(table, tmp_path):
    equal = write_rows(tmp_path / "t.csv", [(p, 3.5, split) for p, _, split in rows_of(table)])
    with pytest.raises(VitcliError, match=r"all 40 training images have the same `lux`, 3\.5"):
        train_tiny(tmp_path / "run", **settings(equal))
    assert not (tmp_path / "run").exists()
    problems = check.run(str(equal), settings={"objective": UNIT}).problems()
    assert "all numbers are 3.5, so there is nothing to learn" in problems


def test_one_test_image_has_no_r2(table, tmp_path):
    few = write_rows(tmp_path / "t.csv", rows_of(table)[:41])
    result = train_tiny(tmp_path / "run", **settings(few, steps=2))
    assert result.figures["images"] == 1 and "r2" not in result.figures
    found = evaluate.run(str(few), model=str(tmp_path / "run"), out=tmp_path / "e")
    assert found.to_json()["r2"] is None and found.to_json()["intervals"]["mae"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment": {**PLAIN, "mixup_alpha": 0.2}}, "no classes that mixup or cutmix could mix"),
        ({"train": {"steps": 2, "fewshot_shots": 1}}, "train.fewshot_shots"),
        ({"objective": {"name": "softmax"}}, "which is regression"),
    ],
)
def test_training_refuses_what_needs_classes(table, tmp_path, changes, message):
    with pytest.raises(VitcliError, match=message):
        train_tiny(tmp_path / "run", **{**settings(table), **changes})


def test_a_regression_cannot_teach_classes(run, tmp_path):
    given = {"name": "distill", "teacher": str(run[0])}
    with pytest.raises(VitcliError, match="predicts numbers"):
        train_tiny(tmp_path / "run", objective=given, model={"num_channels": 1})


def test_numbers_that_were_edited_stop_a_resume(table, tmp_path):
    rows = rows_of(table)
    copy = write_rows(tmp_path / "t.csv", rows)
    train_tiny(tmp_path / "run", **settings(copy, steps=2))
    (tmp_path / "run/result.json").unlink()
    write_rows(copy, [(rows[0][0], 1234.5, "train"), *rows[1:]])
    with pytest.raises(VitcliError, match="1 image relabelled"):
        train_recipe(tmp_path / "run", recipe_of(**settings(copy, steps=2)), resume=True)


def test_check_shows_the_distribution_and_names_the_setting(table):
    found = check.run(str(table)).to_json()
    values = np.array([lux for _, lux, _ in rows_of(table)])
    assert found["suggested_objective"] == "mse"
    assert found["numbers"]["mean"] == pytest.approx(values.mean())
    assert found["numbers"]["median"] == pytest.approx(np.median(values))
    assert (found["numbers"]["min"], found["numbers"]["max"]) == (values.min(), values.max())
    assert "objective.name=mse" in found["training"]["hint"]
    shown = CliRunner().invoke(app, ["check", str(table), "--set", "objective.name=mse"])
    assert "no problems found" in shown.stdout or "problems" in shown.stdout
    assert "training stops" not in shown.stdout


def test_check_finds_a_number_that_means_unknown(table, tmp_path):
    path, _, split = rows_of(table)[0]
    write_rows(tmp_path / "t.csv", [(path, -999.0, split), *rows_of(table)[1:]])
    problems = check.run(str(tmp_path / "t.csv")).problems()
    assert any("1 number is far from all others, such as -999" in line for line in problems)


def test_numbers_far_from_zero_keep_their_digits(table, tmp_path):
    """Timestamps: in float32 they are multiples of 128."""
    rows = [(path, 1.7e9 + lux, split) for path, lux, split in rows_of(table)]
    write_rows(tmp_path / "t.csv", rows)
    far = train_tiny(tmp_path / "far", **settings(tmp_path / "t.csv"))
    near = train_tiny(tmp_path / "near", **settings(table))
    assert far.figures["mae"] == pytest.approx(near.figures["mae"], rel=1e-3)
    assert torch.isfinite(torch.tensor(far.figures["r2"]))
