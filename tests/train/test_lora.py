"""What learns: adapters, frozen layers, and that a run ends with an ordinary model."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.tiny import TINY, tiny_recipe

from vitcli.commands import export, finetune, pretrain
from vitcli.config.recipe import check
from vitcli.config.schema import LoraSection, Recipe
from vitcli.errors import VitcliError
from vitcli.train.lora import adapters, freeze_and_adapt, merged, training_passes
from vitcli.vit import ResNet, ResNetConfig, create_network
from vitcli.weights.load import load_model

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def model_of(**options):
    model = create_network("Pico/4", image_size=32, num_classes=5, depth=3, **options)
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(2))
    return model.eval()


def resnet_of():
    return ResNet(ResNetConfig((32, 32), layers=(1, 1), width=0.5, num_classes=5))


def learning(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def disturb(model):
    """Adapters as after some training."""
    generator = torch.Generator().manual_seed(3)
    for layer in adapters(model).values():
        torch.nn.init.normal_(layer.lora_up, std=0.1, generator=generator)


TARGETS = [("qkv",), ("qkv", "proj"), ("qkv", "proj", "mlp")]


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("options", [{}, {"mlp": "swiglu", "qkv_bias": False}, {"axial": True}])
@torch.no_grad()
def test_adapters_start_from_nothing_and_end_in_the_weights(targets, options):
    if "axial" in options:
        options = {**options, "pool": "mean", "class_token": False}
    model = model_of(**options)
    before, keys = model(IMAGES), set(model.state_dict())
    section = LoraSection(rank=3, alpha=12.0, targets=targets)
    freeze_and_adapt(model, section, "none", seed=0)
    assert torch.equal(model(IMAGES), before)
    disturb(model)
    adapted = model(IMAGES)
    assert (adapted - before).abs().max() > 0.1
    with merged(model):
        assert set(model.state_dict()) == keys and not adapters(model)
        assert torch.allclose(model(IMAGES), adapted, atol=1e-4 * adapted.abs().max().item())
    assert torch.equal(model(IMAGES), adapted)


@pytest.mark.parametrize(("targets", "wide"), [(("qkv",), 4), (("qkv", "proj"), 6)])
def test_the_numbers_that_learn(targets, wide):
    """Of rank r: r (D + 3 D) for qkv, r (D + D) for proj, in each block; and the head."""
    model = model_of()
    d = model.config.embed_dim
    notes = freeze_and_adapt(model, LoraSection(rank=2, targets=targets), "none", seed=0)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = model.head.weight.numel() + model.head.bias.numel()
    assert count == 3 * 2 * wide * d + head
    assert f"{count:,} parameters" in notes[0]
    assert {n.rpartition(".")[2] for n in learning(model) if not n.startswith("head.")} == {
        "lora_up",
        "lora_down",
    }


def test_freezing():
    model = model_of()
    names = learning(model)
    assert freeze_and_adapt(model, LoraSection(), "none", seed=0) == []
    assert learning(model) == names
    freeze_and_adapt(model, LoraSection(), "blocks:2", seed=0)
    assert learning(model) == {n for n in names if n.startswith(("blocks.2.", "norm.", "head."))}
    model = model_of()
    freeze_and_adapt(model, LoraSection(), "backbone", seed=0)
    assert learning(model) == {"head.weight", "head.bias"}
    resnet = resnet_of()
    freeze_and_adapt(resnet, LoraSection(), "backbone", seed=0)
    assert learning(resnet) == {"head.weight", "head.bias"}
    model = model_of()
    freeze_and_adapt(model, LoraSection(rank=2), "blocks:2", seed=0)
    assert set(adapters(model)) == {"blocks.2.attn.qkv", "blocks.2.attn.proj"}


def test_nothing_is_kept_of_what_is_frozen():
    """Bytes that autograd holds for the backward pass."""

    def kept(freeze, rank=None, targets=("qkv", "proj")):
        model = model_of().train()
        freeze_and_adapt(model, LoraSection(rank=rank, targets=targets), freeze, seed=0)
        seen: dict[int, int] = {}
        own = {p.data_ptr() for p in model.parameters()}

        def pack(t):
            if t.data_ptr() not in own:
                seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        images = torch.randn(16, 3, 32, 32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(images).sum()
        del loss
        return sum(seen.values())

    whole = kept("none")
    assert kept("backbone") < 0.03 * whole  # the pooled tokens
    assert kept("blocks:2") < 0.4 * whole
    assert kept("none", rank=2) < 0.85 * whole
    assert kept("blocks:2", rank=2) < 0.3 * whole


def test_the_cost_of_a_step():
    assert training_passes(model_of()) == 3.0
    for freeze, rank, expected in [
        ("backbone", None, 1.0),
        ("blocks:2", None, 1 + 2 / 3),
        ("none", 2, 2.0),
        ("blocks:2", 2, 1 + 1 / 3),
    ]:
        model = model_of()
        freeze_and_adapt(model, LoraSection(rank=rank), freeze, seed=0)
        assert training_passes(model) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kind", "rank", "freeze", "words"),
    [
        ("resnet", 2, "none", "and a ResNet has none"),
        ("resnet", None, "blocks:1", "and a ResNet has none"),
        ("vit", None, "blocks:9", "than the model has: 3"),
        ("vit", 2, "backbone", "leaves no block"),
        ("vit", 1000, "none", "larger than the width"),
    ],
)
def test_what_cannot_be(kind, rank, freeze, words):
    model = resnet_of() if kind == "resnet" else model_of()
    with pytest.raises(VitcliError, match=words):
        freeze_and_adapt(model, LoraSection(rank=rank), freeze, seed=0)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"lora": {"rank": 2}}, "needs pretrained weights"),
        ({"train": {"freeze": "backbone"}}, "needs pretrained weights"),
        ({"lora": {"alpha": 2.0}}, "`alpha` needs `rank`"),
        ({"lora": {"targets": []}}, "must name at least one of"),
        ({"train": {"freeze": "blocks:0"}}, "freeze"),
    ],
)
def test_settings_that_contradict(sections, words):
    with pytest.raises(VitcliError, match=words):
        tiny_recipe(**sections)


LORA = {
    "command": "finetune",
    "lora": {"rank": 2, "targets": ("qkv", "proj", "mlp")},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pretrain run of a second, in its folder."""
    folder = tmp_path_factory.mktemp("lora")
    recipe = tiny_recipe(train={"steps": 2})
    (folder / "tiny.toml").write_text(recipe.to_toml())
    pretrain.run(recipe=str(folder / "tiny.toml"), out=folder / "base")
    return folder


