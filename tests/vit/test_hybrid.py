"""The ResNet of hybrids against the official numbers, and its properties."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vitcli.config.schema import ObjectiveSection
from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.train.objectives.mae import Mae
from vitcli.train.objectives.masked_patch import MaskedPatch
from vitcli.vit import VisionTransformer, ViTConfig
from vitcli.vit.hybrid import (
    Bottleneck,
    HybridEmbed,
    StdConv2dSame,
    StemBackbone,
    init_stem,
    pad_same,
    standardize,
)
from vitcli.weights.loaded import LoadedModel


def tiny(**settings):
    values = {"embed_dim": 32, "depth": 1, "num_heads": 2, "mlp_dim": 64, "patch_size": 1}
    values |= {"stem": (2, 1), "stem_width": 0.5, "image_size": (32, 48)}
    return ViTConfig(**(values | settings))


def drawn(module, seed=0):
    """With other than the usual GroupNorms, so that each of them counts."""
    generator = torch.Generator().manual_seed(seed)
    init_stem(module, generator)
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim == 1:
                p.copy_(1 + 0.3 * torch.randn(p.shape, generator=generator))
    return module.eval()


def stem_tensors(arrays):
    """The official names -> ours, for the part before the encoder."""
    tensors = {}
    for key, value in arrays.items():
        tensor = torch.from_numpy(value)
        *place, layer, what = key.split("/") if "/" in key else (key, "")
        if layer == "embedding":
            name = "proj"
        elif layer in ("conv_root", "gn_root"):
            name = "backbone.stem." + {"conv_root": "conv", "gn_root": "norm"}[layer]
        elif place and place[0].startswith("block"):
            stage, unit = (int(part[-1]) - 1 for part in place)
            name = f"backbone.stages.{stage}.blocks.{unit}."
            name += {"conv_proj": "downsample.conv", "gn_proj": "downsample.norm"}.get(
                layer, layer.replace("gn", "norm")
            )
        else:
            continue
        if what == "kernel":
            tensors[f"{name}.weight"] = tensor.permute(3, 2, 0, 1)
        else:
            tensors[f"{name}.{'weight' if what == 'scale' else 'bias'}"] = tensor.flatten()
    return tensors


def test_the_official_intermediates(shared):
    case = shared / "reference/google_vit/hybrid_2stage"
    described = json.loads((case / "config.json").read_text())["model"]
    io = np.load(case / "io.npz")
    config = tiny(
        embed_dim=described["hidden_size"],
        stem=tuple(described["resnet"]["num_layers"]),
        stem_width=described["resnet"]["width_factor"],
        image_size=(64, 64),
    )
    embed = HybridEmbed(config).eval()
    tensors = stem_tensors(np.load(case / "params.npz"))
    embed.load_state_dict(tensors)  # none is missing and none is left over
    found = {}
    watched = {
        "conv_root": embed.backbone.stem.conv,
        "gn_root": embed.backbone.stem.norm,
        **{f"block{i + 1}": stage for i, stage in enumerate(embed.backbone.stages)},
        "embedding": embed.proj,
    }
    for name, module in watched.items():
        module.register_forward_hook(lambda m, _, y, name=name: found.__setitem__(name, y))
    with torch.no_grad():
        tokens = embed(torch.from_numpy(io["images"]).permute(0, 3, 1, 2))
    covered = [key for key in io.files if key.removeprefix("inter/") in watched]
    assert len(covered) == len(watched) == 5
    for key in covered:
        expected = torch.from_numpy(io[key]).permute(0, 3, 1, 2)
        # The reference's README: 2e-4 for intermediates of hybrids.
        difference = (found[key.removeprefix("inter/")] - expected).abs().max()
        assert difference < 2e-4, (key, float(difference))
    assert torch.equal(tokens, found["embedding"].flatten(2).mT)


def test_weight_standardisation():
    weight = torch.randn(8, 5, 3, 3, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.3
    mean = weight.double().mean(dim=(1, 2, 3), keepdim=True)
    std = (weight.double() - mean).pow(2).mean(dim=(1, 2, 3), keepdim=True).sqrt()
    google = (weight - mean) / (std + 1e-5)
    assert (standardize(weight, 1e-5, of_variance=False) - google).abs().max() < 1e-6
    # timm normalises the kernel as if its outputs were the channels of a batch.
    timm = F.batch_norm(weight.reshape(1, 8, -1), None, None, training=True, eps=1e-8)
    found = standardize(weight, 1e-8, of_variance=True)
    assert (found - timm.reshape_as(weight)).abs().max() < 1e-6


@pytest.mark.parametrize(("kernel", "stride"), [(7, 2), (3, 2), (3, 1), (1, 2), (1, 1)])
def test_same_padding_is_tensorflows_at_any_size(kernel, stride):
    for size in range(1, 20):
        line = torch.arange(1.0, size + 1)[None, None, None]  # (1, 1, 1, X)
        padded = pad_same(line.expand(1, 1, size, size), kernel, stride, -math.inf)[0, 0]
        before = (padded[-1] if kernel == 1 else padded.amax(dim=0)).isinf().long().argmin()
        after = padded.shape[1] - size - before
        assert (padded.shape[1] - kernel) // stride + 1 == math.ceil(size / stride)
        assert 0 <= after - before <= 1  # the odd one at the end
        # And no more than is needed: one pixel less would lose the last window.
        if after:
            assert (padded.shape[1] - 1 - kernel) // stride + 1 < math.ceil(size / stride)


def test_the_map_has_a_cell_for_every_stride_rounded_up():
    backbone = drawn(StemBackbone(1, (1, 1, 1), 32))
    for y, x in ((32, 32), (33, 47), (1, 5), (64, 17)):
        with torch.no_grad():
            found = backbone(torch.randn(1, 1, y, x))
        assert found.shape == (1, 4 * 32 * 4, math.ceil(y / 16), math.ceil(x / 16))
    embed = HybridEmbed(tiny(stem=(), patch_size=4, num_channels=1))
    assert embed(torch.randn(2, 1, 32, 48)).shape == (2, 2 * 3, 32)


def test_the_arithmetics_differ_by_their_epsilons_only():
    google, timm = (drawn(HybridEmbed(tiny(stem_arithmetic=who))) for who in ("google", "timm"))
    assert google.state_dict().keys() == timm.state_dict().keys()
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        a, b = google(images), timm(images)
        assert 0 < (a - b).abs().max() < 1e-3 * a.abs().max()
        for module in timm.modules():
            if isinstance(module, StdConv2dSame):
                module.weight.mul_(1e3)  # so large that no epsilon added to it counts
        same = timm(images)
    assert (b - same).abs().max() < 1e-3 * b.abs().max()
    assert {m.eps for m in google.modules() if isinstance(m, torch.nn.GroupNorm)} == {1e-6}
    assert {m.eps for m in timm.modules() if isinstance(m, torch.nn.GroupNorm)} == {1e-5}


def test_fresh_weights_are_lecun_normal_and_units_begin_as_their_shortcut():
    backbone = StemBackbone(3, (2,), 64)
    init_stem(backbone, torch.Generator().manual_seed(0))
    convolutions = [m for m in backbone.modules() if isinstance(m, StdConv2dSame)]
    assert len(convolutions) == 1 + 2 * 3 + 1
    for conv in convolutions:
        fan_in = conv.weight[0].numel()
        assert float(conv.weight.detach().std()) == pytest.approx(fan_in**-0.5, rel=0.05)
        assert conv.weight.abs().max() <= 2 / 0.8796 * fan_in**-0.5
    first, second = backbone.stages[0].blocks
    assert isinstance(first, Bottleneck) and isinstance(second, Bottleneck)
    x = torch.rand(1, 256, 4, 4)
    assert torch.equal(second(x), x)  # x is not negative, so the ReLU leaves it
    x = torch.randn(1, 64, 4, 4)
    assert torch.equal(first(x), F.relu(first.downsample(x)))
    again = StemBackbone(3, (2,), 64)
    init_stem(again, torch.Generator().manual_seed(0))
    assert all(map(torch.equal, backbone.state_dict().values(), again.state_dict().values()))


def test_a_hybrid_takes_sizes_that_its_stride_does_not_divide():
    """The official code pads each halving: 72 px -> 36 -> 18 -> 18 -> 9 -> 5 cells."""
    config = tiny(stem=(1, 1, 1), image_size=(72, 200), num_classes=3)
    assert config.grid == (5, 13) and config.num_tokens == 1 + 5 * 13
    model = VisionTransformer(config).init_weights(torch.Generator().manual_seed(0)).eval()
    images = torch.randn(2, 3, 72, 200)
    assert model(images).shape == (2, 3)
    cells = model.patch_embed.backbone(images)
    assert cells.shape[2:] == config.grid
    # A size with the same number of cells needs no other positions.
    assert torch.equal(model.positions((5, 13)), model.pos_embed)
    with pytest.raises(ValueError, match="feature map of 18x50 cells"):
        tiny(stem=(1,), patch_size=4, image_size=(72, 200))


@pytest.mark.parametrize("kind", [Mae, MaskedPatch])
def test_objectives_that_predict_pixels_need_whole_patches(kind):
    config = tiny(stem=(1, 1), image_size=(36, 40), pool="mean")
    model = LoadedModel(VisionTransformer(config), preprocess=Preprocess((36, 40)))
    with pytest.raises(VitcliError, match="whole patches of 8 px") as error:
        kind(model, ObjectiveSection())
    assert "a multiple of 8" in error.value.hint
