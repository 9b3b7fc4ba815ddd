"""torchvision's ViTs, against a module with their published structure."""

import pytest
import torch
from support.peers import TorchvisionViT, drawn, interpolated

from vitcli.errors import VitcliError
from vitcli.weights.load import load_model
from vitcli.weights.read_torchvision import evaluation_transform


def images(side: int) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"latent": 24}, {"patch": 16, "width": 96}])
def test_logits(here, options):
    net = drawn(TorchvisionViT(**options))
    torch.save(net.state_dict(), "vit_b_16.pth")
    model = load_model("vit_b_16.pth", num_heads=3)
    assert largest_difference(model(images(32)), net(images(32))) < 1e-5
    assert model.load_report.layout == "torchvision" and model.config.norm_eps == 1e-6


@torch.no_grad()
def test_the_names_of_the_first_releases(here):
    net = drawn(TorchvisionViT())
    old = {
        n.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): t
        for n, t in net.state_dict().items()
    }
    torch.save(old, "vit.pth")
    assert (
        largest_difference(load_model("vit.pth", num_heads=3)(images(32)), net(images(32))) < 1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("side", [64, 24, 40])
def test_positions_at_another_size_have_torchvisions_arithmetic(here, side):
    net = drawn(TorchvisionViT())
    torch.save(net.state_dict(), "vit.pth")
    model = load_model("vit.pth", num_heads=3, image_size=side)
    table = interpolated(net.state_dict(), side, 8)["encoder.pos_embedding"]
    net.encoder.pos_embedding = torch.nn.Parameter(table)
    assert largest_difference(model(images(side)), net(images(side))) < 1e-5
    assert "bicubic_aligned" in model.load_report.line()


@pytest.mark.parametrize(
    ("name", "width", "patch", "side", "expected"),
    [  # torchvision 0.24: the transforms of the weights in models/vision_transformer.py
        ("vit_b_16-c867db91.pth", 768, 16, 224, (256, "bilinear")),
        ("vit_b_16_swag-9ac1b537.pth", 768, 16, 384, (384, "bicubic")),
        ("vit_b_16_lc_swag-4e70ced5.pth", 768, 16, 224, (224, "bicubic")),
        ("vit_b_32-d86f8d99.pth", 768, 32, 224, (256, "bilinear")),
        ("vit_l_16-852ce7e3.pth", 1024, 16, 224, (242, "bilinear")),
        ("vit_l_16_swag-4f3808c9.pth", 1024, 16, 512, (512, "bicubic")),
        ("vit_l_32-c7638314.pth", 1024, 32, 224, (256, "bilinear")),
        ("vit_h_14_swag-80465313.pth", 1280, 14, 518, (518, "bicubic")),
        ("vit_h_14_lc_swag-c1eb923e.pth", 1280, 14, 224, (224, "bicubic")),
    ],
)
def test_the_evaluation_transform_is_that_of_the_weights(name, width, patch, side, expected):
    found = evaluation_transform(side, width, patch, swag="swag" in name)
    assert (found["resize_size"], found["interpolation"]) == expected


def test_preprocessing_is_assumed_with_a_note_and_can_be_set(here):
    torch.save(drawn(TorchvisionViT()).state_dict(), "vit.pth")
    model = load_model("vit.pth", num_heads=3)
    assert (model.preprocess.resize_size, model.preprocess.interpolation) == (37, "bilinear")
    assert model.preprocess.mean == (0.485, 0.456, 0.406)
    assert "assumed torchvision's evaluation transform" in " ".join(model.load_report.notes)
    model = load_model("vit.pth", num_heads=3, preprocess={"mean": 0.5, "interpolation": "bicubic"})
    assert model.preprocess.mean == (0.5,) * 3 and model.preprocess.interpolation == "bicubic"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("encoder.layers.encoder_layer_1.ln_2.bias"), "blocks.1.norm2.bias"),
        (lambda s: s.pop("class_token"), "17 positions"),
        (
            lambda s: s.update({"encoder.layers.encoder_layer_0.gate": torch.ones(2)}),
            "layer_0.gate",
        ),
        (lambda s: s.update({"encoder.ln.weight": torch.ones(7)}), r"norm.weight is \(7,\)"),
        (lambda s: s.update({"conv_proj.weight": torch.ones(7)}), "conv_proj|patch_embed.proj"),
    ],
)
def test_a_damaged_file_is_refused_by_name(here, change, words):
    state = drawn(TorchvisionViT()).state_dict()
    change(state)
    torch.save(state, "vit.pth")
    with pytest.raises(VitcliError, match=words) as error:
        load_model("vit.pth", num_heads=3)
    assert error.value.hint
