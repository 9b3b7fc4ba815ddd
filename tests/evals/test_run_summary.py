"""Rankings and folds of runs, on run directories that are written by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from support.tiny import tiny_recipe

from vitcli.cli import main as exits
from vitcli.commands import compare
from vitcli.evals.comparison import compare_errors, holm
from vitcli.weights.store import save_tensors


def write_run(folder, outcomes, *, data=None, train=None, content="a", rows=None, split="test"):
    """A finished run; `outcomes` (n,) are true for images that it gets right."""
    folder.mkdir(parents=True)
    recipe = tiny_recipe(data=data or {}, train=train or {})
    (folder / "recipe.toml").write_text(recipe.to_toml())
    right = np.asarray(outcomes, dtype=bool)
    figures = {"split": split, "accuracy": float(right.mean()), "images": len(right)}
    figures |= {"loss": 1.0}
    (folder / "result.json").write_text(json.dumps({"figures": figures}))
    facts = {"content": content, "images": {"train": 30 - len(right), split: len(right)}}
    if "folds" in recipe.data.model_fields_set and recipe.data.folds:
        facts |= {"folds": recipe.data.folds, "fold": recipe.data.fold}
        facts |= {"seed": recipe.data.split_seed}
    (folder / "provenance.json").write_text(json.dumps({"data": facts}))
    labels = torch.zeros(len(right), dtype=torch.int64)
    columns = {"index": torch.arange(len(right)), "label": labels}
    columns["predicted"] = torch.from_numpy((~right).astype(np.int64))
    save_tensors(folder / "outcomes.safetensors", columns)
    if rows is not None:
        lines = ["split\tclass\tcontent\tpath", *("\t".join(row) for row in rows)]
        (folder / "images.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_holm_is_the_step_down_procedure():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.5]) == [1.0, 1.0] and holm([0.2]) == [0.2]
    p = np.random.default_rng(0).random(20) ** 3
    for level in (0.01, 0.05, 0.2):  # Holm (1979): reject until the first that is too large
        order, rejected = np.argsort(p), set()
        for rank, i in enumerate(order):
            if p[i] > level / (20 - rank):
                break
            rejected.add(i)
        assert rejected == {i for i, q in enumerate(holm(p.tolist())) if q <= level}


def test_errors_have_students_paired_test():
    rng = np.random.default_rng(0)
    a = rng.random(40)
    b = a + rng.normal(0.1, 0.3, 40)
    assert compare_errors(a, b).p_value == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert compare_errors(a, a).p_value == 1.0


@pytest.fixture
def ranked(tmp_path):
    """Three runs on 400 images: one is clearly worse, two are alike."""
    rng = np.random.default_rng(0)
    good = rng.random(400) < 0.9
    alike = good.copy()
    alike[np.flatnonzero(good)[:6]], alike[np.flatnonzero(~good)[:5]] = False, True
    bad = good & (rng.random(400) < 0.7)
    return [
        write_run(tmp_path / name, right, train={"batch_size": size})
        for name, right, size in (("bad", bad, 16), ("good", good, 32), ("alike", alike, 64))
    ]


def test_the_ranking_tells_real_differences_from_others(ranked, capsys):
    found = compare.run(ranked)
    ranking = found.ranking
    values = {one.run: one.value for one in ranking.runs}
    assert list(values.values()) == sorted(values.values(), reverse=True)
    assert ranking.metric == "accuracy" and ranking.comparisons == 3
    best, second, last = ranking.runs
    assert last.run == str(ranked[0]) and "worse" in last.verdict and last.p_value < 1e-6
    assert "no real difference" in second.verdict and second.p_value > 0.05
    raw = compare.run([Path(best.run), Path(second.run)]).paired[0].p_value
    assert second.p_value == pytest.approx(min(1, raw))  # the largest of three is not multiplied
    assert (
        "Holm's correction for 3 comparisons" in ranking.verdict and second.run in ranking.verdict
    )
    assert exits.run(["compare", *map(str, ranked)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "test accuracy" in shown  # not only in the title: a ranking names its split
    assert "ranking" in shown and "no real difference" in shown and "Holm's correction" in shown
    assert exits.run(["compare", *map(str, ranked), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["ranking"]
    assert said["correction"] == "holm" and [one["run"] for one in said["runs"]] == list(values)


def test_two_runs_need_no_correction(ranked):
    found = compare.run(ranked[:2])
    assert found.ranking.runs[1].p_value == found.paired[0].p_value
    assert "is better than the other runs" in found.ranking.verdict
    assert found.ranking.to_json()["correction"] is None


def test_runs_on_other_images_are_not_ranked(ranked, tmp_path):
    other = write_run(tmp_path / "other", [True] * 30, content="b", train={"batch_size": 8})
    found = compare.run([*ranked, other])
    assert "other data" in found.ranking and found.to_json()["ranking"] == {"reason": found.ranking}


ROWS = [("class", f"{i:016x}", f"{i}.png") for i in range(30)]


def fold_run(folder, fold, right, *, seed=0, folds=3, rows=ROWS, split="test", train=None):
    held = range(fold * 10, fold * 10 + 10)
    table = [(split if i in held else "train", *row) for i, row in enumerate(rows)]
    outcomes = np.arange(10) < right
    data = {"folds": folds, "fold": fold, "split_seed": seed}
    return write_run(
        folder, outcomes, data=data, content=str(fold), rows=table, split=split, train=train
    )


@pytest.mark.parametrize("split", ["test", "validation"])
def test_folds_are_summarised(tmp_path, capsys, split):
    runs = [
        fold_run(tmp_path / f"f{k}", k, right, split=split, train={"seed": k})
        for k, right in enumerate((10, 8, 9))
    ]
    found = compare.run(runs)
    assert found.ranking is None
    mean, std = found.folds.figures["accuracy"]
    assert (mean, std) == pytest.approx((0.9, np.std([1.0, 0.8, 0.9], ddof=1)))
    assert (found.folds.accuracy, found.folds.images) == (pytest.approx(27 / 30), 30)
    wanted = stats.binomtest(27, 30).proportion_ci(method="wilson")
    assert found.folds.interval == pytest.approx((wanted.low, wanted.high))
    assert exits.run(["compare", *map(str, runs)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{split} images of 3 folds" in shown and "accuracy of all folds together" in shown
    assert exits.run(["compare", *map(str, runs), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["folds"]
    assert said["pooled"]["accuracy"] == pytest.approx(0.9) and said["pooled"]["method"] == "wilson"
    assert said["figures"]["accuracy"]["std"] == pytest.approx(0.1)


def test_folds_that_do_not_belong_together_say_why(tmp_path):
    runs = [fold_run(tmp_path / f"f{k}", k, 9) for k in range(3)]

    def reason(*some):
        found = compare.run(some)
        assert found.to_json()["folds"] == {"reason": found.folds}
        return found.folds

    assert reason(*runs[:2]) == "fold 2 of 3 (counted from 0) has no run"
    again = fold_run(tmp_path / "again", 2, 9, train={"seed": 5})
    assert "fold 2 has two runs" in reason(*runs, again)
    seed = fold_run(tmp_path / "seed", 2, 9, seed=7)
    assert "seeds 0 and 7" in reason(*runs[:2], seed)
    five = fold_run(tmp_path / "five", 2, 9, folds=5)
    assert "3 and 5 folds" in reason(*runs[:2], five)
    rows = [("class", f"{i:016x}", f"{i}.png") for i in range(7, 37)]
    assert "have other data" in reason(*runs[:2], fold_run(tmp_path / "rows", 2, 9, rows=rows))
    other = fold_run(tmp_path / "other", 2, 9, train={"batch_size": 64})
    assert "differ in `train.batch_size`" in reason(*runs[:2], other)
    assert compare.run([write_run(tmp_path / "plain", [True]), runs[0]]).folds is None
