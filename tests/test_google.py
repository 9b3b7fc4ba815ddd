"""Official `.npz` files of vit_jax and big_vision, against numbers of the official code."""

import numpy as np
import pytest
import torch

from vitcli.errors import VitcliError
from vitcli.weights.load import load_model
from vitcli.weights.surgery import replace_head, resize

CASES = 9


def plain_cases(shared):
    folders = [shared / "reference/google_vit", shared / "reference/bigvision_vit"]
    files = sorted(f for folder in folders for f in folder.glob("*/params.npz"))
    return [f for f in files if not f.parent.name.startswith("hybrid")]


def test_reference_logits(shared):
    cases = plain_cases(shared)
    assert len(cases) >= CASES
    for path in cases:
        io = np.load(path.parent / "io.npz")
        model = load_model(path, image_size=32)  # sin-cos files do not say their size
        images = torch.from_numpy(io["images"]).permute(0, 3, 1, 2)
        with torch.no_grad():
            assert np.abs(model(images).numpy() - io["logits"]).max() < 1e-5, path
            if "inter/pre_logits" in io:
                found = model.features(images).numpy()
                assert np.abs(found - io["inter/pre_logits"]).max() < 5e-5, path


def test_fine_tuning_load(shared):
    """Head new and zero, hidden layer gone, positions carried over bilinearly."""
    folder = shared / "reference/google_vit/transfer_drop_prelogits"
    expected = np.load(folder / "expected.npz")
    model = load_model(folder / "pretrained.npz")
    assert model.config.representation_size == 40
    replace_head(model, [str(i) for i in range(5)])
    resize(model, (56, 56))
    positions = expected["restored/Transformer/posembed_input/pos_embedding"]
    assert np.abs(model.pos_embed.detach().numpy() - positions).max() < 1e-5
    images = torch.from_numpy(expected["images"]).permute(0, 3, 1, 2)
    with torch.no_grad():
        assert not model(images).any()
        model.head.weight.copy_(torch.from_numpy(expected["test_head_kernel"]).T)
        model.head.bias.copy_(torch.from_numpy(expected["test_head_bias"]))
        difference = model(images).numpy() - expected["logits_with_test_head"]
    assert np.abs(difference).max() < 1e-5
    fates = model.load_report.fates
    assert fates["pos_embed"] == ("resampled", "4x4 -> 7x7, bilinear")
    assert fates["pre_logits.fc.weight"][0] == "dropped" and fates["head.weight"][0] == "new"


def test_position_files(shared):
    """The resampled table as `state_dict` shows it, for the usual pairs of grids."""
    path = shared / "reference/google_vit/token_norep/params.npz"
    model = load_model(path, image_size=(56, 40))
    assert model.state_dict()["pos_embed"].shape == (1, 1 + 7 * 5, 48)
    both = load_model(path, image_size=56, position_resize="bicubic")
    assert "bicubic" in both.load_report.fates["pos_embed"][1]


def test_one_model_in_two_layouts(shared):
    """A trained model as timm has it and as Google has it differ only in their arithmetic."""
    folder = shared / "data/weights/vit_cifar10_mae"
    ours = load_model(folder / "timm.safetensors", num_heads=3, gelu="tanh")
    theirs = load_model(folder / "jax.npz")
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name


def test_hybrids_come_later(shared):
    with pytest.raises(VitcliError, match="hybrid"):
        load_model(shared / "reference/google_vit/hybrid_2stage/params.npz")


def test_something_else(tmp_path):
    np.savez(tmp_path / "w.npz", x=np.zeros(3))
    with pytest.raises(VitcliError, match=r"not an official ViT checkpoint: `embedding/kernel`"):
        load_model(tmp_path / "w.npz")
    (tmp_path / "w.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(VitcliError, match="cannot be read as numpy arrays"):
        load_model(tmp_path / "w.npz")
