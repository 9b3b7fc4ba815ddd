"""Positions against the official resampling and big_vision's sin-cos table."""

import json

import numpy as np
import pytest
import torch

from vitcli.vit.position import resample, sincos2d


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


def test_bicubic_equals_timms_resampling(shared):
    arrays = np.load(shared / "reference/timm_vit/resample_abs_pos_embed/posembed.npz")
    names = sorted({n.partition("/")[0] for n in arrays.files if n.startswith("case")})
    assert len(names) == 5
    for name in (n for n in names if "bilinear" not in n):  # timm's bilinear is not ours
        x, expected = (torch.from_numpy(arrays[f"{name}/{part}"]) for part in ("in", "out"))
        prefix = int("prefix1" in name)
        side = int((x.shape[1] - prefix) ** 0.5)
        rows, cols = (int(n) for n in name.split("to")[1].split("_")[0].split("x"))
        got = resample(x[:, prefix:], (side, side), (rows, cols), "bicubic")
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
