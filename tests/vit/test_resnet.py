"""The BiT ResNet against the equations of big_vision's bit_paper.py, and its face."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from vitcli.errors import VitcliError
from vitcli.vit import ResNet, ResNetConfig, VisionTransformer, create_network
from vitcli.weights.edit import change_pool, prepare_finetune, resize
from vitcli.weights.load import load_model
from vitcli.weights.loaded import LoadedModel
from vitcli.weights.store import read_header, read_vitcli, save_model


def drawn(seed=0, **settings):
    """A small one in which every number counts: no GroupNorm is 1 and 0, the head is not 0."""
    values = {"image_size": (32, 48), "layers": (2, 1), "width": 0.5, "num_classes": 5}
    model = ResNet(ResNetConfig(**(values | settings)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (0.8 if p.ndim == 1 else 0.1))
    return model.eval()


def standardized(x, axes, eps):
    x = x - x.mean(axis=axes, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=axes, keepdims=True) + eps)


def windows(x, size, stride, value):
    """(B, Y, X, F) -> (B, Y', X', F, size, size), padded with `value` by size // 2."""
    p = size // 2
    x = np.pad(x, ((0, 0), (p, p), (p, p), (0, 0)), constant_values=value)
    view = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))
    return view[:, ::stride, ::stride]


class Reference:
    """bit_paper.py in NumPy, channels last, double precision."""

    def __init__(self, model):
        self.p = {k: v.double().numpy() for k, v in model.state_dict().items()}
        self.config = model.config
        timm = model.config.arithmetic == "timm"
        self.weight_eps, self.beyond = (1e-8, 0.0) if timm else (1e-10, -math.inf)

    def conv(self, x, name, stride=1):
        kernel = self.p[f"{name}.weight"].transpose(2, 3, 1, 0)  # HWIO
        kernel = standardized(kernel, (0, 1, 2), self.weight_eps)
        return np.einsum("byxcij,ijco->byxo", windows(x, len(kernel), stride, 0.0), kernel)

    def norm_relu(self, x, name):
        b, y, cols, f = x.shape
        x = standardized(x.reshape(b, y, cols, 32, f // 32), (1, 2, 4), 1e-5).reshape(x.shape)
        return np.maximum(x * self.p[f"{name}.weight"] + self.p[f"{name}.bias"], 0)

    def unit(self, x, name, stride):
        shortcut, x = x, self.norm_relu(x, f"{name}.norm1")
        if f"{name}.downsample.conv.weight" in self.p:
            shortcut = self.conv(x, f"{name}.downsample.conv", stride)
        x = self.conv(x, f"{name}.conv1")
        x = self.conv(self.norm_relu(x, f"{name}.norm2"), f"{name}.conv2", stride)
        return self.conv(self.norm_relu(x, f"{name}.norm3"), f"{name}.conv3") + shortcut

    def __call__(self, images):
        x = self.conv(images.double().numpy().transpose(0, 2, 3, 1), "stem.conv", 2)
        x = windows(x, 3, 2, self.beyond).max(axis=(4, 5))
        for i, units in enumerate(self.config.layers):
            for j in range(units):
                x = self.unit(x, f"stages.{i}.blocks.{j}", 2 if i and not j else 1)
        x = self.norm_relu(x, "norm").mean(axis=(1, 2))
        return x, x @ self.p["head.weight"].T + self.p["head.bias"]


@pytest.mark.parametrize("arithmetic", ["google", "timm"])
@pytest.mark.parametrize("size", [(32, 48), (33, 21), (8, 8)])
def test_the_equations(arithmetic, size):
    # In double precision, because a map of one cell leaves groups whose variance is next to none.
    model = drawn(arithmetic=arithmetic, layers=(2, 1, 1)).double()
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)).double()
    features, logits = Reference(model)(images)
    with torch.no_grad():
        assert np.abs(model.features(images).numpy() - features).max() < 1e-9
        assert np.abs(model(images).numpy() - logits).max() < 1e-8
        other = replace(model.config, arithmetic={"google": "timm", "timm": "google"}[arithmetic])
        twin = ResNet(other).double().eval()
        twin.load_state_dict(model.state_dict())
        assert (twin(images) - model(images)).abs().max() > 1e-3  # the test can tell them apart


def test_activation_checkpointing_changes_no_gradient():
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    gradients = []
    for again in (False, True):
        model = drawn().train()
        model.checkpoint_activations = again
        model(images).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))
    assert len(gradients[0]) == len(list(drawn().parameters()))


