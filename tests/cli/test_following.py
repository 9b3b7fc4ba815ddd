"""Every `next:` line is one command that runs as printed, with the options of the run."""

import shlex
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vitcli.cli.main import run

FOLDER = "mum's photos"  # a blank and a quote, which a shell reads
TINY = ("model.name=mu/4", "model.image_size=8", "augment.crop=none")
ROOT = ["--set", f"data.image_root={FOLDER}"]
ONE_STEP = ["--steps", "1", "--batch-size", "4"]
TRAIN = [*ONE_STEP]
for setting in TINY:
    TRAIN += ["--set", setting]
MAE = ["--recipe", "pretrain_mae", *ONE_STEP]
MAE += ["--set", "model.name=mu/4", "--set", "model.image_size=8"]
MAE += ["--set", "objective.decoder_dim=32"]

# Name -> the words of a command and those of the command that it prints. The commands run in this
# order, and each printed command is executed.
CASES = {
    "classifier": (
        ["pretrain", FOLDER, *TRAIN, "--out", "runs/new one"],
        ["evaluate", FOLDER, "--model", "runs/new one", "--out", "reports/new one"],
    ),
    "table": (
        ["pretrain", "table.csv", *TRAIN, "--out", "runs/t", *ROOT],
        ["evaluate", "table.csv", "--model", "runs/t", "--out", "reports/t", *ROOT],
    ),
    "finetune": (
        ["finetune", FOLDER, "--model", "runs/t", "--steps", "1", "--out", "runs/f"],
        ["evaluate", FOLDER, "--model", "runs/f", "--out", "reports/f"],
    ),
    "formula": (
        ["pretrain", "--out", "runs/formula", *ONE_STEP, "--set", "model.name=mu/8"],
        ["fewshot", "builtin:digits", "--model", "runs/formula", "--shots", "5"],
    ),
    "features of photos with classes": (
        ["pretrain", FOLDER, *MAE, "--out", "runs/mae"],
        ["fewshot", FOLDER, "--model", "runs/mae", "--shots", "5"],
    ),
    "features of photos with several labels": (
        ["pretrain", "tags.csv", *MAE, "--out", "runs/tags"],
        ["inspect", "tags.csv", "--model", "runs/tags"],
    ),
    "fewshot": (
        ["fewshot", FOLDER, "--model", "runs/mae", "--out", "runs/few"],
        ["evaluate", FOLDER, "--model", "runs/few", "--out", "reports/few"],
    ),
    "export": (
        ["export", "--model", "runs/t", "--to", "timm", "--out", "t timm"],
        ["evaluate", "table.csv", "--model", "t timm", "--out", "reports/t timm", *ROOT],
    ),
    "dry run": (
        ["pretrain", FOLDER, "--dry-run", "--lr", "0.01", *TRAIN, "--out", "runs/dry"],
        ["pretrain", FOLDER, "--lr", "0.01", *TRAIN, "--out", "runs/dry"],
    ),
    "plan": (
        ["plan", "pretrain", FOLDER, "--no-probe", "--watts", "65", *TRAIN],
        ["pretrain", FOLDER, "--recipe", "pretrain", *TRAIN],
    ),
    "plan of a run": (
        ["plan", "runs/t", "--no-probe", "--steps", "2"],
        ["pretrain", "--recipe", "runs/t/recipe.toml", "--steps", "2"],
    ),
    "plan of fine-tuning": (
        ["plan", "finetune", FOLDER, "--model", "runs/t", "--no-probe", "--steps", "1"],
        ["finetune", FOLDER, "--recipe", "finetune", "--model", "runs/t", "--steps", "1"],
    ),
}
# Commands that know no command to run next.
SILENT = {
    "plan without data": ["plan", "pretrain", "--no-probe", "--images", "9", *TRAIN],
    "export to Google's layout, which has no class names": [
        *("export", "--model", "runs/t", "--to", "google", "--out", "t.npz"),
        *("--set", "model.gelu=tanh"),
    ],
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with labelled photographs, a table of them, and a table with several labels."""
    folder = tmp_path_factory.mktemp("work")
    rng = np.random.default_rng(0)
    lines, tags = ["path,label"], ["path,labels"]
    for split, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            (folder / FOLDER / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (8, 8, 3)).astype(np.uint8)
                path = f"{split}/{name}/{i}.png"
                Image.fromarray(pixels).save(folder / FOLDER / path)
                lines.append(f"{path},{name}")
                tags.append(f"{FOLDER}/{path},{name};animal" if i else f"{FOLDER}/{path},{name}")
    (folder / "table.csv").write_text("\n".join(lines), encoding="utf-8")
    (folder / "tags.csv").write_text("\n".join(tags), encoding="utf-8")
    return folder


def next_words(text):
    """The words of each `next:` line of an output."""
    lines = [line.removeprefix("next: ") for line in text.splitlines() if line.startswith("next:")]
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("name", CASES)
def test_the_next_command_has_the_options_of_this_one_and_runs(name, work, monkeypatch, capfd):
    monkeypatch.chdir(work)
    monkeypatch.setattr("vitcli.commands.plan.PROBE_SECONDS", 0.1)
    words, expected = CASES[name]
    assert run(words) == 0, capfd.readouterr().err
    (found,) = next_words(capfd.readouterr().out)
    assert sorted(found) == sorted(["vitcli", *expected])
    assert found[:2] == ["vitcli", expected[0]]
    quick = ["--no-bias"] if found[1] == "inspect" else []
    assert run([*found[1:], *quick]) == 0, capfd.readouterr().err


@pytest.mark.parametrize("name", SILENT)
def test_no_command_is_printed_that_would_not_run(name, work, monkeypatch, capfd):
    monkeypatch.chdir(work)
    assert run(SILENT[name]) == 0
    assert not next_words(capfd.readouterr().out)


def test_the_rate_that_was_found_replaces_the_typed_one(capfd, monkeypatch):
    """The run directory of the finder holds its curve, so `--out` is not repeated."""
    from vitcli.cli import console
    from vitcli.commands import find_lr

    rate = SimpleNamespace(lr=0.00123, matrix_lr=0.0456)
    monkeypatch.setattr(find_lr, "run", lambda *args, **more: rate)
    monkeypatch.setattr(console, "show", lambda result, json, draw, after: console.show_next(after))
    given = ["--recipe", "my recipe.toml", "--lr", "1", "--find-lr", "--out", "x", "--strict"]
    assert run(["finetune", "a b", "--model", "m", *given]) == 0
    expected = ["finetune", "a b", "--model", "m", "--recipe", "my recipe.toml", "--strict"]
    expected += ["--lr", "0.0012", "--set", "optim.matrix_lr=0.046"]
    (found,) = next_words(capfd.readouterr().out)
    assert found[:3] == ["vitcli", *expected[:2]] and sorted(found) == sorted(["vitcli", *expected])
