"""A network in any container, behind any prefix, is the network of the bare file."""

import random
from pathlib import Path

import pytest
import torch
from support.peers import TorchvisionViT, VitPytorchViT, drawn
from support.timm_files import tiny

from vitcli.errors import VitcliError
from vitcli.vit.resnet import ResNet, ResNetConfig
from vitcli.weights.find_head import BATCH_NORM_EPS
from vitcli.weights.find_network import LAYOUTS
from vitcli.weights.huggingface.write_huggingface import write_huggingface
from vitcli.weights.load import load_model
from vitcli.weights.store import load_weights

CONTAINERS = (
    "model", "state_dict", "model_state", "model_state_dict", "state", "net", "network", "weights",
)  # fmt: skip
AVERAGED = ("weights_ema", "model_ema", "ema", "state_dict_ema", "ema_state_dict", "teacher")
PREFIXES = (
    "module.", "_orig_mod.", "model.", "backbone.", "base_encoder.", "encoder.", "net.", "student.",
)  # fmt: skip
HEADS = ("head", "fc", "head.1", "classifier.1", "heads.head", "linear", "classifier")
ENDS = ("weight", "bias")
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def bit() -> tuple[dict, torch.Tensor]:
    net = ResNet(ResNetConfig((32, 32), 3, (1, 1), 0.5, 5, "timm"))
    net.init_weights(torch.Generator().manual_seed(0)).eval()
    torch.nn.init.normal_(net.head.weight)
    return net.state_dict(), net(IMAGES)


def huggingface(folder: Path, **options) -> tuple[dict, torch.Tensor]:
    model = tiny(norm_eps=1e-12, **options)
    model.labels = tuple("abcde")
    write_huggingface(model, folder / "hf")
    (folder / "config.json").write_text((folder / "hf/config.json").read_text())
    return load_weights(folder / "hf/model.safetensors"), model(IMAGES)


def timm(**options) -> tuple[dict, torch.Tensor]:
    model = tiny(**options)
    return model.state_dict(), model(IMAGES)


def peer(module: torch.nn.Module) -> tuple[dict, torch.Tensor]:
    module = drawn(module)
    return module.state_dict(), module(IMAGES)


def open_clip(folder: Path) -> tuple[dict, torch.Tensor]:
    """A tower, whose bare file `test_open_clip.py` compares with transformers."""
    d = 48
    shapes = {"class_embedding": (d,), "positional_embedding": (17, d), "proj": (d, 20)}
    shapes |= {"conv1.weight": (d, 3, 8, 8)}
    shapes |= {f"{norm}.{end}": (d,) for norm in ("ln_pre", "ln_post") for end in ENDS}
    inside = {"ln_1": (d,), "ln_2": (d,), "attn.out_proj": (d, d), "mlp.c_fc": (80, d)}
    inside |= {"mlp.c_proj": (d, 80)}
    for block in ("transformer.resblocks.0", "transformer.resblocks.1"):
        shapes |= {f"{block}.{name}.weight": shape for name, shape in inside.items()}
        shapes |= {f"{block}.{name}.bias": shape[:1] for name, shape in inside.items()}
        shapes |= {
            f"{block}.attn.in_proj_weight": (3 * d, d),
            f"{block}.attn.in_proj_bias": (3 * d,),
        }
    generator = torch.Generator().manual_seed(0)
    state = {n: 0.3 * torch.randn(s, generator=generator) for n, s in shapes.items()}
    torch.save(state, folder / "bare.pth")
    return state, load_model(folder / "bare.pth", num_heads=3)(IMAGES)


KINDS = {
    "timm": lambda folder: timm(),
    "hybrid": lambda folder: timm(stem=(1, 1), stem_width=0.5, patch_size=2),
    "bit": lambda folder: bit(),
    "huggingface": huggingface,
    "torchvision": lambda folder: peer(TorchvisionViT()),
    "open_clip": open_clip,
    "vit_pytorch": lambda folder: peer(VitPytorchViT(width=96, heads=3)),
}
LAYOUT_OF = {"hybrid": "timm"}
HEAD_OF = {"huggingface": "classifier", "torchvision": "heads.head", "vit_pytorch": "mlp_head"}


def test_every_layout_is_composed():
    assert {LAYOUT_OF.get(kind, kind) for kind in KINDS} == set(LAYOUTS)


