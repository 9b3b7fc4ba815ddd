"""Tables at several widths: no name is cut."""

import io
import re
from types import SimpleNamespace

import pytest
from rich.cells import cell_len
from rich.console import Console

from vitcli.cli import console
from vitcli.cli.show import evaluation, fewshot, training
from vitcli.commands.compare import RunComparison
from vitcli.evals.comparison import PairedAccuracy
from vitcli.evals.run_summary import FoldSummary, RankedRun, RunRanking

LETTERS = [c for c in map(chr, range(0x100, 0x1400)) if c.isalpha() and cell_len(c) == 1]


def name(number):
    """45 letters that no other name has, so that a wrapped name can be put together again."""
    return "".join(LETTERS[45 * number : 45 * (number + 1)])


@pytest.fixture(params=[50, 80, 120])
def drawn(request, monkeypatch):
    """A function that returns all that a function prints, at one width."""

    def text(draw, *arguments):
        file = io.StringIO()
        out = Console(file=file, width=request.param, highlight=False)
        for module in (console, training.report):
            monkeypatch.setattr(module, "out", out)
        draw(*arguments)
        assert "…" not in file.getvalue()
        return file.getvalue()

    return text


def assert_whole(text, *numbers):
    """Every name is in the text at least once; its letters are there in their order."""
    for number in numbers:
        wanted = name(number)
        letters = re.sub(f"[^{wanted}]", "", text)
        assert letters and letters == wanted * (len(letters) // len(wanted)), number


def comparison(count, ranking=None, folds=None):
    runs = tuple(name(k) for k in range(count))
    settings = {name(8): [name(20 + k) for k in range(count)], "optim.lr": [0.001] * count}
    pair = PairedAccuracy(400, 0.02, -0.01, 0.05, 20, 12, 0.2)
    pairs = [pair] * (count - 1)
    results = {name(10): [0.123456] * count, "accuracy": [0.9] * count}
    splits = ("test",) * count
    return RunComparison(runs, settings, results, pairs, {}, splits, ranking, folds)


@pytest.mark.parametrize("count", [2, 7])
def test_compare_shows_every_name(drawn, count):
    ranked = tuple(
        RankedRun(name(k), 0.9 - k / 100, 0.2, "no real difference from the best run, p = 0.2")
        for k in range(count)
    )
    ranking = RunRanking("accuracy", ranked, count * (count - 1) // 2, f"{name(0)} is better")
    text = drawn(evaluation.show_run_comparison, comparison(count, ranking))
    assert_whole(text, *range(count), 8, 10, *range(20, 20 + count))
    assert "0.1235" in text and "0.001" in text
    folds = FoldSummary(3, 0, "test", 300, {name(11): (0.9, 0.01)}, 0.9, (0.87, 0.93))
    assert_whole(drawn(evaluation.show_run_comparison, comparison(count, None, folds)), 8, 11)


def test_several_models_show_every_name(drawn):
    metrics = SimpleNamespace(images=400, top1=0.9, top1_restricted=0.9, top5=1, loss=0.3, ece=0.02)
    models = [
        SimpleNamespace(
            model=name(k),
            split="validation",
            numbers=None,
            metrics=metrics,
            details=SimpleNamespace(num_outputs=10, real=None),
            intervals=SimpleNamespace(of={"top1": (0.87, 0.92)}),
        )
        for k in range(3)
    ]
    pair = PairedAccuracy(400, 0.02, -0.01, 0.05, 20, 12, 0.2)
    result = SimpleNamespace(data=name(5), models=models, paired=[pair, "measured on other images"])
    text = drawn(evaluation.show_evaluation, result)
    assert_whole(text, 0, 1, 2)
    assert f"{name(5)}: validation images" in text


def test_few_shot_figures_name_their_split(drawn):
    accuracy = {"mean": 0.9, "std": 0.0, "seeds": [0.9], "interval": [0.87, 0.93]}
    path = {"l2": [0.1], "left_out_accuracy": [[0.8]], "accuracy": [accuracy]}
    facts = {
        "method": "ridge",
        "representation": "pre-logits",
        "raw_pixels": None,
        "shots": {"5": {"accuracy": accuracy, "l2": [0.1], "path": path}},
    }
    result = SimpleNamespace(
        to_json=lambda: facts, l2="path", model=name(0), data="photos", classes=3,
        test_images=100, split="validation", dim=64, run=None,
    )  # fmt: skip
    text = " ".join(drawn(fewshot.show_fewshot, result).split())
    assert "validation images" in text and "test images" not in text
    assert_whole(text, 0)


@pytest.mark.parametrize("columns", [2, 3, 6, 14])
def test_any_table_is_whole(drawn, columns):
    names = ["", *(name(k) for k in range(1, columns))]
    rows = [[name(15 + r), *(f"{r}.{k:02}" for k in range(1, columns))] for r in range(2)]
    text = drawn(console.print_table, "a title", names, rows)
    for k in range(1, columns):
        assert_whole(text, k)
        assert f"0.{k:02}" in text and f"1.{k:02}" in text
    assert_whole(text, 15, 16)


def test_facts_are_whole(drawn):
    text = drawn(console.print_facts, "a title", [(name(0), name(1)), ("[b]x[/b]", "[1] of 2")])
    assert_whole(text, 0, 1)
    assert "[b]x[/b]" in text and "[1] of 2" in text


def test_a_column_name_is_no_markup(drawn):
    text = drawn(console.print_table, "", ["", "runs/[red]x"], [["a", "1"]])
    assert "runs/[red]x" in text


def test_a_table_that_fits_has_no_legend(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(console, "out", Console(file=file, width=80, highlight=False))
    console.print_table("", ["", "runs/one", "runs/two"], [["accuracy", "0.9", "0.8"]])
    assert "[1]" not in file.getvalue() and "runs/two" in file.getvalue()
