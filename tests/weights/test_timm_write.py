"""Folders for timm: what they say, and that reading them back gives the same model."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.vit import VisionTransformer, ViTConfig
from vitcli.vit.resnet import ResNet, ResNetConfig
from vitcli.weights.load import load_model
from vitcli.weights.loaded import LoadedModel, create_model
from vitcli.weights.store import save_model
from vitcli.weights.timm.write_timm import write_timm

BASE = ViTConfig(
    image_size=(32, 32),
    patch_size=8,
    embed_dim=48,
    depth=2,
    num_heads=3,
    mlp_dim=80,
    num_classes=4,
)
TWO_HEADS = {"pool": "distilled", "distillation_token": True, "distillation_head": True}
STEM = {"stem_arithmetic": "timm", "image_size": (32, 64)}
EXPRESSED = {
    "plain": {},
    "mean": {"pool": "mean"},
    "mean, norm after it": {"pool": "mean", "norm_after_pool": True, "class_token": False},
    "token, norm after it": {"norm_after_pool": True},
    "map": {"pool": "map", "class_token": False, "gelu": "tanh"},
    "map, norm after it": {"pool": "map", "norm_after_pool": True},
    "epsilon of CLIP": {"norm_eps": 1e-5, "qk_norm": True, "num_registers": 2},
    "registers without positions": {"num_registers": 3, "position_covers_prefix": False},
    "norm before the blocks": {"norm_before_blocks": True, "patch_bias": False},
    "no bias of queries": {"qkv_bias": False, "layer_scale": 1e-3},
    "grey and oblong": {"num_channels": 1, "image_size": (16, 40)},
    "patches alone have positions": {"position_covers_prefix": False, "image_size": (16, 40)},
    "no positions": {"position": "none", "position_covers_prefix": False},
    "swiglu": {"mlp": "swiglu", "mlp_dim": 77, "layer_scale": 1e-5, "num_registers": 1},
    "distilled": {**TWO_HEADS, "image_size": (16, 40), "qk_norm": True},
    "distilled backbone": {**TWO_HEADS, "distillation_head": False, "num_classes": 0},
    "backbone": {"num_classes": 0},
    "a width that divides nothing": {"embed_dim": 51, "mlp_dim": 77},
    "drop rates": {"dropout_rate": 0.1, "drop_path_rate": 0.2},
    "hybrid, root alone": {**STEM, "stem": ()},
    "hybrid, stride 16": {**STEM, "stem": (3, 4, 9), "patch_size": 1},
    "hybrid, stride 32": {
        **STEM,
        "stem": (2, 2, 2, 2),
        "patch_size": 1,
        "pool": "mean",
        "norm_before_blocks": True,
        "patch_bias": False,
        "num_channels": 1,
    },
}
TRANSFORMS = [
    {},
    {"crop_fraction": 0.875, "interpolation": "bilinear", "mean": (0.1,), "std": (1 / 3,)},
    {"resize_mode": "squash", "crop_fraction": 0.9},
    {"resize_mode": "pad", "interpolation": "lanczos"},
]


def filled(model):
    """`model` with weights that are nowhere 0 or 1, class names and a transform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.network.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    config = model.config
    model.head_trained = config.num_classes > 0
    model.labels = tuple(f"class {i}, ß" for i in range(config.num_classes)) or None
    channels = config.num_channels
    model.preprocess = Preprocess(config.image_size, num_channels=channels)
    return model.eval()


def vit(**options) -> LoadedModel:
    return filled(LoadedModel(VisionTransformer(replace(BASE, **options))))


def check_round_trip(model, out):
    notes = write_timm(model, out)
    back = load_model(out)
    assert back.config == model.config and back.load_report.layout == "timm"
    assert (back.labels, back.preprocess) == (model.labels, model.preprocess)
    assert back.head_trained == model.head_trained
    assert not back.load_report.names("dropped") and not back.load_report.notes
    expected = model.state_dict()
    assert set(back.state_dict()) == set(expected)
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    return notes


@pytest.mark.parametrize("i", range(len(EXPRESSED)), ids=list(EXPRESSED))
def test_everything_comes_back(i, tmp_path):
    model = vit(**list(EXPRESSED.values())[i])
    model.preprocess = replace(model.preprocess, **TRANSFORMS[i % len(TRANSFORMS)])
    if model.config.num_channels == 3 and i % 2:
        model.preprocess = replace(model.preprocess, mean=(0.485, 0.456, 0.406))
    assert check_round_trip(model, tmp_path / "out") == []


@pytest.mark.parametrize(
    "config",
    [
        ResNetConfig((64, 48), 3, (3, 4, 6, 3), 0.5, 3, "timm"),
        ResNetConfig((32, 32), 1, (3, 4, 6, 3), 1.0, 0, "timm"),
    ],
)
def test_a_resnet_comes_back(config, tmp_path):
    assert check_round_trip(filled(LoadedModel(ResNet(config))), tmp_path / "out") == []
    weights = load_file(tmp_path / "out/model.safetensors")
    if config.num_classes:  # a convolution on the pooled map, as timm has it
        assert weights["head.fc.weight"].shape == (3, config.feature_dim, 1, 1)


