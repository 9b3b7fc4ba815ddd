"""Rotary positions, against the equations of the papers written with complex numbers."""

import math

import pytest
import torch
from support.kinds import pictures, small

from vitcli.vit import ViTConfig
from vitcli.vit.blocks import Attention
from vitcli.vit.rope import Rotation, augment_coordinates, patch_coordinates, rotate, rotation

CPU = torch.device("cpu")
# Where the coordinates begin, their period, and the channels of a pair, as in the two papers.
DINOV3 = {"rope": "centred", "position": "none"}
EVA02 = {"rope": "index", "rope_theta": 1e4, "rope_pairs": "neighbours"}


def config(**settings):
    sizes = {"image_size": (12, 20), "patch_size": 4, "embed_dim": 24, "num_heads": 2, "depth": 1}
    return ViTConfig(**{**sizes, "mlp_dim": 24, **settings})


def by_hand(x, settings, grid, reference=None):
    """(B, H, N, 12) rotated: each pair of channels is a complex number times exp(i angle)."""
    quarter = x.shape[-1] // 4
    out = x.clone()
    theta = settings.get("rope_theta", 100.0)
    for n in range(grid[0] * grid[1]):
        place = n // grid[1], n % grid[1]
        for i in range(2 * quarter):
            axis, j = divmod(i, quarter)  # the first half of the pairs encodes the row
            if settings["rope"] == "centred":
                at = 2 * math.pi * (2 * (place[axis] + 0.5) / grid[axis] - 1)
            else:
                at = place[axis] / grid[axis] * (reference or grid)[axis]
            a, b = (2 * i, 2 * i + 1) if "rope_pairs" in settings else (i, i + 2 * quarter)
            angle = at * theta ** (-j / quarter)
            turn = complex(math.cos(angle), math.sin(angle))
            pair = torch.complex(x[..., n, a], x[..., n, b]) * turn
            out[..., n, a], out[..., n, b] = pair.real, pair.imag
    return out


@pytest.mark.parametrize("settings", [DINOV3, EVA02, {**EVA02, "rope_grid": (16, 16)}])
@pytest.mark.parametrize("grid", [(3, 5), (4, 2), (1, 1)])
def test_rotation_is_that_of_the_papers(settings, grid):
    turn = rotation(config(**settings), grid, CPU, training=False, kept=None)
    n = grid[0] * grid[1]
    x = torch.randn(2, 2, 3 + n, 12, generator=torch.Generator().manual_seed(0))
    found = rotate(x, turn)
    assert torch.equal(found[:, :, :3], x[:, :, :3])  # prefix tokens have no position
    expected = by_hand(x[:, :, 3:], settings, grid, settings.get("rope_grid"))
    torch.testing.assert_close(found[:, :, 3:], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [DINOV3, EVA02])
def test_scores_depend_on_the_difference_of_positions_only(settings):
    """The property for which RoPE was made: shifting both patches changes nothing."""
    turn = rotation(config(**settings), (4, 6), CPU, training=False, kept=None)
    q, k = torch.randn(2, 1, 1, 1, 12, generator=torch.Generator().manual_seed(0))
    q, k = (rotate(x.expand(1, 1, 24, 12), turn)[0, 0] for x in (q, k))
    scores = (q @ k.T).reshape(4, 6, 4, 6)
    torch.testing.assert_close(
        scores[1:, 2:, 1:, 2:], scores[:-1, :-2, :-1, :-2], atol=1e-5, rtol=0
    )
    assert float(scores.std()) > 0.1


def test_periods_in_bf16():
    """As in Meta's files: the periods are rounded, the angles are not."""
    exact = rotation(config(**DINOV3), (3, 5), CPU, training=False, kept=None)
    rounded = rotation(config(**DINOV3, rope_dtype="bf16"), (3, 5), CPU, training=False, kept=None)
    period = torch.tensor([100.0 ** (j / 3) for j in range(3)]).to(torch.bfloat16).double()
    row = 2 * (torch.tensor([0, 1, 2]).double() + 0.5) / 3 - 1
    expected = (2 * math.pi * row[:, None] / period).cos()
    torch.testing.assert_close(rounded.cos[::5, :3].double(), expected, atol=1e-6, rtol=0)
    assert not torch.allclose(exact.cos, rounded.cos)


def test_dropped_patches_keep_their_angles():
    whole = config(**DINOV3)
    kept = torch.tensor([[4, 1, 14], [0, 2, 7]])
    turn = rotation(whole, (3, 5), CPU, training=False, kept=None)
    few = rotation(whole, (3, 5), CPU, training=False, kept=kept)
    x = torch.randn(2, 2, 1 + 15, 12)
    expected = rotate(x, turn)
    at = 1 + kept[:, None, :, None].expand(2, 2, 3, 12)
    found = rotate(torch.cat([x[:, :, :1], x.gather(2, at)], dim=2), few)
    torch.testing.assert_close(found[:, :, 1:], expected.gather(2, at), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["rope, DINOv3", "rope, EVA-02"])
