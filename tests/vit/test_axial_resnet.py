"""AxialResNet against loops over equation 4 of Wang et al. (2020), and its sizes."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from vitcli.vit import ResNet, ResNetConfig, create_network
from vitcli.vit.axial_resnet import AxialAttention, AxialReplacement
from vitcli.vit.macs import macs
from vitcli.vit.variants import config_from_dict, is_variant, parse_variant
from vitcli.weights.edit import resize
from vitcli.weights.load import load_model
from vitcli.weights.loaded import LoadedModel
from vitcli.weights.store import save_model


def shaken(module, seed=0):
    """Every number counts: no norm is 1 and 0, no embedding is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5 + 0.2)
    return module


def normalized(x, groups, weight, bias):
    """GroupNorm of one image, channels first, group by group."""
    out = np.empty_like(x)
    size = len(x) // groups
    for g in range(groups):
        part = x[g * size : (g + 1) * size]
        out[g * size : (g + 1) * size] = (part - part.mean()) / np.sqrt(part.var() + 1e-5)
    shape = (-1, *[1] * (x.ndim - 1))
    return out * weight.reshape(shape) + bias.reshape(shape)


def attend_in_loops(p, x, heads=8):
    """Equation 4 for the rows of one image (F, lines, n), cell by cell."""
    f, lines, n = x.shape
    e = f // heads
    kernel = p["qkv.weight"][:, :, 0, 0]
    qkv = np.einsum("of,fln->oln", kernel, x)
    qkv = normalized(qkv, 32, p["norm_qkv.weight"], p["norm_qkv.bias"])
    terms = np.zeros((3, heads, lines, n, n))
    out = np.zeros((2, f, lines, n))

    def parts(h, cell):
        whole = qkv[2 * e * h : 2 * e * (h + 1), cell[0], cell[1]]
        return whole[: e // 2], whole[e // 2 : e], whole[e:]

    def embeddings(offset):
        whole = p["rel_pos"][offset + (len(p["rel_pos"]) - 1) // 2]
        return whole[: e // 2], whole[e // 2 : e], whole[e:]

    for h in range(heads):
        for line in range(lines):
            for o in range(n):
                for a in range(n):
                    q, k = parts(h, (line, o))[0], parts(h, (line, a))[1]
                    r_q, r_k, _ = embeddings(a - o)
                    terms[:, h, line, o, a] = q @ k, q @ r_q, k @ r_k
    scale, shift = p["norm_scores.weight"], p["norm_scores.bias"]
    scores = normalized(terms.reshape(3 * heads, lines, n, n), 3 * heads, scale, shift)
    scores = scores.reshape(terms.shape).sum(axis=0)
    for h in range(heads):
        for line in range(lines):
            for o in range(n):
                weights = np.exp(scores[h, line, o]) / np.exp(scores[h, line, o]).sum()
                for a in range(n):
                    out[0, e * h : e * (h + 1), line, o] += weights[a] * parts(h, (line, a))[2]
                    out[1, e * h : e * (h + 1), line, o] += weights[a] * embeddings(a - o)[2]
    out = out.reshape(2 * f, lines, n)
    out = normalized(out, 32, p["norm_out.weight"], p["norm_out.bias"])
    return out[:f] + out[f:]


@pytest.mark.parametrize("along", ["row", "column"])
def test_attention_along_one_axis_against_loops(along):
    x = torch.randn(2, 64, 3, 5, generator=torch.Generator().manual_seed(1)).double()
    length = {"row": 5, "column": 3}[along]
    module = shaken(AxialAttention(64, length, along).double())
    p = {name: value.numpy() for name, value in module.state_dict().items()}
    with torch.no_grad():
        found = module(x).numpy()
    for image, expected in zip(x.numpy(), found, strict=True):
        image = image if along == "row" else image.transpose(0, 2, 1)
        naive = attend_in_loops(p, image)
        naive = naive if along == "row" else naive.transpose(0, 2, 1)
        assert np.abs(naive - expected).max() < 1e-10


def test_columns_come_before_rows_and_the_pool_takes_the_stride():
    module = shaken(AxialReplacement(64, 2, (3, 5)).double())
    x = torch.randn(1, 64, 3, 5, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        map_, found = module.row(module.column(x)), module(x)
    assert found.shape == (1, 64, 2, 3)
    for i in range(2):
        for j in range(3):  # the cells at the border are means of fewer cells
            window = map_[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean(dim=(2, 3))
            assert torch.allclose(found[:, :, i, j], window)


def source_parameters(width, layers=(3, 4, 6, 3), classes=1000):
    """Parameters of AxialAttentionNet in axialnet.py at 224 px, whose norms are elsewhere."""
    inputs, side = int(64 * width), 56
    total = 3 * inputs * 49 + 2 * inputs
    for stage, units in enumerate(layers):
        planes = int(128 * 2**stage * width)
        for unit in range(units):
            length = side * 2 if stage and not unit else side
            total += inputs * planes + 2 * planes + planes * 2 * planes + 4 * planes
            attention = planes * 2 * planes + 2 * (2 * planes) + 2 * 24 + 2 * (2 * planes)
            total += 2 * (attention + planes // 8 * 2 * (2 * length - 1))
            total += 0 if unit else inputs * 2 * planes + 4 * planes
            inputs = 2 * planes
        side //= 2
    return total + inputs * classes + classes


def products(width, layers=(3, 4, 6, 3), classes=1000):
    """Multiply-adds at 224 px: convolutions, and the five products of attention in each axis."""
    inputs, side = int(64 * width), 56
    total = 3 * inputs * 49 * 112**2
    for stage, units in enumerate(layers):
        planes = int(128 * 2**stage * width)
        for unit in range(units):
            n = side * 2 if stage and not unit else side
            total += n * n * inputs * planes + side * side * planes * 2 * planes
            # q k, q r_q and k r_k have half the width of the values; w v and w r_v the whole.
            total += 2 * (n * n * planes * 2 * planes + n**3 * planes * (3 / 2 + 2))
            total += 0 if unit else side * side * inputs * 2 * planes
            inputs = 2 * planes
        side //= 2
    return total + inputs * classes


@pytest.mark.parametrize(("name", "width"), [("AxialResNet-50", 0.5), ("Axial-R50x1", 1.0)])
def test_sizes(name, width):
    """11.6 M and 2.84 G, 44.0 M and 10.2 G: a few norms more or less than the source."""
    config = parse_variant(name, num_classes=1000)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in ResNet(config).parameters())
    assert parameters == pytest.approx(source_parameters(width), rel=5e-4)
    assert macs(config) == products(width)


def test_names():
    config = parse_variant("AxialResNet-50")
    assert config == parse_variant("Axial-R50x0.5") == parse_variant("R50x0.5", axial=True)
    assert config.axial and config.layers == (3, 4, 6, 3) and config.width == 0.5
    assert config_from_dict(config.to_dict()) == config
    assert is_variant("AxialResNet-50") and is_variant("Axial-R50x1")
    old = {key: value for key, value in parse_variant("R50x1").to_dict().items() if key != "axial"}
    assert config_from_dict(old) == parse_variant("R50x1")
    for wrong in ("AxialResNet-51", "Axial-R51x1", "Axial-R50x0.75"):
        with pytest.raises(ValueError):
            parse_variant(wrong)


def small(size=(32, 48), **settings):
    values = {"image_size": size, "layers": (1, 2), "width": 0.5, "num_classes": 5, "axial": True}
    return ResNet(ResNetConfig(**(values | settings)))


def test_only_the_convolutions_of_3x3_are_replaced():
    plain = small(axial=False)
    assert not any(isinstance(m, AxialAttention) for m in plain.modules())
    kernels = [m.kernel_size for m in small().modules() if isinstance(m, nn.Conv2d)]
    assert set(kernels) == {(7, 7), (1, 1)}


def test_fresh_weights():
    model = create_network("Axial-R50x0.5", layers=(1,), num_classes=3, image_size=64)
    unit = model.stages[0].blocks[0].conv2
    assert float(unit.row.qkv.weight.detach().std()) == pytest.approx(1 / 8, rel=0.05)
    assert float(unit.row.rel_pos.detach().std()) == pytest.approx(math.sqrt(1 / 8), rel=0.1)
    assert not torch.equal(unit.row.rel_pos, unit.column.rel_pos)


def test_another_image_size_resamples_the_offsets(tmp_path):
    model = LoadedModel(shaken(small()).eval(), labels=tuple("abcde"))
    images = torch.randn(1, 3, 64, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model.network(images)  # the network itself accepts other sizes
    save_model(tmp_path / "m.safetensors", model)
    read = load_model(
        tmp_path / "m.safetensors", image_size=(64, 48), preprocess={"mean": 0.5, "std": 0.5}
    )
    assert read.config == replace(model.config, image_size=(64, 48))
    with torch.no_grad():
        assert torch.allclose(read.network(images), before, atol=1e-5)
    shapes = {name: p.shape for name, p in ResNet(read.config).named_parameters()}
    assert {name: p.shape for name, p in read.network.named_parameters()} == shapes
    name = "stages.0.blocks.0.conv2.column.rel_pos"
    assert read.load_report.status[name] == ("resampled", "offsets of 8 -> 16 cells, linear")
    assert read.load_report.status[name.replace("column", "row")][0] == "loaded"
    resize(read, (32, 48))
    assert read.network.get_parameter(name).shape == model.network.get_parameter(name).shape
