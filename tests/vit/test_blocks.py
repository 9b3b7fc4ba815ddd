"""The encoder's parts against torch's own and against their definitions."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vitcli.vit.blocks import (
    Attention,
    AxialBlock,
    Block,
    DropPath,
    SwiGlu,
    attend,
    attend_explicit,
    drop_path_rates,
    join_lines,
    relative_bias,
    split_lines,
)
from vitcli.vit.config import ViTConfig

SMALL = {"embed_dim": 8, "num_heads": 2, "mlp_dim": 12, "patch_size": 4, "norm_eps": 1e-5}


def shaken(module, seed=0):
    """`module` in double precision, with random numbers in place of its zeros and ones."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.5)
    return module.double().eval()


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


def test_a_bias_is_added_to_the_scores_and_learns():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 9, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 3, 9, 9, dtype=torch.float64, requires_grad=True)
    expected = (q @ k.transpose(2, 3) / 8**0.5 + bias).softmax(dim=-1) @ v
    weight = torch.randn_like(expected)
    inputs = (q, k, v, bias)
    theirs = torch.autograd.grad((expected * weight).sum(), inputs)
    for function in (attend, attend_explicit):
        out = function(*inputs)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
        ours = torch.autograd.grad((out * weight).sum(), inputs)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("prefix", [0, 2])
def test_relative_attention_equals_its_definition_pair_by_pair(prefix):
    """Appendix D.4, one query and one key at a time; the offset is p_q - p_k."""
    n, heads, e = 6, 2, 4
    config = ViTConfig(
        image_size=(8, 12),
        **SMALL,
        depth=1,
        class_token=prefix > 0,
        num_registers=max(prefix - 1, 0),
        pool="mean",
        position="relative",
        qk_norm=True,
    )
    attention = shaken(Attention(config, n))
    x = torch.randn(2, prefix + n, 8, dtype=torch.float64)
    qkv = attention.qkv(x).reshape(2, prefix + n, 3, heads, e)
    q, k, v = (t.squeeze(2) for t in qkv.split(1, dim=2))  # (B, T, H, E)
    q, k = attention.q_norm(q), attention.k_norm(k)
    out = torch.zeros(2, prefix + n, heads, e, dtype=torch.float64)
    for image in range(2):
        for head in range(heads):
            for i in range(prefix + n):
                scores = []
                for j in range(prefix + n):
                    key = k[image, j, head]
                    if i >= prefix and j >= prefix:
                        key = key + attention.rel_pos[(i - prefix) - (j - prefix) + n - 1]
                    scores.append((q[image, i, head] @ key) / e**0.5)
                shares = torch.stack(scores).softmax(dim=0)
                out[image, i, head] = shares @ v[image, :, head]
    expected = attention.proj(out.flatten(2))
    torch.testing.assert_close(attention(x, (1, n)), expected, rtol=1e-9, atol=1e-11)


def test_half_precision_takes_the_relative_bias_too():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 10, 8) for _ in range(3))
    table = torch.randn(17, 8)
    exact = attend(q, k, v, relative_bias(q, table, 1))
    q, k, v = (t.bfloat16() for t in (q, k, v))
    half = attend(q, k, v, relative_bias(q, table, 1))
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().max() < 0.06


def test_lines_are_rows_or_columns():
    x = torch.arange(2 * 6.0).reshape(2, 6, 1)  # two images of 2x3 patches
    assert split_lines(x, (2, 3), "row")[:2].squeeze(2).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert split_lines(x, (2, 3), "column")[:3].squeeze(2).tolist() == [[0, 3], [1, 4], [2, 5]]
    for along in ("row", "column"):
        assert torch.equal(join_lines(split_lines(x, (2, 3), along), (2, 3), along), x)


@pytest.mark.parametrize("along", ["row", "column"])
def test_attention_along_a_line_is_attention_to_nothing_else(along):
    """Against attention over all patches with the other rows (columns) masked out."""
    config = ViTConfig(
        image_size=(12, 20), **SMALL, class_token=False, pool="mean", layer_scale=1.0, axial=True
    )
    rows, cols = config.grid
    block = shaken(Block(config, 0.0, along))
    x = torch.randn(2, rows * cols, 8, dtype=torch.float64)
    place = torch.arange(rows * cols)
    line = place // cols if along == "row" else place % cols
    mask = line[:, None] == line
    q, k, v = block.attn.qkv(block.norm1(x)).reshape(2, -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
    seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    y = x + block.ls1(block.attn.proj(seen.transpose(1, 2).flatten(2)))
    y = y + block.ls2(block.mlp(block.norm2(y)))
    torch.testing.assert_close(block(x, (rows, cols)), y, rtol=1e-9, atol=1e-11)


def test_an_axial_block_is_one_along_rows_and_one_along_columns():
    config = ViTConfig(image_size=(12, 20), **SMALL, class_token=False, pool="mean", axial=True)
    axial = shaken(AxialBlock(config, 0.0))
    row, column = Block(config, 0.0, "row").double(), Block(config, 0.0, "column").double()
    row.load_state_dict(axial.row.state_dict())
    column.load_state_dict(axial.column.state_dict())
    x = torch.randn(2, 15, 8, dtype=torch.float64)
    assert torch.equal(axial(x, (3, 5)), column(row(x, (3, 5)), (3, 5)))


def test_stochastic_depth_drops_whole_images_of_an_axial_block():
    config = ViTConfig(image_size=(12, 20), **SMALL, class_token=False, pool="mean", axial=True)
    block = shaken(Block(config, 0.5, "row")).train()
    torch.nn.init.zeros_(block.mlp.fc2.weight)
    torch.nn.init.zeros_(block.mlp.fc2.bias)
    x = torch.randn(64, 15, 8, dtype=torch.float64)
    same = (block(x, (3, 5)) == x).flatten(1)
    kept = same.all(dim=1)
    assert 10 < kept.sum() < 54 and not same[~kept].any()


def test_swiglu_equals_its_formula():
    torch.manual_seed(0)
    mlp = shaken(SwiGlu(8, 12))
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    x1 = x @ mlp.fc1.weight[:12].T + mlp.fc1.bias[:12]
    x2 = x @ mlp.fc1.weight[12:].T + mlp.fc1.bias[12:]
    expected = (x1 * x1.sigmoid() * x2) @ mlp.fc2.weight.T + mlp.fc2.bias
    torch.testing.assert_close(mlp(x), expected)


class Copies(TorchDispatchMode):
    """The operations that move numbers from one place to another."""

    NAMES = ("clone", "copy_", "_to_copy", "stack", "cat", "constant_pad_nd")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), words=None):
        name = function.overloadpacket.__name__
        self.found += [name] if name in self.NAMES else []
        return function(*arguments, **(words or {}))


def test_fused_attention_copies_nothing_forward_and_once_backward():
    """Queries, keys and values are views of one projection; their gradients are joined once."""
    attention = Attention(ViTConfig(**SMALL), 16)
    x = torch.randn(2, 17, 8, requires_grad=True)
    with Copies() as copies:
        y = attention(x, (4, 4))
    assert copies.found == []
    with Copies() as copies:
        y.sum().backward()
    assert copies.found == ["stack"]
