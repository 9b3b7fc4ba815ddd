"""The convolutional stem: its filters, its sizes, and what it needs of the rest."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images

from vitcli.config.recipe import check
from vitcli.config.schema import Recipe
from vitcli.errors import VitcliError
from vitcli.train.muon import Muon
from vitcli.train.resolve import random_model
from vitcli.vit import VisionTransformer, ViTConfig, create_network, parse_variant
from vitcli.vit.conv_stem import (
    ConvStage,
    StridedStage,
    default_channels,
    whitening_kernel,
)
from vitcli.vit.whitening import cosine_basis, whiten_patches

TINY_RUN = {"command": "pretrain", "data": {"name": "x"}, "train": {"steps": 1, "batch_size": 2}}


def tiny(**settings):
    values = {"embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_dim": 32, "patch_size": 1}
    values |= {"conv_stem": (8, 12), "image_size": (16, 24), "num_classes": 3}
    return ViTConfig(**(values | settings))


def test_cosine_basis_is_scipys():
    from scipy.fft import dct

    for length in (1, 3, 4):
        wanted = dct(np.eye(length), norm="ortho", axis=0)
        np.testing.assert_allclose(cosine_basis(length).numpy(), wanted, atol=1e-12)


@pytest.mark.parametrize("num_channels", [1, 3])
def test_whitening_decorrelates_photographs(num_channels):
    """The two photographs of scikit-learn, at a quarter of their size."""
    pixels = torch.tensor(np.stack(load_sample_images().images)).permute(0, 3, 1, 2).float()
    pixels = F.interpolate(pixels / 127.5 - 1, scale_factor=0.25, mode="area")[:, :num_channels]
    kernel = whitening_kernel(num_channels)
    count = len(kernel) // 2
    assert count == min(16, 9 * num_channels)
    assert torch.equal(kernel[:count], -kernel[count:])

    def condition(values):
        covariance = torch.cov(values.double())
        return torch.linalg.cond(covariance).item()

    patches = F.unfold(pixels, 3).permute(1, 0, 2).flatten(1)  # (C * 9, patches)
    found = F.conv2d(pixels, kernel[:count]).permute(1, 0, 2, 3).flatten(1)  # (count, patches)
    assert condition(found) < condition(patches) / 30
    assert found.std(dim=1).min() > 0.1 and found.std(dim=1).max() < 3


@pytest.mark.parametrize(("name", "filters"), [("Pico/4", 48), ("mu/4", 32)])
def test_patch_projection_starts_with_whitening_filters(name, filters):
    """They decorrelate real photographs; nothing else in the network changes."""
    model, random = (create_network(name, image_size=32, seed=3) for _ in range(2))
    whiten_patches(model)
    kernel, width = model.patch_embed.proj.weight, model.config.embed_dim
    both = min(2 * filters, width)
    assert torch.equal(kernel[filters:both], -kernel[: both - filters])
    for key, value in random.state_dict().items():
        same = torch.equal(value, model.state_dict()[key])
        assert same == (key != "patch_embed.proj.weight")
    assert torch.equal(kernel[both:], random.patch_embed.proj.weight[both:])
    pixels = torch.tensor(np.stack(load_sample_images().images)).permute(0, 3, 1, 2).float()
    pixels = F.interpolate(pixels / 127.5 - 1, (96, 160), mode="area")
    count = min(filters, width)
    # The spread of variances among all directions: much smaller than with random weights.
    white, other = (
        torch.linalg.cond(torch.cov(net.patch_embed(pixels).flatten(0, 1).T[:count].double()))
        for net in (model, random)
    )
    assert white < other / 30


def test_patch_init_is_a_setting_of_random_plain_models():
    def built(**model):
        recipe = check(Recipe, {**TINY_RUN, "model": model}, "test")
        return random_model(recipe, SimpleNamespace(classes=("cat", "dog"))).network

    plain = {"name": "mu/4", "image_size": 16}
    expected = built(**plain)
    whiten_patches(expected)
    found = built(**plain, patch_init="whitening").state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.state_dict().items())
    for name in ("Conv+mu/4", "R+mu/16", "R26x1"):
        with pytest.raises(VitcliError, match="is for a patch projection") as error:
            built(name=name, image_size=32, patch_init="whitening")
        assert "`--set model.name=Pico/4`" in error.value.hint


def test_the_whitening_layer_is_stored_and_never_trained():
    model = create_network("Conv+Pico/4", image_size=16, num_classes=3)
    name = "patch_embed.root.weight"
    assert name in model.state_dict() and name not in dict(model.named_parameters())
    assert not model.patch_embed.root(torch.zeros(1, 3, 16, 16)).requires_grad
    assert torch.equal(model.patch_embed.root.weight, whitening_kernel(3))
    with torch.device("meta"):
        assert VisionTransformer(tiny()).patch_embed.root.weight.is_meta


def test_a_stage_is_its_definition():
    """Conv, max-pool, norm, GELU, and the residual branch, in the usual layout."""
    torch.manual_seed(0)
    stage = ConvStage(3, 5, 1e-6)
    x = torch.randn(2, 3, 7, 8)

    def conv(x, layer):
        w = layer.weight
        w = w - w.mean(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, w / w.square().mean(dim=(1, 2, 3), keepdim=True).sqrt(), padding=1)

    def norm(x):
        mean, variance = x.mean((1, 2, 3), True), x.var((1, 2, 3), correction=0, keepdim=True)
        return (x - mean) / variance.sqrt()

    wanted = F.gelu(
        norm(F.max_pool2d(F.pad(conv(x, stage.conv1), (0, 0, 0, 1), value=-math.inf), 2))
    )
    wanted = wanted + F.gelu(norm(conv(wanted, stage.conv2)))
    torch.testing.assert_close(stage(x), wanted, rtol=1e-4, atol=1e-4)
    early = StridedStage(3, 5, 1e-6)
    wanted = F.gelu(norm(conv(x, early.conv1)[:, :, ::2, ::2]))
    torch.testing.assert_close(early(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [(12,), (8, 12), (6, 9, 16, 12)])
def test_stages_before_the_last_two_are_strided(channels):
    model = VisionTransformer(tiny(conv_stem=channels)).init_weights(
        torch.Generator().manual_seed(0)
    )
    embed = model.patch_embed
    found = [embed.root.out_channels, *(stage.conv1.out_channels for stage in embed.stages)]
    assert found == [32, *channels]
    early = [isinstance(stage, StridedStage) for stage in embed.stages]
    assert early == [i < len(channels) - 2 for i in range(len(channels))]
    assert embed(torch.randn(2, 3, 16, 24)).shape == (2, math.prod(model.config.grid), 16)


@pytest.mark.parametrize(
    ("name", "side", "grid"),
    [
        ("Conv+Pico/4", 32, 8),
        ("Conv+Pico/4", 28, 7),
        ("Conv+Pico/2", 16, 8),
        ("Conv+Pico/8", 60, 8),
    ],
)
def test_image_sizes(name, side, grid):
    model = create_network(name, image_size=side, depth=1)
    assert model.config.grid == (grid, grid)
    assert model.config.pixels_per_patch == int(name[-1])
    assert model.tokens(torch.randn(1, 3, side, side)).shape == (1, grid * grid + 1, 128)


def test_an_image_does_not_depend_on_its_batch():
    model = create_network("Conv+Pico/4", image_size=16, depth=1)
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=1e-4, atol=1e-5)


def test_default_channels_and_blocks():
    assert parse_variant("Conv+Pico/4").depth == 2 and parse_variant("Conv+B/16").depth == 4
    assert parse_variant("Conv+ViT-mu/4").depth == 1
    assert default_channels(192, 4) == (96, 192)
    assert default_channels(128, 8) == (32, 64, 128)  # the hybrid of recipes/RECORDS.md
    assert default_channels(128, 16) == (32, 32, 64, 128)  # multiples of 32
    assert default_channels(128, 2) == (128,)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"conv_stem": ()}, "one to 6 stages"),
        ({"conv_stem": (8, 0)}, "conv_stem is 0"),
        ({"stem": (1,)}, "not both"),
        ({"patch_size": 3}, "feature map of 4x6 cells"),
    ],
)
def test_wrong_settings(settings, text):
    with pytest.raises(ValueError, match=text):
        tiny(**settings)


@pytest.mark.parametrize("name", ["Conv+Nano/6", "Conv+Nano/1", "Conv+Nano/128"])
def test_a_stride_that_is_no_power_of_two(name):
    with pytest.raises(ValueError, match="a convolutional stem ends in `/2`"):
        parse_variant(name)


def test_muon_takes_a_kernel_as_a_matrix():
    """The same step for a kernel (F, C, 3, 3) as for the matrix (F, 9 C)."""
    torch.manual_seed(0)
    kernel = torch.nn.Parameter(torch.randn(4, 2, 3, 3))
    matrix = torch.nn.Parameter(kernel.detach().flatten(1).clone())
    kernel.grad = torch.randn(4, 2, 3, 3)
    matrix.grad = kernel.grad.flatten(1)
    for p in (kernel, matrix):
        Muon([p], lr=0.1, momentum=0.9, weight_decay=0.1).step()
    torch.testing.assert_close(kernel.detach().flatten(1), matrix.detach())
