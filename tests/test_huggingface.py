"""Hugging Face folders, against numbers of transformers and against transformers itself."""

import json
import shutil

import numpy as np
import pytest
import torch

from vitcli.errors import VitcliError
from vitcli.weights.load import load_model

CASES = 3


def test_reference_logits(shared):
    cases = sorted((shared / "reference/hf_vit").glob("vit_cls*"))
    assert len(cases) >= CASES
    for folder in cases:
        io = np.load(folder / "io.npz")
        model = load_model(folder)
        with torch.no_grad():
            logits = model(torch.from_numpy(io["pixel_values"])).numpy()
        assert np.abs(logits - io["logits"]).max() < 1e-5, folder
        assert model.labels[0] == "class_0" and model.head_trained
        p = model.preprocess
        assert (p.resize_mode, p.interpolation, p.mean) == ("squash", "bilinear", (0.5,) * 3)


def test_masked_image_model_is_a_backbone(shared):
    model = load_model(shared / "reference/hf_vit/vit_mim")
    assert model.labels is None and not model.head_trained
    assert len(model.load_report.names("dropped")) == 3


@pytest.mark.parametrize("kind", ["deit_distilled", "dinov2_reg"])
def test_other_models_are_refused(shared, kind):
    with pytest.raises(VitcliError, match="model, which is not understood") as error:
        load_model(shared / "reference/hf_vit" / kind)
    assert "ViTForImageClassification" in error.value.hint


@pytest.mark.parametrize("pooler", [True, False])
@pytest.mark.parametrize("act", ["gelu", "gelu_new"])
def test_features_of_a_vit_model(tmp_path, pooler, act):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=[16, 24],
        patch_size=8,
        layer_norm_eps=1e-3,
        hidden_act=act,
        qkv_bias=not pooler,
    )
    theirs = transformers.ViTModel(config, add_pooling_layer=pooler).eval()
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        out = theirs(images)
        expected = out.pooler_output if pooler else out.last_hidden_state[:, 0]
        torch.testing.assert_close(model.features(images), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            model.tokens(images), out.last_hidden_state, atol=1e-5, rtol=1e-5
        )
    assert not model.head_trained and model.labels is None
    assert "no preprocessor_config.json" in model.load_report.notes[0]


def test_the_processor(shared, tmp_path):
    folder = shutil.copytree(shared / "reference/hf_vit/vit_cls", tmp_path / "m")
    folder.chmod(0o755)
    path = folder / "preprocessor_config.json"
    path.unlink()
    said = {
        "size": {"shortest_edge": 40},
        "do_center_crop": True,
        "crop_size": {"height": 32, "width": 32},
        "resample": 3,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "rescale_factor": 2 / 255,
    }
    path.write_text(json.dumps(said))
    p = load_model(folder).preprocess
    assert (p.resize_mode, p.resize_size, p.interpolation) == ("crop", 40, "bicubic")
    np.testing.assert_allclose((p.mean, p.std), ([0.05, 0.1, 0.15], [0.2, 0.25, 0.3]))
    path.write_text(json.dumps({**said, "resample": 9}))
    with pytest.raises(VitcliError, match="filter that is not understood: 9"):
        load_model(folder)


def test_names_that_transformers_puts_in(shared, tmp_path):
    folder = shutil.copytree(shared / "reference/hf_vit/vit_cls", tmp_path / "m")
    folder.chmod(0o755)
    described = json.loads((folder / "config.json").read_text())
    described["id2label"] = {str(i): f"LABEL_{i}" for i in range(7)}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(described))
    assert load_model(folder).labels is None
    assert load_model(folder, labels=list("abcdefg")).labels == tuple("abcdefg")
    (folder / "config.json").unlink()
    with pytest.raises(VitcliError, match=r"no config\.json of theirs"):
        load_model(folder)
