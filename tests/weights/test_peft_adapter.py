"""LoRA folders of PEFT, against transformers with W + scale * B A in its own modules."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.timm_files import tiny

from vitcli.errors import VitcliError
from vitcli.weights.load import load_model

transformers = pytest.importorskip("transformers")
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "image_size": 32,
    "patch_size": 8,
}


def classic(name: str) -> str:
    """The name of a module in version 5 of transformers -> its name in version 4."""
    letters = {"q": "query", "k": "key", "v": "value"}
    name = name.replace(".layers.", ".encoder.layer.")
    name = re.sub(
        r"attention\.([qkv])_proj", lambda m: f"attention.attention.{letters[m[1]]}", name
    )
    return name.replace("mlp.fc1", "intermediate.dense")


@pytest.fixture
def net(here):
    """A classifier of transformers, saved as `base/`."""
    torch.manual_seed(0)
    net = transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, num_labels=4))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    net.save_pretrained("base")
    return net.eval()


def adapt(net, ranks=(2,), scale=lambda rank: 16 / rank, rename=lambda name: name, **config):
    """Write `adapter/` and change `net` in place: every layer gets the next of `ranks`."""
    tensors, ends = {}, ("q_proj", "v_proj", "mlp.fc1")
    modules = [(n, m) for n, m in net.named_modules() if n.endswith(ends)]
    assert len(modules) == 6
    with torch.no_grad():
        for i, (name, module) in enumerate(modules):
            rank = ranks[i % len(ranks)]
            a, b = torch.randn(rank, module.in_features), torch.randn(module.out_features, rank)
            module.weight += scale(rank) * 0.01 * b @ a
            tensors[f"base_model.model.{rename(name)}.lora_A.weight"] = a
            tensors[f"base_model.model.{rename(name)}.lora_B.weight"] = 0.01 * b
    write(tensors, r=max(ranks), **config)
    return tensors


def write(tensors, **config):
    Path("adapter").mkdir(exist_ok=True)
    values = {"peft_type": "LORA", "lora_alpha": 16, "base_model_name_or_path": "base", **config}
    Path("adapter/adapter_config.json").write_text(json.dumps(values))
    save_file(tensors, "adapter/adapter_model.safetensors")


def check(net, **settings):
    model = load_model("adapter", **settings)
    with torch.no_grad():
        difference = (model(IMAGES) - net(IMAGES).logits).abs().max()
    assert difference < 5e-5, difference
    return model


@pytest.mark.parametrize("rename", [lambda name: name, classic])
def test_merged_logits_are_those_of_transformers(net, rename):
    adapt(net, rename=rename)
    model = check(net)
    notes = " ".join(model.load_report.notes)
    assert "`adapter` is a LoRA adapter: loaded its base model `base`" in notes
    assert "merged the LoRA adapter of 6 layers" in notes


def test_scaling_by_the_square_root_of_the_rank(net):
    adapt(net, ranks=(2, 4), scale=lambda rank: 16 / rank**0.5, use_rslora=True)
    check(net)


def test_ranks_and_alphas_of_single_layers(net):
    alphas = {2: 16, 4: 5}
    adapt(
        net,
        ranks=(2, 4, 2),  # the value projections have rank 4
        scale=lambda rank: alphas[rank] / rank,
        alpha_pattern={"v_proj": 5},
    )
    check(net)


def test_a_new_head_replaces_that_of_the_base_and_its_pooler_goes(net):
    """As the tutorials do: a backbone with a pooler, and a classifier in `modules_to_save`."""
    backbone = transformers.ViTModel(net.config)
    backbone.load_state_dict(net.vit.state_dict(), strict=False)
    backbone.save_pretrained("backbone")
    net.classifier = torch.nn.Linear(48, 7)
    tensors = adapt(net, base_model_name_or_path="backbone", modules_to_save=["classifier"])
    head = {f"base_model.model.classifier.{n}": p for n, p in net.classifier.named_parameters()}
    write(tensors | head, base_model_name_or_path="backbone")
    model = check(net)
    assert model.config.num_classes == 7 and model.labels is None and model.head_trained
    assert "and took `classifier` from it" in " ".join(model.load_report.notes)


def test_trained_biases_replace_those_of_the_base(net):
    """With `bias="all"`, PEFT also stores the head from before the training."""
    tensors = adapt(net)
    query = dict(net.named_modules())["vit.layers.1.attention.q_proj"]
    torch.nn.init.normal_(query.bias)
    tensors["base_model.model.vit.layers.1.attention.q_proj.base_layer.bias"] = query.bias
    tensors["base_model.model.classifier.original_module.bias"] = torch.zeros(4)
    write(tensors, bias="all")
    check(net)


def test_the_base_model_can_be_set_and_must_be_named(net):
    adapt(net, base_model_name_or_path=None)
    with pytest.raises(VitcliError, match="does not name the base model") as error:
        load_model("adapter")
    assert "`--set model.base_model=MODEL`" in error.value.hint
    check(net, base_model="base")
    with pytest.raises(VitcliError, match="`base` is no LoRA adapter"):
        load_model("base", base_model="adapter")
    with pytest.raises(VitcliError, match="is an adapter itself"):
        load_model("adapter", base_model="adapter")


def test_a_base_model_in_timms_layout(here):
    net = tiny()
    torch.save(net.state_dict(), "timm.pth")
    a, b = torch.randn(2, 48), torch.randn(144, 2)
    place = "base_model.model.blocks.1.attn.qkv"
    write({f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b},
          base_model_name_or_path="timm.pth")  # fmt: skip
    with torch.no_grad():
        net.network.blocks[1].attn.qkv.weight += 16 / 2 * b @ a
        assert torch.allclose(load_model("adapter", num_heads=3)(IMAGES), net(IMAGES), atol=1e-4)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "is a DoRA adapter"),
        ({"peft_type": "IA3"}, "is a `IA3` adapter"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model"),
    ],
)
def test_other_adapters_are_refused_with_what_works(net, config, words):
    adapt(net, **config)
    with pytest.raises(VitcliError, match=words) as error:
        load_model("adapter")
    assert "merge_and_unload" in error.value.hint


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        (
            "vit.layers.9.attention.q_proj.lora_A.weight",
            None,
            "another kind of LoRA",
        ),
        ("vit.layers.0.attention.q_proj.lora_B.weight", (48, 3), "and lora_B is"),
        (
            "vit.layers.0.attention.q_proj.lora_B.weight",
            (40, 2),
            "does not fit its",
        ),
        ("classifier.weight", (3, 40), r"head.weight is \(3, 40\)"),
    ],
)
def test_a_damaged_adapter_is_refused_by_name(net, name, shape, words):
    tensors, name = copy.copy(adapt(net)), f"base_model.model.{name}"
    if shape is None:
        tensors[name.replace("lora_A", "lora_magnitude_vector")] = torch.ones(2)
    else:
        tensors[name] = torch.ones(shape)
    write(tensors)
    with pytest.raises(VitcliError, match=words) as error:
        load_model("adapter")
    assert error.value.hint


def test_the_file_itself_and_an_older_pickle(net):
    tensors = adapt(net)
    with torch.no_grad():
        found = load_model("adapter/adapter_model.safetensors")(IMAGES)
        Path("adapter/adapter_model.safetensors").unlink()
        torch.save(tensors, "adapter/adapter_model.bin")
        torch.save({"lr": 1.0}, "adapter/training_args.bin")
        assert torch.equal(load_model("adapter")(IMAGES), found)
        assert (found - net(IMAGES).logits).abs().max() < 5e-5


def test_a_trainers_folder_with_an_adapter_in_its_checkpoint(net):
    adapt(net)
    Path("out").mkdir()
    Path("adapter").rename("out/checkpoint-3")
    model = load_model("out")
    with torch.no_grad():
        assert (model(IMAGES) - net(IMAGES).logits).abs().max() < 5e-5
