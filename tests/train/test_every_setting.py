"""Every value of every setting trains for two steps: each one by itself, and in pairs."""

import csv
import io
import itertools
import json
import random
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support import every_value
from support.every_value import (
    ELSEWHERE,
    all_pairs,
    grown,
    level,
    levels,
    needs_of,
    pairs,
    random_needs,
)

from vitcli.config.recipe import check, lay_over, nest
from vitcli.config.schema import Recipe
from vitcli.data.formula import dataset
from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.progress import Quiet
from vitcli.run import Run
from vitcli.train import build, session
from vitcli.train.build import build_loop, open_source, start_accelerator
from vitcli.train.resolve import pretrained_model, random_model
from vitcli.vit import create_network
from vitcli.weights.loaded import LoadedModel
from vitcli.weights.store import save_model

ROOT = Path(__file__).parents[2]
CLASSES = ("cat", "dog")
MODELS = {
    "pretrain": {"name": "mu/4", "image_size": 16, "num_channels": 3},
    "finetune": {"name": "weights.safetensors"},
}
BASE = {
    "command": "pretrain",
    "data": {"name": "folder"},
    "train": {"steps": 2, "batch_size": 8, "precision": "fp32", "eval_steps": 1},
}
PARTS = 12


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Data in every form that a setting needs, and weights to fine-tune and to learn from."""
    folder = tmp_path_factory.mktemp("every")
    rng, rows, tars = np.random.default_rng(0), [], []
    for split, name, i in itertools.product(("train", "test"), CLASSES, range(8)):
        path = folder / "folder" / split / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        rows.append({"file": str(path), "kind": name, "split": split})
        tars.append((split, name, path))
    for table, column in (("table.csv", "kind"), ("labels.csv", "labels")):
        with open(folder / table, "w", newline="") as file:
            writer = csv.DictWriter(file, ["file", column, "split"])
            writer.writeheader()
            for i, row in enumerate(rows):
                many = "cat|dog" if i % 3 == 0 else row["kind"]
                value = row["kind"] if column == "kind" else many
                writer.writerow({"file": row["file"], column: value, "split": row["split"]})
    with open(folder / "names.csv", "w") as names, open(folder / "groups.csv", "w") as groups:
        names.write("file,label,split\n")
        groups.write("file,label,patient,fold\n")
        for i, (split, name, path) in enumerate(tars):
            stem = path.relative_to(folder / "folder").with_suffix("")
            names.write(f"{stem},{name},{split}\n")
            groups.write(f"{path},{name},{i % 6},{i % 4}\n")
    lines = [f"{path},{i / 4},{split}" for i, (split, _, path) in enumerate(tars)]
    (folder / "numbers.csv").write_text("\n".join(["file,amount,split", *lines]))
    (folder / "shards").mkdir()
    for split in ("train", "test"):
        with tarfile.open(folder / f"shards/{split}-0.tar", "w") as shard:
            for i, (_, name, path) in enumerate(t for t in tars if t[0] == split):
                content = {"cls": name.encode(), "png": path.read_bytes()}
                for ending, data in content.items():
                    member = tarfile.TarInfo(f"{i:04}.{ending}")
                    member.size = len(data)
                    shard.addfile(member, io.BytesIO(data))
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    network = create_network("mu/4", num_classes=2, image_size=16, depth=2)
    preprocess = Preprocess((16, 16), mean=(0.5,), std=(0.5,))
    model = LoadedModel(network, labels=CLASSES, preprocess=preprocess, head_trained=True)
    save_model(folder / "weights.safetensors", model)
    embeddings = {"text_embeddings": torch.eye(2, network.config.head_dim)}
    save_file(embeddings, folder / "text.safetensors", {"labels": json.dumps(CLASSES)})
    return folder


class Trainer:
    """Builds and trains rows of settings."""

    def __init__(self, files, monkeypatch):
        monkeypatch.chdir(files)
        # It depends on no setting, and takes longer than two steps.
        monkeypatch.setattr(build, "matrix_peak", lambda device, precision: 1e9)
        monkeypatch.setattr(dataset, "NUM_TEST", 16)
        self.numbers = itertools.count()

    def recipe(self, row):
        settings = {}
        lay_over(settings, BASE)
        lay_over(settings, {"model": MODELS[row.get("command", "pretrain")]})
        for key, value in row.items():
            lay_over(settings, nest(key, value))
        return check(Recipe, settings, "row")

    def make_model(self, recipe):
        if recipe.command == "pretrain":
            return lambda source: random_model(recipe, source)
        return lambda source: pretrained_model(recipe, source, Quiet())

    def accepts(self, row):
        """False if the product refuses the settings with an error for users."""
        try:
            recipe = self.recipe(row)
            accelerator, _ = start_accelerator(recipe)
            source = open_source(recipe, Quiet())
            build_loop(recipe, source, self.make_model(recipe), Run("none"), accelerator, Quiet())
        except VitcliError:
            return False
        except Exception as error:
            raise AssertionError(f"{row} is refused without a message for users") from error
        return True

    def train(self, row):
        recipe = self.recipe(row)
        try:
            result = session.train(
                recipe,
                self.make_model(recipe),
                out=Path(f"run{next(self.numbers)}-{abs(hash(str(row)))}"),
                resume=False,
                watch=Quiet(),
            )
        except Exception as error:
            raise AssertionError(f"training fails with {row}") from error
        assert result.steps >= 1 and np.isfinite(result.figures.get("loss", 0.0))


@pytest.fixture
def trainer(files, monkeypatch):
    warnings.simplefilter("ignore")
    return Trainer(files, monkeypatch)


def test_values_that_train_elsewhere_do(files):
    for name, path in ELSEWHERE.items():
        key = name.partition("=")[0]
        assert key in every_value.fields(), f"`{key}` is no setting any more"
        assert key.rpartition(".")[2] in (ROOT / path).read_text(encoding="utf-8")


def test_every_value_trains(trainer):
    """In few long rows, which also cover many pairs."""
    left = {level(k, v): needs_of(k, v) for k, values in levels().items() for v in values}
    while left:
        first, *more = left.values()
        assert trainer.accepts(first), f"{first} is refused: add what it needs to `NEEDS`"
        row = grown(first, more, trainer.accepts)
        trainer.train(row)
        for key, value in row.items():
            left.pop(level(key, value), None)


@pytest.mark.proof
@pytest.mark.parametrize("part", range(PARTS))
def test_every_pair_of_values_trains(trainer, part):
    """Each pair that the product does not refuse, in random long rows."""
    left = {pair: row for i, (pair, row) in enumerate(all_pairs().items()) if i % PARTS == part}
    rng, refused = random.Random(part), 0
    while left:
        first = left.pop(rng.choice(list(left)))
        if not trainer.accepts(first):
            refused += 1
            continue
        row = grown(first, random_needs(rng), trainer.accepts)
        trainer.train(row)
        for pair in pairs(row):
            left.pop(pair, None)
    assert refused < len(all_pairs()) / PARTS / 5
