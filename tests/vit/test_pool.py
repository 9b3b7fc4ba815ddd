"""What the head reads, by hand."""

import pytest
import torch
import torch.nn.functional as F
from support.kinds import small

from vitcli.vit import ViTConfig
from vitcli.vit.pool import AttentionPool, pool_quadrants, pool_tokens


def test_pool_quadrants_by_hand():
    x = torch.arange(16.0).reshape(1, 16, 1)  # a 4x4 grid
    assert pool_quadrants(x, (4, 4)).tolist() == [[2.5, 4.5, 10.5, 12.5]]
    odd = torch.arange(9.0).reshape(1, 9, 1)  # the middle row and column count twice
    assert pool_quadrants(odd, (3, 3)).tolist() == [[2.0, 3.0, 5.0, 6.0]]


def tokens(config):
    """(1, T, 2) tokens that are numbered: 0 is the class token."""
    count = torch.arange(float(config.num_tokens))
    return torch.stack([count, -count], dim=1)[None]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # One row of 3 patches; before them class token (0), distillation token, two registers.
        ({"pool": "token", "num_registers": 2}, [0, 0]),
        ({"pool": "mean", "num_registers": 2}, [4, -4]),
        ({"pool": "mean", "class_token": False}, [1, -1]),
        ({"pool": "mean", "distillation_token": True, "num_registers": 2}, [5, -5]),
        ({"pool": "token_mean", "num_registers": 2}, [0, 0, 4, -4]),
        ({"pool": "distilled", "distillation_token": True, "num_registers": 2}, [0, 0, 1, -1]),
    ],
)
def test_which_tokens_are_pooled(settings, expected):
    config = ViTConfig(image_size=(16, 48), embed_dim=2, num_heads=1, **settings)
    pooled = pool_tokens(tokens(config), config, config.grid)
    assert pooled.tolist() == [expected] and config.pooled_dim == len(expected)


def test_attention_pooling_equals_torchs_own_attention():
    """One query over the tokens; `nn.MultiheadAttention` with the same weights, then the MLP."""
    config = ViTConfig(embed_dim=12, num_heads=3, mlp_dim=20, pool="map", class_token=False)
    torch.manual_seed(0)
    pool = AttentionPool(config).double()
    with torch.no_grad():
        for p in pool.parameters():
            p.normal_(std=0.5)
    theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([pool.q.weight, pool.kv.weight]))
        theirs.in_proj_bias.copy_(torch.cat([pool.q.bias, pool.kv.bias]))
        theirs.out_proj.weight.copy_(pool.proj.weight)
        theirs.out_proj.bias.copy_(pool.proj.bias)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    y = theirs(pool.latent.expand(2, -1, -1), x, x)[0][:, 0]
    hidden = F.gelu(F.linear(pool.norm(y), pool.mlp.fc1.weight, pool.mlp.fc1.bias))
    y = y + F.linear(hidden, pool.mlp.fc2.weight, pool.mlp.fc2.bias)
    torch.testing.assert_close(pool(x), y, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("pool", ["token_mean", "distilled"])
def test_pre_logits_and_a_norm_after_pooling_fit_a_wide_pooling(pool):
    model = small(
        pool=pool,
        distillation_token=True,
        norm_after_pool=True,
        representation_size=6,
        num_classes=3,
    )
    assert model.fc_norm.weight.shape == (32,) and model.pre_logits.fc.weight.shape == (6, 32)
    assert model(torch.zeros(1, 3, 16, 24)).shape == (1, 3)
