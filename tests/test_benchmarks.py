"""The benchmarks: the row of RECORDS.md, the run of all of them, and their figures."""

import importlib.util
import json
import runpy
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vitcli.cli.app import app
from vitcli.evals.intervals import wilson_interval

RECIPES = Path(__file__).parents[1] / "recipes"
ABOUT = {"processor": "P", "cores": 2.0, "threads": 2, "commit": "abcdef123", "date": "2026-01-02"}


@pytest.fixture
def script(monkeypatch):
    """Load a script of `recipes/` as a module; the commands that it starts run in this process."""
    monkeypatch.syspath_prepend(str(RECIPES))
    measuring = importlib.import_module("measuring")

    def run_timed(words):
        words = [str(word) for word in words]
        if words[1:3] == ["-m", "vitcli"]:
            done = CliRunner().invoke(app, words[3:], catch_exceptions=False)
            assert done.exit_code == 0, done.output
            return measuring.Timed(done.stdout, 1.5, 2.5)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", words[1:])
            runpy.run_path(words[1], run_name="__main__")
        return measuring.Timed("", 1.5, 2.5)

    def load(name):
        spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(module, "run_timed", run_timed, raising=False)
        return module

    monkeypatch.setattr(measuring, "run_timed", run_timed)
    monkeypatch.setattr(measuring, "machine", lambda: dict(ABOUT))
    yield load
    sys.modules.pop("measuring")


