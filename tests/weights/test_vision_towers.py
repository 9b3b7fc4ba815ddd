"""Vision towers of CLIP, SigLIP, SigLIP 2 and AIMv2, against transformers with random weights."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vitcli.errors import VitcliError
from vitcli.weights.load import load_model

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 30,
    "max_position_embeddings": 6,
    "eos_token_id": 29,
}
FLEX = {key: value for key, value in SIZES.items() if key != "image_size"} | {"num_patches": 16}
NAMES = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2", "aimv2": "Aimv2"}


def randomised(model, seed=0):
    """Give every parameter a random value that counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.startswith("logit"):
                scale = 1.0 if p.ndim == 1 and "norm" in name and name.endswith("weight") else 0.0
                p.copy_(scale + 0.3 * torch.randn(p.shape, generator=generator))
    return model.eval()


def tower(kind, **settings):
    """A vision model of transformers alone."""
    sizes = FLEX if kind == "siglip2" else SIZES
    config = getattr(transformers, f"{NAMES[kind]}VisionConfig")(**{**sizes, **settings})
    return randomised(getattr(transformers, f"{NAMES[kind]}VisionModel")(config))


def both_towers(kind, cls="Model", vision=None, **settings):
    """A model of transformers with a text tower, or a classifier with its config."""
    sizes = {**(FLEX if kind == "siglip2" else SIZES), **(vision or {})}
    text = {**TEXT, **({"projection_size": 32} if "siglip" in kind else {})}
    config = getattr(transformers, f"{NAMES[kind]}Config")(
        vision_config=sizes, text_config=text, **settings
    )
    return randomised(getattr(transformers, f"{NAMES[kind]}{cls}")(config))


def as_naflex(images, patch=8):
    """(B, C, Y, X) -> the arguments of SigLIP 2, whose images are patches of one length."""
    rows, cols = (side // patch for side in images.shape[2:])
    patches = images.unflatten(3, (cols, patch)).unflatten(2, (rows, patch))
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.long),
        "spatial_shapes": torch.tensor([[rows, cols]] * len(images)),
    }


def arguments(kind, images, **others):
    return as_naflex(images) if kind == "siglip2" else {"pixel_values": images, **others}


def images_of(*size):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)


TOWERS = [
    ("clip", {}),
    ("clip", {"hidden_act": "gelu", "layer_norm_eps": 1e-3}),
    ("siglip", {}),
    ("siglip", {"vision_use_head": False}),
    ("siglip2", {}),
    ("aimv2", {}),
    ("aimv2", {"qkv_bias": True, "mlp_bias": True}),
    ("aimv2", {"use_head": False, "is_native": True}),
]


@pytest.mark.parametrize(("kind", "settings"), TOWERS)
@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_features_of_a_tower(tmp_path, kind, settings, prefix):
    """Files of transformers 4 have a prefix before all names."""
    theirs = tower(kind, **settings)
    theirs.save_pretrained(tmp_path)
    if prefix:
        tensors = load_file(tmp_path / "model.safetensors")
        renamed = {f"{prefix}{name.removeprefix(prefix)}": t for name, t in tensors.items()}
        save_file(renamed, tmp_path / "model.safetensors")
    model = load_model(tmp_path)
    images = images_of(32, 32)
    with torch.no_grad():
        out = theirs(**arguments(kind, images))
        tokens = model.network.tokens(images)
        last = out.last_hidden_state
        assert_close(tokens, theirs.post_layernorm(last) if kind == "clip" else last)
        expected = out.pooler_output if out.pooler_output is not None else last.mean(dim=1)
        assert_close(model.features(images), expected)
        assert_close(model(images), expected)
    assert model.config.num_classes == 0 and not model.head_trained
    assert not model.load_report.names("new")


@pytest.mark.parametrize("size", [(40, 40), (24, 48)])
@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2"])
def test_another_resolution(tmp_path, kind, size):
    theirs = tower(kind)
    theirs.save_pretrained(tmp_path)
    images = images_of(*size)
    model = load_model(tmp_path, image_size=size)
    with torch.no_grad():
        expected = theirs(**arguments(kind, images, interpolate_pos_encoding=True))
        assert_close(model.features(images), expected.pooler_output)


