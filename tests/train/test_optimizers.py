"""Optimizers and schedules against the official implementations."""

import json
import math
import re
import tomllib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.kinds import KINDS, small
from support.stepping import compare
from support.tiny import records, tiny_recipe, train_recipe

from vitcli.config.recipe import check
from vitcli.config.schema import OptimSection, Recipe, ScheduleSection
from vitcli.errors import VitcliError
from vitcli.train.build import check_names, unused_settings
from vitcli.train.loop import Loop
from vitcli.train.optimizers import OPTIMIZERS, JointOptimizer, Sgd, build_optimizers
from vitcli.train.param_groups import is_hidden_matrix, is_kernel, set_lr
from vitcli.train.schedules import SCHEDULES, schedule_factor
from vitcli.train.signals import Stopped
from vitcli.vit import create_network
from vitcli.weights.load import load_model


def run_reference(folder, section, schedule, clip, tmp_path, final, loss_tolerance=2e-5):
    """Repeat the recorded steps with our model and optimizer; the largest differences."""
    config = json.loads((folder / "config.json").read_text())
    arrays = np.load(folder / "steps.npz")
    models = {}
    for part in ("init", final):
        tensors = {
            n.removeprefix(f"{part}/"): arrays[n] for n in arrays.files if n.startswith(f"{part}/")
        }
        np.savez(tmp_path / f"{part.replace('/', '_')}.npz", **tensors)
        models[part] = load_model(
            tmp_path / f"{part.replace('/', '_')}.npz", num_heads=2, image_size=16
        )
    model = models["init"].network.train()
    optimizers = build_optimizers(model, section)
    images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2)
    labels = torch.from_numpy(arrays["labels"]).long()
    losses = []
    total = config.get("total_steps") or config["schedule"]["total_steps"]
    for step in range(config["steps"]):
        part = slice(step * config["batch"], (step + 1) * config["batch"])
        set_lr(optimizers, schedule_factor(schedule, step, total))
        loss = F.cross_entropy(model(images[part]), labels[part])
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    expected = config["loss"]
    assert losses == pytest.approx(expected, abs=loss_tolerance)
    return model.state_dict(), models[final].state_dict()


def without_key_bias(name, tensor):
    """The gradient of the key's bias is exactly zero; Adam makes steps of its rounding noise."""
    if not name.endswith("qkv.bias"):
        return tensor
    q, _, v = tensor.chunk(3)
    return torch.cat([q, v])


def test_sgd_makes_the_official_steps(shared, tmp_path):
    ours, theirs = run_reference(
        shared / "reference/train_steps/vit_jax_sgd",
        OptimSection(name="sgd", lr=0.05, momentum=0.9),
        ScheduleSection(name="cosine", warmup_steps=2),
        1.0,
        tmp_path,
        "f32mom/final",
    )
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-5)


def test_sgd_with_half_the_momentum_makes_the_official_steps(shared, tmp_path):
    """In bf16 their sums round otherwise than ours: 1e-4 apart; their README allows 5e-4."""
    ours, theirs = run_reference(
        shared / "reference/train_steps/vit_jax_sgd",
        OptimSection(name="sgd", lr=0.05, momentum=0.9, momentum_dtype="bf16"),
        ScheduleSection(name="cosine", warmup_steps=2),
        1.0,
        tmp_path,
        "bf16mom/final",
        loss_tolerance=5e-4,
    )
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=5e-4)


