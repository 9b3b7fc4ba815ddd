"""Hugging Face folders, against numbers of transformers and against transformers itself."""

import itertools
import json
import shutil
from contextlib import suppress

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import CLASSES, VIT, random_model

from vitcli.errors import VitcliError
from vitcli.weights.load import load_model

REFERENCES = {
    "deit_distilled",
    "dinov2_reg",
    "vit_cls",
    "vit_cls_lowvar",
    "vit_cls_newkeys",
    "vit_mim",
}


def copied(shared, name, tmp_path):
    """A writable copy of a reference folder."""
    folder = tmp_path / name
    folder.mkdir()
    for file in (shared / "reference/hf_vit" / name).iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def worst(ours, theirs):
    return float(np.abs(ours.numpy() - theirs).max())


def hidden_states(model, images):
    """The input of the first block, then the output of each."""
    states = [model.network.embed(images)]
    for block in model.network.blocks:
        block.register_forward_hook(lambda *parts: states.append(parts[-1]))
    model(images)
    return states


def test_every_reference_case(shared):
    cases = sorted(p.parent for p in (shared / "reference/hf_vit").glob("*/io.npz"))
    assert len(cases) >= len(REFERENCES)
    assert {p.name for p in cases} >= REFERENCES
    compared = 0
    for folder in cases:
        io = np.load(folder / "io.npz")
        model = load_model(folder)
        x = torch.from_numpy(io["pixel_values"])
        with torch.no_grad():
            if "logits" in io:
                assert worst(model(x), io["logits"]) < 5e-5, folder
                compared += 1
            if "distillation_logits" in io:
                tokens = model.network.tokens(x)
                assert worst(model.network.head(tokens[:, 0]), io["cls_logits"]) < 5e-5
                assert (
                    worst(model.network.head_dist(tokens[:, 1]), io["distillation_logits"]) < 5e-5
                )
                compared += 1
            if "hidden_0" in io:
                for i, z in enumerate(hidden_states(model, x)):
                    assert worst(z, io[f"hidden_{i}"]) < 1e-4, (folder, i)
                    compared += 1
    assert compared >= 5 + 1 + 4 * 4


def test_reference_cases_at_another_resolution(shared):
    """Without a setting, positions are resampled as transformers does it for this kind of model."""
    compared = 0
    for file in sorted((shared / "reference/hf_vit").glob("*/io.npz")):
        io = np.load(file)
        if "logits_big" not in io:
            continue
        x = torch.from_numpy(io["pixel_values_big"])
        model = load_model(file.parent, image_size=tuple(x.shape[2:]))
        with torch.no_grad():
            assert worst(model(x), io["logits_big"]) < 5e-5, file
        compared += 1
    assert compared >= 2


def test_one_output_without_a_problem_type_is_a_sigmoid(tmp_path):
    """As transformers' pipeline; the softmax of one number would be 1 for every image."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=16, num_labels=1,
    )  # fmt: skip
    theirs = transformers.ViTForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        wanted = theirs(images).logits.sigmoid()
        found = model.probabilities(model(images))
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=1e-6)
    assert "one output: its probability is the sigmoid of the logit" in model.load_report.notes


def test_what_comes_with_the_weights(shared):
    folder = shared / "reference/hf_vit"
    model = load_model(folder / "vit_cls")
    assert model.labels == tuple(f"class_{i}" for i in range(7)) and model.head_trained
    assert model.config.norm_eps == 1e-12
    p = model.preprocess
    assert (p.resize_mode, p.interpolation, p.mean) == ("squash", "bilinear", (0.5,) * 3)
    deit = load_model(folder / "deit_distilled")
    assert (deit.config.pool, deit.config.distillation_head) == ("distilled", True)
    p = deit.preprocess
    assert (p.resize_mode, p.resize_size, p.interpolation) == ("squash", 40, "bicubic")
    dino = load_model(folder / "dinov2_reg")
    assert (dino.config.num_registers, dino.config.pool) == (4, "token_mean")
    assert dino.load_report.names("dropped") == ["dinov2_with_registers.embeddings.mask_token"]
    p = dino.preprocess
    assert (p.resize_mode, p.resize_size, p.mean) == ("crop", 40, (0.485, 0.456, 0.406))


def test_masked_image_model_is_a_backbone(shared):
    model = load_model(shared / "reference/hf_vit/vit_mim")
    assert model.labels is None and not model.head_trained
    assert len(model.load_report.names("dropped")) == 3


def test_channels_that_are_not_pictures(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4, num_channels=5,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    model = load_model(tmp_path, preprocess={"mean": 0.5, "std": 0.5})
    assert model.preprocess is None and "image files have 1 or 3 channels" in " ".join(
        model.load_report.notes
    )


def test_trained_weights_classify(shared):
    """The same weights lie there in timm's layout."""
    folder = shared / "data/weights/vit_fashionmnist"
    ours = load_model(folder / "hf")
    assert ours.labels[9] == "Ankle boot" and ours.config.num_channels == 1
    said = {"mean": 0.5, "std": 0.5}
    timm = load_model(
        folder / "timm.safetensors", num_heads=4, norm_eps=1e-5, pool="token", preprocess=said
    )
    images = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), timm(images), atol=1e-5, rtol=1e-5)


