"""Positions against the official resampling and big_vision's sin-cos table."""

import json

import numpy as np
import pytest
import torch

from vitcli.vit.config import ViTConfig
from vitcli.vit.position import (
    OffsetBias,
    attended_length,
    concatenate_axes,
    is_position,
    resample,
    resample_line,
    resample_offsets,
    resample_table,
    sincos2d,
    table_shapes,
)


def test_bilinear_equals_the_official_resampling(shared):
    folder = shared / "reference/google_posembed"
    arrays = np.load(folder / "posembed.npz")
    quirks = {c["name"]: c.get("zero_edge_quirk") for c in cases(folder)}
    names = sorted({name.partition("/")[0] for name in arrays.files})
    assert len(names) == 5
    for name in names:
        x, expected = (torch.from_numpy(arrays[f"{name}/{part}"]) for part in ("in", "out"))
        prefix = int(not name.endswith("nocls"))
        old, new = (int((t.shape[1] - prefix) ** 0.5) for t in (x, expected))
        got = resample(x[:, prefix:], (old, old), (new, new), "bilinear")
        got, want = (t.reshape(new, new, -1) for t in (got, expected[:, prefix:]))
        if quirks[name]:  # scipy put the last row and column past the edge; see its README
            got, want = got[:-1, :-1], want[:-1, :-1]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def cases(folder):
    meta = json.loads((folder / "meta.json").read_text())
    found = meta["cases"] if isinstance(meta, dict) and "cases" in meta else meta
    if isinstance(found, dict):
        return [
            {"name": name, **values} for name, values in found.items() if isinstance(values, dict)
        ]
    return found


def test_antialiased_resampling_equals_timms(shared):
    arrays = np.load(shared / "reference/timm_vit/resample_abs_pos_embed/posembed.npz")
    names = sorted({n.partition("/")[0] for n in arrays.files if n.startswith("case")})
    assert len(names) == 5
    for name in names:
        method = "bilinear_antialiased" if "bilinear" in name else "bicubic"
        x, expected = (torch.from_numpy(arrays[f"{name}/{part}"]) for part in ("in", "out"))
        prefix = int("prefix1" in name)
        side = int((x.shape[1] - prefix) ** 0.5)
        rows, cols = (int(n) for n in name.split("to")[1].split("_")[0].split("x"))
        got = resample(x[:, prefix:], (side, side), (rows, cols), method)
        torch.testing.assert_close(got, expected[:, prefix:], rtol=0, atol=1e-5)


