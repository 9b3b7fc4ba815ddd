"""LoadedModel: the network is pure torch, and everything else travels beside it."""

import copy

import torch
from PIL import Image

import vitcli
from vitcli.preprocess import Preprocess
from vitcli.train.resolve import with_dropout
from vitcli.vit import create_network
from vitcli.weights.loaded import LoadedModel, model_hash
from vitcli.weights.store import save_model

FACTS = ("labels", "preprocess", "head_activation", "temperature", "head_trained", "load_report")


def full(**settings):
    network = create_network("Pico/8", image_size=16, num_classes=3, depth=1, **settings)
    torch.nn.init.normal_(network.head.weight, generator=torch.Generator().manual_seed(0))
    return LoadedModel(
        network,
        labels=("a", "b", "c"),
        preprocess=Preprocess(image_size=(16, 16)),
        head_activation="sigmoid",
        temperature=2.5,
        head_trained=True,
    )


def test_the_network_knows_nothing_about_its_use():
    for name in ("Pico/8", "R26x1"):
        assert not any(hasattr(create_network(name), fact) for fact in FACTS)


def test_the_public_example(tmp_path):
    save_model(tmp_path / "m.safetensors", full())
    for model in (
        vitcli.load_model(tmp_path / "m.safetensors"),
        vitcli.load_model("Pico/8", image_size=16, num_classes=3),
    ):
        images = model.preprocess(Image.new("RGB", (20, 30), "red"))[None]
        assert images.shape == (1, 3, 16, 16) and model(images).shape == (1, 3)
        assert model.features(images).shape == (1, model.config.feature_dim)
        assert model.state_dict()["pos_embed"].shape == (1, 5, 128)
    made = vitcli.create_model("Pico/8", num_classes=10, image_size=32)
    assert made.config.num_classes == 10 and made.labels is None and made.preprocess is None
    assert made(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_everything_comes_back_from_a_file(tmp_path):
    model = full()
    save_model(tmp_path / "m.safetensors", model)
    back = vitcli.load_model(tmp_path / "m.safetensors")
    for name in set(FACTS) - {"load_report"}:
        assert getattr(back, name) == getattr(model, name), name
    logits = torch.randn(4, 3)
    expected = torch.sigmoid(logits.double() / 2.5)
    assert torch.equal(back.probabilities(logits), expected)
    assert model_hash(back) == model_hash(model)


def test_a_deep_copy_shares_nothing():
    model = full()
    other = copy.deepcopy(model)
    other.network.head.weight.data.zero_()
    other.temperature = 1.0
    assert model.network.head.weight.any() and model.temperature == 2.5


def test_other_dropout_rates_keep_everything_else():
    model = full()
    model.network.position_resize = "bilinear"
    other = with_dropout(model, {"dropout_rate": 0.1})
    assert other.config.dropout_rate == 0.1 and model.config.dropout_rate == 0.0
    assert other.network.position_resize == "bilinear"
    for name in FACTS:
        assert getattr(other, name) == getattr(model, name), name
    for key, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor), key
