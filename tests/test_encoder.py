"""The encoder's parts against torch's own and against their definitions."""

import pytest
import torch
import torch.nn.functional as F

from vitcli.vit.encoder import DropPath, attend, attend_explicit, drop_path_rates
from vitcli.vit.variants import ViTConfig


@pytest.mark.parametrize("tokens", [1, 17, 197])
def test_explicit_attention_equals_the_fused_kernel(tokens):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, tokens, 16, dtype=torch.float64) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attend_explicit(q, k, v), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(attend(q, k, v), expected, rtol=1e-10, atol=1e-12)


def test_explicit_attention_has_the_gradients_of_the_fused_kernel():
    torch.manual_seed(0)
    inputs = [torch.randn(2, 2, 9, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weight = torch.randn(2, 2, 9, 8, dtype=torch.float64)
    ours = torch.autograd.grad((attend_explicit(*inputs) * weight).sum(), inputs)
    theirs = torch.autograd.grad((F.scaled_dot_product_attention(*inputs) * weight).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_bf16_attention_agrees_within_its_rounding():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 65, 32) for _ in range(3))
    exact = F.scaled_dot_product_attention(q, k, v)
    half = attend(*(t.bfloat16() for t in (q, k, v))).float()
    assert (half - exact).abs().max() < 0.03


def test_drop_path_keeps_the_mean_and_drops_whole_images():
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    x = torch.ones(20_000, 2, 3)
    y = drop(x)
    per_image = y.flatten(1)
    assert torch.all((per_image == 0).all(1) | (per_image == 1 / 0.75).all(1))
    # The share dropped is binomial: 5 standard deviations of 0.25 +- sqrt(0.25 * 0.75 / n).
    assert abs((per_image == 0).all(1).float().mean() - 0.25) < 5 * (0.1875 / 20_000) ** 0.5
    assert torch.equal(drop.eval()(x), x)


def test_drop_path_rates_grow_linearly():
    config = ViTConfig(depth=5, drop_path_rate=0.2)
    assert drop_path_rates(config) == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
