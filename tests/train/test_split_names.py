"""Results name the split that they were measured on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.tiny import records, tiny_recipe

from vitcli.cli.show.training import show_trained
from vitcli.commands import compare, evaluate, fewshot
from vitcli.config.recipe import nest
from vitcli.progress import Quiet
from vitcli.run import Run
from vitcli.train import validate
from vitcli.train.resolve import random_model
from vitcli.train.session import TrainResult, train

COUNTS = {"train": 6, "val": 3, "test": 2}  # images per class


@pytest.fixture
def photos(here):
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for name in ("ant", "bee", "cat"):
            for i in range(count):
                path = here / "photos" / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return here / "photos"


def go(out, seed=0):
    recipe = tiny_recipe(
        data={"name": "photos"},
        model={"num_channels": 3, "depth": 1},
        augment={"crop": "none"},
        optim={"name": "adamw"},
        train={"steps": 4, "batch_size": 6, "eval_steps": 2, "seed": seed},
    )
    make = lambda source: random_model(recipe, source)  # noqa: E731
    return train(recipe, make, out=Path(out), resume=False, watch=Quiet())


def count_evaluations(monkeypatch):
    """The splits that are evaluated, in order."""
    seen, real = [], validate._outputs

    def outputs(model, images, *rest):
        seen.append((images.name, len(images)))
        return real(model, images, *rest)

    monkeypatch.setattr(validate, "_outputs", outputs)
    return seen


def test_validation_images_are_never_called_test_images(photos, monkeypatch, capsys):
    seen = count_evaluations(monkeypatch)
    result = go("run")
    assert seen == [("validation", 9), ("validation", 9), ("test", 6)]  # steps 2 and 4, then once
    found = records(Path("run"))
    assert [r["step"] for r in found if "validation/accuracy" in r] == [2, 4]
    assert [r["step"] for r in found if "test/accuracy" in r] == [4]
    written = json.loads(Path("run/result.json").read_text())
    assert (written["figures"]["split"], written["figures"]["images"]) == ("test", 6)
    assert (written["validation"]["split"], written["validation"]["images"]) == ("validation", 9)
    assert found[-1]["test/accuracy"] == written["figures"]["accuracy"]
    assert found[-1]["validation/accuracy"] == written["validation"]["accuracy"]
    Path("run/report.html").touch()  # most tests leave reports out, see conftest.py
    show_trained(result)
    shown = capsys.readouterr().out
    assert "validation accuracy" in shown and "test accuracy" in shown
    assert "test balanced accuracy" in shown and "test loss" in shown
    assert "run/report.html" in shown
    evaluated = evaluate.run("photos", model="run", out=Path("e")).to_json()
    assert evaluated["split"] == "test"
    assert evaluated["top1"] == pytest.approx(written["figures"]["accuracy"])


def test_the_best_error_of_a_regression_is_no_percentage(capsys):
    best = {"split": "validation", "metric": "mae", "value": 3.25, "step": 7}
    facts = {"seconds": 1.0, "images_per_second": 1.0, "figures": {}, "labels": 1, "best": best}
    show_trained(TrainResult("r", "finetune", "d", "m", 1, 9, 9, **facts))
    shown = " ".join(capsys.readouterr().out.split())
    assert "best validation mae 3.25 at step 7" in shown and "%" not in shown


def test_without_test_images_the_result_is_a_validation_accuracy(photos, capsys):
    shutil.rmtree(photos / "test")
    result = go("run")
    assert result.figures["split"] == "validation" and result.validation is None
    assert not any("test/accuracy" in r for r in records(Path("run")))
    show_trained(result)
    assert "test accuracy" not in capsys.readouterr().out
    facts = fewshot.run(
        "photos", model="run", settings=nest("fewshot.shots", [1]), out=Path("f")
    ).to_json()
    assert facts["split"] == facts["shots"]["1"]["split"] == "validation"


def test_without_validation_images_the_curve_is_of_the_test_images(photos):
    shutil.rmtree(photos / "val")
    result = go("run")
    assert result.figures["split"] == "test" and result.validation is None
    assert [r["step"] for r in records(Path("run")) if "test/accuracy" in r] == [2, 4]


def test_a_run_of_an_earlier_version_is_compared_by_its_split(photos):
    """It reported the validation images, and did not say so."""
    go("new")
    go("old", seed=1)
    run = Run(Path("old"))
    values = run.result()
    values["figures"] = {k: v for k, v in values.pop("validation").items() if k != "split"}
    run.finish(values)
    assert TrainResult(**run.result()).validation is None
    found = compare.run([Path("new"), Path("old")])
    assert found.splits == ("test", "validation")
    assert found.results["accuracy"][1] is None and found.results["test_images"] == [6, None]
    assert found.results["validation_accuracy"] == [None, values["figures"]["accuracy"]]
    assert found.results["validation_images"] == [None, 9]
    assert "the test and the validation split" in found.paired[0]
    assert compare.run([Path("new"), Path("new")]).results["accuracy"][0] is not None
