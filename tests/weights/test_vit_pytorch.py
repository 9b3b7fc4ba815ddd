"""vit-pytorch's ViT and SimpleViT, against modules with their published structure."""

import pytest
import torch
from support.peers import VitPytorchViT, drawn

from vitcli.errors import VitcliError
from vitcli.weights.load import load_model

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
VERSIONS = ("0.35", "1.2", "1.26")


def save(net) -> str:
    torch.save(net.state_dict(), "vit.pt")
    return "vit.pt"


@torch.no_grad()
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "options",
    [{}, {"simple": True}, {"simple": True, "registers": 3}, {"width": 64, "heads": 1},
     {"channels": 1}, {"pool": "mean"}],
)  # fmt: skip
def test_logits(here, version, options):
    if version != "1.26" and ("registers" in options or "pool" in options):
        pytest.skip("this version has no such model")
    net = drawn(VitPytorchViT(version=version, **options))
    images = IMAGES[:, : options.get("channels", 3)]
    model = load_model(save(net), image_size=32)
    assert (model(images) - net(images)).abs().max() < 1e-5
    assert model.load_report.layout == "vit_pytorch" and model.config.norm_eps == 1e-5
    assert model.config.pixel_norm == model.config.patch_norm == (version != "0.35")
    assert any("heads of width 64" in note for note in model.load_report.notes)


def test_what_no_tensor_shows_is_asked_for(here):
    with pytest.raises(VitcliError) as error:
        load_model(save(drawn(VitPytorchViT(width=48, heads=3))))
    assert "`model.num_heads`" in error.value.message
    with pytest.raises(VitcliError, match=r"`model\.image_size`"):
        load_model(save(drawn(VitPytorchViT(simple=True))))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"transformer.layers.0.0.q_norm.gamma": (2, 1, 64)},
            "another architecture of vit-pytorch",
        ),
        ({"to_patch_embedding.2.weight": (128, 190)}, "patches of 190 values"),
        ({"transformer.layers.0.0.to_qkv.weight": (3 * 64, 128)}, "attention of width 64"),
        ({"transformer.layers.1.0.to_qkv.weight": (3 * 64, 128)}, r"qkv.weight is \(192, 128\)"),
        ({"pos_embedding": (15, 128)}, "15 positions"),
        ({"mlp_head.weight": (5, 7)}, r"head.weight is \(5, 7\)"),
    ],
)
def test_another_architecture_and_a_damaged_file_are_refused_by_name(here, change, words):
    state = drawn(VitPytorchViT()).state_dict()
    state |= {name: torch.ones(shape) for name, shape in change.items()}
    torch.save(state, "vit.pt")
    with pytest.raises(VitcliError, match=words) as error:
        load_model("vit.pt")
    assert error.value.hint


def test_a_patch_size_cannot_change_under_a_norm_of_its_pixels(here):
    with pytest.raises(VitcliError, match="normalises the pixels of a patch"):
        load_model(save(drawn(VitPytorchViT())), patch_size=4)
    model = load_model("vit.pt", patch_size=8, image_size=64)
    assert model.config.pixel_norm and model.config.grid == (8, 8)
