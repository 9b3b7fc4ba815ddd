"""What a configuration refuses, and its way through JSON."""

import json
import tomllib
from dataclasses import fields
from typing import Literal, get_args, get_origin

import pytest

from vitcli.config.recipe import check
from vitcli.config.schema import ModelSection
from vitcli.vit import ViTConfig, parse_variant
from vitcli.vit.config import canonical_pool


def test_configurations_survive_a_round_trip_through_json():
    config = parse_variant("S/8", image_size=(64, 32), num_classes=3, pool="avg", layer_scale=1e-5)
    assert ViTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: parse_variant("B/15"), "not a multiple of patch size 15"),
        (lambda: parse_variant("B/16", pool="max"), "unknown pooling `max`"),
        (lambda: parse_variant("B/16", class_token=False), "needs the class token"),
        (lambda: parse_variant("B/16", num_heads=7), "not a multiple of 7 heads"),
        (lambda: parse_variant("B/16", image_size=(16, 16), pool="quadrants"), "2x2"),
        (lambda: ViTConfig.from_dict({"width": 3}), "unknown model settings: width"),
    ],
)
def test_what_cannot_be_built_is_said_in_words(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_spellings():
    assert [canonical_pool(n) for n in ("cls", "tok", "gap", "avg", "mean")] == [
        "token",
        "token",
        "mean",
        "mean",
        "mean",
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pool": "tokens"}, "unknown pool `tokens`; use one of `token`, `mean`"),
        ({"position": "rotary"}, "unknown position `rotary`; use one of `learned`, `learned2d`"),
        ({"position_at": "first"}, "unknown position_at `first`"),
        ({"mlp": "relu"}, "unknown mlp `relu`; use one of `gelu`, `swiglu`"),
        ({"gelu": "quicker"}, "unknown gelu `quicker`"),
        ({"norm": "batch"}, "unknown norm `batch`; use one of `layer`, `rms`"),
        ({"projection_size": 0}, "projection_size is 0"),
        ({"norm_after_pool": True, "final_norm": False}, "needs the final norm"),
        ({"stem": (1,), "patch_size": 1, "patch_norm": True}, "norms of its own"),
        ({"stem": (1,), "patch_size": 1, "crop_to_patches": True}, "rounds up"),
        ({"image_size": (5, 40), "crop_to_patches": True}, "not a multiple of patch size"),
        ({"stem_arithmetic": "torch"}, "unknown stem_arithmetic `torch`"),
        ({"depth": 0}, "depth is 0"),
        ({"depth": 10**8}, "depth is 100000000, not a whole number from 1 to 1,000"),
        ({"num_heads": 2.0}, "num_heads is 2.0, not a whole number"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"num_classes": -1}, "num_classes is -1, not a whole number from 0"),
        ({"num_registers": True}, "num_registers is True"),
        ({"representation_size": 0}, "representation_size is 0"),
        ({"class_token": "no"}, "class_token is 'no', not true or false"),
        ({"dropout_rate": 1.0}, "dropout_rate is 1.0"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0"),
        ({"layer_scale": float("inf")}, "layer_scale is inf"),
        ({"pool": "token_mean", "class_token": False}, "`token_mean` needs the class token"),
        ({"pool": "distilled"}, "needs `distillation_token = true`"),
        (
            {"pool": "mean", "distillation_token": True, "class_token": False},
            "stands beside a class token",
        ),
        (
            {"distillation_token": True, "distillation_head": True},
            "a distillation head needs pool `distilled`, not `token`",
        ),
        (
            {
                "distillation_token": True,
                "distillation_head": True,
                "pool": "distilled",
                "representation_size": 8,
            },
            "no pre-logits",
        ),
        ({"axial": True}, "axial blocks have rows and columns of patches only"),
        (
            {"axial": True, "class_token": False, "pool": "mean", "num_registers": 1},
            "axial blocks have rows and columns of patches only",
        ),
        ({"embed_dim": 15, "num_heads": 1, "position": "learned2d"}, "an even width, not 15"),
        ({"embed_dim": 6, "num_heads": 1, "position": "sincos2d"}, "4 divides, not 6"),
        ({"position": "relative", "position_at": "every"}, "`relative` is added nowhere"),
        (
            {"axial": True, "class_token": False, "pool": "mean", "position_bias": "shared"},
            "axial blocks have no 2-D offsets",
        ),
        ({"position_bias": "blocks"}, "unknown position_bias `blocks`"),
        ({"position": "none", "position_at": "shared"}, "`none` is added nowhere"),
        ({"position": "sincos2d", "position_at": "every"}, "`position_at = shared`"),
        ({"stem": (3, 0)}, "each of one block or more"),
        ({"stem": (1, 1, 1, 1, 1)}, "up to four stages"),
        (
            {"stem": (3, 4, 9), "patch_size": 2},
            "15x15 cells, which is not a multiple",
        ),
        ({"stem": (3,), "stem_width": 0.3}, "32 groups"),
    ],
)
def test_settings_that_contradict_each_other(settings, words):
    with pytest.raises(ValueError, match=words):
        ViTConfig(**{"image_size": (240, 240), **settings})


@pytest.mark.parametrize(
    ("stem", "patch_size", "pixels"),
    [(None, 16, 16), ((), 8, 32), ((2,), 4, 16), ((3, 4, 9), 1, 16), ((3, 4, 6, 3), 1, 32)],
)
def test_pixels_of_a_patch(stem, patch_size, pixels):
    config = ViTConfig(image_size=(224, 160), stem=stem, patch_size=patch_size)
    assert config.pixels_per_patch == pixels
    assert config.grid == (224 // pixels, 160 // pixels)


def test_counts_of_tokens_and_widths():
    settings = {"image_size": (32, 48), "num_registers": 4, "distillation_token": True}
    config = ViTConfig(**settings, pool="distilled")
    assert (config.num_prefix_tokens, config.num_tokens, config.num_covered_tokens) == (6, 12, 6)
    assert (config.pooled_dim, config.feature_dim, config.head_dim) == (1536, 1536, 1536)
    config = ViTConfig(**settings, pool="distilled", distillation_head=True, position="learned2d")
    assert (config.num_covered_tokens, config.feature_dim, config.head_dim) == (0, 1536, 768)
    assert ViTConfig(**settings, position_covers_prefix=False).num_covered_tokens == 0
    assert ViTConfig(pool="token_mean", representation_size=10).feature_dim == 10


def test_a_recipe_can_say_every_setting_of_a_model():
    """Each field has a key of the section, which takes the same words."""
    section = ModelSection.model_fields
    assert {f.name for f in fields(ViTConfig)} - set(section) == {"num_classes"}
    choices = {f.name: get_args(f.type) for f in fields(ViTConfig) if get_origin(f.type) is Literal}
    assert len(choices) == 10
    for key, words in choices.items():
        given = {word for part in get_args(section[key].annotation) for word in get_args(part)}
        assert given == set(words) or key == "pool"  # which has other spellings too
    text = '[model]\nname = "R50+B/16"\nstem = [2, 2]\nstem_width = 0.5\nposition = "learned2d"'
    given = check(ModelSection, tomllib.loads(text)["model"], "here").architecture()
    assert given == {"stem": (2, 2), "stem_width": 0.5, "position": "learned2d"}
