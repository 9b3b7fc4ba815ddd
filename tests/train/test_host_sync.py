"""The loop does not wait for the GPU: its steps run on a device whose numbers cannot be read.

Tensors on torch's `meta` device have no content. `.item()`, `.cpu()`, `nonzero` and a boolean index
fail there, and these are the calls that make the host wait for a GPU. A tensor that was left on the
CPU fails too, as it would on a GPU.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from support.tiny import tiny_recipe

from vitcli.progress import Quiet
from vitcli.run import Run
from vitcli.train import optimizers
from vitcli.train.build import build_loop, open_source, start_accelerator
from vitcli.train.ema import Ema
from vitcli.train.optimizers import OPTIMIZERS, JointOptimizer, build_optimizers
from vitcli.train.resolve import random_model
from vitcli.train.signals import SignalFlag
from vitcli.vit import create_network
from vitcli.weights.loaded import LoadedModel
from vitcli.weights.store import save_model

GPU = torch.device("meta")
STEPS = 1  # and one more, with the optimizer's state of the first


def on_gpu(recipe, folder, monkeypatch):
    """The loop of a recipe, with its weights and batches on the device without content."""
    accelerator, _ = start_accelerator(recipe, precision="fp32")
    source = open_source(recipe, Quiet())
    loop = build_loop(
        recipe, source, lambda s: random_model(recipe, s), Run(folder), accelerator, Quiet()
    )
    autocast = torch.autocast  # torch has none for this device
    monkeypatch.setattr(
        torch,
        "autocast",
        lambda kind, *a, **k: autocast("cpu" if kind == "meta" else kind, *a, **k),
    )
    objective = loop.state.objective
    objective._apply(lambda tensor: torch.empty_like(tensor, device=GPU))
    for kind in ("AdamW", "SGD"):  # the fused kernels are for devices with numbers
        make = getattr(torch.optim, kind)
        monkeypatch.setattr(
            optimizers.torch.optim,
            kind,
            lambda *a, _make=make, **k: _make(*a, **{**k, "fused": False}),
        )
    loop.state.optimizers = build_optimizers(objective, recipe.optim)
    loop.state.ema = Ema(objective, 0.9)
    loop.wrapped, loop.wrapped_optimizer = objective, JointOptimizer(loop.state.optimizers)
    loop.accelerator = SimpleNamespace(
        device=GPU,
        num_processes=1,
        process_index=0,
        is_main_process=True,
        no_sync=lambda module: nullcontext(),
        backward=lambda loss: loss.backward(),
        clip_grad_norm_=torch.nn.utils.clip_grad_norm_,
        reduce=lambda tensor, reduction: tensor,
    )
    loop.timeline.planned = loop.timeline.total = STEPS + 1
    return loop


def make_steps(loop):
    signals = SignalFlag()
    for batch in loop._batches():
        assert batch.images.device == GPU
        lr = loop._set_lr()
        loop._count_step(loop.step(batch), lr)
        assert loop._decide(signals).is_last == (loop.state.step > STEPS)


@pytest.fixture
def host_copies(monkeypatch):
    """The calls that copy numbers of Python to the device, which waits for all of its work."""
    found, real = [], torch.tensor

    def tensor(data, *arguments, device=None, **words):
        if device is not None and torch.device(device) == GPU:
            found.append(data)
        return real(data, *arguments, device=device, **words)

    monkeypatch.setattr(torch, "tensor", tensor)
    return found


MIXED = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mix_rate": 1.0}
QUIET = {"log_steps": 50, "checkpoint_steps": 50, "eval_steps": 50}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_waits(name, tmp_path, monkeypatch, host_copies):
    recipe = tiny_recipe(
        train=QUIET, optim={"name": name, "weight_decay": 0.1, "grad_clip": 1.0, "momentum": 0.9}
    )
    make_steps(on_gpu(recipe, tmp_path, monkeypatch))
    assert not host_copies


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    from vitcli.preprocess import Preprocess

    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    network = create_network("mu/4", image_size=8, num_classes=10)
    labels = tuple(str(digit) for digit in range(10))
    save_model(
        path,
        LoadedModel(network, labels, Preprocess((8, 8), mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.1))),
    )
    return str(path)


OBJECTIVES = {
    "softmax": {},
    "sigmoid": {},
    "softmax weighted": {"class_weights": "balanced", "focal_gamma": 2.0},
    "softmax adjusted": {"logit_adjustment": 1.0},
    "mae rope": {"decoder_dim": 16, "decoder_heads": 2, "decoder_depth": 1},
    "mae": {"decoder_dim": 16, "decoder_heads": 2, "decoder_depth": 1, "norm_pixels": True},
    "masked_patch mean_color": {"target": "mean_color"},
    "masked_patch pixels": {"target": "pixels"},
    "masked_patch small_patch": {"target": "small_patch"},
    "descriptors": {},
    "guided": {},
    "distill": {},
}


@pytest.mark.parametrize("words", OBJECTIVES)
def test_no_objective_waits(words, tmp_path, monkeypatch, host_copies, teacher):
    name, settings = words.split()[0], OBJECTIVES[words]
    if name == "distill":
        settings = {"teacher": teacher}
    takes_shares = name in ("softmax", "sigmoid", "guided", "distill")
    quadrants = {"pool": "quadrants", "image_size": 16}
    rotary = {"position": "none", "rope": "centred"}
    recipe = tiny_recipe(
        train={**QUIET, "micro_batch_size": 12},
        objective={"name": name, **settings},
        model=quadrants if name in ("descriptors", "guided") else rotary if "rope" in words else {},
        augment=MIXED if takes_shares else {},
    )
    make_steps(on_gpu(recipe, tmp_path, monkeypatch))
    assert not host_copies


def test_progressive_sizes_and_dropped_patches_do_not_wait(tmp_path, monkeypatch, host_copies):
    train = {**QUIET, "smaller_sizes": [[4, 0.5]], "patch_drop_rate": 0.5}
    make_steps(on_gpu(tiny_recipe(train=train), tmp_path, monkeypatch))
    assert not host_copies