def test_what_the_config_says(tmp_path):
    model = create_model("B/16", num_classes=2, image_size=224, depth=1)
    model.preprocess = Preprocess((224, 224), mean=(0.1,), std=(0.2,), resize_size=256)
    model.labels, model.head_trained = ("cat", "dog"), True
    notes = write_timm(model, tmp_path / "out")
    assert notes == ["`preprocess.resize_size` = 256 becomes a crop fraction"]
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert said["architecture"] == "vit_base_patch16_224" and said["label_names"] == ["cat", "dog"]
    assert (said["num_classes"], said["num_features"], said["global_pool"]) == (2, 768, "token")
    assert said["pretrained_cfg"] == {
        "custom_load": False,
        "input_size": [3, 224, 224],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 224 / 256,
        "crop_mode": "center",
        "mean": [0.1] * 3,
        "std": [0.2] * 3,
        "num_classes": 2,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    assert said["model_args"]["depth"] == 1 and said["model_args"]["act_layer"] == "gelu"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize(
    ("name", "size", "architecture"),
    [
        ("Ti/16", 224, "vit_tiny_patch16_224"),
        ("Ti/16", 384, "vit_tiny_patch16_384"),
        ("Ti/8", 224, "vit_tiny_patch16_224"),  # timm has no tiny one with patches of 8
        ("S/32", 224, "vit_small_patch32_224"),
        ("S/8", 224, "vit_small_patch8_224"),
        ("Pico/4", 32, "vit_base_patch16_224"),
    ],
)
def test_the_nearest_architecture(name, size, architecture, tmp_path):
    write_timm(create_model(name, image_size=size), tmp_path / "out")
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert said["architecture"] == architecture
    assert said["model_args"]["patch_size"] == int(name.partition("/")[2])


def test_every_width_of_an_mlp_survives_the_ratio():
    """timm computes int(width * ratio)."""
    from vitcli.weights.timm.write_timm import vit_arguments

    for width in (48, 51, 72, 192, 768, 1408):
        for hidden in range(1, 5 * width, 7):
            config = replace(BASE, embed_dim=width, num_heads=1, mlp_dim=hidden)
            assert int(width * vit_arguments(config)["mlp_ratio"]) == hidden
            gated = replace(config, mlp="swiglu")
            assert int(width * vit_arguments(gated)["mlp_ratio"]) == 2 * hidden


def test_every_resize_survives_the_share(tmp_path):
    """timm resizes to floor(side / crop_pct)."""
    from vitcli.weights.timm.write_timm import crop_pct

    for side in (32, 224, 336, 518):
        for resized in range(side, 2 * side):
            share = crop_pct(Preprocess((side, side), resize_size=resized))
            assert math.floor(side / share) == resized and 0 < share <= 1
    for size, resized in (((32, 32), 30), ((16, 40), 64)):
        model = vit(image_size=size)
        model.preprocess = replace(model.preprocess, resize_size=resized)
        with pytest.raises(VitcliError, match=r"preprocess\.resize_size"):
            write_timm(model, tmp_path / "out")


def test_a_resized_and_cropped_picture_is_the_same_after_the_round_trip(tmp_path):
    from PIL import Image

    model = vit()
    model.preprocess = replace(model.preprocess, resize_size=37)
    write_timm(model, tmp_path / "out")
    picture = Image.effect_noise((90, 61), 80).convert("RGB")
    assert torch.equal(load_model(tmp_path / "out").preprocess(picture), model.preprocess(picture))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"axial": True, "class_token": False, "pool": "mean"}, "`model.axial` = true"),
        ({"position": "learned2d"}, "`model.position` = learned2d"),
        ({"position": "relative"}, "`model.position` = relative"),
        ({"position_at": "every"}, "`model.position_at` = every"),
        ({"pool": "quadrants"}, "`model.pool` = quadrants"),
        ({"pool": "token_mean"}, "`model.pool` = token_mean"),
        ({"representation_size": 8}, "`model.representation_size` = 8"),
        ({"norm_eps": 1e-12}, "`model.norm_eps` = 1e-12"),
        (
            {"norm_eps": 1e-5, "mlp": "swiglu"},
            "`model.norm_eps` = 1e-05 .timm has it without SwiGLU",
        ),
        ({"norm_before_blocks": True}, "`model.patch_bias` = true .* norm before the blocks"),
        ({"pool": "map", "mlp": "swiglu"}, "`model.pool` = map .*attention pool has no SwiGLU"),
        ({"distillation_token": True}, "`model.pool` = token .* distillation token"),
        ({**TWO_HEADS, "distillation_head": False}, "`model.pool` = distilled"),
        ({**TWO_HEADS, "num_registers": 1}, "`model.num_registers` = 1 .* distillation token"),
        ({**TWO_HEADS, "mlp": "swiglu"}, "`model.mlp` = swiglu .*distillation token"),
        ({**STEM, "stem": (1, 1), "patch_size": 1}, r"`model.stem` = \[1, 1\]"),
        ({**STEM, "stem": (), "stem_width": 2.0}, "`model.stem_width` = 2"),
        ({**STEM, "stem": (), "stem_arithmetic": "google"}, "`model.stem_arithmetic` = google"),
    ],
)
def test_what_timm_has_not_is_named(options, words, tmp_path):
    with pytest.raises(VitcliError, match=words) as error:
        write_timm(vit(**options), tmp_path / "out")
    assert "`--to onnx`" in error.value.hint
    assert ("`--set model.norm_eps=1e-6`" in error.value.hint) == ("norm_eps" in options)
    assert ("stem_arithmetic=timm" in error.value.hint) == ("google" in options.values())
    assert not list(tmp_path.iterdir())