def test_adamw_makes_big_visions_steps(shared, tmp_path):
    # big_vision multiplies its weight decay by the schedule only: ours is theirs over the rate.
    ours, theirs = run_reference(
        shared / "reference/train_steps/big_vision_adam_softmax",
        OptimSection(name="adamw", lr=0.01, weight_decay=0.5, betas=(0.9, 0.999)),
        ScheduleSection(name="cosine", warmup_steps=2),
        1.0,
        tmp_path,
        "final",
    )
    for name in ours:
        if name != "pos_embed":  # fixed
            a, b = (without_key_bias(name, s[name]) for s in (ours, theirs))
            torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_parameter_has_one_optimizer_and_only_kernels_decay(name):
    model = create_network("Pico/8", image_size=32, num_classes=5, pool="map", num_registers=2)
    optimizers = build_optimizers(model, OptimSection(name=name, weight_decay=0.1))
    names = {id(p): n for n, p in model.named_parameters()}
    seen = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            assert group["base_lr"] == group["lr"]
            for p in group["params"]:
                seen.append(names[id(p)])
                assert (group["weight_decay"] > 0) == is_kernel(names[id(p)], p)
    assert sorted(seen) == sorted(names.values())
    decays = {n for n, p in model.named_parameters() if is_kernel(n, p)}
    assert not decays & {"cls_token", "pos_embed", "reg_token", "attn_pool.latent"}
    assert {"head.weight", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= decays


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_optimizer_decays_apart_from_the_gradient(name, dtype):
    """Without a gradient a step is w -= lr * decay * w, and it leaves no trace in the momentum."""
    if dtype == "bf16" and "momentum_dtype" not in OPTIMIZERS[name].settings:
        pytest.skip("it has no setting of the momentum's type")
    layer = torch.nn.Linear(8, 8, bias=False)
    head = torch.nn.Linear(8, 2)  # without gradients; Muon leaves it to AdamW
    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([layer]), "head": head})
    section = OptimSection(name=name, lr=0.1, matrix_lr=0.1, weight_decay=0.5, momentum_dtype=dtype)
    optimizers = build_optimizers(model, section)
    expected = layer.weight.detach().clone()
    for _ in range(3):
        layer.weight.grad = torch.zeros_like(layer.weight)
        for optimizer in optimizers:
            optimizer.step()
        expected *= 1 - 0.1 * 0.5
    if (
        name == "lamb"
    ):  # it scales the whole step, decay included, by |w| / |decay * w| (algorithm 2)
        return
    torch.testing.assert_close(layer.weight.detach(), expected)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.5}  # as before the steps


def test_sgd_with_decay_follows_the_algorithm():
    """SGDW (Loshchilov and Hutter, 2019, algorithm 1), where the schedule scales both parts."""

    def by_hand(w, gradients, decay, rates):
        buffer = np.zeros_like(w)
        for g, lr in zip(gradients, rates, strict=True):
            buffer = 0.9 * buffer + g
            w = w - lr * decay * w - lr * buffer
        return w

    compare(lambda groups: Sgd(groups, lr=1.0, momentum=0.9), by_hand, atol=1e-5)


def test_lion_has_the_betas_of_its_authors():
    assert OptimSection(name="lion").betas == (0.9, 0.99)
    assert OptimSection(name="lion", betas=(0.95, 0.98)).betas == (0.95, 0.98)
    assert OptimSection(name="adamw").betas == OptimSection(name="lamb").betas == (0.9, 0.999)
    stated = tiny_recipe(optim={"name": "lion"})
    assert stated.optim.betas == (0.9, 0.99)
    assert check(Recipe, tomllib.loads(stated.to_toml()), "again") == stated


def test_muon_has_the_matrices_of_the_blocks_only():
    model = create_network("Pico/8", image_size=32, num_classes=5)
    hidden = {n for n, p in model.named_parameters() if is_hidden_matrix(n, p)}
    assert len(hidden) == 6 * 4
    assert all(n.startswith("blocks.") and n.endswith(".weight") for n in hidden)


@pytest.mark.parametrize("name", KINDS)
def test_tables_and_tokens_are_no_kernels_in_any_kind_of_model(name):
    """Kernels end in `weight`, and Muon's lie in the blocks and the stages of a conv stem."""
    model = small(name)
    named = list(model.named_parameters())
    kernels = {n for n, p in named if is_kernel(n, p)}
    assert kernels == {n for n, p in named if n.endswith(".weight") and p.ndim > 1}
    hidden = {n for n, p in named if is_hidden_matrix(n, p)}
    assert hidden == {n for n in kernels if n.startswith(("blocks.", "patch_embed.stages."))}