def written(folder, name, **sections):
    """A fine-tuning recipe's file."""
    settings = {**TINY, **LORA, "model": {"name": str(folder / "base"), "dropout_rate": 0.1}}
    for section, values in sections.items():
        settings[section] = {**settings[section], **values}
    path = folder / f"{name}.toml"
    path.write_text(check(Recipe, settings, name).to_toml())
    return str(path)


@pytest.mark.parametrize("optimizer", ["muon", "sgd"])
def test_a_run_ends_with_an_ordinary_model(base, optimizer):
    recipe = written(base, optimizer, optim={"name": optimizer, "momentum": 0.9, "lr": 0.01})
    out = base / optimizer
    result = finetune.run(recipe=recipe, out=out)
    before, after = load_model(str(base / "base")), load_model(str(out))
    old, new = before.state_dict(), after.state_dict()
    assert result.parameters == sum(p.numel() for p in after.network.parameters())
    with safe_open(out / "lora.safetensors", "pt") as file:
        said = json.loads(file.metadata()["vitcli"])
    assert said["rank"] == 2 and said["alpha"] == 4.0 and said["base"] == str(base / "base")
    parts = load_file(out / "lora.safetensors")
    adapted = {name.rpartition(".")[0] for name in parts}
    assert len(adapted) == 4 * after.config.depth
    for name in new:
        layer = name.removesuffix(".weight")
        if layer in adapted:
            change = 2.0 * parts[f"{layer}.lora_up"] @ parts[f"{layer}.lora_down"]
            assert change.abs().max() > 0
            assert torch.allclose(new[name], old[name] + change, atol=1e-6)
        elif not name.startswith("head."):
            assert torch.equal(new[name], old[name]), name
    assert not (base / "base/lora.safetensors").exists()


def test_a_resumed_run_ends_with_the_same_bits(base):
    steps = {"steps": 4, "checkpoint_steps": 2, "keep_checkpoints": 9, "ema_decay": 0.9}
    recipe = written(base, "resumed", train=steps)
    finetune.run(recipe=recipe, out=base / "whole")
    shutil.copytree(base / "whole", base / "broken")
    for name in ("model.safetensors", "lora.safetensors", "result.json"):
        (base / "broken" / name).unlink()
    shutil.rmtree(base / "broken/checkpoints/step_000004")
    finetune.run(recipe=recipe, out=base / "broken", resume=True)
    for name in ("model.safetensors", "lora.safetensors"):
        assert (base / "broken" / name).read_bytes() == (base / "whole" / name).read_bytes()


def test_it_is_exported(base, tmp_path):
    recipe = written(base, "exported", train={"steps": 1}, lora={"rank": 1})
    finetune.run(recipe=recipe, out=base / "adapted")
    export.run(model=str(base / "adapted"), to="timm", out=tmp_path / "timm")
    ours, theirs = load_model(str(base / "adapted")), load_model(str(tmp_path / "timm"))
    images = torch.randn(2, ours.config.num_channels, 8, 8)
    assert torch.equal(ours(images), theirs(images))
