"""Classes of the data and outputs of a model: names, synsets, numbers, class maps."""

import json

import numpy as np
import pytest

from vitcli.errors import VitcliError
from vitcli.evals.class_matching import (
    ClassMatching,
    imagenet_outputs,
    match_outputs,
    read_class_map,
)
from vitcli.progress import Quiet
from vitcli.weights.imagenet import imagenet_names, imagenet_synsets, synset_outputs
from vitcli.weights.loaded import create_model


def model(labels, outputs=None):
    net = create_model("Pico/8", image_size=8, num_classes=outputs or len(labels), depth=1)
    net.labels = None if labels is None else tuple(labels)
    return net


class Notes(Quiet):
    def __init__(self):
        self.lines = []

    def note(self, message):
        self.lines.append(message)


@pytest.fixture(scope="module")
def imagenet():
    return model(imagenet_names(1000))


def test_synsets_are_the_folders_of_imagenet(imagenet):
    notes = Notes()
    found = match_outputs(imagenet, ["n01443537", "n01440764", "n15075141"], "imagenet-a", notes)
    assert found.outputs == ((1,), (0,), (999,))
    assert found.display_names == ("goldfish", "tench", "toilet tissue")
    assert "synsets" in notes.lines[0]


def test_synsets_of_other_makes():
    synsets, names = imagenet_synsets(1000), imagenet_names(1000)
    first = [name.split(",")[0] for name in names]  # as many publishers shorten them
    in_order = {synset: i for i, synset in enumerate(synsets)}
    assert synset_outputs(1000, first) == in_order == synset_outputs(1000, None)
    assert synset_outputs(3, synsets[5:8]) == {synset: i for i, synset in enumerate(synsets[5:8])}
    # Ten classes in an order of their own, by name.
    few = ["golf_ball", "tench, Tinca tinca", "Church"]
    assert synset_outputs(3, few) == {"n03445777": 0, "n01440764": 1, "n03028079": 2}
    assert synset_outputs(2, ["cat", "dog"]) == {}
    known = synset_outputs(21843, imagenet_names(21843))
    assert imagenet_synsets(21843)[known["n01440764"]] == "n01440764"


def test_numbers_are_outputs():
    """Folders 0..11, which sort as text, of a model with names of its own."""
    net = model([f"class {i}" for i in range(12)])
    classes = sorted(map(str, range(12)))
    assert classes[2] == "10"
    notes = Notes()
    found = match_outputs(net, classes, "v2", notes)
    assert [one[0] for one in found.outputs] == [int(name) for name in classes]
    assert "numbers" in notes.lines[0]
    with pytest.raises(VitcliError, match="lacks 11 of the 11"):
        match_outputs(net, classes[1:], "v2", notes)  # not all: they may be other things
    with pytest.raises(VitcliError, match="lacks"):
        match_outputs(
            model(list("abcdefghij")), [str(i) for i in range(10)], "builtin:digits", notes
        )


@pytest.mark.parametrize("width", [1, 2])
def test_numbers_of_a_model_without_names(width):
    """Folders 0..11 in text order: output 2 is `2`, not `10`."""
    classes = sorted(f"{i:0{width}}" for i in range(12))
    notes = Notes()
    found = match_outputs(model(None, 12), classes, "photos", notes)
    assert [one[0] for one in found.outputs] == [int(name) for name in classes]
    assert "output numbers 0–11" in notes.lines[0]


def test_words_of_a_model_without_names():
    notes = Notes()
    found = match_outputs(model(None, 3), ["ant", "bee", "10"], "photos", notes)
    assert found.outputs == ((0,), (1,), (2,))
    assert "in the data's order: 0 is `ant`, 1 is `bee`, 2 is `10`" in notes.lines[0]
    assert "--labels FILE" in notes.lines[0]


def test_some_numbers_of_imagenet(imagenet):
    found = match_outputs(imagenet, ["10", "999", "2"], "v2", Quiet())
    assert found.outputs == ((10,), (999,), (2,))


def write(path, text):
    path.write_text(text)
    return read_class_map(path)


def test_class_maps_of_every_kind(tmp_path, imagenet):
    # As ObjectNet publishes its map: names of folders differ by case and signs.
    said = {
        "Alarm clock": "analog clock; digital clock",
        "Backpack": "backpack, back pack, knapsack, packsack, rucksack, haversack",
        "Bills (money)": ["n01440764", 7],
        "Banana": "954",
    }
    mapped = write(tmp_path / "map.json", json.dumps(said))
    notes = Notes()
    classes = ["alarm_clock", "backpack", "banana", "bills_money", "air_freshener"]
    found = match_outputs(imagenet, classes, "objectnet", notes, mapped)
    assert found.classes == ("alarm_clock", "backpack", "banana", "bills_money")
    assert found.outputs == ((409, 530), (414,), (954,), (0, 7))
    assert found.data_indices.tolist() == [0, 1, 2, 3]
    assert notes.lines == ["1 of 5 classes is not in the class map and left out"]
    rows = write(tmp_path / "map.csv", "alarm_clock,409\nalarm_clock,digital clock\n")
    assert match_outputs(imagenet, classes, "x", notes, rows).outputs == ((409, 530),)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("m.json", "[1]", "does not hold a JSON object"),
        ("m.json", "{", "cannot read the class map"),
        ("m.json", '{"a": 1.5}', "`a` has the invalid value 1.5"),
        ("m.json", '{"a": []}', "`a` has no model class"),
        ("m.csv", "a,b,c\n", "line 1 of .* has 3 columns, not 2"),
        ("m.csv", "", "is empty"),
    ],
)
def test_maps_that_are_none(tmp_path, name, text, words):
    with pytest.raises(VitcliError, match=words):
        write(tmp_path / name, text)
    with pytest.raises(VitcliError, match="cannot read the class map"):
        read_class_map(tmp_path / "nowhere.json")


def test_maps_that_do_not_fit():
    net = model(["cat", "dog"])
    with pytest.raises(VitcliError, match=r"names 2 classes that the model.*`dgo`, `5`") as error:
        match_outputs(net, ["a", "b"], "x", Quiet(), {"a": ("dgo",), "b": (5,)})
    assert "did you mean `dog`?" in error.value.hint
    with pytest.raises(VitcliError, match="none of the classes of `x`, such as `a`"):
        match_outputs(net, ["a", "b"], "x", Quiet(), {"c": ("dog",)})


def test_outputs_back_to_classes():
    both = ClassMatching(("a", "b"), ((4, 1), (2,)), np.arange(2))
    assert both.to_data_classes(np.array([1, 4, 2, 0, 7])).tolist() == [0, 0, 1, 2, 2]
    assert both.all_outputs.tolist() == [1, 2, 4] and both.first_outputs.tolist() == [4, 2]


def test_all_of_imagenet_or_none(imagenet):
    assert imagenet_outputs(imagenet).tolist() == list(range(1000))
    with pytest.raises(VitcliError, match="lacks 1000 of the 1000 classes of ImageNet-1k"):
        imagenet_outputs(model(["cat", "dog"]))