# Files, tables, labels, errors ------------------------------------------------------------------


@pytest.mark.parametrize("form", ["shards", "pickle"])
def test_other_containers(tmp_path, form):
    pytest.importorskip("transformers")
    theirs = random_model("ViTForImageClassification", "ViTConfig", {**VIT, **CLASSES})
    if form == "shards":
        theirs.save_pretrained(tmp_path, max_shard_size="40KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    else:
        theirs.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        (tmp_path / "model.safetensors").unlink()
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    images = torch.randn(2, 3, 32, 32)
    model = load_model(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images).logits, atol=5e-5, rtol=0)


def test_rows_of_zeros_cover_nothing(tmp_path):
    pytest.importorskip("transformers")
    theirs = random_model("ViTForImageClassification", "ViTConfig", {**VIT, **CLASSES})
    with torch.no_grad():
        theirs.vit.embeddings.position_embeddings[:, :1] = 0
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert not model.config.position_covers_prefix and model.network.pos_embed.shape == (1, 16, 48)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images).logits, atol=5e-5, rtol=0)


def test_names_that_transformers_puts_in(shared, tmp_path):
    folder = copied(shared, "vit_cls", tmp_path)
    names = {str(i): f"LABEL_{i}" for i in range(7)}
    edit(folder / "config.json", id2label=names)
    assert load_model(folder).labels is None
    assert load_model(folder, labels=list("abcdefg")).labels == tuple("abcdefg")
    names = {str(i): f"n{i}" for i in reversed(range(7))}
    edit(folder / "config.json", id2label=names)
    assert load_model(folder).labels == tuple(f"n{i}" for i in range(7))
    (folder / "config.json").unlink()
    with pytest.raises(VitcliError, match=r"there is no config\.json"):
        load_model(folder)


@pytest.mark.parametrize("kind", ["vit-hybrid", "depth_anything", None])
def test_other_models_are_refused(shared, tmp_path, kind):
    folder = copied(shared, "vit_cls", tmp_path)
    edit(folder / "config.json", model_type=kind)
    if kind is None:
        described = json.loads((folder / "config.json").read_text())
        del described["model_type"]
        (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(VitcliError, match=r"supported|there is no config\.json") as error:
        load_model(folder)
    if kind:
        assert "`dinov2_with_registers`" in error.value.hint and f"`{kind}`" in error.value.message


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden_act": "relu"}, "activation `relu`"),
        ({"patch_size": [8, 4]}, "patches of 8x4"),
        ({"num_attention_heads": 5}, "is invalid.*5 heads"),
        ({"num_hidden_layers": 4}, "`num_hidden_layers` is 4, the weights have 3"),
        ({"num_channels": 10**5}, "`num_channels` is 100000, the weights have 3"),
        ({"hidden_size": "wide"}, "is invalid"),
        ({"image_size": 64}, "pos_embed is"),
    ],
)
def test_a_config_that_contradicts(shared, tmp_path, values, words):
    folder = copied(shared, "vit_cls", tmp_path)
    edit(folder / "config.json", **values)
    with pytest.raises(VitcliError, match=words):
        load_model(folder)


JUNK = [None, "x", -1, 0, 1e30, [], {}, [1, 2, 3], {"a": 1}]


def test_any_value_in_the_json_files_is_taken_or_refused(shared, tmp_path):
    """Whatever a key holds: a model, or an error for the user; never a traceback."""
    rng = np.random.default_rng(0)
    folders = [copied(shared, name, tmp_path) for name in ("vit_cls", "dinov2_reg")]
    for folder, file in itertools.product(folders, ("config.json", "preprocessor_config.json")):
        path = folder / file
        whole = path.read_text()
        pairs = list(itertools.product(json.loads(whole), JUNK))
        assert len(pairs) >= 80
        for i in rng.permutation(len(pairs))[:80]:
            edit(path, **dict([pairs[i]]))
            with suppress(VitcliError):
                load_model(folder)
            path.write_text(whole)


