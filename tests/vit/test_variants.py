"""Names of models against the official tables of sizes and parameter counts."""

import json
import re
from functools import cache

import pytest
import torch

from vitcli.vit import (
    VARIANTS,
    ResNet,
    ResNetConfig,
    VisionTransformer,
    ViTConfig,
    config_from_dict,
    create_network,
    from_config,
    parse_variant,
)
from vitcli.vit.variants import RESNETS, is_variant

# Width, layers, MLP, heads: table 1 of the paper, DeiT, big_vision's models/vit.py.
SIZES = {
    "mu": (32, 1, 128, 2),
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "M": (512, 12, 2048, 8),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
    "G": (1664, 48, 8192, 16),
    "e": (1792, 56, 15360, 16),
    # Ours.
    "Pico": (128, 6, 512, 4),
    "Nano": (192, 6, 768, 3),
}

# 1000 classes; counted by timm's resnetv2_50x1_bit and so on.
BIT = {
    "R50x1": 25_549_352,
    "R50x3": 217_319_080,
    "R101x1": 44_541_480,
    "R101x3": 387_934_888,
    "R152x2": 236_335_208,
    "R152x4": 936_533_224,
}


# Of the eight that the table has for each model; the others differ in the number of classes only.
OFFICIAL_COUNTS = (
    "features_only_no_head",
    "classes1000_prelogits",
    "classes21843_no_prelogits",
    "classes1000_no_prelogits_384px",
)


@cache
def count(config):
    with torch.device("meta"):
        return sum(p.numel() for p in from_config(config).parameters())


def by_formula(d, depth, mlp, patch, grid, classes, channels=3):
    """Parameters of a ViT with class token and learned positions, from the equations alone."""
    attention = d * 3 * d + 3 * d + d * d + d
    block = attention + d * mlp + mlp + mlp * d + d + 4 * d
    embedding = patch * patch * channels * d + d + d + (grid[0] * grid[1] + 1) * d
    return embedding + depth * block + 2 * d + (d * classes + classes if classes else 0)


def resnet_by_formula(layers, width, classes):
    """Parameters of a BiT ResNet."""
    total, inputs = 7 * 7 * 3 * 64 * width, 64 * width
    for i, units in enumerate(layers):
        mid = 64 * width * 2**i
        for _ in range(units):
            total += 2 * inputs + inputs * mid + 2 * mid + 9 * mid * mid + 2 * mid + mid * 4 * mid
            total += inputs * 4 * mid if inputs != 4 * mid else 0
            inputs = 4 * mid
    return total + 2 * inputs + inputs * classes + classes


def stem_by_formula(layers):
    """Parameters of a hybrid's ResNet, and the number of its feature maps."""
    total, inputs = 7 * 7 * 3 * 64 + 2 * 64, 64
    for i, units in enumerate(layers):
        mid = 64 * 2**i
        for unit in range(units):
            total += inputs * mid + 9 * mid * mid + mid * 4 * mid + 2 * (mid + mid + 4 * mid)
            total += inputs * 4 * mid + 8 * mid if unit == 0 else 0
            inputs = 4 * mid
    return total, inputs


def test_every_variant_is_in_the_table_of_this_test():
    assert {n: (v.embed_dim, v.depth, v.mlp_dim, v.num_heads) for n, v in VARIANTS.items()} == SIZES


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_are_those_of_the_equations(size):
    d, depth, mlp, _ = SIZES[size]
    shapes = [(16, (224, 224), 1000), (14, (224, 224), 0), (8, (64, 120), 7)]
    for patch, image, classes in shapes if depth <= 12 else shapes[:1]:  # no size has its own
        grid = image[0] // patch, image[1] // patch
        config = parse_variant(f"{size}/{patch}", image_size=image, num_classes=classes)
        assert config.grid == grid
        assert count(config) == by_formula(d, depth, mlp, patch, grid, classes)


def test_published_sizes_in_millions():
    # Scaling Vision Transformers, table 2 (g, G); the paper (the others).
    published = {"g/14": 1011, "G/14": 1843, "H/14": 632}
    for name, millions in published.items():
        assert count(parse_variant(name)) / 1e6 == pytest.approx(millions, rel=5e-3), name


def official(key):
    """`R50+ViT-B_16`, `ViT-S_16-gap-norep` -> our name and settings."""
    name, gap, _ = key.partition("-gap-norep")
    settings = {"pool": "gap", "class_token": False} if gap else {}
    return name.replace("ViT-", "").replace("_", "/"), settings