def test_a_hybrid_of_googles_can_be_given_timms_arithmetic(tmp_path):
    model = vit(**{**STEM, "stem": (), "stem_arithmetic": "google"})
    save_model(tmp_path / "w.safetensors", model)
    said = load_model(tmp_path / "w.safetensors", stem_arithmetic="timm")
    images = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(said(images), model(images))
    write_timm(said, tmp_path / "out")
    assert torch.equal(load_model(tmp_path / "out")(images), said(images))
    save_model(tmp_path / "plain.safetensors", vit())
    with pytest.raises(VitcliError, match="the model is not a hybrid"):
        load_model(tmp_path / "plain.safetensors", stem_arithmetic="timm")


def test_everything_that_is_wrong_is_said_at_once(tmp_path):
    with pytest.raises(VitcliError) as error:
        write_timm(vit(position="learned2d", pool="quadrants", norm_eps=1e-12), tmp_path / "out")
    assert error.value.message.count("`model.") == 3


def test_a_resnet_that_timm_has_not_is_named(tmp_path):
    for config, words in (
        (ResNetConfig(layers=(1, 1), num_classes=2, arithmetic="timm"), r"`layers` = \[1, 1\]"),
        (ResNetConfig(num_classes=2), "`arithmetic` = google"),
    ):
        with pytest.raises(VitcliError, match=words):
            write_timm(LoadedModel(ResNet(config)), tmp_path / "out")


def test_what_is_lost_is_noted(tmp_path):
    model = vit(position="sincos2d")
    model.head_trained, model.preprocess = False, None
    notes = " ".join(write_timm(model, tmp_path / "a"))
    assert "sin-cos" in notes and "not trained" in notes and "timm assumes ImageNet's" in notes
    back = load_model(tmp_path / "a")
    assert back.config == replace(model.config, position="learned")
    assert torch.equal(back.network.pos_embed, model.network.pos_embed)
    model = vit(patch_bias=False)
    assert "holds zeros" in write_timm(model, tmp_path / "b")[0]
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_model(tmp_path / "b")(images), model(images))


def test_a_folder_that_is_there_is_kept(tmp_path):
    (tmp_path / "out").mkdir()
    write_timm(vit(), tmp_path / "out")  # an empty one is as good as none
    before = (tmp_path / "out/config.json").read_bytes()
    with pytest.raises(VitcliError, match="exists already"):
        write_timm(vit(depth=1), tmp_path / "out")
    assert (tmp_path / "out/config.json").read_bytes() == before
    with pytest.raises(VitcliError, match="cannot write"):
        write_timm(vit(), tmp_path / "no/such")


def test_real_weights(shared, tmp_path):
    model = load_model(shared / "data/weights/vit_tiny_patch16_224_in1k/timm.safetensors")
    assert check_round_trip(model, tmp_path / "out") == []
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert said["architecture"] == "vit_tiny_patch16_224"
    assert len(said["label_names"]) == 1000 and said["pretrained_cfg"]["crop_pct"] == 0.9


def test_reference_cases(shared, tmp_path):
    """timm's own files, read and written: the same tensors under the same names."""
    cases = sorted((shared / "reference/timm_vit").glob("*/model.safetensors"))
    assert len(cases) >= 4
    for path in cases:
        model = load_model(path, num_heads=3)
        out = tmp_path / path.parent.name
        write_timm(model, out)
        before, after = load_file(path), load_file(out / "model.safetensors")
        assert set(after) == set(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
        kwargs = json.loads((path.parent / "config.json").read_text())["kwargs"]
        said = json.loads((out / "config.json").read_text())["model_args"]
        for key, value in kwargs.items():  # what timm was called with to make this file
            assert said[key] == value or said[key] == [value, value], (path, key)
