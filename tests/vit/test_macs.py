"""Multiply-adds: the paper's, the official code's, and a formula's."""

import json
from dataclasses import replace

import pytest
import torch
from support.kinds import small

from vitcli.vit import create_network, from_config, parse_variant
from vitcli.vit import macs as module
from vitcli.vit.hybrid import StdConv2dSame
from vitcli.vit.macs import macs, macs_by_part, training_flops

JFT = 303e6  # images
# Table 6 of the paper: exaFLOPs of pre-training.
TABLE_6 = [
    ("B/32", 7, 55),
    ("B/16", 7, 224),
    ("L/32", 7, 196),
    ("L/16", 7, 783),
    ("L/16", 14, 1567),
    ("H/14", 14, 4262),
]


@pytest.mark.parametrize(("name", "epochs", "exaflops"), TABLE_6)
def test_table_6(name, epochs, exaflops):
    config = parse_variant(name, image_size=(224, 224), num_classes=0)
    found = training_flops(config, JFT * epochs) / 1e18
    # 56.10 for the 55 of B/32: rounding explains 0.9 % of these 2.0 %, and the rest is not known.
    # 49 tokens instead of 50 would make it 55.0, but without the class token L/32 and B/16 are off.
    assert found == pytest.approx(exaflops, rel=0.0201 if name == "B/32" else 0.003)


# ResNets and hybrids of the same table. R50+L/16 has 859 at 7 epochs and 1668 at 14: the first is
# 3 % more than half of the second, and only the second is that of a count.
TABLE_6_CONVOLUTIONS = [
    ("R50x1", 7, 50),
    ("R50+B/32", 7, 106),
    ("R50+B/16", 7, 274),
    ("R50+L/32", 7, 246),
    *(
        pytest.param(*row, marks=pytest.mark.slow)  # seconds each
        for row in (
            ("R50x2", 7, 199),
            ("R101x1", 7, 96),
            ("R152x1", 7, 141),
            ("R152x2", 7, 563),
            ("R152x2", 14, 1126),
            ("R200x3", 14, 3306),
            ("R50+L/16", 14, 1668),
        )
    ),
]


def positions(size, kernel, stride, before, count):
    """How many of the `count` x `kernel` products along one side meet a pixel and not a zero."""
    starts = [i * stride - before for i in range(count)]
    return sum(max(0, min(s + kernel, size) - max(s, 0)) for s in starts)


def products_with_zeros(config):
    """Products of convolutions with zeros beyond the border, per image.

    XLA's cost analysis (`HloCostAnalysis::HandleConvolution`), which the authors' hardware reports,
    counts only positions inside of the image.
    """
    skipped = []

    def hook(module, inputs, output):
        kernel, stride = module.kernel_size[0], module.stride[0]
        if kernel == stride:  # patches
            return
        (size, _), (count, _) = inputs[0].shape[2:], output.shape[2:]
        before = kernel // 2
        if isinstance(module, StdConv2dSame):
            before = max((count - 1) * stride + kernel - size, 0) // 2
        inside = positions(size, kernel, stride, before, count)
        channels = module.in_channels * module.out_channels
        skipped.append(channels * ((kernel * count) ** 2 - inside**2))

    with torch.device("meta"):
        model = from_config(config).eval()
        images = torch.empty(1, 3, *config.image_size)
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(hook)
        model(images)
    return sum(skipped)


@pytest.mark.parametrize(("name", "epochs", "exaflops"), TABLE_6_CONVOLUTIONS)
def test_table_6_of_resnets_and_hybrids(name, epochs, exaflops):
    config = parse_variant(name, image_size=(224, 224), num_classes=0)
    zeros = products_with_zeros(config)
    factor = training_flops(config, JFT * epochs) / macs(config) / 1e18
    # 3.0 to 4.0 % more with the zeros, for a ResNet; the paper rounds 50 exaFLOPs by up to 1 %.
    assert factor * (macs(config) - zeros) == pytest.approx(exaflops, rel=0.01)
    if "+" not in name:
        assert 0.03 < zeros / macs(config) < 0.05
    elif "16" in name:
        assert zeros / macs(config) < 0.006