def composed(state: dict, head: str, draw: random.Random) -> object:
    """The content of a file around `state`, whose head has the name `head`."""
    around = [draw.choice(PREFIXES) for _ in range(draw.randint(0, 3))]
    prefix = "".join(around)
    new_head = draw.choice((head, *HEADS))
    at = "".join(around[: draw.randint(0, len(around))]) if new_head != head else prefix
    tensors = {}
    for name, tensor in state.items():
        if name.rpartition(".")[0] == head:
            tensors[f"{at}{new_head}.{name.rpartition('.')[2]}"] = (
                tensor.flatten(1) if tensor.ndim == 4 else tensor
            )
        elif draw.random() < 0.1 and "." in name:
            module, _, last = name.rpartition(".")
            tensors[f"{prefix}{module}._orig_mod.{last}"] = tensor
        else:
            tensors[prefix + name] = tensor
    others = {"criterion.pos_weight": torch.ones(5), "normalize.mean": torch.ones(1, 3, 1, 1)}
    others |= {"train_acc.tp": torch.zeros(5, dtype=torch.int64), "n_averaged": torch.tensor(3)}
    tensors |= {name: others[name] for name in draw.sample(sorted(others), draw.randint(0, 3))}
    value: object = tensors
    for _ in range(draw.randint(0, 2)):
        if draw.random() < 0.2:
            value = [
                value,
                {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1}]},
            ]
        else:
            value = {"epoch": 3, draw.choice(CONTAINERS): value, "optimizer": {"state": {}}}
    if draw.random() < 0.4:
        zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        value = {"before": zeros, draw.choice(AVERAGED): value}
    return value


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_whatever_is_around_a_network_the_logits_are_those_of_the_bare_file(here, kind):
    state, expected = KINDS[kind](here)
    head = HEAD_OF.get(kind, "head")
    for seed in range(15):
        torch.save(composed(state, head, random.Random(f"{kind} {seed}")), "w.pth")
        size = (32, 32) if kind != "huggingface" else None
        heads = {"num_heads": 3} if kind != "bit" else {}
        model = load_model("w.pth", image_size=size, **heads)
        assert torch.allclose(model(IMAGES), expected, atol=1e-5), seed


@pytest.fixture
def net():
    return tiny()


def prefixed(prefix: str, state: dict, factor: float = 1.0) -> dict:
    return {prefix + name: tensor * factor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("value", "key", "factor"),
    [
        (lambda s: {"model": s, "model_ema": prefixed("module.", s, 2)}, None, 2),
        (lambda s: {"model": s, "model_ema": prefixed("module.", s, 2)}, "model", 1),
        (lambda s: {"model": s, "model_ema": prefixed("module.", s, 2)}, "model_ema", 2),
        (lambda s: {"model": s, "model_ema": prefixed("module.", s, 2)}, "model_ema.module.", 2),
        (lambda s: prefixed("student.", s) | prefixed("teacher.", s, 2), None, 2),
        (lambda s: prefixed("student.", s) | prefixed("teacher.", s, 2), "student", 1),
        (lambda s: prefixed("encoder.", s) | prefixed("target_encoder.", s, 2), None, 2),
        (lambda s: prefixed("base_encoder.", s) | prefixed("momentum_encoder.", s, 2), None, 1),
        (lambda s: s | prefixed("ema.", s, 2), None, 2),
        (lambda s: s | prefixed("ema.", s, 2), "", 1),
        (lambda s: {"a": s, "b": prefixed("", s, 2)}, "b", 2),
        (lambda s: [s, prefixed("", s, 2)], "1", 2),
    ],
)
def test_of_several_networks_the_averaged_one_or_the_chosen_one_is_loaded(
    here, net, value, key, factor
):
    torch.save(value(net.state_dict()), "w.pth")
    back = load_model("w.pth", num_heads=3, checkpoint_key=key)
    assert torch.equal(back.network.pos_embed, net.network.pos_embed * factor)
    chosen = [note for note in back.load_report.notes if "loaded the weights under" in note]
    assert len(chosen) == (key is None)
    assert all("`--set model.checkpoint_key=" in note for note in chosen)