def test_parameter_counts_are_the_official_ones(shared):
    models = json.loads((shared / "reference/facts.json").read_text())["models"]
    covered = 0
    for key, facts in models.items():
        name, settings = official(key)
        config = parse_variant(name, **settings)
        width = facts["config"]["hidden_size"]
        assert config.embed_dim == width
        assert list(config.stem or ()) == facts["config"].get("resnet", {}).get("num_layers", [])
        assert (config.stem is not None) == ("resnet" in facts["config"])
        assert [config.patch_size] * 2 == facts["config"]["patches"]["size"]
        for what in OFFICIAL_COUNTS:
            changes = dict(settings)
            if what.startswith("classes"):
                changes["num_classes"] = int(what[len("classes") :].split("_")[0])
            if "_prelogits" in what and "_no_prelogits" not in what:
                changes["representation_size"] = width
            if what.endswith("_384px"):  # what a patch size does not divide is cut off there
                side = 384 // config.pixels_per_patch * config.pixels_per_patch
                changes["image_size"] = (side, side)
            found = count(parse_variant(name, **changes))
            assert found == facts["params_at_224px"][what], (key, what)
            covered += 1
    assert (len(models), covered) == (18, 18 * 4)


@pytest.mark.parametrize(
    ("name", "layers", "stride"),
    [
        ("R50+B/16", (3, 4, 9), 16),
        ("R50+L/16", (3, 4, 9), 16),
        ("R50+B/32", (3, 4, 6, 3), 32),
        ("R50+L/32", (3, 4, 6, 3), 32),
        ("R26+B/32", (2, 2, 2, 2), 32),
        ("R26+S/32", (2, 2, 2, 2), 32),
        ("R101+H/16", (3, 4, 26), 16),
        ("R152+Ti/32", (3, 8, 36, 3), 32),
        ("R+Ti/16", (), 32),
    ],
)
def test_hybrids(name, layers, stride):
    image, classes = (224, 160), 10
    config = parse_variant(name, image_size=image, num_classes=classes)
    patch = 8 if layers == () else 1
    assert (config.stem, config.patch_size, config.pixels_per_patch) == (layers, patch, stride)
    assert config.grid == (224 // stride, 160 // stride)
    d, depth, mlp, _ = SIZES[name.partition("+")[2].partition("/")[0]]
    stem, maps = stem_by_formula(layers)
    vit = by_formula(d, depth, mlp, patch, config.grid, classes, channels=maps)
    assert count(config) == stem + vit


@pytest.mark.parametrize("name", ["Axial-B/32", "Axial-B/16"])
def test_axial(name):
    config = parse_variant(name, num_classes=1000)
    assert (config.axial, config.class_token, config.pool) == (True, False, "mean")
    d, depth, mlp, patch = 768, 12, 3072, config.patch_size
    twice = by_formula(d, 2 * depth, mlp, patch, config.grid, 1000)  # two blocks for each one
    assert count(config) == twice - 2 * d  # no class token, nor its position


@pytest.mark.parametrize("name", ["R50x1", "R50x2", "R101x1", "R152x1", "R152x2", "R200x3", *BIT])
def test_bit_resnets(name):
    depth, width = (int(n) for n in name[1:].split("x"))
    config = parse_variant(name, num_classes=1000)
    assert isinstance(config, ResNetConfig)
    assert (config.layers, config.width, config.depth) == (RESNETS[depth], width, depth)
    assert config.feature_dim == 2048 * width
    assert count(config) == resnet_by_formula(config.layers, width, 1000)
    assert count(config) == BIT.get(name, count(config))


@pytest.mark.parametrize("name", ["B/16", "R50+B/16", "R+Ti/16", "Axial-B/32"])
def test_the_papers_longer_names(name):
    longer = re.sub(r"(\w+/)", r"ViT-\1", name)
    assert longer in ("ViT-B/16", "R50+ViT-B/16", "R+ViT-Ti/16", "Axial-ViT-B/32")
    assert parse_variant(longer) == parse_variant(name) and is_variant(longer)
    with pytest.raises(ValueError, match=f"`{re.escape(longer)}` is one"):
        parse_variant(longer.replace("B/", "b/").replace("Ti/", "TI/"))


def test_the_small_ones_have_the_size_that_the_readme_says():
    settings = {"image_size": (32, 32), "num_classes": 10, "pool": "mean", "class_token": False}
    # By hand for Pico/4: embedding 48*128+128, positions 64*128 learned, six blocks, norm, head.
    block = 4 * (128 * 128 + 128) + 2 * 128 * 512 + 512 + 128 + 4 * 128
    expected = 48 * 128 + 128 + 64 * 128 + 6 * block + 2 * 128 + 1290
    assert count(parse_variant("Pico/4", **settings)) == expected


def test_names_make_models_with_random_weights_that_a_seed_repeats():
    for name, kind, settings in (
        ("Pico/8", VisionTransformer, {"depth": 1}),
        ("R26+mu/16", VisionTransformer, {"stem": (1,), "stem_width": 0.5, "image_size": 32}),
        ("Axial-Pico/8", VisionTransformer, {"depth": 1}),
        ("R26x1", ResNet, {"layers": (1, 1), "width": 0.5}),
    ):
        a, b, c = (
            create_network(name, **{"num_classes": 3, "image_size": 32, "seed": seed, **settings})
            for seed in (1, 1, 2)
        )
        assert type(a) is kind and not a.training
        states = [model.state_dict() for model in (a, b, c)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        assert torch.equal(a(images), torch.zeros(2, 3))  # a zero head
        features = a.features(images)
        assert features.shape == (2, a.config.feature_dim)
        assert features.isfinite().all() and features.std() > 0.01


def test_configurations_of_both_kinds_survive_a_round_trip_through_json():
    for name in ("B/16", "R50+B/16", "R+Ti/16", "Axial-B/32", "R101x3"):
        config = parse_variant(name, image_size=(64, 96), num_classes=3)
        values = json.loads(json.dumps(config.to_dict()))
        assert config_from_dict(values) == config
        assert ("kind" in values) == (not isinstance(config, ViTConfig))


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("X/16", {}, "no model variant `X/16`"),
        ("b/16", {}, "`B/16` is one"),
        ("R50+b/16", {}, r"`R50\+B/16` is one"),
        ("B", {}, "no model variant `B`"),
        ("R50+B/8", {}, "ends in `/16` or `/32`"),
        ("R+B/32", {}, "without stages it ends in `/16`"),
        ("R51+B/16", {}, "26, 50, 101, 152, 200 layers"),
        ("R18x1", {}, "26, 50, 101, 152, 200 layers"),
        ("R50x0", {}, "gives 0 channels"),
        ("R50x1", {"depth": 3}, "unknown settings of a ResNet: depth"),
        ("R50x1", {"layers": ()}, "a unit in every stage"),
        ("R+Ti/16", {"image_size": (224, 200)}, "not a multiple of patch size 8"),
        ("R50+B/16", {"stem_width": 0.4}, "not a multiple of its 32 groups"),
        ("Axial-B/16", {"class_token": True}, "rows and columns"),
        ("Axial-R50+B/16", {}, "no model variant"),
    ],
)
def test_what_no_model_has_as_a_name_is_said_in_words(name, settings, words):
    with pytest.raises(ValueError, match=words):
        parse_variant(name, **settings)


def test_a_kind_that_is_not_known():
    with pytest.raises(ValueError, match="unknown kind of model: `mixer`"):
        config_from_dict({"kind": "mixer"})
    with pytest.raises(ValueError, match="unknown settings of a ResNet: embed_dim"):
        config_from_dict({"kind": "resnet", "embed_dim": 3})


def test_spellings():
    for name in ("B/16", "R50+B/16", "R+Ti/16", "Axial-B/32", "So400m/14", "R50x1", "Q/3", "R9x9"):
        assert is_variant(name), name
    for name in ("runs/x", "x.npz", "B/16/x", "R50", "R50x1.npz", "hf:a/16", "Radial-B/16", ""):
        assert not is_variant(name), name


def test_the_half_sized_b_of_figure_4():
    half, whole = parse_variant("ViT-b/32"), parse_variant("B/32")
    assert (half.embed_dim, half.mlp_dim) == (whole.embed_dim // 2, whole.mlp_dim // 2)
    assert (half.depth, half.num_heads, half.patch_size) == (12, 12, 32)
    assert count(half) == by_formula(384, 12, 1536, 32, (7, 7), 0)
    with pytest.raises(ValueError, match="`B/16` is one"):  # not a model of half the size
        parse_variant("b/16")
