"""Names and sizes against the official table of parameter counts."""

import json

import pytest
import torch

from vitcli.vit import VARIANTS, VisionTransformer, ViTConfig, parse_variant
from vitcli.vit.variants import is_variant, normal_pool

OFFICIAL = {
    "Ti/16": "ViT-Ti_16",
    "S/16": "ViT-S_16",
    "S/32": "ViT-S_32",
    "B/8": "ViT-B_8",
    "B/16": "ViT-B_16",
    "B/32": "ViT-B_32",
    "L/16": "ViT-L_16",
    "L/32": "ViT-L_32",
    "H/14": "ViT-H_14",
}


def count(config):
    with torch.device("meta"):
        return sum(p.numel() for p in VisionTransformer(config).parameters())


@pytest.mark.parametrize("name", OFFICIAL)
def test_parameter_counts_are_the_official_ones(name, shared):
    facts = json.loads((shared / "reference/facts.json").read_text())
    expected = facts["models"][OFFICIAL[name]]["params_at_224px"]
    width = VARIANTS[name.partition("/")[0]].embed_dim
    assert count(parse_variant(name)) == expected["features_only_no_head"]
    for classes in (1000, 21843):
        assert (
            count(parse_variant(name, num_classes=classes))
            == expected[f"classes{classes}_no_prelogits"]
        )
        full = parse_variant(name, num_classes=classes, representation_size=width)
        assert count(full) == expected[f"classes{classes}_prelogits"]


def test_the_small_ones_have_the_size_that_the_readme_says():
    settings = {"image_size": (32, 32), "num_classes": 10, "pool": "mean", "class_token": False}
    # By hand for Pico/4: embedding 48*128+128, positions 64*128 learned, six blocks, norm, head.
    block = 4 * (128 * 128 + 128) + 2 * 128 * 512 + 512 + 128 + 4 * 128
    expected = 48 * 128 + 128 + 64 * 128 + 6 * block + 2 * 128 + 1290
    assert count(parse_variant("Pico/4", **settings)) == expected


def test_configurations_survive_a_round_trip_through_json():
    config = parse_variant("S/8", image_size=(64, 32), num_classes=3, pool="avg", layer_scale=1e-5)
    assert ViTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: parse_variant("X/16"), "no model variant `X/16`"),
        (lambda: parse_variant("B/15"), "not a multiple of patch size 15"),
        (lambda: parse_variant("B/16", pool="max"), "no pooling `max`"),
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
    assert [normal_pool(n) for n in ("cls", "tok", "gap", "avg", "mean")] == [
        "token",
        "token",
        "mean",
        "mean",
        "mean",
    ]
    assert is_variant("B/16") and is_variant("R50+B/16")
    assert not is_variant("runs/x") and not is_variant("x.npz") and not is_variant("B/16/x")
