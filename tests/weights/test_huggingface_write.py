"""Hugging Face folders of ours: transformers loads them as they are, and we read them back."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import vitcli
from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.vit import ResNet, ResNetConfig, VisionTransformer, ViTConfig
from vitcli.weights.huggingface.write_huggingface import write_huggingface
from vitcli.weights.load import load_model
from vitcli.weights.loaded import LoadedModel

SIZES = {
    "image_size": (16, 16),
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_dim": 32,
}
PREPROCESSES = [
    Preprocess((16, 16), "squash", interpolation="bilinear", mean=(0.5,), std=(0.5,)),
    Preprocess((16, 16), "squash", crop_fraction=0.9, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)),
    Preprocess((16, 16), "squash", resize_size=20, interpolation="lanczos"),
    Preprocess((16, 16), "crop", crop_fraction=0.875, interpolation="bicubic"),
    Preprocess((16, 16), "crop", resize_size=20, interpolation="nearest"),
    Preprocess((16, 16), "crop", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
]
DINOV3 = {"rope": "centred", "position": "none", "layer_scale": 0.5}
SIGLIP = {"class_token": False, "pool": "map", "gelu": "tanh", "norm_eps": 1e-6}
DINO = {"layer_scale": 0.1, "pool": "token_mean", "num_classes": 3}
CONFIGS = {
    "ViTForImageClassification": [
        {"num_classes": 3},
        {"num_classes": 3, "gelu": "tanh", "norm_eps": 1e-5},
        {"num_classes": 1, "qkv_bias": False, "image_size": (16, 8), "dropout_rate": 0.1},
        {"num_classes": 3, "num_channels": 1, "norm_eps": 1e-12},
        {"num_classes": 3, "position_covers_prefix": False},
        {"num_classes": 3, "position": "sincos2d"},
    ],
    "ViTModel": [{}, {"representation_size": 24}, {"representation_size": 16, "gelu": "tanh"}],
    "DeiTForImageClassification": [
        {"num_classes": 3, "distillation_token": True},
        {"num_classes": 3, "distillation_token": True, "position_covers_prefix": False},
    ],
    "DeiTForImageClassificationWithTeacher": [
        {
            "num_classes": 3,
            "distillation_token": True,
            "pool": "distilled",
            "distillation_head": True,
        },
    ],
    "DeiTModel": [
        {"distillation_token": True},
        {"distillation_token": True, "representation_size": 8, "position": "sincos2d"},
    ],
    "Dinov2ForImageClassification": [
        DINO,
        {**DINO, "mlp": "swiglu", "mlp_dim": 24, "gelu": "tanh"},
        {**DINO, "position_covers_prefix": False, "qkv_bias": False},
    ],
    "Dinov2Model": [{"layer_scale": 1e-5}, {"layer_scale": 1.0, "position": "sincos2d"}],
    "Dinov2WithRegistersForImageClassification": [
        {**DINO, "num_registers": 2, "position_covers_prefix": False},
        {
            **DINO,
            "num_registers": 1,
            "position_covers_prefix": False,
            "mlp": "swiglu",
            "mlp_dim": 48,
            "position": "sincos2d",
        },
    ],
    "Dinov2WithRegistersModel": [
        {"layer_scale": 0.5, "num_registers": 4, "position_covers_prefix": False}
    ],
    "DINOv3ViTModel": [
        {**DINOV3, "key_bias": False, "num_registers": 4, "norm_eps": 1e-5, "rope_rescale": 2.0},
        {**DINOV3, "key_bias": False, "mlp": "swiglu", "image_size": (16, 8)},
        {**DINOV3, "qkv_bias": False, "mlp": "swiglu", "num_registers": 2, "rope_theta": 50.0},
        {**DINOV3, "gelu": "tanh", "rope_shift": 0.5, "rope_jitter": 1.5, "drop_path_rate": 0.1},
    ],
    "SiglipVisionModel": [
        SIGLIP,
        {**SIGLIP, "image_size": (18, 18), "crop_to_patches": True},  # as So400m/14 at 384 px
        {**SIGLIP, "pool": "mean", "gelu": "exact", "num_channels": 1},
    ],
    "SiglipForImageClassification": [
        {**SIGLIP, "pool": "mean", "num_classes": 3},
        {**SIGLIP, "pool": "mean", "num_classes": 1, "num_heads": 4, "gelu": "quick"},
    ],
}
GRID = [(cls, settings) for cls, several in CONFIGS.items() for settings in several]


def random_model(settings, seed=0):
    """Every tensor random, none of them zero."""
    config = ViTConfig(**{**SIZES, **settings})
    model = LoadedModel(VisionTransformer(config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    if config.num_classes:
        model.labels = tuple(f"class {i}, Köln" for i in range(config.num_classes))
    p = PREPROCESSES[seed % len(PREPROCESSES)]
    if config.num_channels == 1 or config.image_size != p.image_size:
        p = Preprocess(config.image_size, "squash", num_channels=config.num_channels)
    model.preprocess, model.head_trained = p, config.num_classes > 0
    return model.eval()


def theirs_at(folder, cls):
    """The class that the folder names, loaded without anything missing or left over."""
    transformers = pytest.importorskip("transformers")
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert described["architectures"] == [cls]
    arguments = {"output_loading_info": True, "attn_implementation": "eager"}
    if cls in ("ViTModel", "DeiTModel") and "pooler_output_size" not in described:
        arguments["add_pooling_layer"] = False
    auto = transformers.AutoModel if cls.endswith("Model") else None
    auto = auto or transformers.AutoModelForImageClassification
    model, info = auto.from_pretrained(folder, **arguments)
    assert type(model).__name__ == cls
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize(("seed", "cls", "settings"), [(i, *case) for i, case in enumerate(GRID)])
def test_transformers_computes_the_same_and_we_read_it_back(tmp_path, seed, cls, settings):
    ours, folder = random_model(settings, seed), tmp_path / "out"
    write_huggingface(ours, folder)
    images = torch.randn(2, ours.config.num_channels, *ours.config.image_size)
    theirs = theirs_at(folder, cls)
    with torch.no_grad():
        out = theirs(images)
        if ours.config.num_classes:
            expected = out.logits
        else:
            torch.testing.assert_close(
                ours.network.tokens(images), out.last_hidden_state, atol=5e-5, rtol=0
            )
            expected = out.pooler_output
            if expected is None:  # DINOv2's class token, or SigLIP without its pooling
                tokens = out.last_hidden_state
                expected = tokens[:, 0] if ours.config.class_token else tokens.mean(dim=1)
        torch.testing.assert_close(ours(images), expected, atol=5e-5, rtol=0)

    back = load_model(folder)
    assert back.config == ours.config
    assert (back.labels, back.preprocess) == (ours.labels, ours.preprocess)
    assert back.head_trained == ours.head_trained
    before, after = ours.state_dict(), back.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("seed", range(12))
def test_random_combinations_come_back(tmp_path, seed):
    """Settings drawn at random: an error that names one of them, or an exact round trip."""
    rng = np.random.default_rng(seed)
    choices = {
        "num_classes": [0, 4],
        "distillation_token": [False, False, True],
        "num_registers": [0, 0, 2],
        "layer_scale": [None, 0.5],
        "mlp": ["gelu", "gelu", "swiglu"],
        "mlp_dim": [32, 24],
        "pool": ["token", "token", "token_mean", "mean"],
        "position": ["learned", "learned", "sincos2d", "none"],
        "position_covers_prefix": [True, False],
        "representation_size": [None, None, 8],
        "gelu": ["exact", "tanh"],
        "qkv_bias": [True, False],
        "norm_eps": [1e-12, 1e-6, 3e-4],
    }
    written = 0
    for trial in range(40):
        drawn = {key: values[rng.integers(len(values))] for key, values in choices.items()}
        if drawn["position"] != "learned":
            drawn["position_covers_prefix"] = drawn["num_registers"] == 0
        ours, folder = random_model(drawn, trial), tmp_path / str(trial)
        try:
            write_huggingface(ours, folder)
        except VitcliError as error:
            assert "`model." in error.message and not folder.exists()
            continue
        back = load_model(folder)
        assert back.config == ours.config and back.preprocess == ours.preprocess
        state = back.state_dict()
        assert all(torch.equal(t, state[name]) for name, t in ours.state_dict().items())
        images = torch.randn(2, 3, 16, 16)
        with torch.no_grad():
            assert torch.equal(ours(images), back(images))
        written += 1
    assert written


# What cannot be said ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (
            {"pool": "map", "class_token": False, "num_classes": 3},
            ["`siglip` cannot express `model.pool` = map (SigLIP with a head reads the mean"],
        ),
        (
            {"pool": "quadrants", "class_token": False, "image_size": (16, 8)},
            ["`model.image_size` = [16, 8]", "`model.pool` = quadrants"],
        ),
        (
            {"pool": "map", "class_token": False, "layer_scale": 0.1, "qkv_bias": False},
            ["`siglip_vision_model`", "`model.layer_scale` = 0.1", "`model.qkv_bias` = false"],
        ),
        ({"pool": "mean"}, ["`model.pool` = mean"]),
        ({"pool": "quadrants"}, ["`model.pool` = quadrants"]),
        ({"pool": "map"}, ["`model.pool` = map"]),
        ({"position": "none"}, ["`model.position` = none"]),
        ({"position": "learned2d"}, ["`model.position` = learned2d"]),
        (
            {"position": "relative", "qk_norm": True},
            ["`model.position` = relative", "`model.qk_norm` = true"],
        ),
        ({"position_at": "every"}, ["`model.position_at` = every"]),
        ({"norm_after_pool": True}, ["`model.norm_after_pool` = true"]),
        ({"norm_before_blocks": True}, ["`model.norm_before_blocks` = true"]),
        ({"patch_bias": False}, ["`model.patch_bias` = false"]),
        ({"num_classes": 3, "representation_size": 8}, ["`model.representation_size` = 8"]),
        ({"num_registers": 2}, ["`model.layer_scale` = none", "`model.position_covers_prefix`"]),
        ({"layer_scale": 0.1, "num_classes": 3}, ["`model.pool` = token (DINOv2 with a head"]),
        (
            {"layer_scale": 0.1, "pool": "token_mean"},
            ["`model.pool` = token_mean (DINOv2 without a head"],
        ),
        ({"layer_scale": 0.1, "mlp_dim": 40}, ["`model.mlp_dim` = 40"]),
        ({**DINO, "mlp": "swiglu", "mlp_dim": 30}, ["`model.mlp_dim` = 30"]),
        ({**DINO, "image_size": (16, 8)}, ["`model.image_size` = [16, 8]"]),
        ({"distillation_token": True, "layer_scale": 0.1}, ["`model.layer_scale` = 0.1"]),
        (
            {"distillation_token": True, "pool": "distilled"},
            ["`model.pool` = distilled (DeiT has a head for each"],
        ),
        ({"distillation_token": True, "num_registers": 2}, ["`model.num_registers` = 2"]),
        (
            {"axial": True, "class_token": False, "pool": "mean", "position": "none"},
            ["`model.axial` = true"],
        ),
    ],
)
def test_what_transformers_has_no_class_for(tmp_path, settings, named):
    with pytest.raises(VitcliError, match="cannot express") as error:
        write_huggingface(random_model(settings), tmp_path / "out")
    assert all(words in error.value.message for words in named), error.value.message
    assert "`--to onnx`" in error.value.hint and not list(tmp_path.iterdir())


def test_a_resnet_has_no_place(tmp_path):
    model = LoadedModel(ResNet(ResNetConfig((32, 32), layers=(1,), num_classes=2)))
    with pytest.raises(VitcliError, match=r"a ResNet .*for Vision Transformers"):
        write_huggingface(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("preprocess", "words"),
    [
        (Preprocess((16, 16), "pad"), "`preprocess.resize_mode` = pad"),
        (Preprocess((16, 8), "crop"), "`preprocess.resize_mode` = crop .*an oblong"),
    ],
)
def test_preprocessing_that_no_processor_does(tmp_path, preprocess, words):
    model = random_model({"image_size": preprocess.image_size})
    model.preprocess = preprocess
    with pytest.raises(VitcliError, match=words) as error:
        write_huggingface(model, tmp_path / "out")
    assert "resize_mode=squash" in error.value.hint and not (tmp_path / "out").exists()


def test_notes(tmp_path):
    model = random_model({"num_classes": 3, "num_channels": 1, "drop_path_rate": 0.1})
    model.labels, model.preprocess, model.head_trained = None, None, False
    notes = " ".join(write_huggingface(model, tmp_path / "a"))
    for words in ("LABEL_0", "no preprocessing", "not trained", "drop_path_rate", "grey"):
        assert words in notes
    back = load_model(tmp_path / "a")
    assert back.labels is None
    assert not (tmp_path / "a/preprocessor_config.json").exists()
    assert "add_pooling_layer=False" in write_huggingface(random_model({}), tmp_path / "b")[0]
    plain = random_model({"num_classes": 3})
    assert write_huggingface(plain, tmp_path / "c") == []
    bare = random_model({"position": "sincos2d", "position_covers_prefix": False})
    assert any("row of zeros" in note for note in write_huggingface(bare, tmp_path / "d"))


def test_the_folder_is_whole_or_not_there(tmp_path, monkeypatch):
    model, out = random_model({"num_classes": 3}), tmp_path / "out"
    out.mkdir()
    write_huggingface(model, out)  # an empty folder is none
    names = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert {p.name for p in out.iterdir()} == names
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(VitcliError, match="exists already"):
        write_huggingface(model, out)
    with pytest.raises(VitcliError, match="is not a folder"):
        write_huggingface(model, tmp_path / "missing/out")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vitcli.weights.store.save_file", full)
    with pytest.raises(VitcliError, match="No space left"):
        write_huggingface(model, tmp_path / "other")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert list(tmp_path.iterdir()) == [out]


# The pipeline of transformers -------------------------------------------------------------------


def photo(rows, cols):
    """Something like a photograph: soft shapes, some grain."""
    rng = np.random.default_rng(rows * cols)
    y, x = np.mgrid[0:rows, 0:cols] / max(rows, cols)
    waves = [np.sin(a * x + b * y + c) for a, b, c in rng.uniform(-12, 12, (3, 3))]
    pixels = 127 + 90 * np.stack(waves, axis=2) + rng.normal(0, 8, (rows, cols, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def probabilities(folder, path):
    transformers = pytest.importorskip("transformers")
    pipeline = transformers.pipeline("image-classification", model=str(folder))
    return {row["label"]: row["score"] for row in pipeline(str(path), top_k=3)}


def ours_for(model, path):
    (row,) = vitcli.predict([path], model=model, top=3, precision="fp32")
    return {one["label"]: one["probability"] for one in row["top"]}


@pytest.mark.parametrize(
    "preprocess", PREPROCESSES, ids=lambda p: f"{p.resize_mode}-{p.interpolation}"
)
@pytest.mark.parametrize("cls", [c for c in CONFIGS if "Classification" in c])
def test_the_pipeline_gives_our_probabilities(tmp_path, cls, preprocess):
    model = random_model(CONFIGS[cls][0])
    model.preprocess = replace(preprocess, crop_rounding="down")
    folder = tmp_path / "out"
    write_huggingface(model, folder)
    for rows, cols in ((60, 120), (90, 60), (97, 61), (16, 16)):
        path = tmp_path / f"{rows}.png"
        photo(rows, cols).save(path)
        theirs, ours = probabilities(folder, path), ours_for(model, path)
        assert theirs.keys() == ours.keys()
        assert max(abs(theirs[label] - ours[label]) for label in ours) < 1e-5


def test_real_weights_and_real_pictures(shared, tmp_path):
    """timm's ViT-Ti on ImageNet, exported: the same answer, with the same certainty."""
    weights = shared / "data/weights/vit_tiny_patch16_224_in1k/timm.safetensors"
    model = load_model(weights, preprocess={"mean": 0.5, "std": 0.5})
    model.labels = tuple(f"n{i:04}" for i in range(1000))
    write_huggingface(model, tmp_path / "hf")
    table = pyarrow.parquet.read_table(shared / "data/imagenette_val500/test.parquet")
    for i in (0, 1, 499):
        path = tmp_path / f"{i}.jpg"
        path.write_bytes(table["image"][i].as_py()["bytes"])
        theirs, ours = probabilities(tmp_path / "hf", path), ours_for(model, path)
        assert theirs.keys() == ours.keys()
        assert max(abs(theirs[label] - ours[label]) for label in ours) < 1e-5


def test_folders_of_transformers_survive_the_way_through(shared, tmp_path):
    """Theirs -> ours -> theirs: every tensor that a classifier uses, bit for bit."""
    from safetensors.torch import load_file

    for name in ("vit_cls", "vit_cls_lowvar", "deit_distilled", "dinov2_reg"):
        source = shared / "reference/hf_vit" / name
        write_huggingface(load_model(source), tmp_path / name)
        before, after = (load_file(d / "model.safetensors") for d in (source, tmp_path / name))
        assert before.keys() == after.keys()
        folded = ("position_embeddings", "cls_token", "mask_token")
        for key, tensor in before.items():
            if name != "dinov2_reg" or not key.endswith(folded):
                assert torch.equal(tensor, after[key]), key
        for file in ("config.json", "preprocessor_config.json"):
            said = json.loads((source / file).read_text())
            written = json.loads((tmp_path / name / file).read_text())
            assert {k: written[k] for k in written if k in said and k != "dtype"} == {
                k: said[k] for k in written if k in said and k != "dtype"
            }
