"""Folders of DINOv3: settings, image processor, refusals. `test_families.py` has the features."""

import json

import pytest
import torch
from support.families import FAMILIES, GATED, random_model

from vitcli.errors import VitcliError
from vitcli.weights.from_checkpoint import build_model
from vitcli.weights.huggingface.read_huggingface import read_huggingface
from vitcli.weights.load import load_model
from vitcli.weights.overrides import Overrides

pytest.importorskip("transformers")

PUBLIC = {  # preprocessor_config.json of facebook/dinov3-vits16-pretrain-lvd1689m
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "DINOv3ViTImageProcessorFast",
    "image_std": [0.229, 0.224, 0.225],
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 32, "width": 32},
}


@pytest.fixture(scope="module")
def gated():
    """A small S+ of transformers."""
    settings = {**FAMILIES["dinov3_vit"].models[0][1], **GATED}
    return random_model("DINOv3ViTModel", "DINOv3ViTConfig", settings)


def read(theirs, tensors=None, **values):
    """The model of these files, without a folder."""
    described = {**theirs.config.to_dict(), **values}
    tensors = theirs.state_dict() if tensors is None else tensors
    return build_model(read_huggingface(tensors, "folder", described, None, Overrides()), "folder")


def test_training_of_the_public_weights_is_kept(gated):
    config = read(gated).config
    assert (config.rope, config.rope_theta, config.rope_rescale) == ("centred", 100.0, 2.0)
    assert (config.pool, config.position, config.norm_eps) == ("token", "none", 1e-5)
    moved = read(gated, pos_embed_shift=0.1, pos_embed_jitter=1.5, pos_embed_rescale=None).config
    assert (moved.rope_shift, moved.rope_jitter, moved.rope_rescale) == (0.1, 1.5, None)


def test_a_half_folder_is_refused_in_words(gated):
    """Without any one tensor of the first block and of the embedding, or with another shape."""
    tensors = gated.state_dict()
    first = [n for n in tensors if "layer.1." not in n and "mask_token" not in n]
    assert len(first) > 20
    for key in first:
        rest = {name: tensor for name, tensor in tensors.items() if name != key}
        for half in (rest, {**tensors, key: torch.cat([tensors[key]] * 2)}):
            with pytest.raises(VitcliError, match=r"missing|another shape|not part of|weights"):
                read(gated, half)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden_size": 96}, "another shape"),
        ({"num_hidden_layers": 3}, "`num_hidden_layers` is 3, the weights have 2"),
        ({"num_register_tokens": 3}, r"reg_token is \(1, 4, 48\), not \(1, 3, 48\)"),
        ({"num_attention_heads": 5}, "5 heads"),
        ({"num_attention_heads": 24}, "heads whose width 4 divides"),
        ({"hidden_act": "gelu"}, "gated MLP with the unsupported activation `gelu`"),
        ({"use_gated_mlp": False, "hidden_act": "gelu"}, r"mlp.fc1.weight is \(160, 48\), not"),
        ({"proj_bias": False}, "`proj_bias` is false"),
        ({"mlp_bias": False}, "`mlp_bias` is false"),
        ({"query_bias": False}, "query and value have a bias, or neither"),
        ({"key_bias": True}, "missing: `blocks.0.attn.qkv.bias`"),
        ({"rope_theta": 0.5}, "rope_theta is 0.5"),
        ({"rope_theta": "warm"}, "config.json of `folder` is invalid"),
        ({"pos_embed_rescale": 0.5}, "rope_rescale is 0.5"),
        ({"patch_size": [8, 4]}, "patches of 8x4"),
    ],
)
def test_a_config_that_contradicts(gated, values, words):
    with pytest.raises(VitcliError, match=words):
        read(gated, **values)


def test_the_image_processor(gated, tmp_path):
    gated.save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(PUBLIC))
    p = load_model(tmp_path).preprocess
    assert (p.resize_mode, p.interpolation, p.image_size) == ("squash", "bilinear", (32, 32))
    assert (p.mean, p.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    path.write_text(json.dumps({**PUBLIC, "size": {"height": 48, "width": 64}}))
    model = load_model(tmp_path)  # rotary positions fit every size
    assert model.preprocess.image_size == (48, 64) and model.config.image_size == (32, 32)
    note = "images are 48x64 px, as in its preprocessor_config.json, not 32x32 px"
    assert note in model.load_report.notes
    bare = {"image_processor_type": "DINOv3ViTImageProcessorFast"}  # the values of the class
    path.write_text(json.dumps(bare))
    p = load_model(tmp_path).preprocess
    assert (p.interpolation, p.mean, p.image_size) == (
        "bilinear",
        (0.485, 0.456, 0.406),
        (224, 224),
    )
    path.unlink()
    model = load_model(tmp_path)
    assert model.preprocess.mean == (0.485, 0.456, 0.406)
    assert "no preprocessor_config.json" in " ".join(model.load_report.notes)