@pytest.fixture
def images(tmp_path):
    """Two classes of 32 px: 20 training and 12 test images each."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 12)):
        for number in range(2 * count):
            folder = tmp_path / "data" / split / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "data"


def call(module, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
    module.main()


def test_the_row_of_a_track(script, images, tmp_path, monkeypatch, capsys):
    records = script("bench_records")
    figures = tmp_path / "figures.jsonl"
    words = ["--track", "hybrid", "--data", images, "--tiny", "--seeds", 2, "--tta", "flip"]
    call(records, monkeypatch, *words, "--json", figures)
    *lines, row = capsys.readouterr().out.splitlines()
    *runs, about = map(json.loads, lines)
    assert [run["seed"] for run in runs] == [0, 1] and about["machine"] == ABOUT
    for run in runs:
        assert run["images"] == 24 and run["split"] == "test" and run["train_images"] == 2 * 8
        assert run["interval"] == pytest.approx(wilson_interval(run["accuracy"], 24))
        assert 0 < run["share_of_blocks"] < 1 and run["cpu_seconds"] == 2.5
    accuracies = [100 * run["accuracy"] for run in runs]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == len(board_head())
    mean, spread = statistics.mean(accuracies), statistics.stdev(accuracies)
    assert cells[4].startswith(f"{mean:.1f} ± {spread:.1f} % (")
    assert "with `--tta flip`" in cells[4]
    assert cells[:4] == ["2 min", "hybrid", "80 %", "2"] and cells[7] == "P, 2 cores, abcdef1"
    found = [json.loads(line) for line in figures.read_text().splitlines()]
    assert found[0]["value"] == pytest.approx(mean) and found[0]["better"] == "higher"


def board_head():
    """The cells of the head of the table in RECORDS.md."""
    text = (RECIPES / "RECORDS.md").read_text()
    head = next(line for line in text.splitlines() if line.startswith("| budget | track"))
    return head.strip("|").split("|")


def test_compute_becomes_a_number_of_steps(script, images, monkeypatch, capsys):
    """On validation images: a tenth of the training images, and no test image."""
    records = script("bench_records")
    flags = ["--set", "model.name=mu/4", "--set", "train.batch_size=4"]
    planned = records.plan("speedrun_plain", str(images), flags)
    per_step = planned["training_flops_per_image"] * 4
    words = ["--track", "plain", "--data", images, "--seeds", 1, "--flop", f"{3 * per_step / 1e9}G"]
    call(records, monkeypatch, *words, "--validation", "--", *flags)
    run = json.loads(capsys.readouterr().out.splitlines()[0])
    assert run["steps"] == 3 and run["images"] == 4 and run["split"] == "validation"
    assert run["pflop"] == pytest.approx(3 * per_step / 1e15)


@pytest.mark.parametrize("text", ["0.06", "P", "xP"])
def test_compute_needs_a_unit(script, text):
    with pytest.raises(script("bench_records").argparse.ArgumentTypeError, match="G, T or P"):
        script("bench_records").parse_flop(text)


def test_all_benchmarks_make_one_record(script, tmp_path, monkeypatch, capsys):
    everything = script("bench_all")
    words = ["--tiny", "--only", "load,extract", "--records", tmp_path, "--out"]
    call(everything, monkeypatch, *words, tmp_path / "first.json")
    record = json.loads((tmp_path / "first.json").read_text())
    assert record["machine"] == ABOUT and list(record["benchmarks"]) == ["load", "extract"]
    for bench in record["benchmarks"].values():
        assert bench["figures"] and bench["command"].startswith("bench_")
        for figure in bench["figures"]:
            assert set(figure) == {"name", "value", "unit", "spread", "better"}
            assert figure["value"] > 0 and (figure["spread"] is None or figure["spread"] >= 0)
    assert "nothing is worse" in capsys.readouterr().out
    # A machine on which everything was a thousand times as fast.
    for bench in record["benchmarks"].values():
        for figure in bench["figures"]:
            figure["value"] *= 1e3 if figure["better"] == "higher" else 1e-3
            figure["spread"] = 0.0
    (tmp_path / "first.json").write_text(json.dumps(record))
    call(everything, monkeypatch, *words, tmp_path / "second.json")
    worse = [line for line in capsys.readouterr().out.splitlines() if line.startswith("worse: ")]
    assert len(worse) == 3 and all(", was " in line for line in worse)


def test_a_benchmark_that_fails_is_in_the_record(script, tmp_path, monkeypatch):
    everything = script("bench_all")

    def fails(words):
        raise SystemExit("no such file")

    monkeypatch.setattr(everything, "run_timed", fails)
    words = ["--only", "load,imbalance", "--records", tmp_path, "--out", tmp_path / "a.json"]
    with pytest.raises(SystemExit) as end:
        call(everything, monkeypatch, *words)
    assert end.value.code == 1
    found = json.loads((tmp_path / "a.json").read_text())["benchmarks"]
    assert found["load"]["error"] == "no such file"
    # No path of this machine.
    assert found["imbalance"]["command"].startswith(
        "bench_imbalance.py ../shared/data/cifar10_small "
    )


@pytest.mark.parametrize(
    ("better", "then", "now", "worse"),
    [
        ("higher", (10.0, 1.0), (8.5, 0.6), False),  # the ranges 9 to 11 and 7.9 to 9.1 meet
        ("higher", (10.0, 1.0), (8.5, 0.4), True),
        ("higher", (10.0, 1.0), (15.0, 0.1), False),
        ("lower", (10.0, 1.0), (11.6, 0.5), True),
        ("lower", (10.0, None), (10.9, 0.0), False),  # less than a tenth
        ("lower", (10.0, None), (11.1, 0.0), True),
    ],
)
def test_noise_is_not_a_loss(script, better, then, now, worse):
    one, two = ({"value": v, "spread": s, "better": better} for v, s in (now, then))
    assert script("bench_all").is_worse(one, two) is worse


def test_records_of_other_machines_are_not_compared(script, tmp_path):
    everything = script("bench_all")
    for number, (processor, date, value) in enumerate(
        [("P", "2026-01-01", 1.0), ("P", "2026-01-03", 3.0), ("Q", "2026-01-04", 4.0)]
    ):
        figures = [{"name": "speed", "value": value}]
        machine = {**ABOUT, "processor": processor, "date": date}
        record = {"machine": machine, "benchmarks": {"step": {"figures": figures}, "data": {}}}
        (tmp_path / f"{number}.json").write_text(json.dumps(record))
    found = everything.earlier_figures(tmp_path, ABOUT)
    assert found["speed"]["value"] == 3.0 and found["speed"]["date"] == "2026-01-03"


def test_every_script_is_in_the_table(script):
    named = {str(bench.words[0]) for bench in script("bench_all").BENCHES.values()}
    scripts = {path.name for path in RECIPES.glob("bench_*.py")} - {"bench_all.py"}
    assert named == scripts