def test_the_face_of_a_vision_transformer():
    model, vit = drawn(), create_network("Pico/8", image_size=32, depth=1, num_classes=5)
    assert model.checkpoint_activations == vit.checkpoint_activations
    public = {name for name in vars(VisionTransformer) if not name.startswith("_")}
    shared = {"init_weights", "features", "classify", "forward"}
    assert shared <= public and all(callable(getattr(model, name)) for name in shared)
    images = torch.randn(1, 3, 32, 48)
    assert torch.equal(model.classify(model.features(images)), model(images))
    backbone = ResNet(replace(model.config, num_classes=0))
    assert torch.equal(backbone(images), backbone.features(images))


def test_fresh_weights():
    model = create_network("R26x1", layers=(1, 1), num_classes=7, image_size=32)
    assert not any(p.any() for p in model.head.parameters())
    for name, p in model.named_parameters():
        if p.ndim == 4:
            assert float(p.detach().std()) == pytest.approx(p[0].numel() ** -0.5, rel=0.05), name
        elif "norm" in name:
            assert torch.equal(p, torch.full_like(p, float(name.endswith("weight")))), name


def test_a_file_of_ours(tmp_path):
    model = LoadedModel(drawn(), labels=tuple("abcde"), head_trained=True)
    save_model(tmp_path / "m.safetensors", model)
    header = read_header(tmp_path / "m.safetensors")
    assert header["config"]["kind"] == "resnet"
    assert read_vitcli(tmp_path / "m.safetensors").config == model.config
    read = load_model(
        tmp_path / "m.safetensors", image_size=64, preprocess={"mean": 0.5, "std": 0.5}
    )
    assert isinstance(read.network, ResNet) and read.labels == model.labels and read.head_trained
    assert read.config == replace(model.config, image_size=(64, 64))
    assert all(map(torch.equal, read.state_dict().values(), model.state_dict().values()))
    images = torch.randn(1, 3, 32, 48)
    torch.testing.assert_close(read(images), model(images), rtol=1e-5, atol=1e-5)
    assert set(read.load_report.status.values()) == {("loaded", "")}
    for settings in ({"norm_eps": 1e-6}, {"num_heads": 4}, {"gelu": "tanh"}):
        with pytest.raises(VitcliError, match=f"a ResNet has no `model.{next(iter(settings))}`"):
            load_model(tmp_path / "m.safetensors", **settings)
    # A header that says another architecture than the tensors have.
    model.network.config = replace(model.config, layers=(1, 1))
    save_model(tmp_path / "lies.safetensors", model)
    with pytest.raises(VitcliError, match=r"not part of the model: `stages\.0\.blocks\.1"):
        load_model(tmp_path / "lies.safetensors")


def test_surgery():
    model = LoadedModel(drawn())
    features = model.features(images := torch.randn(1, 3, 32, 48))
    prepare_finetune(model, ["x", "y"], image_size=(17, 40))
    assert model.config == replace(model.config, num_classes=2, image_size=(17, 40))
    assert model.labels == ("x", "y") and not model.head_trained
    assert torch.equal(model(images), torch.zeros(1, 2))
    assert torch.equal(model.features(images), features)
    resize(model, (17, 40))
    change_pool(model, "gap")  # what it does already
    with pytest.raises(VitcliError, match="a ResNet pools `mean`, not `token`"):
        change_pool(model, "token")


def test_the_rows_of_a_trained_head_are_kept():
    model = LoadedModel(drawn(), labels=tuple("abcde"), head_trained=True)
    rows = model.network.head.weight.detach().clone()
    prepare_finetune(model, ["d", "b"], keep_head=True)
    assert torch.equal(model.network.head.weight, rows[[3, 1]]) and model.head_trained


def test_a_variant_by_its_name():
    model = load_model("R26x1", image_size=(64, 96), num_classes=3)
    assert model.config == ResNetConfig((64, 96), layers=(2, 2, 2, 2), num_classes=3)
    assert model.preprocess.image_size == (64, 96)
    with pytest.raises(VitcliError, match="unknown settings of a ResNet: norm_eps"):
        load_model("R50x1", norm_eps=1e-6)
    with pytest.raises(VitcliError, match="26, 50, 101, 152, 200 layers"):
        load_model("R34x1")


def test_configurations():
    config = ResNetConfig(image_size=(20, 30), layers=(1, 2), width=1.5, num_classes=4)
    assert ResNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert (config.depth, config.feature_dim) == (11, 768)
    for settings, words in (
        ({"width": 0.3}, "not a multiple of its 32 groups"),
        ({"layers": (2, 0)}, "a unit in every stage"),
        ({"image_size": (0, 3)}, "image_size is 0"),
        ({"width": 1e30}, "is above 100"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"arithmetic": "jax"}, "no arithmetic `jax`"),
        ({"num_channels": 0}, "num_channels is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            ResNetConfig(**settings)
