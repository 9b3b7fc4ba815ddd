"""Every kind of model that can be configured: against its definition, and all in general."""

import json

import pytest
import torch
from support.kinds import KINDS, pictures, small

from vitcli.vit import VisionTransformer, ViTConfig

TOLERANCE = 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_every_kind(name):
    """Features are what the head reads, every weight learns, and other sizes pass."""
    model = small(name)
    config, images = model.config, pictures(model)
    assert config.grid == (4, 6)
    features = model.features(images)
    assert features.shape == (2, config.feature_dim)
    logits = model(images)
    assert torch.equal(logits, model.classify(features)) and logits.shape == (2, 5)
    assert not torch.allclose(logits[0], logits[1])
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    rows, cols = (side // n for side, n in zip(config.image_size, config.grid, strict=True))
    for grid in ((2, 9), (7, 7), (6, 4)):
        with torch.no_grad():
            at = model(pictures(model, size=(grid[0] * rows, grid[1] * cols)))
        assert at.shape == (2, 5) and torch.isfinite(at).all()


@pytest.mark.parametrize("name", KINDS)
def test_a_model_is_a_function_of_its_header_and_its_tensors(name):
    model = small(name)
    header = json.loads(json.dumps(model.config.to_dict()))
    again = VisionTransformer(ViTConfig.from_dict(header)).eval()
    assert again.config == model.config
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(pictures(model)), model(pictures(model)))


def test_order_of_the_tokens():
    model = small("distilled", num_registers=2, position_covers_prefix=False, depth=1)
    x = model.embed(pictures(model))
    assert x.shape == (2, 4 + 24, 16)
    tokens = (model.cls_token, model.dist_token, model.reg_token)
    assert torch.equal(x[:, :4], torch.cat(tokens, dim=1).expand(2, -1, -1))
    patches = model.patch_embed(pictures(model)) + model.pos_embed
    assert torch.equal(x[:, 4:], patches)


def test_two_distilled_heads_are_averaged():
    model = small("distilled", num_registers=1)
    x = model.tokens(pictures(model))
    expected = (model.head(x[:, 0]) + model.head_dist(x[:, 1])) / 2
    torch.testing.assert_close(model(pictures(model)), expected)
    # As one layer over both tokens, which is what the option without a second head is.
    one = small("distilled, one head", num_registers=1)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("head")}
    state["head.weight"] = torch.cat([model.head.weight, model.head_dist.weight], dim=1) / 2
    state["head.bias"] = (model.head.bias + model.head_dist.bias) / 2
    one.load_state_dict(state)
    torch.testing.assert_close(one(pictures(model)), expected)


@pytest.mark.parametrize("at", ["stem", "every", "shared"])
def test_two_dimensional_positions_are_a_table_of_concatenated_codes(at):
    model = small("learned2d", position_at=at)
    flat = small("plain", num_registers=1, position_at=at)
    state = {k: v for k, v in model.state_dict().items() if "pos_embed" not in k}
    for prefix in ("", "block_") if at == "every" else ("",):
        x, y = (model.state_dict()[f"{prefix}pos_embed_{side}"] for side in "xy")
        table = torch.zeros(len(x), 2 + 4 * 6, 16)  # class token and register have no code
        for row in range(4):
            for col in range(6):
                table[:, 2 + row * 6 + col] = torch.cat([x[:, col], y[:, row]], dim=1)
        state[f"{prefix}pos_embed"] = table
    flat.load_state_dict(state)
    images = pictures(model)
    torch.testing.assert_close(model(images), flat(images), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("covers", [True, False])
@pytest.mark.parametrize("at", ["stem", "every", "shared"])
def test_where_positions_are_added(at, covers):
    """Table 8: after the stem, or at the input of every block, its own table or one for all."""
    model = small(position_at=at, position_covers_prefix=covers, norm_before_blocks=True)
    images = pictures(model)
    x = torch.cat([model.cls_token.expand(2, -1, -1), model.patch_embed(images)], dim=1)
    for i, block in enumerate(model.blocks):
        table = model.block_pos_embed[i - 1] if at == "every" and i else model.pos_embed[0]
        if i == 0 or at != "stem":
            x = x + (table if covers else torch.cat([torch.zeros(1, 16), table]))
        x = model.norm_pre(x) if i == 0 else x
        x = block(x, model.config.grid)
    torch.testing.assert_close(model.tokens(images), model.norm(x), rtol=0, atol=TOLERANCE)


def test_relative_codes_of_zero_are_no_positions():
    model = small("relative")
    bag = small("none", num_registers=1, pool="token_mean")
    state = model.state_dict()
    bag.load_state_dict({k: v for k, v in state.items() if "rel_pos" not in k})
    images = pictures(model)
    assert not torch.allclose(model(images), bag(images), atol=1e-2)
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn.rel_pos)
    torch.testing.assert_close(model(images), bag(images), rtol=0, atol=TOLERANCE)


def count(**settings):
    with torch.device("meta"):
        model = VisionTransformer(ViTConfig(**settings))
    return sum(p.numel() for p in model.parameters())


def test_what_each_option_adds_in_parameters():
    """By hand for B/16 at 224: D = 768, 12 blocks of 12 heads, N = 196."""
    d, n, mlp, base = 768, 196, 3072, count()
    block = (d * 3 * d + 3 * d) + (d * d + d) + (d * mlp + mlp) + (mlp * d + d) + 4 * d
    added = {
        (("distillation_token", True),): 2 * d,  # the token and its position
        (("position", "none"),): -(n + 1) * d,
        (("position", "learned2d"),): -(n + 1) * d + (14 + 14) * d // 2,
        (("position", "relative"),): -(n + 1) * d + 12 * (2 * n - 1) * (d // 12),
        (("position_at", "every"),): 11 * (n + 1) * d,
        (("position_at", "shared"),): 0,
        (("position", "learned2d"), ("position_at", "every")): -(n + 1) * d + 12 * 14 * d,
        (("mlp", "swiglu"),): 12 * (d * mlp + mlp),
        (("norm_before_blocks", True),): 2 * d,
        (("patch_bias", False),): -d,
        (("pixel_norm", True),): 2 * 16 * 16 * 3,
        (("patch_norm", True),): 2 * d,
        (("axial", True), ("class_token", False), ("pool", "mean")): 12 * block - 2 * d,
        (("num_classes", 10), ("pool", "token_mean")): 2 * d * 10 + 10,
    }
    for settings, number in added.items():
        assert count(**dict(settings)) == base + number, settings
    distilled = {"distillation_token": True, "pool": "distilled", "num_classes": 10}
    assert count(**distilled) == base + 2 * d + 2 * d * 10 + 10
    assert count(**distilled, distillation_head=True) == base + 2 * d + 2 * (d * 10 + 10)
