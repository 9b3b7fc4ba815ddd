"""ImageNet's class names, against the facts that are known of them and the data that has them."""

import json

import pyarrow.parquet as pq
import pytest
from support.watching import Told

from vitcli.weights.edit import match_classes
from vitcli.weights.imagenet import imagenet_names
from vitcli.weights.load import load_model
from vitcli.weights.load_report import UNNAMED, LoadReport, note_load_report
from vitcli.weights.loaded import create_model

# Index -> what any list of ImageNet-1k has there.
ANCHORS = {
    0: "tench",
    207: "golden retriever",
    281: "tabby",
    404: "airliner",
    817: "sports car",
    850: "teddy",
    999: "toilet tissue",
}


@pytest.mark.parametrize("count", [1000, 21841, 21843])
def test_as_many_names_as_classes_all_different(count):
    names = imagenet_names(count)
    assert len(names) == count == len(set(names))
    assert all(name == name.strip() and name for name in names)


def test_anchors():
    names = imagenet_names(1000)
    for index, first in ANCHORS.items():
        assert names[index].split(",")[0] == first
    assert names[134] == "crane, n02012849" and names[517] == "crane, n03126707"
    assert names[638] == "maillot" and names[639] == "maillot, tank suit"
    assert imagenet_names(10) is None


def test_the_two_21k_lists_differ_by_two_classes():
    """Google's set has two synsets that the release of autumn 2011 lacks."""
    google, autumn = imagenet_names(21843), imagenet_names(21841)
    known = set(autumn)
    assert [name for name in google if name in known] == list(autumn)


def test_1k_and_21k_have_most_names_in_common():
    """One synset of ImageNet-1k is not in ImageNet-21k, and some words are ambiguous there."""
    shared = set(imagenet_names(1000)) & set(imagenet_names(21843))
    assert 900 < len(shared) < 1000 and "teddy, teddy bear" not in shared


def test_names_match_those_of_data(shared):
    """The ten classes of imagenette, as its ClassLabel spells them."""
    schema = pq.read_schema(shared / "data/imagenette_val500/test.parquet")
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    names = features["label"]["names"]
    assert match_classes(names, imagenet_names(1000)) == [
        *(0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
    ]


def test_a_thousand_outputs_without_names(shared):
    path = shared / "data/weights/vit_tiny_patch16_224_in1k/timm.safetensors"
    model = load_model(path, num_heads=3, gelu="exact", preprocess={"mean": 0.5, "std": 0.5})
    assert model.labels == imagenet_names(1000)
    note = "1000 outputs have no names: assumed the classes of ImageNet-1k"
    assert note in model.load_report.notes
    own = [f"c{i}" for i in range(1000)]
    named = load_model(
        path, num_heads=3, gelu="exact", preprocess={"mean": 0.5, "std": 0.5}, labels=own
    )
    assert named.labels == tuple(own) and note not in named.load_report.notes


def test_a_new_head_needs_no_names():
    net = create_model("mu/4", num_classes=2, image_size=8)
    notes = [f"1000 {UNNAMED}: assumed", "assumed 3 heads"]
    net.load_report = LoadReport(source="x", layout="timm", notes=notes)
    for new_head in (True, False):
        told = Told()
        note_load_report(net, told, new_head=new_head)
        assert any(UNNAMED in line for line in told.notes) is not new_head
        assert "assumed 3 heads" in told.notes