def test_dropping_patches_in_training_is_leaving_them_out(name):
    """A mask over the dropped patches gives the same class token as computing without them."""
    model = small(name, rope_rescale=None, pool="token", norm_after_pool=False)
    images = pictures(model)
    x = model.embed(images)
    torch.manual_seed(0)
    model.patch_drop_rate = 0.5
    short, kept = model.drop_patches(x)
    found = model.encode(short, model.grid_of(images), kept)[:, 0]
    prefix, turn = model.config.num_prefix_tokens, model.rotation(model.grid_of(images))
    hidden = torch.ones(2, x.shape[1], dtype=torch.bool)
    hidden[:, :prefix] = False
    hidden.scatter_(1, kept + prefix, False)
    bias = torch.zeros(hidden.shape).masked_fill(hidden, -math.inf)[:, None, None]
    for block in model.blocks:
        heads = block.attn.heads
        block.attn.heads = lambda x, *given, heads=heads: (
            *heads(x, *given)[:3],
            bias.expand(-1, 2, x.shape[1], -1),
        )
        x = block(x, model.grid_of(images), None, turn)
    torch.testing.assert_close(found, model.norm(x)[:, 0], atol=1e-5, rtol=0)


def test_coordinates_move_in_training_only():
    moved = config(**DINOV3, rope_shift=0.5, rope_jitter=1.5, rope_rescale=2.0)
    still = patch_coordinates(moved, (3, 5), CPU)
    torch.manual_seed(0)
    drawn = torch.stack([augment_coordinates(still, moved) for _ in range(400)])
    factor = (drawn[:, -1] - drawn[:, 0]) / (still[-1] - still[0])  # (400, 2), per axis
    assert 2.0 < factor.max() <= 3.0 and 1 / 3 <= factor.min() < 0.5
    ratio = factor[:, 0] / factor[:, 1]  # jitter alone: both axes share the rescaling
    assert 1.8 < ratio.max() <= 1.5**2 and 1 / 1.5**2 <= ratio.min() < 0.6
    centre = (drawn[:, 7] / factor).abs()  # the middle patch is at 0, so this is the shift
    assert 0.45 < centre.max() <= 0.5
    evaluated = rotation(moved, (3, 5), CPU, training=False, kept=None)
    plain = rotation(config(**DINOV3), (3, 5), CPU, training=False, kept=None)
    assert torch.equal(evaluated.cos, plain.cos)


def test_model_in_training_draws_once_for_all_blocks(monkeypatch):
    model = small("rope, DINOv3").train()
    turns = []
    monkeypatch.setattr(
        Attention, "forward", lambda self, x, *given: turns.append(given[2]) or self.proj(x)
    )
    for _ in range(2):
        model(pictures(model))
    assert len(turns) == 6 and all(t is turns[0] for t in turns[:3])
    assert not torch.equal(turns[0].cos, turns[3].cos)


def test_a_key_bias_that_is_absent_is_zero():
    bare, full = (Attention(config(key_bias=key_bias), 15) for key_bias in (False, True))
    with torch.no_grad():
        bare.q_bias.normal_()
        bare.v_bias.normal_()
        state = {k: v for k, v in bare.state_dict().items() if k not in ("q_bias", "v_bias")}
        state["qkv.bias"] = torch.cat([bare.q_bias, torch.zeros(24), bare.v_bias])
        full.load_state_dict(state)
        x = torch.randn(2, 16, 24)
        torch.testing.assert_close(bare(x, (3, 5)), full(x, (3, 5)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rope": "spiral"}, "unknown rope `spiral`"),
        ({"rope": "centred", "num_heads": 4}, "heads whose width 4 divides, not 6"),
        ({"rope": "centred", "axial": True, "class_token": False, "pool": "mean"}, "axial blocks"),
        ({"rope": "centred", "rope_grid": (2, 2)}, "goes with `rope = index`"),
        ({"rope": "index", "rope_grid": (2, 0)}, "rope_grid"),
        ({"rope": "index", "rope_grid": (2, 2, 2)}, "not rows and columns"),
        ({"rope": "index", "rope_theta": 0.5}, "rope_theta is 0.5"),
        ({"rope": "index", "rope_jitter": math.inf}, "rope_jitter is inf"),
        ({"rope": "index", "rope_shift": -1.0}, "rope_shift is -1.0"),
        ({"rope_theta": 10.0}, "rope_theta needs rotary positions"),
        ({"rope": "index", "rope_dtype": "fp16"}, "unknown rope_dtype"),
        ({"qkv_bias": False, "key_bias": False}, "goes with `qkv_bias = true`"),
    ],
)
def test_settings_that_contradict(settings, words):
    with pytest.raises(ValueError, match=words):
        config(**settings)


def test_a_model_with_rotary_positions_needs_the_rotation():
    attention = Attention(config(**DINOV3), 15)
    with pytest.raises(AssertionError):
        attention(torch.randn(1, 16, 24), (3, 5))
    turn = Rotation(torch.ones(15, 6), torch.zeros(15, 6), "halves")
    assert attention(torch.randn(1, 16, 24), (3, 5), None, turn).shape == (1, 16, 24)
