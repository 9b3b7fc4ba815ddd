"""CONTRIBUTING's table is true: each addition works after touching exactly the files it names."""

import json
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


class Addition:
    """One addition to a copy of the package, and the files that it changes."""

    def __init__(self, folder):
        self.folder, self.changed = folder, set()

    def insert(self, path, before, text):
        file = self.folder / path
        old = file.read_text(encoding="utf-8")
        assert old.count(before) == 1, (path, before, old.count(before))
        file.write_text(old.replace(before, text + before), encoding="utf-8")
        self.changed.add(path)

    def write(self, path, text):
        (self.folder / path).write_text(text, encoding="utf-8")
        self.changed.add(str(Path(path).parent) + "/")


def add_optimizer(copy):
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


def add_objective(copy):
    copy.write("vitcli/train/objectives/brier.py", OBJECTIVE)
    file = "vitcli/train/objectives/__init__.py"
    copy.insert(
        file,
        "from vitcli.train.objectives.classification",
        "from vitcli.train.objectives.brier import Brier\n",
    )
    copy.insert(file, '    "sigmoid": Sigmoid,\n', '    "brier": Brier,\n')


def add_model_size(copy):
    row = '    "Femto": Variant(32, 2, 64, 2),\n'
    copy.insert("vitcli/vit/variants.py", '    "Ti": Variant(', row)


def add_data_reader(copy):
    copy.write("vitcli/data/readers/pairs.py", READER)
    copy.insert(
        "vitcli/data/readers/__init__.py",
        '    "hf:": Reader(',
        '    "pairs": Reader("x.pairs", "pairs", "readers.pairs:load_pairs", (".pairs",)),\n',
    )


def add_machine(copy):
    row = '    "abacus": Hardware("Abacus", 1e9, GIB, 1e9, "a drawing"),\n'
    copy.insert("vitcli/cost/hardware.py", '    "t4": Hardware(', row)


def add_flag_of_predict(copy):
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


ADDITIONS = {
    "an optimizer": add_optimizer,
    "an objective": add_objective,
    "a model size": add_model_size,
    "a data reader": add_data_reader,
    "a machine for `plan --device`": add_machine,
    "a flag of `predict`": add_flag_of_predict,
}
TRAIN = "pretrain --recipe tiny.toml --steps 2 --set {} --out run-{}"
COMMANDS = (
    TRAIN.format("optim.name=plain", "plain"),
    TRAIN.format("objective.name=brier", "brier"),
    "fewshot --model Femto/4 --image-size 8 --shots 1 --json",
    "check x.pairs --json",
    "plan tiny.toml --device abacus --no-probe --json",
    "plan --help",
    "predict a.png b.png --limit 1 --model run-plain --json",
)
# All commands in one start, because torch takes longer to load than they do.
JOB = """
import contextlib, io, json, sys
from vitcli.cli.main import run
results = []
for line in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run(line.split())
    results.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def added(tmp_path_factory):
    """A copy of the package with all additions: name -> the files that it changed."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "vitcli", folder / "vitcli")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    changed = {}
    for name, add in ADDITIONS.items():
        addition = Addition(folder)
        add(addition)
        changed[name] = addition.changed
    return folder, changed


@pytest.fixture(scope="module")
def output(added):
    """Command -> what it prints, in the copy of the package."""
    folder, _ = added
    write_tiny(folder / "tiny.toml", optim={"name": "adamw"})
    pixels = np.random.default_rng(0).integers(0, 255, (20, 8, 8, 3), dtype=np.uint8)
    with (folder / "x.pairs").open("wb") as file:
        np.savez(file, images=pixels, labels=np.arange(20) % 2)
    for name in "ab":
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    done = subprocess.run(
        [sys.executable, "-c", JOB, json.dumps(COMMANDS)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    for command, (status, _, err) in zip(COMMANDS, results, strict=True):
        assert status == 0, (command, err)
    return {command: out for command, (_, out, _) in zip(COMMANDS, results, strict=True)}


@pytest.mark.parametrize("name", ADDITIONS)
def test_an_addition_touches_the_files_of_its_row(name, added):
    assert added[1][name] == named(name)


@pytest.mark.slow
def test_an_optimizer_and_an_objective_train(output, added):
    for name in ("plain", "brier"):
        recipe = (added[0] / f"run-{name}/recipe.toml").read_text()
        assert f'name = "{name}"' in recipe
        assert (added[0] / f"run-{name}/model.safetensors").is_file()


@pytest.mark.slow
def test_a_model_size_is_built(output):
    assert '"dim": 32' in output[COMMANDS[2]]


@pytest.mark.slow
def test_a_data_reader_reads(output):
    assert "20" in output[COMMANDS[3]]


@pytest.mark.slow
def test_a_machine_is_planned_for_and_in_the_help(output):
    assert '"Abacus"' in output[COMMANDS[4]]
    assert "abacus, t4" in output[COMMANDS[5]]  # the help asks the registry


@pytest.mark.slow
def test_a_flag_of_predict_is_taken(output):
    out = output[COMMANDS[6]]
    assert '"path": "a.png"' in out and "b.png" not in out
