"""Optimizers and schedules against the official implementations."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kinds import KINDS, small

from vitcli.config import OptimSection, ScheduleSection
from vitcli.train.optim import (
    OPTIMIZERS,
    build_optimizers,
    is_hidden_matrix,
    is_kernel,
    schedule_factor,
    set_rates,
    warmup_steps,
)
from vitcli.vit import create_model
from vitcli.weights.load import load_model

SCHEDULED = ("cosine", "linear")


def test_schedules_equal_the_official_ones(shared):
    entries = json.loads((shared / "reference/schedules/schedules.json").read_text())
    compared = 0
    for family, default_end in (("vit_jax", 1e-5), ("big_vision", 0.0)):
        for entry in entries[family]:
            kwargs = entry["kwargs"]
            if kwargs["decay_type"] not in SCHEDULED:
                continue
            base = kwargs["base"]
            end = kwargs.get("linear_end", default_end) if kwargs["decay_type"] == "linear" else 0.0
            section = ScheduleSection(
                name=kwargs["decay_type"],
                warmup_steps=kwargs["warmup_steps"],
                final_lr_fraction=end / base,
            )
            for step, expected in zip(entry["steps"], entry["lr_float64"], strict=True):
                got = base * schedule_factor(section, step, kwargs["total_steps"])
                assert got == pytest.approx(expected, abs=1e-6 * base)
                compared += 1
    assert compared == 67


def test_wsd_is_stable_and_then_decays():
    section = ScheduleSection(
        name="wsd", warmup_fraction=0.1, decay_fraction=0.25, final_lr_fraction=0.2
    )
    factors = [schedule_factor(section, step, 100) for step in range(101)]
    assert factors[0] == 0 and factors[5] == pytest.approx(0.5)
    assert factors[10:78] == [1.0] * 68
    assert factors[100] == pytest.approx(0.2)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_warmup_in_steps_or_as_a_share():
    assert warmup_steps(ScheduleSection(warmup_steps=30), 20) == 20
    assert warmup_steps(ScheduleSection(warmup_fraction=0.1), 95) == 10
    assert warmup_steps(ScheduleSection(), 95) == 0


def run_reference(folder, section, schedule, clip, tmp_path, final):
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
    model = models["init"].train()
    optimizers = build_optimizers(model, section)
    images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2)
    labels = torch.from_numpy(arrays["labels"]).long()
    losses = []
    total = config.get("total_steps") or config["schedule"]["total_steps"]
    for step in range(config["steps"]):
        part = slice(step * config["batch"], (step + 1) * config["batch"])
        set_rates(optimizers, schedule_factor(schedule, step, total))
        loss = F.cross_entropy(model(images[part]), labels[part])
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    expected = config["loss"]
    assert losses == pytest.approx(expected, abs=2e-5)
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
    model = create_model("Pico/8", image_size=32, num_classes=5, pool="map", num_registers=2)
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


def test_muon_has_the_matrices_of_the_blocks_only():
    model = create_model("Pico/8", image_size=32, num_classes=5)
    hidden = {n for n, p in model.named_parameters() if is_hidden_matrix(n, p)}
    assert len(hidden) == 6 * 4
    assert all(n.startswith("blocks.") and n.endswith(".weight") for n in hidden)


@pytest.mark.parametrize("name", KINDS)
def test_tables_and_tokens_are_no_kernels_in_any_kind_of_model(name):
    """Whatever the kind: kernels end in `weight`, and Muon's lie in blocks of the encoder."""
    model = small(name)
    named = list(model.named_parameters())
    kernels = {n for n, p in named if is_kernel(n, p)}
    assert kernels == {n for n, p in named if n.endswith(".weight") and p.ndim > 1}
    hidden = {n for n, p in named if is_hidden_matrix(n, p)}
    assert hidden == {n for n in kernels if n.startswith("blocks.")}
