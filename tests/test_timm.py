"""timm's layout, against numbers that timm computed."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vitcli.errors import VitcliError
from vitcli.vit import create_model
from vitcli.weights.load import load_model, require_preprocess

CASES = 4


@pytest.fixture
def plain(tmp_path):
    """A small file in timm's layout that says nothing about itself, and its model."""
    net = create_model("Pico/4", num_classes=10, image_size=28, num_channels=1, depth=2)
    torch.nn.init.normal_(net.head.weight)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors", net


def test_reference_logits(shared):
    cases = sorted((shared / "reference/timm_vit").glob("*/model.safetensors"))
    assert len(cases) >= CASES
    for path in cases:
        io = np.load(path.parent / "io.npz")
        model = load_model(path, num_heads=3)
        with torch.no_grad():
            images = torch.from_numpy(io["images"])
            assert np.abs(model(images).numpy() - io["logits"]).max() < 1e-5, path
            assert np.abs(model.features(images).numpy() - io["pre_logits"]).max() < 1e-5, path


def test_what_the_file_does_not_say_is_named(plain):
    path, _ = plain
    with pytest.raises(VitcliError) as error:
        load_model(path)
    keys = ("model.num_heads", "preprocess.mean", "preprocess.std")
    assert all(key in error.value.message and key in error.value.hint for key in keys)
    model = load_model(path, num_heads=4)
    with pytest.raises(VitcliError) as error:
        require_preprocess(model)
    assert "model.num_heads" not in error.value.message
    assert "`preprocess.mean`, `preprocess.std`" in error.value.message
    model = load_model(path, num_heads=4, preprocess={"mean": 0.5, "std": [0.25]})
    assert (model.preprocess.mean, model.preprocess.std) == ((0.5,), (0.25,))
    assert model.preprocess.num_channels == 1


def test_settings_reach_the_config(plain):
    path, net = plain
    model = load_model(path, num_heads=8, norm_eps=1e-5, gelu="tanh", pool="gap")
    assert (model.config.num_heads, model.config.norm_eps) == (8, 1e-5)
    assert (model.config.gelu, model.config.pool) == ("tanh", "mean")
    assert torch.equal(model.head.weight, net.head.weight)  # the user says what the head reads
    with pytest.raises(VitcliError, match="5, which does not divide width 128"):
        load_model(path, num_heads=5)


def test_quadrants_have_no_head_in_timm(plain):
    model = load_model(plain[0], num_heads=4, pool="quadrants")
    assert model.config.num_classes == 0 and not model.head_trained
    assert model.load_report.fates["head.weight"][0] == "dropped"
    assert model.features(torch.zeros(1, 1, 28, 28)).shape == (1, 512)


def test_the_variant_says_heads_and_normalisation(tmp_path):
    net = create_model("Ti/16", num_classes=5, image_size=32)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    model = load_model(tmp_path / "w.safetensors")
    assert model.config == net.config
    assert model.preprocess.mean == (0.5, 0.5, 0.5)
    notes = " ".join(model.load_report.notes)
    assert "3 heads" in notes and "assumed" in notes and model.labels is None


def test_the_hub_config_beside_it(plain):
    path, _ = plain
    hub = {
        "architecture": "vit_base_patch16_224",
        "num_classes": 10,
        "global_pool": "avg",
        "model_args": {"num_heads": 2, "fc_norm": False},
        "pretrained_cfg": {
            "input_size": [1, 28, 28],
            "mean": [0.2],
            "std": [0.3],
            "crop_pct": 0.7,
            "interpolation": "bilinear",
            "label_names": [f"n{i}" for i in range(10)],
        },
    }
    (path.parent / "config.json").write_text(json.dumps(hub))
    for given in (path, path.parent):
        model = load_model(given)
        p = model.preprocess
        assert (p.mean, p.std, p.crop_fraction) == ((0.2,), (0.3,), 0.7)
        assert p.interpolation == "bilinear"
        assert (model.config.num_heads, model.config.pool) == (2, "mean")
        assert model.labels[3] == "n3"
    assert load_model(path, num_heads=4).config.num_heads == 4  # what is said goes first
    (path.parent / "config.json").write_text("{")
    with pytest.raises(VitcliError, match="cannot be read as JSON"):
        load_model(path)


def test_common_prefixes_go(plain):
    path, net = plain
    save_file({f"module.{k}": v for k, v in load_file(path).items()}, path)
    model = load_model(path, num_heads=4)
    assert torch.equal(model.pos_embed, net.pos_embed)


def test_a_grid_that_is_not_square(tmp_path):
    net = create_model("Pico/8", image_size=(16, 40), depth=1)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(VitcliError, match="no square grid"):
        load_model(tmp_path / "w.safetensors", num_heads=4)
    model = load_model(tmp_path / "w.safetensors", num_heads=4, image_size=(16, 40))
    assert model.config.grid == (2, 5) and not model.load_report.names("resampled")


def test_another_architecture_is_named(tmp_path):
    net = create_model("Pico/8", image_size=16, depth=1)
    extra = {"dist_token": torch.zeros(1, 1, 128)}
    save_file({**net.state_dict(), **extra}, tmp_path / "w.safetensors")
    with pytest.raises(VitcliError, match="not part of the model: dist_token"):
        load_model(tmp_path / "w.safetensors", num_heads=4)
    save_file({"layer1.0.conv1.weight": torch.zeros(3)}, tmp_path / "w.safetensors")
    with pytest.raises(VitcliError, match=r"does not hold a Vision .* layer1\.0\.conv1\.weight"):
        load_model(tmp_path / "w.safetensors")