@pytest.mark.parametrize(
    ("value", "key", "words", "hint"),
    [
        (lambda s: {"a": s, "b": dict(s)}, None, "2 networks, under `a.` and `b.`", "key=a`"),
        (lambda s: prefixed("student.", s) | prefixed("teacher.", tiny(depth=1).state_dict()), None,
         "networks of different sizes, under `student.` and `teacher.`", "key=student`"),
        (lambda s: {"a": s, "b": dict(s)}, "c", "no network fits", "one of these paths"),
        (lambda s: {"x": {"a": s, "b": dict(s)}}, "x", "several networks fit", "one of these"),
        (lambda s: s, "model", "has one network without a prefix", "remove"),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen_is_an_error_that_names_the_networks(
    here, net, value, key, words, hint
):
    torch.save(value(net.state_dict()), "w.pth")
    with pytest.raises(VitcliError) as error:
        load_model("w.pth", num_heads=3, checkpoint_key=key)
    assert words in error.value.message and hint in error.value.hint


def test_a_batch_norm_before_the_head_becomes_part_of_it(here, net):
    """The linear probes of MAE are a BatchNorm without parameters and a linear layer."""
    state = net.state_dict()
    for affine in (False, True):
        norm = torch.nn.BatchNorm1d(48, eps=BATCH_NORM_EPS, affine=affine)
        for p in [*norm.parameters(), norm.running_mean, norm.running_var]:
            torch.nn.init.uniform_(p, 0.5, 2.0)
        head = torch.nn.Sequential(norm, torch.nn.Linear(48, 5)).eval()
        bare = {n: t for n, t in state.items() if not n.startswith("head.")}
        torch.save({"model": bare | prefixed("head.", head.state_dict())}, "w.pth")
        back = load_model("w.pth", num_heads=3)
        with torch.no_grad():
            expected = head(net.features(IMAGES))
            assert torch.allclose(back(IMAGES), expected, atol=1e-5)
        assert any("with the BatchNorm before it" in note for note in back.load_report.notes)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"fc.0.weight": (7, 48), "fc.2.weight": (5, 7)}, "`fc` is more than one linear layer"),
        ({"head.0.weight": (48,), "head.1.weight": (5, 48)}, "`head` is more than one"),
        ({"fc.weight": (5, 48), "classifier.weight": (5, 48)}, "several heads, `fc` and `class"),
    ],
)
def test_a_head_that_does_not_fit_is_left_out_with_a_note(here, net, extra, words):
    state = {n: t for n, t in net.state_dict().items() if not n.startswith("head.")}
    torch.save(state | {name: torch.ones(shape) for name, shape in extra.items()}, "w.pth")
    back = load_model("w.pth", num_heads=3)
    assert back.config.num_classes == 0 and not back.head_trained
    assert any(words in note for note in back.load_report.notes)
    assert all(back.load_report.status[name][0] == "dropped" for name in extra)


def test_an_attention_pool_is_no_head(here, net):
    state = {n: t for n, t in net.state_dict().items() if not n.startswith("head.")}
    shapes = {"head.attention.in_proj_weight": (144, 48), "head.mlp_2.weight": (48, 48)}
    torch.save(state | {name: torch.ones(shape) for name, shape in shapes.items()}, "w.pth")
    with pytest.raises(VitcliError, match=r"not part of the model: `head\.attention"):
        load_model("w.pth", num_heads=3)


def test_tensors_beside_the_network_are_reported_with_their_reason(here, net):
    reasons = {
        "criterion.pos_weight": "belongs to the loss",
        "val_accuracy.tp": "belongs to a metric",
        "normalize.mean": "normalises the images",
        "other.weight": "outside `model.`",
    }
    state = prefixed("model.", net.state_dict()) | {n: torch.ones(3) for n in reasons}
    torch.save({"state_dict": state}, "w.pth")
    status = load_model("w.pth", num_heads=3).load_report.status
    assert {n: status[n] for n in reasons} == {n: ("dropped", why) for n, why in reasons.items()}


def test_the_values_of_a_normalisation_in_front_of_the_network_are_named(here, net):
    values = {"normalize.mean": torch.tensor([0.4, 0.5, 0.6]).reshape(1, 3, 1, 1)}
    torch.save(prefixed("net.", net.state_dict()) | values, "w.pth")
    notes = load_model("w.pth", num_heads=3).load_report.notes
    assert any("`normalize.mean` [0.4, 0.5, 0.6]" in n and "`preprocess.mean`" in n for n in notes)


def test_a_key_where_there_is_no_choice_is_an_error(here, net):
    with pytest.raises(VitcliError, match="has random weights"):
        load_model("Pico/8", checkpoint_key="model")
