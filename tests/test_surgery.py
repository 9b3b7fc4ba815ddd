import numpy as np
import pytest
import torch

from vitcli.errors import VitcliError
from vitcli.vit import create_model
from vitcli.weights.load import load_model
from vitcli.weights.store import save_model
from vitcli.weights.surgery import change_pool, match_classes, prepare_finetune, resize


@pytest.fixture
def model():
    net = create_model(
        "Pico/8", num_classes=3, image_size=16, representation_size=20, depth=2, seed=1
    )
    torch.nn.init.normal_(net.head.weight)
    torch.nn.init.normal_(net.head.bias)
    net.labels, net.head_trained = ("cat", "dog", "eel"), True
    return net


def test_a_new_head_is_zero_and_both_old_layers_go(model):
    prepare_finetune(model, ["x", "y"], image_size=(32, 16))
    assert model.config.num_classes == 2 and model.config.representation_size is None
    assert model.labels == ("x", "y") and not model.head_trained
    out = model(torch.randn(2, 3, 32, 16))
    assert out.shape == (2, 2) and not out.any()
    assert not any(name.startswith("pre_logits") for name in model.state_dict())


def test_the_backbone_stays(model):
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = model.tokens(images)
        prepare_finetune(model, ["x", "y"])
        assert torch.equal(model.tokens(images), before)


def test_rows_of_known_classes_are_kept_by_name(model):
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = model(images)
        prepare_finetune(model, ["eel", "cat"], keep_head=True)
        torch.testing.assert_close(model(images), before[:, [2, 0]])
    assert model.head_trained and model.config.representation_size == 20


def test_unknown_classes_get_a_zero_head_all_the_same(model):
    prepare_finetune(model, ["eel", "fox"], keep_head=True)
    assert not model.head.weight.any() and not model.head_trained


def test_there_and_back_keeps_the_prefix(model):
    before = model.pos_embed.detach().clone()
    resize(model, (32, 48))
    assert model.config.grid == (4, 6)
    assert torch.equal(model.pos_embed[:, :1], before[:, :1])
    assert isinstance(model.pos_embed, torch.nn.Parameter)
    assert model(torch.randn(1, 3, 32, 48)).shape == (1, 3)


def test_timm_resampling(shared):
    """Square and not: the numbers of timm's `resample_abs_pos_embed`."""
    from vitcli.vit.position import resample

    found = np.load(shared / "reference/timm_vit/resample_abs_pos_embed/posembed.npz")
    cases = {name.split("/")[0] for name in found.files if name.startswith("case")}
    assert len(cases) >= 4
    for case in cases:
        if "bilinear" in case:
            continue
        old, new = case.split("_")[1].split("to")
        rows, cols = map(int, new.split("x"))
        prefix = int(case.split("prefix")[1][0])
        table = torch.from_numpy(found[f"{case}/in"])
        grid = resample(table[:, prefix:], (int(old), int(old)), (rows, cols))
        out = torch.cat([table[:, :prefix], grid], dim=1).numpy()
        assert np.abs(out - found[f"{case}/out"]).max() < 1e-5, case


def test_a_size_that_the_patch_does_not_divide(model):
    with pytest.raises(VitcliError, match="30x16 is not a multiple of patch size 8") as error:
        resize(model, (30, 16))
    assert "32x16" in error.value.hint


def test_pooling_changes_drop_what_was_trained_on_another(model):
    change_pool(model, "cls")
    assert model.head_trained  # the same pooling by another name
    change_pool(model, "gap")
    assert not model.head_trained and model.labels is None
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, 128)
    with pytest.raises(VitcliError, match="no attention pool"):
        change_pool(model, "map")
    with pytest.raises(VitcliError, match="no pooling `median`"):
        change_pool(model, "median")


def test_names_match():
    assert match_classes(["b", "a"], ["a", "b", "c"]) == [1, 0]
    assert match_classes(["b", "d"], ["a", "b"]) is None
    imagenet = ["tench, Tinca tinca", "goldfish, Carassius auratus", "English springer"]
    assert match_classes(["english_springer", "Tench"], imagenet) == [2, 0]
    assert match_classes(["crane"], ["crane, bird", "crane, machine"]) is None
    assert match_classes(["A", "a"], ["a", "b"]) is None  # never two onto one


def test_the_report_names_every_tensor(model, tmp_path):
    save_model(tmp_path / "m.safetensors", model)
    loaded = load_model(tmp_path / "m.safetensors", image_size=32)
    prepare_finetune(loaded, ["x"])
    report = loaded.load_report
    assert set(report.fates) == set(model.state_dict())
    assert report.fates["pos_embed"] == ("resampled", "2x2 -> 4x4, bicubic")
    line = report.line()
    assert "resampled: pos_embed (2x2 -> 4x4, bicubic)" in line
    assert "new: head.weight (zero, 1 classes)" in line
    assert "dropped: pre_logits.fc.weight (pre-training head)" in line