def test_native_resolution_of_aimv2(tmp_path):
    theirs = tower("aimv2", is_native=True)
    theirs.save_pretrained(tmp_path)
    images = images_of(24, 48)
    with torch.no_grad():
        expected = theirs(images).pooler_output
        assert_close(load_model(tmp_path, image_size=(24, 48)).features(images), expected)


@pytest.mark.parametrize("kind", NAMES)
def test_a_text_tower_is_left_out(tmp_path, kind):
    theirs = both_towers(kind)
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    images = images_of(32, 32)
    with torch.no_grad():
        expected = theirs.vision_model(**arguments(kind, images)).pooler_output
        assert_close(model.features(images), expected)
        embedded = theirs.get_image_features(**arguments(kind, images)).pooler_output
        assert_close(model.network.projection(model.features(images)), embedded)
    assert "the text tower of the file is left out" in model.load_report.notes
    assert model.config.projection_size == (None if "siglip" in kind else 512)


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2"])
def test_a_classifier_of_a_tower(tmp_path, kind):
    theirs = both_towers(kind, "ForImageClassification", id2label={0: "cat", 1: "dog", 2: "owl"})
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    images = images_of(32, 32)
    with torch.no_grad():
        assert_close(model(images), theirs(**arguments(kind, images)).logits)
    assert model.labels == ("cat", "dog", "owl") and model.head_trained


def test_an_image_embedding_is_a_projection_of_the_features(tmp_path):
    config = transformers.CLIPVisionConfig(**SIZES, projection_dim=20)
    theirs = randomised(transformers.CLIPVisionModelWithProjection(config))
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    images = images_of(32, 32)
    with torch.no_grad():
        embedded = model.network.projection(model.features(images))
        assert_close(embedded, theirs(images).image_embeds)


@pytest.mark.parametrize(
    ("kind", "processor", "settings"),
    [
        ("clip", "CLIPImageProcessorPil", {"size": 32, "crop_size": 32}),
        ("aimv2", "CLIPImageProcessorPil", {"size": {"shortest_edge": 36}, "crop_size": 32}),
        ("siglip", "SiglipImageProcessorPil", {"size": {"height": 32, "width": 32}}),
    ],
)
def test_pictures_as_the_processor_makes_them(tmp_path, kind, processor, settings):
    tower(kind).save_pretrained(tmp_path)
    theirs = getattr(transformers, processor)(**settings)
    theirs.save_pretrained(tmp_path)
    preprocess = load_model(tmp_path).preprocess
    rng = np.random.default_rng(0)
    for rows, cols in ((64, 96), (80, 40), (32, 32)):
        picture = Image.fromarray(rng.integers(0, 256, (rows, cols, 3), dtype=np.uint8))
        expected = theirs(picture, return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(preprocess(picture).numpy(), expected, atol=2e-6)


@pytest.mark.parametrize(
    ("kind", "mean", "mode"),
    [
        ("clip", 0.48145466, "crop"),
        ("aimv2", 0.48145466, "crop"),
        ("siglip", 0.5, "squash"),
        ("siglip2", 0.5, "squash"),
    ],
)
def test_without_a_processor_the_familys_own_is_assumed(tmp_path, kind, mean, mode):
    tower(kind).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    p = model.preprocess
    assert (p.mean[0], p.resize_mode) == (mean, mode) and p.image_size == (32, 32)
    notes = " ".join(model.load_report.notes)
    assert "no preprocessor_config.json: assumed" in notes
    assert ("CLIP's mean" in notes) == (mean != 0.5)


@pytest.mark.parametrize("kind", NAMES)
def test_a_damaged_or_half_fitting_file_is_refused_in_words(tmp_path, kind):
    """Without any one tensor, and with a config.json of another size."""
    tower(kind).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in tensors:
        if "patch_embed" not in name:  # without it, it is no Vision Transformer
            rest = {key: value for key, value in tensors.items() if key != name}
            save_file(rest, tmp_path / "model.safetensors")
            with pytest.raises(VitcliError, match=r"missing: |the weights have"):
                load_model(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    described = json.loads((tmp_path / "config.json").read_text())
    for key, value in (("hidden_size", 64), ("num_hidden_layers", 3), ("hidden_act", "relu")):
        (tmp_path / "config.json").write_text(json.dumps({**described, key: value}))
        with pytest.raises(VitcliError, match=r"of another shape|the weights have|activation"):
            load_model(tmp_path)
