"""Patches of another size: against timm's numbers, and what the pseudo-inverse promises."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import kinds
from support.kinds import pictures

from vitcli.cli.main import run
from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.vit.patches import resample_kernel
from vitcli.weights.load import load_model
from vitcli.weights.loaded import LoadedModel, create_model
from vitcli.weights.store import save_model


def small(*args, **settings):
    return LoadedModel(kinds.small(*args, **settings))


def test_kernels_equal_timms(shared):
    arrays = np.load(shared / "reference/timm_vit/resample_abs_pos_embed/posembed.npz")
    kernel = torch.from_numpy(arrays["patch_embed/in"])
    names = [name for name in arrays.files if name.startswith("patch_embed/out_")]
    assert len(names) >= 2
    for name in names:
        got = resample_kernel(kernel, int(name.rpartition("_")[2]))
        torch.testing.assert_close(got, torch.from_numpy(arrays[name]), rtol=0, atol=1e-4)


def test_a_larger_patch_sees_what_the_smaller_one_saw(tmp_path):
    """Four patches of 4 pixels, each drawn with 7: the same tokens, since 7 is more than 4."""
    net = small(image_size=(8, 8))
    save_model(tmp_path / "w.safetensors", net)
    model = load_model(tmp_path / "w.safetensors", patch_size=7, image_size=14)
    patches = torch.randn(2, 3, 2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    drawn = F.interpolate(patches.reshape(-1, 1, 4, 4), (7, 7), mode="bicubic", antialias=True)
    before = patches.permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 8, 8)
    after = drawn.reshape(2, 3, 2, 2, 7, 7).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 14, 14)
    with torch.no_grad():
        torch.testing.assert_close(model(after), net(before), atol=1e-4, rtol=0)
    fates = model.load_report.status
    assert fates["patch_embed.proj.weight"] == ("resampled", "4x4 -> 7x7, pseudo-inverse")
    assert fates["pos_embed"][0] == "loaded" and "head.weight" not in model.load_report.names("new")


def test_positions_follow_where_the_picture_stays(tmp_path):
    net = small("learned2d", image_size=(16, 24))
    net.preprocess = Preprocess(image_size=(16, 24))
    save_model(tmp_path / "w.safetensors", net)
    model = load_model(tmp_path / "w.safetensors", patch_size=8)
    assert (model.config.image_size, model.config.grid) == ((16, 24), (2, 3))
    assert set(model.load_report.names("resampled")) == {
        "patch_embed.proj.weight",
        "pos_embed_x",
        "pos_embed_y",
    }
    assert model(pictures(model)).shape == (2, 5) and model.preprocess.image_size == (16, 24)
    assert load_model(tmp_path / "w.safetensors", patch_size=4).load_report.names("resampled") == []


def test_what_has_no_such_patches(tmp_path):
    save_model(tmp_path / "h.safetensors", small("hybrid"))
    save_model(tmp_path / "r.safetensors", create_model("R26x1", layers=(1,), width=0.5))
    for name in ("h", "r"):
        with pytest.raises(VitcliError, match="no patches of pixels"):
            load_model(tmp_path / f"{name}.safetensors", patch_size=3)
    save_model(tmp_path / "w.safetensors", small())
    for wrong in (5, 0, "x"):
        with pytest.raises(
            VitcliError, match=f"`model.patch_size` = {wrong} does not fit"
        ) as error:
            load_model(tmp_path / "w.safetensors", patch_size=wrong)
        assert "model.image_size" in error.value.hint
    assert load_model("Pico/8", image_size=16, patch_size=4).config.patch_size == 4


def test_on_the_command_line(here, capsys):
    net = small()
    net.preprocess, net.head_trained = Preprocess(image_size=(16, 24)), True
    save_model("w.safetensors", net)
    from PIL import Image

    Image.new("RGB", (30, 20), (200, 30, 90)).save("x.png")
    command = ["predict", "x.png", "--model", "w.safetensors", "--set", "model.patch_size=8"]
    assert run([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["probability"] > 0
    assert "patch_embed.proj.weight (4x4 -> 8x8, pseudo-inverse)" in err