def test_layers_have_their_rates():
    """As MAE fine-tunes: the head's is whole, the embedding's is decayed most."""
    model = create_network("Pico/8", image_size=32, num_classes=5, num_registers=1)
    depth = model.config.depth
    names = {id(p): n for n, p in model.named_parameters()}
    for kind in ("adamw", "muon"):
        found = {}
        for optimizer in build_optimizers(model, OptimSection(name=kind, layer_decay=0.75)):
            full = 0.02 if isinstance(optimizer, torch.optim.Muon) else 1e-3
            for group in optimizer.param_groups:
                assert group["base_lr"] == group["lr"]
                found |= {names[id(p)]: group["lr"] / full for p in group["params"]}
        assert found["head.weight"] == found["norm.weight"] == 1.0
        for i in range(depth):
            for part in ("attn.qkv.weight", "norm1.bias"):
                assert found[f"blocks.{i}.{part}"] == pytest.approx(0.75 ** (depth - i))
        for name in ("patch_embed.proj.weight", "cls_token", "pos_embed", "reg_token"):
            assert found[name] == pytest.approx(0.75 ** (depth + 1))


class OwnBlocks(torch.nn.Module):
    """An objective whose head has blocks too, which are no encoder layers."""

    encoder_prefix = "model."

    def __init__(self, network):
        super().__init__()
        self.model = network
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
        self.other_model = torch.nn.Linear(4, 4)


def test_only_parameters_of_the_network_are_encoder_layers():
    network = create_network("Pico/8", image_size=32, num_classes=5)
    objective = OwnBlocks(network)
    own = [p for part in (objective.blocks, objective.other_model) for p in part.parameters()]
    optimizers = build_optimizers(objective, OptimSection(name="muon", layer_decay=0.5))
    rates = {id(p): g["lr"] for o in optimizers for g in o.param_groups for p in g["params"]}
    assert {rates[id(p)] for p in own} == {1e-3}  # AdamW's whole rate, as the head's
    assert rates[id(network.blocks[5].norm1.weight)] == pytest.approx(0.5 * 1e-3)


def test_rates_by_layer_need_layers():
    with pytest.raises(VitcliError, match="needs trainable ViT blocks"):
        resnet = create_network("R50x1", image_size=32, num_classes=3)
        build_optimizers(resnet, OptimSection(layer_decay=0.5))


@pytest.mark.parametrize(("scaling", "factor"), [("linear", 0.25), ("sqrt", 0.5)])
def test_rates_follow_the_batch(scaling, factor):
    section = OptimSection(lr=1e-3, lr_batch_size=1024, lr_scaling=scaling)
    assert section.rate_factor(256) == factor
    assert OptimSection().rate_factor(256) == 1.0


def test_bf16_momentum_is_for_sgd():
    recipe = tiny_recipe(optim={"name": "adamw", "momentum_dtype": "bf16"})
    with pytest.raises(VitcliError, match=r"`optim\.momentum_dtype` is for `sgd`"):
        check_names(recipe)


@pytest.mark.parametrize(
    ("table", "name", "words"),
    [
        ("optim", "adam", r"did you mean `adamw`\? Available: `adamw`, `sgd`"),
        ("schedule", "cosin", r"did you mean `cosine`\? Available: `linear`"),
        ("objective", "softmx", r"did you mean `softmax`\? Available: `auto`"),
    ],
)
def test_unknown_names_give_the_nearest_one_and_the_list(table, name, words):
    with pytest.raises(VitcliError, match=f"`{name}`") as caught:
        check_names(tiny_recipe(**{table: {"name": name}}))
    assert re.search(words, caught.value.hint)


