"""The report of a load names every tensor."""

import pytest
from safetensors.torch import save_file
from support.watching import Told

from vitcli.preprocess import Preprocess
from vitcli.weights.edit import change_pool, prepare_finetune
from vitcli.weights.load import load_model
from vitcli.weights.load_report import note_load_report
from vitcli.weights.loaded import create_model
from vitcli.weights.store import save_model


@pytest.fixture
def file(here):
    net = create_model("Pico/8", depth=1, image_size=32, num_classes=7, representation_size=5)
    net.preprocess, net.head_trained = Preprocess(image_size=(32, 32)), True
    net.labels = tuple("abcdefg")
    save_model("m.safetensors", net)
    return "m.safetensors"


def rows(model):
    """Tensor name -> (status, the rest of its line)."""
    lines = [line.split() for line in model.load_report.table(model)]
    assert len({name for _, name, *_ in lines}) == len(lines)
    return {name: (status, " ".join(rest)) for status, name, *rest in lines}


def test_every_tensor_once_with_its_shape(file):
    model = load_model(file)
    found = rows(model)
    for name, tensor in model.state_dict().items():
        assert found.pop(name) == ("loaded", "x".join(map(str, tensor.shape)))
    assert found == {}
    assert model.load_report.line() == f"{len(model.state_dict())} tensors loaded (vitcli)"


def test_resampled_new_and_dropped(file):
    model = prepare_finetune(load_model(file), ["cat", "dog"], image_size=(48, 32))
    found = rows(model)
    assert found["pos_embed"] == (
        "resampled",
        "1x25x128 4x4 -> 6x4, bicubic; 1x17x128 in the file",
    )
    assert found["head.weight"][0] == "new"
    assert found["head.weight"][1].startswith("2x128 ")
    assert found["head.weight"][1].endswith("zero, 2 classes, replaces 7x5")
    assert found["pre_logits.fc.weight"][0] == "dropped"
    assert "5x128" in found["pre_logits.fc.weight"][1]
    assert set(model.state_dict()) <= set(found)
    line = model.load_report.line()
    assert "resampled: pos_embed (4x4 -> 6x4, bicubic)" in line and "new: head.weight" in line


def test_a_head_that_another_pooling_leaves_behind(file):
    model = load_model(file)
    change_pool(model, "mean")
    found = rows(model)
    assert {n for n, (status, _) in found.items() if status == "dropped"} == {
        "head.weight",
        "head.bias",
        "pre_logits.fc.weight",
        "pre_logits.fc.bias",
    }
    assert "7x5" in found["head.weight"][1] and "`token`" in found["head.weight"][1]


def test_what_is_not_float32_and_what_a_classifier_does_not_use(here):
    net = create_model("Ti/16", image_size=32, num_classes=3, depth=12)
    tensors = {name: tensor.bfloat16() for name, tensor in net.state_dict().items()}
    save_file({**tensors, "mask_token": tensors["cls_token"].clone()}, "timm.safetensors")
    model = load_model("timm.safetensors")
    found = rows(model)
    assert found["norm.weight"] == ("loaded", "192 from torch.bfloat16")
    assert found["mask_token"] == ("dropped", "1x1x192 used only by masked-image training")


def test_one_line_or_all(file):
    model, short, long = load_model(file), Told(), Told()
    note_load_report(model, short)
    note_load_report(model, long, verbose=True)
    assert short.notes == [*model.load_report.notes, model.load_report.line()]
    assert long.notes == [*short.notes, *model.load_report.table(model)]


def test_random_weights_are_all_new():
    model = load_model("Pico/8")
    assert model.load_report.line() == f"{len(model.state_dict())} tensors new (variant)"
    assert {status for status, _ in rows(model).values()} == {"new"}
