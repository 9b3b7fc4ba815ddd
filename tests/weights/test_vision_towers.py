"""Vision towers of CLIP, SigLIP, SigLIP 2 and AIMv2, against transformers with random weights."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.families import FLEX, VIT, both, random_model

from vitcli.errors import VitcliError
from vitcli.weights.feature_layers import set_representation
from vitcli.weights.huggingface.write_huggingface import write_huggingface
from vitcli.weights.load import load_model

transformers = pytest.importorskip("transformers")

NAMES = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2", "aimv2": "Aimv2"}


def tower(kind, **settings):
    """A vision model of transformers alone."""
    sizes = FLEX if kind == "siglip2" else VIT
    name = NAMES[kind]
    return random_model(f"{name}VisionModel", f"{name}VisionConfig", {**sizes, **settings})


def images_of(*size):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)


@pytest.mark.parametrize("kind", NAMES)
def test_files_of_transformers_4_have_a_prefix(tmp_path, kind):
    theirs = tower(kind)
    theirs.save_pretrained(tmp_path)
    expected = load_model(tmp_path).state_dict()
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {f"vision_model.{n.removeprefix('vision_model.')}": t for n, t in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    found = load_model(tmp_path).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_native_resolution_of_aimv2(tmp_path):
    theirs = tower("aimv2", is_native=True)
    theirs.save_pretrained(tmp_path)
    images = images_of(24, 48)
    with torch.no_grad():
        expected = theirs(images).pooler_output
        assert_close(load_model(tmp_path, image_size=(24, 48)).features(images), expected)


@pytest.mark.parametrize("size", [32, 37])  # 37 px are cut to 32
def test_a_folder_of_siglip_survives_the_way_through(tmp_path, size):
    """Theirs -> ours -> theirs: tensors, config.json, features and pixels."""
    theirs = tower("siglip", image_size=size)
    theirs.save_pretrained(tmp_path / "theirs")
    processor = transformers.SiglipImageProcessorPil(size={"height": size, "width": size})
    processor.save_pretrained(tmp_path / "theirs")
    write_huggingface(load_model(tmp_path / "theirs"), tmp_path / "ours")
    back = transformers.AutoModel.from_pretrained(tmp_path / "ours")
    assert type(back) is type(theirs)
    before, after = theirs.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    said, written = (
        json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("theirs", "ours")
    )
    assert {key: said[key] for key in written} == written
    images = images_of(size, size)
    with torch.no_grad():
        expected = theirs(images).pooler_output
        assert_close(back.eval()(images).pooler_output, expected)
        assert_close(load_model(tmp_path / "ours").features(images), expected)
    picture = Image.fromarray((np.arange(60 * 90 * 3) % 251).astype(np.uint8).reshape(60, 90, 3))
    found = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours", use_fast=False)
    pixels = [one(picture, return_tensors="np")["pixel_values"] for one in (found, processor)]
    np.testing.assert_allclose(*pixels, atol=2e-6)


@pytest.mark.parametrize(("kind", "projection"), [("clip", 20), ("siglip", None), ("aimv2", 20)])
def test_a_text_tower_is_left_out(tmp_path, kind, projection):
    name = NAMES[kind]
    theirs = random_model(f"{name}Model", f"{name}Config", both(VIT, projection))
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    images = images_of(32, 32)
    with torch.no_grad():
        embedded = theirs.get_image_features(images).pooler_output
        assert_close(model.network.projection(model.features(images)), embedded)
    assert "the text tower of the file is left out" in model.load_report.notes
    assert model.config.projection_size == projection


def test_representations_for_few_shot(tmp_path):
    """Class token, mean of the patches, or both; SigLIP has no class token."""
    images = images_of(32, 32)
    for kind, fits in (("clip", {"cls": 1, "mean": 1, "token_mean": 2}), ("siglip", {"mean": 1})):
        tower(kind).save_pretrained(tmp_path / kind)
        tokens = load_model(tmp_path / kind).network.tokens(images)
        for name, count in fits.items():
            model = load_model(tmp_path / kind)
            set_representation(model, name)
            features = model.features(images)
            assert features.shape == (2, count * 48)
            mean = tokens[:, kind == "clip" :].mean(dim=1)
            assert_close(features[:, -48:], tokens[:, 0] if name == "cls" else mean)
    with pytest.raises(VitcliError, match="needs the class token"):
        set_representation(load_model(tmp_path / "siglip"), "cls")


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
    for key, value in (("hidden_size", 96), ("num_hidden_layers", 3), ("hidden_act", "relu")):
        (tmp_path / "config.json").write_text(json.dumps({**described, key: value}))
        with pytest.raises(VitcliError, match=r"of another shape|the weights have|activation"):
            load_model(tmp_path)