SETTINGS = [
    {"name": "lion", "betas": (0.9, 0.99), "lr": 1e-4},
    {"name": "lamb"},
    {"name": "adafactor"},
    {"name": "adamw", "layer_decay": 0.7},
    {"name": "sgd", "momentum_dtype": "bf16", "lr": 0.05},
    {"name": "sgd", "lr_batch_size": 128, "lr": 0.05},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_a_resumed_run_is_exact_with_each(tmp_path, settings):
    check_resume(tmp_path, optim=settings, model={"embed_dim": 64})
    if "lr_batch_size" in settings:
        rates = [r["lr"] for r in records(tmp_path / "whole") if "lr" in r]
        assert max(rates) == pytest.approx(0.05 / 4, rel=0.2)


def test_a_resumed_run_is_exact_with_a_convolutional_stem(tmp_path):
    """Muon trains its kernels; the run begins with smaller images."""
    stem = {"name": "Conv+Pico/2", "image_size": 8, "conv_stem": (8,)}
    check_resume(tmp_path, model=stem, train={"smaller_sizes": ((4, 0.7),)})


def check_resume(tmp_path, train=None, **sections):
    """Assert that 6 steps equal 3, a stop, a resume and 3 more, bit for bit."""
    recipe = tiny_recipe(train={"steps": 6, "eval_steps": 6, **(train or {})}, **sections)

    def go(name, resume=False):
        train_recipe(tmp_path / name, recipe, resume)

    go("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_stop_request", lambda run, _: 15 if run.state.step == 3 else None)
        with pytest.raises(Stopped):
            go("parts")
    go("parts", resume=True)
    a, b = (tmp_path / n / "model.safetensors" for n in ("whole", "parts"))
    assert a.read_bytes() == b.read_bytes()


def test_settings_of_another_optimizer_or_schedule_are_named():
    def notes(**sections):
        return unused_settings(tiny_recipe(**sections), multi_label=False)

    muon = {"matrix_lr": 0.1, "momentum": 0.95, "betas": (0.9, 0.95)}
    assert notes(optim={"name": "muon", **muon}) == []
    schedule = {"name": "constant", "final_lr_fraction": 0.1}
    assert notes(optim={"name": "lamb", **muon}, schedule=schedule) == [
        "optimizer `lamb` does not use `optim.matrix_lr`, `optim.momentum`",
        "schedule `constant` does not use `schedule.final_lr_fraction`",
    ]


@pytest.mark.parametrize(
    ("registry", "section"), [(OPTIMIZERS, OptimSection), (SCHEDULES, ScheduleSection)]
)
def test_the_settings_of_each_entry_are_keys_of_its_table(registry, section):
    for entry in registry.values():
        assert entry.settings <= section.model_fields.keys()


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("overflow", [None, "head.weight", "blocks.0.mlp.fc1.weight"])
def test_two_optimizers_share_one_decision_of_the_fp16_scaler(clip, overflow):
    """Scaled gradients give the step of unscaled ones; an overflow skips both optimizers."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    section = OptimSection(name="muon", lr=0.01, matrix_lr=0.02, weight_decay=0.1)
    Accelerator(cpu=True)  # the state that an AcceleratedOptimizer asks for

    def step(scale):
        network = small("plain").train()
        before = {name: p.detach().clone() for name, p in network.named_parameters()}
        optimizers = build_optimizers(network, section)
        assert len(optimizers) == 2
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scale else None
        joint = AcceleratedOptimizer(JointOptimizer(optimizers), scaler=scaler)
        generator = torch.Generator().manual_seed(0)
        for p in network.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        if scaler is not None:
            scaler.scale(torch.ones(()))  # creates its tensors
            for name, p in network.named_parameters():
                p.grad *= 1024.0
                if name == overflow:
                    p.grad.view(-1)[0] = math.inf
            if clip is not None:  # as `Accelerator.clip_grad_norm_` does
                scaler.unscale_(joint.optimizer)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
        joint.step()
        return before, dict(network.named_parameters())

    before, scaled = step(scale=True)
    expected = before if overflow else step(scale=False)[1]
    for name, value in scaled.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)
