"""Every property of a model in turn, exported to every layout: it comes back, or the table says no.

The table is `EXPRESSIBLE`. It is right if each model is either refused with the table's reason, or
gives the same logits and settings after reading it back, except where the table says so.
"""

from dataclasses import asdict, fields, replace

import pytest
import torch

from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.vit import ResNet, ResNetConfig, VisionTransformer, ViTConfig
from vitcli.weights.expressible import EXPRESSIBLE, find_limits
from vitcli.weights.google.write_google import write_google
from vitcli.weights.huggingface.write_huggingface import write_huggingface
from vitcli.weights.limit import Lost, Refused
from vitcli.weights.load import load_model
from vitcli.weights.loaded import LoadedModel
from vitcli.weights.timm.write_timm import write_timm

WRITERS = {"timm": write_timm, "huggingface": write_huggingface, "google": write_google}
BASE = ViTConfig(
    image_size=(32, 32),
    patch_size=8,
    embed_dim=48,
    depth=2,
    num_heads=3,
    mlp_dim=96,
    num_classes=4,
)
# A model that the layout holds, for which the other properties change one by one.
HELD = {"timm": {}, "huggingface": {}, "google": {"gelu": "tanh"}}
STEM = {"stem": (), "patch_size": 2, "image_size": (32, 64)}
DINO = {"layer_scale": 0.5, "pool": "token_mean"}
DINOV3 = {"rope": "centred", "position": "none", "layer_scale": 0.5, "num_classes": 0}
NO_TOKEN = {"class_token": False, "pool": "mean"}
TWO_HEADS = {"distillation_token": True, "pool": "distilled", "distillation_head": True}
# Property -> other values, with the settings that they need.
VIT = {
    "image_size": [
        {"image_size": (16, 40)},
        {**DINO, "image_size": (16, 40)},
        {**NO_TOKEN, "image_size": (16, 40)},
    ],
    "patch_size": [{"patch_size": 4}],
    "num_channels": [{"num_channels": 1}, {"num_channels": 4}],
    "embed_dim": [{"embed_dim": 36}, {"embed_dim": 51, "mlp_dim": 77}],
    "depth": [{"depth": 1}],
    "num_heads": [{"num_heads": 4}],
    "mlp_dim": [{"mlp_dim": 77}, {**DINO, "mlp_dim": 77}],
    "num_classes": [
        {"num_classes": 0},
        {"layer_scale": 0.5, "num_classes": 0},
        {**DINO, "num_classes": 0},
    ],
    "pool": [{"pool": pool} for pool in ("mean", "quadrants", "map", "token_mean")]
    + [
        {**NO_TOKEN, "pool": pool, "num_classes": classes}
        for pool in ("mean", "map", "quadrants")
        for classes in (0, 4)
    ],
    "pool_blocks": [{"pool_blocks": 2}],
    "class_token": [
        NO_TOKEN,
        {**NO_TOKEN, "pool": "map"},
        {**NO_TOKEN, "position_covers_prefix": False},
        {**NO_TOKEN, "pool": "map", "mlp": "swiglu"},
    ],
    "distillation_token": [{"distillation_token": True}, TWO_HEADS],
    "distillation_head": [
        {**TWO_HEADS, "distillation_head": False},
        {**TWO_HEADS, "distillation_head": False, "num_classes": 0},
    ],
    "num_registers": [
        {"num_registers": 2},
        {"num_registers": 2, "position_covers_prefix": False},
        {**DINO, "num_registers": 2},
        {**DINO, "num_registers": 2, "position_covers_prefix": False},
        {**TWO_HEADS, "num_registers": 1},
        {**NO_TOKEN, "num_registers": 2},
    ],
    "position": [
        *({"position": kind} for kind in ("learned2d", "relative", "sincos2d", "none")),
        {**TWO_HEADS, "position": "none"},
        {**STEM, "position": "sincos2d"},
        {"position": "sincos2d", "position_covers_prefix": False},
        *({**NO_TOKEN, "position": kind} for kind in ("sincos2d", "none")),
    ],
    "position_at": [{"position_at": "every"}, {"position_at": "shared"}],
    "position_bias": [{"position_bias": "every"}, {"position_bias": "shared"}],
    "position_covers_prefix": [
        {"position_covers_prefix": False},
        {**TWO_HEADS, "position_covers_prefix": False},
        {**STEM, "position_covers_prefix": False},
    ],
    "representation_size": [
        {"representation_size": 24},
        {"representation_size": 24, "num_classes": 0},
        {**DINO, "representation_size": 24},
        {**NO_TOKEN, "representation_size": 24, "num_classes": 0},
    ],
    "qkv_bias": [{"qkv_bias": False}, {**NO_TOKEN, "qkv_bias": False}],
    "qk_norm": [{"qk_norm": True}],
    "layer_scale": [
        {"layer_scale": 0.5},
        DINO,
        {**TWO_HEADS, "layer_scale": 0.5},
        {**NO_TOKEN, "layer_scale": 0.5},
    ],
    "mlp": [
        {"mlp": "swiglu"},
        {**DINO, "mlp": "swiglu", "mlp_dim": 128},
        {**TWO_HEADS, "mlp": "swiglu"},
        {**STEM, "mlp": "swiglu"},
    ],
    "gelu": [{"gelu": "tanh"}, {"gelu": "exact"}, {"gelu": "quick"}],
    "norm": [{"norm": "rms"}],
    "norm_eps": [
        {"norm_eps": 1e-5},
        {"norm_eps": 3e-4},
        {"norm_eps": 1e-5, "mlp": "swiglu"},
    ],
    "norm_before_blocks": [
        {"norm_before_blocks": True},
        {"norm_before_blocks": True, "patch_bias": False},
    ],
    "norm_after_pool": [{"norm_after_pool": True}, {**TWO_HEADS, "norm_after_pool": True}],
    "final_norm": [{"final_norm": False}],
    "patch_bias": [{"patch_bias": False}],
    "pixel_norm": [{"pixel_norm": True}],
    "patch_norm": [{"patch_norm": True}],
    "projection_size": [{"projection_size": 24}, {"projection_size": 24, "num_classes": 0}],
    "head_norm": [{"head_norm": True}],
    "crop_to_patches": [
        {"crop_to_patches": True},
        {**NO_TOKEN, "crop_to_patches": True},
        {**NO_TOKEN, "crop_to_patches": True, "image_size": (37, 37)},
    ],
    "axial": [{**NO_TOKEN, "axial": True}],
    "stem": [
        {**STEM, "stem": (1, 1), "patch_size": 1, "stem_arithmetic": "timm"},
        {**STEM, **NO_TOKEN, "stem": (2, 1), "patch_size": 1, "position_covers_prefix": False},
        {**STEM, **TWO_HEADS, "stem_arithmetic": "timm"},
        {**STEM, "pool": "map", "class_token": False},
    ],
    "stem_width": [{**STEM, "stem_width": 0.5}],
    "conv_stem": [{"conv_stem": (8, 16), "patch_size": 2}],
    "stem_arithmetic": [{**STEM, "stem_arithmetic": kind} for kind in ("timm", "google")],
    "dropout_rate": [{**base, "dropout_rate": 0.1} for base in ({}, DINOV3, NO_TOKEN)],
    "drop_path_rate": [{"drop_path_rate": 0.1}, {**DINOV3, "drop_path_rate": 0.1}],
    "key_bias": [{"key_bias": False}, {**DINOV3, "key_bias": False}],
    "attention_norm": [{"attention_norm": True}],
    "mlp_norm": [{"mlp_norm": True}, {"mlp_norm": True, "mlp": "swiglu"}],
    "rope": [
        DINOV3,
        {**DINOV3, "num_registers": 2, "mlp": "swiglu", "qkv_bias": False},
        {**DINOV3, "mlp": "swiglu", "gelu": "tanh", "image_size": (16, 40)},
        {**DINOV3, "num_classes": 4},
        {**DINOV3, "pool": "mean"},
        {**DINOV3, **NO_TOKEN},
        {**DINOV3, "distillation_token": True},
        {**DINOV3, "position_covers_prefix": False},
        {**DINOV3, "representation_size": 8},
        {**DINOV3, "rope": "index"},
        {"rope": "centred"},
    ],
    "rope_theta": [{**DINOV3, "rope_theta": 50.0}],
    "rope_pairs": [{**DINOV3, "rope_pairs": "neighbours"}],
    "rope_grid": [{**DINOV3, "rope": "index", "rope_grid": (3, 5)}],
    "rope_dtype": [{**DINOV3, "rope_dtype": "bf16"}],
    "rope_shift": [{**DINOV3, "rope_shift": 0.5}],
    "rope_jitter": [{**DINOV3, "rope_jitter": 1.25}],
    "rope_rescale": [{**DINOV3, "rope_rescale": 2.0}],
}
RESNET = {
    "image_size": [{"image_size": (48, 32)}],
    "num_channels": [{"num_channels": 1}],
    "layers": [{"layers": (1, 1)}],
    "width": [{"width": 1.0}, {"width": 1.5}],
    "num_classes": [{"num_classes": 0}],
    "arithmetic": [{"arithmetic": "google"}],
    "axial": [{"axial": True}],
}
PREPROCESS = {
    "image_size": [{}],
    "resize_mode": [{"resize_mode": "squash"}, {"resize_mode": "pad"}],
    "resize_size": [
        {"resize_size": 40},
        {"resize_size": 40, "resize_mode": "squash"},
        {"resize_size": 24},
    ],
    "crop_fraction": [{"crop_fraction": 0.9}, {"crop_fraction": 0.9, "resize_mode": "squash"}],
    "interpolation": [{"interpolation": "bilinear"}, {"interpolation": "nearest"}],
    "mean": [{"mean": (0.1, 0.2, 0.3)}],
    "std": [{"std": (0.3,)}],
    "num_channels": [{"mean": (0.1,)}],  # always that of the model
    "crop_rounding": [{"crop_rounding": "down", "resize_mode": "crop"}],
    "antialias": [{"antialias": False, "interpolation": "bilinear"}],
    "window": [{"window": (-160.0, 240.0)}],
    "border": [{"border": 2}],
}
TRAVELS = {
    "labels": [None],
    "head_activation": ["sigmoid"],
    "head_trained": [False],
    "preprocess": [None],
}


