"""ReaL on a set that is made here, as its authors compute it."""

import json

import numpy as np
import pytest
from PIL import Image

from vitcli.commands import evaluate
from vitcli.data.source import load_data
from vitcli.errors import VitcliError
from vitcli.evals.features import extract
from vitcli.evals.real_labels import read_real_labels, real_targets
from vitcli.preprocess import Preprocess
from vitcli.weights.imagenet import imagenet_names, imagenet_synsets
from vitcli.weights.load import load_model
from vitcli.weights.loaded import create_model
from vitcli.weights.store import save_model

NUMBERS = [3, 7, 8, 12, 20]  # of the images, as in their file names


@pytest.fixture
def validation(here):
    """Five images of two synsets under ImageNet's names, and a model that says something."""
    net = create_model("Pico/8", image_size=8, num_classes=1000, depth=1)
    rng = np.random.default_rng(0)
    net.network.head.weight.data.normal_(0, 1)
    net.labels, net.head_trained = imagenet_names(1000), True
    net.preprocess = Preprocess(image_size=(8, 8))
    save_model("m.safetensors", net)
    for i, number in enumerate(NUMBERS):
        folder = here / "val" / imagenet_synsets(1000)[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"ILSVRC2012_val_{number:08d}.png")
    return "val"


def answers_of(folder):
    """File name -> what the model says."""
    images = load_data(folder, whole=True).splits["train"]
    found = extract(load_model("m.safetensors"), images, output="logits")
    names = [images.file_name(i) for i in found.indices.tolist()]
    return dict(zip(names, found.outputs, strict=True))


def test_accuracy_as_its_authors_compute_it(validation, here):
    logits = answers_of(validation)
    said = {name: int(z.argmax()) for name, z in logits.items()}
    real = [[] for _ in range(25)]
    for k, number in enumerate(NUMBERS):
        name = f"ILSVRC2012_val_{number:08d}.png"
        third = int(np.argsort(-logits[name])[2])
        real[number - 1] = [[said[name], 5], [3], [], [third, 999], [said[name]]][k]
    (here / "real.json").write_text(json.dumps(real))
    result = evaluate.run(validation, model="m.safetensors", real=here / "real.json")
    right = [
        answer in real[int(name[15:23]) - 1]
        for name, answer in said.items()
        if real[int(name[15:23]) - 1]
    ]
    assert (result.details.real.images, result.details.real.skipped) == (4, 1)
    assert result.details.real.top1 == pytest.approx(np.mean(right)) == 0.5
    assert result.details.real.top5 >= 0.75
    assert result.metrics.images == 5  # the labels of the folders, all of them
    two = sorted({NUMBERS[k]: k % 2 for k in range(5)}.items())
    among = [int(logits[f"ILSVRC2012_val_{n:08d}.png"][:2].argmax()) == label for n, label in two]
    assert result.metrics.top1_restricted == pytest.approx(
        np.mean(among)
    )  # of both synsets, 0 and 1
    facts = result.to_json()
    assert facts["real"]["top1"] == 0.5
    low, high = facts["intervals"]["top1_real"]
    assert low <= 0.5 <= high


def test_names_in_parquet(validation, here):
    import datasets

    rows = {"image": [], "label": []}
    for path in sorted((here / validation).rglob("*.png")):
        rows["image"].append({"bytes": path.read_bytes(), "path": f"val/{path.name}"})
        rows["label"].append(path.parent.name)
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("string"))
    datasets.Dataset.from_dict(rows, features).to_parquet("test.parquet")
    images = load_data("test.parquet").splits["test"]
    found = real_targets(images, np.arange(5), [[n] for n in range(25)], np.arange(1000) + 1)
    numbers = [int(images.file_name(i)[15:23]) for i in range(5)]
    assert sorted(numbers) == NUMBERS and found[:, 0].tolist() == numbers


def test_what_is_no_file_of_labels(tmp_path):
    for text in ("{}", "[]", "[1]", '[["a"]]', "[[1000]]", "[[true]]"):
        (tmp_path / "real.json").write_text(text)
        with pytest.raises(VitcliError, match="not a list of lists of classes"):
            read_real_labels(tmp_path / "real.json")
    with pytest.raises(VitcliError, match="cannot read") as error:
        read_real_labels(tmp_path / "nowhere.json")
    assert "reassessed-imagenet" in error.value.hint


def test_images_that_it_does_not_know(validation, here):
    images = load_data(validation, whole=True).splits["train"]
    every = np.arange(5)
    with pytest.raises(VitcliError, match="is image 20, but the ReaL file has only 8 images"):
        real_targets(images, every, [[1]] * 8, np.arange(1000))
    with pytest.raises(VitcliError, match="none of 5 images has a ReaL label"):
        real_targets(images, every, [[]] * 30, np.arange(1000))
    digits = load_data("builtin:digits").splits["test"]
    with pytest.raises(VitcliError, match="no image has a name such as ILSVRC2012_val"):
        real_targets(digits, np.arange(3), [[1]] * 30, np.arange(1000))