def test_sincos_equals_big_visions(shared):
    arrays = np.load(shared / "reference/bigvision_vit/gap_sincos2d_reptrue/io.npz")
    expected = torch.from_numpy(arrays["posemb_sincos2d"]).reshape(1, 16, 48)
    torch.testing.assert_close(sincos2d((4, 4), 48), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_the_same_grid_is_left_alone(method):
    x = torch.randn(1, 15, 8)
    assert resample(x, (3, 5), (3, 5), method) is x


def test_a_constant_table_stays_constant():
    x = torch.full((1, 12, 8), 0.7)
    for method in ("bilinear", "bicubic"):
        torch.testing.assert_close(
            resample(x, (3, 4), (7, 5), method), torch.full((1, 35, 8), 0.7), rtol=0, atol=1e-6
        )


def test_width_must_be_a_multiple_of_four():
    with pytest.raises(ValueError, match="multiple of 4: 30"):
        sincos2d((2, 2), 30)


def test_a_patch_has_the_code_of_its_column_and_of_its_row():
    x, y = torch.randn(1, 5, 4), torch.randn(1, 3, 4)
    table = concatenate_axes(x, y)
    assert table.shape == (1, 15, 8)
    for row in range(3):
        for col in range(5):
            code = torch.cat([x[0, col], y[0, row]])
            assert torch.equal(table[0, row * 5 + col], code)


@pytest.mark.parametrize("new", [1, 2, 4, 7, 12])
def test_a_line_is_interpolated_with_its_ends_aligned(new):
    line = torch.randn(2, 7, 3)
    got = resample_line(line, new)
    places = np.linspace(0, 6, new)
    for i in range(2):
        for channel in range(3):
            expected = np.interp(places, np.arange(7), line[i, :, channel].numpy())
            np.testing.assert_allclose(got[i, :, channel], expected, atol=1e-5)
    assert resample_line(line, 7) is line


def test_two_lines_give_what_their_cross_would():
    x, y = torch.randn(1, 6, 4), torch.randn(1, 4, 4)
    expected = resample(concatenate_axes(x, y), (4, 6), (9, 5), "bilinear")
    got = concatenate_axes(resample_line(x, 5), resample_line(y, 9))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("new", [1, 2, 5, 6, 13])
def test_offset_zero_stays_offset_zero(new):
    old = 6
    table = torch.randn(2 * old - 1, 3)
    got = resample_offsets(table, new)
    assert got.shape == (2 * new - 1, 3)
    torch.testing.assert_close(got[new - 1], table[old - 1], rtol=0, atol=1e-6)
    if new > 1:  # a share of the largest offset is the same share of the new largest one
        offsets = np.arange(1 - new, new) / (new - 1)
        for channel in range(3):
            stored = np.arange(1 - old, old) / (old - 1)
            expected = np.interp(offsets, stored, table[:, channel].numpy())
            np.testing.assert_allclose(got[:, channel], expected, atol=1e-5)
    assert resample_offsets(table, old) is table


def test_several_tables_are_resampled_like_one():
    tables = torch.randn(3, 12, 4)
    for method in ("bilinear", "bicubic"):
        got = resample(tables, (3, 4), (5, 2), method)
        for i in range(3):
            one = resample(tables[i : i + 1], (3, 4), (5, 2), method)
            torch.testing.assert_close(got[i : i + 1], one)


def test_the_entries_of_prefix_tokens_are_kept():
    config = ViTConfig(image_size=(48, 64), num_registers=2, position_at="every", depth=3)
    table = torch.randn(2, 3 + 12, 8)
    got = resample_table("block_pos_embed", table, config, (5, 5))
    assert got.shape == (2, 28, 8) and torch.equal(got[:, :3], table[:, :3])
    torch.testing.assert_close(got[:, 3:], resample(table[:, 3:], (3, 4), (5, 5)))
    assert resample_table("block_pos_embed", table, config, (3, 4)) is table


def test_names_of_position_tables():
    names = ("pos_embed", "pos_embed_x", "block_pos_embed", "block_pos_embed_y")
    assert all(map(is_position, (*names, "blocks.0.attn.rel_pos", "rel_pos")))
    others = ("cls_token", "blocks.0.attn.qkv.weight", "decoder_pos_embed", "pos_embed_z")
    assert not any(map(is_position, others))
    assert attended_length("blocks.0.attn.rel_pos", (3, 5)) == 15
    assert attended_length("blocks.0.row.attn.rel_pos", (3, 5)) == 5
    assert attended_length("blocks.0.column.attn.rel_pos", (3, 5)) == 3


def test_which_tables_there_are():
    def shapes(**settings):
        settings = {"image_size": (48, 80), "embed_dim": 8, "num_heads": 1, "depth": 4, **settings}
        return table_shapes(ViTConfig(**settings))

    assert shapes() == {"pos_embed": (1, 16, 8)}
    assert shapes(position_covers_prefix=False) == {"pos_embed": (1, 15, 8)}
    assert shapes(position="none") == shapes(position="relative") == {}
    assert shapes(position_at="shared") == shapes()
    assert shapes(position_at="every") == {"pos_embed": (1, 16, 8), "block_pos_embed": (3, 16, 8)}
    crossed = {"pos_embed_x": (1, 5, 4), "pos_embed_y": (1, 3, 4)}
    assert shapes(position="learned2d") == crossed
    every = {"block_pos_embed_x": (3, 5, 4), "block_pos_embed_y": (3, 3, 4)}
    assert shapes(position="learned2d", position_at="every") == crossed | every
    assert shapes(position_at="every", depth=1) == shapes()


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (6, 2)])
def test_the_offset_bias_is_that_of_beit(grid):
    """transformers' own module, at its window and at others, with its three extra entries."""
    pytest.importorskip("transformers")
    from transformers import BeitConfig
    from transformers.models.beit.modeling_beit import BeitRelativePositionBias

    described = BeitConfig(image_size=64, patch_size=16, num_attention_heads=3, hidden_size=48)
    theirs = BeitRelativePositionBias(described)
    config = ViTConfig((64, 64), num_heads=3, embed_dim=48, position_bias="shared")
    ours = OffsetBias(config)
    torch.nn.init.normal_(theirs.relative_position_bias_table)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(grid), theirs(grid), rtol=0, atol=1e-6)


def test_the_offset_bias_of_an_oblong_image():
    """By the definition: one entry per (row offset, column offset), in row-major order."""
    rows, cols, prefix = 2, 3, 2
    bias = OffsetBias(ViTConfig((32, 48), num_registers=1, position_bias="every", num_heads=1))
    bias.relative_position_bias_table.data = torch.arange(3.0 * 5 + 3)[:, None]
    found = bias((rows, cols))[0, 0]
    for i, j in np.ndindex(rows * cols, rows * cols):
        down, right = i // cols - j // cols, i % cols - j % cols
        assert found[prefix + i, prefix + j] == (down + 1) * 5 + right + 2
    assert (found[:prefix, prefix:] == 15).all() and (found[prefix:, :prefix] == 16).all()
    assert (found[:prefix, :prefix] == 17).all()