def test_every_property_is_tried():
    """A new field needs a value here, and an entry in the table if a layout cannot hold it."""
    assert set(VIT) == {field.name for field in fields(ViTConfig)}
    assert set(RESNET) == {field.name for field in fields(ResNetConfig)}
    assert set(PREPROCESS) == {field.name for field in fields(Preprocess)}
    known = {f"model.{key}" for key in VIT} | {f"resnet.{key}" for key in RESNET} | {"resnet"}
    known |= {f"preprocess.{key}" for key in PREPROCESS} | set(TRAVELS)
    assert {limit.key for limits in EXPRESSIBLE.values() for limit in limits} <= known


def test_every_limit_is_reached():
    """The cases below meet each entry of the table, so that none stays untested."""
    resnets = [resnet(settings) for several in RESNET.values() for settings in several]
    for layout, limits in EXPRESSIBLE.items():
        models = [vit(layout, settings) for several in VIT.values() for settings in several]
        models += resnets
        models += [vit(layout, {}, one) for several in PREPROCESS.values() for one in several]
        models.append(vit(layout, {"image_size": (16, 40)}, {"resize_mode": "crop"}))
        for name, values in TRAVELS.items():
            for value in values:
                models.append(vit(layout, {}))
                setattr(models[-1], name, value)
        met = [limit for model in models for limit in find_limits(model, layout).values()]
        assert [limit for limit in limits if limit not in met] == []