def test_xla_counts_a_little_more(shared):
    """Its count has the element-wise work as well: 0.1 to 1.3 % of it, as its notes say."""
    facts = json.loads((shared / "reference/facts.json").read_text())["models"]
    ours = {"ViT-Ti_16": "Ti/16", "ViT-B_16": "B/16", "ViT-L_16": "L/16", "ViT-B_32": "B/32"}
    for theirs, name in ours.items():
        wanted = facts[theirs]["compute"]["xla_cost_analysis_gflops_224px"] * 1e9
        found = 2 * macs(parse_variant(name, image_size=(224, 224), num_classes=1000))
        assert 1.001 < wanted / found < 1.013


def test_the_official_code(shared):
    """`gmacs` counts products and convolutions of the official flax models."""
    facts = json.loads((shared / "reference/facts.json").read_text())["models"]
    ours = {"ViT-Ti_16": "Ti/16", "ViT-S_16": "S/16", "ViT-B_16": "B/16", "ViT-B_32": "B/32"}
    ours |= {"ViT-L_16": "L/16", "ViT-L_32": "L/32", "ViT-H_14": "H/14", "ViT-B_8": "B/8"}
    ours |= {"R50+ViT-B_16": "R50+B/16", "R26+ViT-S_32": "R26+S/32", "R+ViT-Ti_16": "R+Ti/16"}
    for theirs, name in ours.items():
        known = {k: v for k, v in facts[theirs]["compute"].items() if k.endswith("px")}
        assert "224px" in known
        for size, wanted in ((k, v["gmacs"]) for k, v in known.items() if isinstance(v, dict)):
            side = int(size.removesuffix("px"))
            config = parse_variant(name, image_size=(side, side), num_classes=1000)
            assert macs(config) / 1e9 == pytest.approx(wanted, abs=6e-5), (theirs, side)


@pytest.mark.parametrize(
    ("options", "prefix"),
    [
        ({}, 1),
        ({"image_size": (32, 64), "num_registers": 3}, 4),
        ({"class_token": False, "pool": "mean", "representation_size": 20}, 0),
    ],
)
def test_a_formula(options, prefix):
    config = create_network("Ti/16", **{"image_size": 32, "num_classes": 10, **options}).config
    n = config.grid[0] * config.grid[1]
    t, d, m = n + prefix, config.embed_dim, config.mlp_dim
    assert macs_by_part(config) == {
        "embedding": n * 16 * 16 * 3 * d,
        "attention": config.depth * (4 * t * d * d + 2 * t * t * d),
        "mlp": config.depth * 2 * t * d * m,
        "head": 10 * (20 if config.representation_size else d)
        + (20 * d if config.representation_size else 0),
    }
    assert macs(config) == sum(macs_by_part(config).values())


# Kinds whose blocks, positions or poolings differ.
BLOCKS = ("plain", "map", "all of today", "tower", "bias, shared", "axial, relative")
BLOCKS += ("rope, EVA-02",)


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_that_are_not_built_count_as_much(kind):
    """Five blocks are counted from two passes over fewer, and here from one pass over all."""
    config = small(kind, depth=5).config
    cases = [(config, 0.0)]
    if kind == "plain":
        cases += [(config, 0.5), (replace(config, pool_blocks=2), 0.0)]
    for case, rate in cases:
        whole = module._run_and_count(case, rate)
        assert macs_by_part(case, rate) == whole and sum(whole.values()) > 0


@pytest.mark.parametrize("name", ["R50x1", "R50+Ti/16", "Axial-Ti/16"])
def test_other_families_are_counted_whole(name):
    config = create_network(name, image_size=64, num_classes=10).config
    found = macs_by_part(config)
    assert macs(config) > 1e8 and found["head"] > 0
    assert ("stages" in found) == (name == "R50x1")


def test_attention_pooling_by_the_formula():
    """One query attends to N patches, then an MLP on one vector; it used to end in a traceback."""
    d, mlp, n = 192, 768, 196
    config = parse_variant("Ti/16", pool="map", class_token=False)
    expected = d * d + n * 2 * d * d + 2 * n * d + d * d + 2 * d * mlp
    assert macs_by_part(config)["pooling"] == expected
    without = parse_variant("Ti/16", pool="mean", class_token=False)
    assert macs(config) - macs(without) == expected
