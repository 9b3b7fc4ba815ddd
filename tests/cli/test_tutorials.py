"""The tutorials: each command of a page runs, in the order of the page, with a tiny model."""

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.docs import commands

from vitcli.cli.main import run

PAGES = Path(__file__).parents[2] / "docs/tutorials"
# Options of the pages that cost time or need another machine. Each is replaced by nothing.
DROPPED = ("--epochs", "--budget", "--image-size", "--processes", "--device", "--track")
TRAIN = ["--steps", "2", "--batch-size", "4"]
MODEL = ["--set", "model.name=mu/8", "--set", "model.image_size=32"]
# Commands that take longer than a page may, and have tests of their own. They are parsed only.
ELSEWHERE = ("doctor", "bench", "paper_vit_b16_i1k", "--find-lr", "train.compile=true")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """The folders that the pages name, with images of 16 px, and weights in timm's layout."""
    folder = tmp_path_factory.mktemp("tutorials")
    rng = np.random.default_rng(0)
    for place, count in (("photos", 10), ("cifar10", 10), ("final", 3)):
        for name, colour in (("cat", (200, 80, 40)), ("dog", (40, 80, 200))):
            (folder / place / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(colour, 30, (16, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / place / name / f"{i:03}.jpg")
    (folder / "new").mkdir()
    Image.new("RGB", (20, 16), (200, 80, 40)).save(folder / "new/a.jpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(["pretrain", "photos", *TRAIN, *MODEL, "--out", "runs/start"]) == 0
        made = ["export", "--model", "runs/start", "--to", "timm", "--out", "weights"]
        assert run(made) == 0
    return folder


def smaller(line):
    """The words of a command, with two steps of a tiny model in place of minutes."""
    words = shlex.split(line)[1:]
    for flag in DROPPED:
        while flag in words:
            at = words.index(flag)
            del words[at : at + 2]
    if words[0] == "pretrain" and words[1] != "--resume":
        words += [*TRAIN, *MODEL]
    elif words[0] == "finetune":
        words += TRAIN
    elif words[0] == "plan":
        words += [*TRAIN, "--no-probe", *([] if "finetune" in words else MODEL)]
    return words


@pytest.mark.parametrize(
    "page",
    [
        "photos",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("laptop", "two-ideas", "gpu", "cluster")
        ),
    ],
)
def test_every_command_of_a_page_runs(page, photos, tmp_path, monkeypatch, capfd):
    folder = shutil.copytree(photos, tmp_path / "page")
    monkeypatch.chdir(folder)
    lines = list(commands((PAGES / f"{page}.md").read_text(encoding="utf-8"), seeds=3))
    assert len(lines) >= 4
    for line in lines:
        if not any(word in line.split() for word in ELSEWHERE):
            assert run(smaller(line)) == 0, (line, capfd.readouterr().err)
    if page == "photos":
        rows = (folder / "predictions.csv").read_text(encoding="utf-8").splitlines()
        assert len(rows) == 2 and rows[1].startswith("new/a.jpg,")