def complete(network, preprocess=None):
    """Give `network` weights that are nowhere 0 or 1, class names and a transform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model, config = LoadedModel(network), network.config
    model.head_trained = config.num_classes > 0
    model.labels = tuple(f"class {i}" for i in range(config.num_classes)) or None
    if config.num_channels in (1, 3):
        settings = {"resize_mode": "squash", "crop_rounding": "even", **(preprocess or {})}
        model.preprocess = Preprocess(
            config.image_size, num_channels=config.num_channels, **settings
        )
    return model.eval()


def vit(layout, settings, preprocess=None):
    return complete(VisionTransformer(replace(BASE, **{**HELD[layout], **settings})), preprocess)


def resnet(settings):
    config = ResNetConfig((32, 32), 3, (3, 4, 6, 3), 0.5, 3, "timm")
    return complete(ResNet(replace(config, **settings)))


def check(model, layout, folder):
    """Write and read `model`: the table's error, or the same model up to what the table says."""
    out = folder / ("w.npz" if layout == "google" else "w")
    limits = find_limits(model, layout)
    refused = {key: limit for key, limit in limits.items() if isinstance(limit, Refused)}
    if refused:
        with pytest.raises(VitcliError, match="cannot express") as error:
            WRITERS[layout](model, out)
        for key, limit in refused.items():
            name = "a ResNet" if key.startswith("resnet") else f"`{key}` = "
            assert name in error.value.message and f"({limit.text})" in error.value.message
        assert "`--to onnx`" in error.value.hint and not list(folder.iterdir())
        return
    notes = WRITERS[layout](model, out)
    assert len(notes) == len(limits)
    back = load_model(out)
    images = torch.randn(
        2,
        model.config.num_channels,
        *model.config.image_size,
        generator=torch.Generator().manual_seed(1),
    )
    with torch.no_grad():
        expected, found = model(images), back(images)
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    lost = {
        key.partition(".")[2] or key for key, limit in limits.items() if isinstance(limit, Lost)
    }
    before, after = asdict(model.config), asdict(back.config)
    assert {key for key in before if before[key] != after[key]} <= lost
    if model.preprocess is not None:
        before, after = asdict(model.preprocess), asdict(back.preprocess)
        changed = {key for key in before if before[key] != after[key]}
        assert changed <= lost | ({"crop_fraction"} if "resize_size" in lost else set())
    for name in ("labels", "head_activation", "head_trained"):
        assert getattr(back, name) == getattr(model, name) or name in lost, name


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("field", VIT)
def test_a_setting_of_a_vit(layout, field, tmp_path):
    for i, settings in enumerate(VIT[field]):
        (tmp_path / str(i)).mkdir()
        check(vit(layout, settings), layout, tmp_path / str(i))


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("field", RESNET)
def test_a_setting_of_a_resnet(layout, field, tmp_path):
    for i, settings in enumerate(RESNET[field]):
        (tmp_path / str(i)).mkdir()
        check(resnet(settings), layout, tmp_path / str(i))


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("field", PREPROCESS)
def test_a_setting_of_the_preprocessing(layout, field, tmp_path):
    for i, settings in enumerate(PREPROCESS[field]):
        (tmp_path / str(i)).mkdir()
        check(vit(layout, {}, settings), layout, tmp_path / str(i))


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("name", TRAVELS)
def test_what_travels_with_the_network(layout, name, tmp_path):
    for i, value in enumerate(TRAVELS[name]):
        (tmp_path / str(i)).mkdir()
        model = vit(layout, {})
        setattr(model, name, value)
        check(model, layout, tmp_path / str(i))