def test_tensors_without_their_partner_are_named(shared, tmp_path):
    folder = copied(shared, "vit_cls", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["vit.encoder.layer.0.attention.attention.key.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(VitcliError, match=r"missing: `blocks\.0\.attn\.qkv\.weight") as error:
        load_model(folder)
    assert "attention.attention.query.weight" in error.value.message


# The image processor ----------------------------------------------------------------------------


def test_the_processor(shared, tmp_path):
    folder = copied(shared, "vit_cls", tmp_path)
    path = folder / "preprocessor_config.json"
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
    with pytest.raises(VitcliError, match="unsupported filter 9"):
        load_model(folder)
    path.write_text(json.dumps({"size": 32, "do_normalize": False}))
    p = load_model(folder).preprocess
    assert (p.resize_mode, p.mean, p.std) == ("squash", (0.0,) * 3, (1.0,) * 3)
    path.write_text(json.dumps({"do_resize": False}))
    model = load_model(folder)
    assert model.preprocess.resize_mode == "squash" and "not resize" in model.load_report.notes[0]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"feature_extractor_type": "ViTFeatureExtractor", "size": 32}, ("squash", None)),
        (
            {"feature_extractor_type": "DeiTFeatureExtractor", "size": 40, "crop_size": 32},
            ("squash", 40),
        ),
        (
            {"image_processor_type": "BitImageProcessorFast", "size": 36, "crop_size": 32},
            ("crop", 36),
        ),
        (
            {
                "image_processor_type": "ViTImageProcessor",
                "size": {"height": 36, "width": 36},
                "crop_size": {"height": 32, "width": 32},
                "do_center_crop": True,
            },
            ("squash", 36),
        ),
        # More than the model reads: the same share of the picture at its size.
        (
            {"image_processor_type": "DeiTImageProcessor", "size": 80, "crop_size": 64},
            ("squash", 40),
        ),
    ],
)
def test_sizes_old_and_new(shared, tmp_path, said, expected):
    folder = copied(shared, "vit_cls", tmp_path)
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    p = load_model(folder).preprocess
    assert (p.resize_mode, p.resize_size) == expected and p.image_size == (32, 32)


def test_dinov2_takes_the_size_of_its_processor(shared, tmp_path):
    """Meta's own: the config says 518 pixels, the processor 224."""
    folder = copied(shared, "dinov2_reg", tmp_path)
    edit(
        folder / "preprocessor_config.json",
        size={"shortest_edge": 28},
        crop_size={"height": 24, "width": 24},
    )
    model = load_model(folder)
    assert model.config.image_size == (32, 32) and model.preprocess.image_size == (24, 24)
    assert any("24x24" in note for note in model.load_report.notes)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images).logits, atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", ["vit_cls", "deit_distilled", "dinov2_reg"])
def test_without_a_processor(shared, tmp_path, name):
    folder = copied(shared, name, tmp_path)
    (folder / "preprocessor_config.json").unlink()
    model = load_model(folder)
    assert any("no preprocessor_config.json" in note for note in model.load_report.notes)
    assert model.preprocess.image_size == (32, 32)
    assert model.preprocess.mean == ((0.5,) * 3 if name == "vit_cls" else (0.485, 0.456, 0.406))
    stated = load_model(folder, preprocess={"mean": 0.5, "std": 0.5})
    assert not any("no preprocessor_config.json" in note for note in stated.load_report.notes)


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        ("ViTImageProcessorPil", {"size": {"height": 32, "width": 32}, "image_mean": [0.4] * 3}),
        ("DeiTImageProcessorPil", {"size": {"height": 40, "width": 40}, "crop_size": 32}),
        ("BitImageProcessorPil", {"size": {"shortest_edge": 40}, "crop_size": 32, "resample": 1}),
        ("BitImageProcessorPil", {"size": {"shortest_edge": 32}, "crop_size": 32}),
        ("ViTImageProcessorPil", {"size": {"height": 32, "width": 32}, "rescale_factor": 1 / 127}),
    ],
)
def test_pictures_as_the_processor_makes_them(shared, tmp_path, cls, settings):
    transformers = pytest.importorskip("transformers")
    from PIL import Image

    processor = getattr(transformers, cls)(**settings)
    folder = copied(shared, "vit_cls", tmp_path)
    processor.save_pretrained(folder)
    preprocess = load_model(folder).preprocess
    generator = np.random.default_rng(0)
    # Margins of an even number of pixels: an odd one is rounded differently.
    for rows, cols in ((64, 96), (80, 40), (32, 32), (20, 28)):
        picture = Image.fromarray(generator.integers(0, 256, (rows, cols, 3), dtype=np.uint8))
        theirs = processor(picture, return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(preprocess(picture).numpy(), theirs, atol=2e-6)
