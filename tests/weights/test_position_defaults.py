"""Positions at another image size: the arithmetic of the library that the file came from.

Each reference is that library, or its arithmetic in other words: timm's `resample_abs_pos_embed`,
transformers' `interpolate_pos_encoding`, torchvision's `interpolate_embeddings`, scipy's `zoom` in
the official code, and `posemb_sincos_2d` of big_vision and SimpleViT.
"""

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from support.peers import TorchvisionViT, VitPytorchViT, drawn
from support.timm_files import tiny

from vitcli.errors import VitcliError
from vitcli.weights.google.write_google import write_google
from vitcli.weights.load import load_model

SIZES = [(64, 64), (24, 24), (40, 16), (32, 56)]  # larger, smaller, non-square; a patch is 8 px


def grid_of(table: torch.Tensor) -> torch.Tensor:
    """(1, 1 + 16, D) -> (1, D, 4, 4), without the class token."""
    return table[:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)


def stored(kind: str, here):
    """Write a file of each layout: (its path, its positions, the arithmetic of its library)."""
    torch.manual_seed(0)
    if kind == "torchvision":
        net = drawn(TorchvisionViT())
        torch.save(net.state_dict(), "w.pth")
        return (
            "w.pth",
            net.encoder.pos_embedding.data,
            lambda grid, size: F.interpolate(grid, size, mode="bicubic", align_corners=True),
        )
    if kind == "timm":
        net = tiny()
        torch.save(net.state_dict(), "w.pth")
        return (
            "w.pth",
            net.network.pos_embed.data,
            lambda grid, size: F.interpolate(grid, size, mode="bicubic", antialias=True),
        )
    if kind == "vit_pytorch":  # the library has no function for it: timm's default
        net = drawn(VitPytorchViT(width=96, heads=3))
        torch.save(net.state_dict(), "w.pth")
        return (
            "w.pth",
            net.pos_embedding.data[None],
            lambda grid, size: F.interpolate(grid, size, mode="bicubic", antialias=True),
        )
    net = tiny(gelu="tanh")
    write_google(net, here / "w.npz")

    def zoomed(grid, size):
        table = grid[0].permute(1, 2, 0).numpy()
        factors = (size[0] / 4, size[1] / 4, 1)
        found = scipy.ndimage.zoom(table, factors, order=1).astype(np.float32)
        return torch.from_numpy(found).permute(2, 0, 1)[None]

    return "w.npz", net.network.pos_embed.data, zoomed


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["timm", "torchvision", "google", "vit_pytorch"])
def test_learned_positions(here, kind, size):
    path, table, arithmetic = stored(kind, here)
    model = load_model(path, image_size=size, num_heads=3)
    expected = arithmetic(grid_of(table), (size[0] // 8, size[1] // 8)).flatten(2).transpose(1, 2)
    assert torch.allclose(model.network.pos_embed[:, 1:], expected, atol=1e-5)
    assert torch.equal(model.network.pos_embed[:, :1], table[:, :1])
    resized = model.load_report.status["pos_embed"]
    assert resized[0] == "resampled" and model.network.position_resize in resized[1]


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "Dinov2WithRegisters"])
def test_transformers(here, kind, size):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    net = getattr(transformers, f"{kind}Model")(config).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    net.save_pretrained("hf")
    images = torch.randn(2, 3, *size)
    resized = {"interpolate_pos_encoding": True} if kind == "ViT" else {}
    expected = net(images, **resized).last_hidden_state
    found = load_model("hf", image_size=size).network.tokens(images)
    assert torch.allclose(found, expected, atol=5e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["vit_pytorch", "google"])
def test_fixed_positions_are_computed_for_the_size(here, kind, size):
    if kind == "vit_pytorch":
        net = drawn(VitPytorchViT(width=96, heads=3, simple=True))
        torch.save(net.state_dict(), "w.pth")
        model = load_model("w.pth", num_heads=3, image_size=size)
        expected = VitPytorchViT.sincos(size[0] // 8, size[1] // 8, 96)
    else:
        net = tiny(position="sincos2d", position_covers_prefix=False, gelu="tanh")
        write_google(net, here / "w.npz")
        model = load_model("w.npz", num_heads=3, image_size=size)
        expected = VitPytorchViT.sincos(size[0] // 8, size[1] // 8, 48)
    found = model.network.pos_embed[0, -expected.shape[0] :]
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_setting_decides(here):
    torch.save(tiny().state_dict(), "w.pth")
    model = load_model("w.pth", num_heads=3, image_size=64, position_resize="bicubic_aligned")
    assert model.network.position_resize == "bicubic_aligned"
    with pytest.raises(VitcliError, match=r"are `learned`, not `sincos2d`"):
        load_model("w.pth", num_heads=3, position_resize="computed")
