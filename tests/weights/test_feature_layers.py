"""Every representation, beside what hooks on the plain model see; and as a model of its own."""

import pytest
import torch

from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.weights.edit import replace_head
from vitcli.weights.feature_layers import set_representation
from vitcli.weights.load import load_model
from vitcli.weights.loaded import create_model
from vitcli.weights.store import save_model

KINDS = {
    "plain": {},
    "pre-logits": {"representation_size": 24},
    "mean": {"pool": "mean", "class_token": False},
    "fc_norm": {"pool": "mean", "norm_after_pool": True, "num_registers": 2},
    "map": {"pool": "map"},
    "two heads": {
        "pool": "distilled",
        "distillation_token": True,
        "distillation_head": True,
    },
    "every": {"position_at": "every"},
    "lines": {"position_at": "every", "position": "learned2d"},
}


def make(kind):
    net = create_model("Pico/4", image_size=16, depth=4, num_classes=3, **KINDS[kind])
    generator = torch.Generator().manual_seed(1)
    for name, p in net.network.named_parameters():
        if name == "cls_token" or "norm" in name or "pos_embed" in name:
            p.data += 0.3 * torch.randn(p.shape, generator=generator)
    net.preprocess = Preprocess(image_size=(16, 16))
    net.labels = ("a", "b", "c")
    return net.eval()


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def outputs(net, images):
    """(B, T, D) of every block."""
    found = []
    handles = [
        block.register_forward_hook(lambda _, i, o: found.append(o)) for block in net.network.blocks
    ]
    with torch.no_grad():
        net(images)
    for handle in handles:
        handle.remove()
    return found


def pooled(net, x, how):
    """What `how` makes of (B, T, D), written out."""
    x = x if net.config.norm_after_pool else net.network.norm(x)
    patches = x[:, net.config.num_prefix_tokens :]
    if how == "quadrants":
        b, _, d = patches.shape
        cut = patches.reshape(b, 2, 2, 2, 2, d).mean(dim=(2, 4))  # of a grid of 4x4
        y = cut.reshape(b, 4 * d)
    elif how == "token_mean":
        y = torch.cat([x[:, 0], patches.mean(1)], dim=1)
    else:
        y = x[:, 0] if how == "cls" else patches.mean(1)
    return net.network.fc_norm(y) if net.config.norm_after_pool else y


CASES = [
    ("plain", "cls", "cls", [4]),
    ("plain", "mean", "mean", [4]),
    ("plain", "quadrants", "quadrants", [4]),
    ("plain", "token_mean", "token_mean", [4]),
    ("plain", "layer:4", "cls", [4]),
    ("plain", "layer:2", "cls", [2]),
    ("plain", "concat:4", "cls", [1, 2, 3, 4]),
    ("pre-logits", "cls", "cls", [4]),
    ("pre-logits", "layer:3", "cls", [3]),
    ("pre-logits", "concat:2", "cls", [3, 4]),
    ("mean", "layer:1", "mean", [1]),
    ("mean", "concat:3", "mean", [2, 3, 4]),
    ("mean", "quadrants", "quadrants", [4]),
    ("fc_norm", "cls", "cls", [4]),
    ("fc_norm", "concat:2", "mean", [3, 4]),
    ("map", "layer:2", "cls", [2]),
    ("two heads", "cls", "cls", [4]),
    ("two heads", "concat:2", "cls", [3, 4]),
    ("every", "layer:3", "cls", [3]),
    ("every", "layer:1", "cls", [1]),
    ("lines", "layer:2", "cls", [2]),
    ("lines", "concat:4", "cls", [1, 2, 3, 4]),
]


@pytest.mark.parametrize(("kind", "name", "how", "blocks"), CASES)
def test_it_is_what_the_plain_model_holds(kind, name, how, blocks, images, tmp_path):
    net = make(kind)
    with torch.no_grad():
        inside = outputs(net, images)
        expected = torch.cat([pooled(net, inside[i - 1], how) for i in blocks], dim=1)
        set_representation(net, name)
        torch.testing.assert_close(net.features(images), expected, atol=1e-5, rtol=1e-4)
    assert net.config.feature_dim == expected.shape[1] and net.labels is None
    # A classifier on it is an ordinary weights file.
    replace_head(net, ["x", "y"], keep_pre_logits=True)
    torch.nn.init.normal_(net.network.head.weight)
    save_model(tmp_path / "w.safetensors", net)
    again = load_model(tmp_path / "w.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(again(images), net.network.head(expected), atol=1e-4, rtol=1e-4)
    if name.startswith("layer"):
        assert len(again.network.blocks) == blocks[0]


def test_what_the_head_reads(images):
    net = make("pre-logits")
    with torch.no_grad():
        expected = net.features(images)
        set_representation(net, "pre-logits")
        assert torch.equal(net.features(images), expected) and net.labels == ("a", "b", "c")


def test_gradients_reach_every_block_that_is_read(images):
    net = make("plain")
    set_representation(net, "concat:2")
    net.train().features(images).square().sum().backward()
    assert all(block.mlp.fc2.weight.grad.abs().sum() > 0 for block in net.network.blocks)


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("plain", "layer:5", "has 4 blocks"),
        ("plain", "concat:9", "has 4 blocks"),
        ("plain", "layer:0", "unknown representation `layer:0`"),
        ("plain", "nonsense", "unknown representation `nonsense`"),
        ("mean", "cls", "class token"),
    ],
)
def test_errors(kind, name, words):
    with pytest.raises(VitcliError, match=words):
        set_representation(make(kind), name)


def test_a_resnet_has_one():
    net = create_model("R26x1", image_size=32)
    set_representation(net, "pre-logits")
    with pytest.raises(VitcliError, match="a ResNet has no representation `cls`"):
        set_representation(net, "cls")


@pytest.mark.parametrize(
    ("layout", "out"), [("timm", "t"), ("huggingface", "h"), ("google", "g.npz")]
)
def test_layouts_that_cannot_say_it_refuse(layout, out, here):
    from vitcli.commands import export

    net = make("plain")
    set_representation(net, "concat:2")
    replace_head(net, ["x", "y"])
    save_model("w.safetensors", net)
    with pytest.raises(VitcliError, match="pool_blocks"):
        export.run(layout, model="w.safetensors", out=here / out)
    assert not (here / out).exists()


def test_configurations_that_cannot_be(images):
    from vitcli.vit import ViTConfig

    for settings in (
        {"pool_blocks": 13},
        {"pool_blocks": 0},
        {"pool_blocks": 2, "pool": "map"},
        {"pool_blocks": 2, "representation_size": 8},
    ):
        with pytest.raises(ValueError, match="pool_blocks"):
            ViTConfig(**settings)
