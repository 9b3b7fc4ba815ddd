"""CONTRIBUTING's table is true: each addition works after touching exactly the files it names."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.tiny import write_tiny

ROOT = Path(__file__).parents[1]
TABLE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

OBJECTIVE = '''"""Squared error of the probabilities (Brier, 1950)."""

import torch.nn.functional as F

from vitcli.train.objectives.base import Objective


class Brier(Objective):
    """Squared error of the class probabilities."""

    supervised = True

    def __init__(self, model, section):
        super().__init__()
        self.model = model.network

    def forward(self, images, labels):
        probabilities = self.model(images).float().softmax(dim=1)  # (B, K)
        loss = (probabilities - F.one_hot(labels, probabilities.shape[1])).square().sum(1).mean()
        return loss, {"loss": loss.detach()}
'''
READER = '''"""A .pairs file with `images` (n, Y, X, C) and `labels` (n,)."""

import numpy as np

from vitcli.data.image_set import ArrayStore, ImageSet
from vitcli.data.source import make_source


def load_pairs(request):
    arrays = np.load(request.path)
    classes = [str(c) for c in np.unique(arrays["labels"])]
    labels = np.searchsorted(np.unique(arrays["labels"]), arrays["labels"])
    images = ImageSet("train", classes, labels, ArrayStore(request.notation, arrays["images"]))
    return make_source(request, {"train": images}, [arrays["images"].tobytes()], [])
'''


def named(addition):
    """The files that the table names for an addition."""
    (row,) = re.findall(rf"^\| {re.escape(addition)} \|(.*)\|$", TABLE, flags=re.M)
    return set(re.findall(r"`(vitcli/[\w/.]+)`", row))


class Copy:
    """A copy of the package, and the files of it that were changed."""

    def __init__(self, folder):
        self.folder, self.changed = folder, set()
        shutil.copytree(ROOT / "vitcli", folder / "vitcli")
        shutil.copytree(ROOT / "recipes", folder / "recipes")

    def insert(self, path, before, text):
        file = self.folder / path
        old = file.read_text(encoding="utf-8")
        assert old.count(before) == 1, (path, before, old.count(before))
        file.write_text(old.replace(before, text + before), encoding="utf-8")
        self.changed.add(path)

    def write(self, path, text):
        (self.folder / path).write_text(text, encoding="utf-8")
        self.changed.add(str(Path(path).parent) + "/")

    def run(self, *arguments):
        environment = {**os.environ, "PYTHONPATH": str(self.folder)}
        done = subprocess.run(
            [sys.executable, "-m", "vitcli", *arguments],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path):
    copied = Copy(tmp_path)
    write_tiny(tmp_path / "tiny.toml")
    return copied


def train(copy, *settings):
    words = [word for setting in settings for word in ("--set", setting)]
    return copy.run("pretrain", "--recipe", "tiny.toml", "--steps", "2", *words, "--out", "run")


def test_an_optimizer(copy):
    file = "vitcli/train/optimizers.py"
    copy.insert(
        file,
        "@dataclass(frozen=True)\nclass OptimizerEntry",
        "def plain(named, s, depth):\n"
        '    """SGD without momentum."""\n'
        "    return [torch.optim.SGD(param_groups(named, s, s.lr, depth), lr=s.lr)]\n\n\n",
    )
    entry = '    "plain": OptimizerEntry(plain, frozenset()),\n'
    copy.insert(file, '    "lion": OptimizerEntry(', entry)
    train(copy, "optim.name=plain")
    assert copy.changed == named("an optimizer")


def test_an_objective(copy):
    copy.write("vitcli/train/objectives/brier.py", OBJECTIVE)
    file = "vitcli/train/objectives/__init__.py"
    copy.insert(
        file,
        "from vitcli.train.objectives.classification",
        "from vitcli.train.objectives.brier import Brier\n",
    )
    copy.insert(file, '    "sigmoid": Sigmoid,\n', '    "brier": Brier,\n')
    train(copy, "objective.name=brier")
    assert copy.changed == named("an objective")


def test_a_model_size(copy):
    row = '    "Femto": Variant(32, 2, 64, 2),\n'
    copy.insert("vitcli/vit/variants.py", '    "Ti": Variant(', row)
    words = ("fewshot", "--model", "Femto/4", "--image-size", "8", "--shots", "1", "--json")
    assert '"dim": 32' in copy.run(*words)
    assert copy.changed == named("a model size")


def test_a_data_reader(copy):
    copy.write("vitcli/data/readers/pairs.py", READER)
    copy.insert(
        "vitcli/data/readers/__init__.py",
        '    "hf:": Reader(',
        '    "pairs": Reader("x.pairs", "pairs", "readers.pairs:load_pairs", (".pairs",)),\n',
    )
    pixels = np.random.default_rng(0).integers(0, 255, (20, 8, 8, 3), dtype=np.uint8)
    with (copy.folder / "x.pairs").open("wb") as file:
        np.savez(file, images=pixels, labels=np.arange(20) % 2)
    assert "20" in copy.run("check", "x.pairs", "--json")
    assert copy.changed == named("a data reader")


def test_a_machine(copy):
    row = '    "abacus": Hardware("Abacus", 1e9, GIB, 1e9, "a drawing"),\n'
    copy.insert("vitcli/cost/hardware.py", '    "t4": Hardware(', row)
    words = ("--device", "abacus", "--no-probe", "--json")
    assert '"Abacus"' in copy.run("plan", "tiny.toml", *words)
    assert "abacus, t4" in copy.run("plan", "--help")  # the help asks the registry
    assert copy.changed == named("a machine for `plan --device`")


def test_a_flag_of_predict(copy):
    copy.insert(
        "vitcli/cli/options.py",
        "    threshold: Annotated[\n",
        '    limit: Annotated[int | None, option(DATA, "--limit", help="Maximum.")] = None\n',
    )
    file = "vitcli/commands/predict.py"
    text = (copy.folder / file).read_text(encoding="utf-8")
    start = text.index("\ndef run(")
    signature = text.index("    top: int = 5,\n", start)
    body = text.index('    """\n', text.index('"""', signature) + 3) + len('    """\n')
    text = text[:body] + "    paths = list(paths)[:limit]\n" + text[body:]
    text = text[:signature] + "    limit: int | None = None,\n" + text[signature:]
    (copy.folder / file).write_text(text, encoding="utf-8")
    copy.changed.add(file)
    train(copy)
    for name in "ab":
        Image.new("RGB", (8, 8)).save(copy.folder / f"{name}.png")
    out = copy.run("predict", "a.png", "b.png", "--limit", "1", "--model", "run", "--json")
    assert '"path": "a.png"' in out and "b.png" not in out
    assert copy.changed == named("a flag of `predict`")
