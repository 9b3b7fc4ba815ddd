"""The traced memory of a step: against a real pass, and against arithmetic."""

import pytest
import torch
from support.tiny import tiny_recipe

from vitcli.config.recipe import check
from vitcli.config.schema import Recipe
from vitcli.cost.memory import ForwardMemory, StepShape, evaluation_memory, step_memory
from vitcli.preprocess import Preprocess
from vitcli.train.lora import freeze_and_adapt
from vitcli.train.objectives import build_objective
from vitcli.vit import create_network, from_config, parse_variant
from vitcli.weights.loaded import LoadedModel

SIZE = (3, 32, 32)


def objective(recipe, device="meta", **settings):
    settings = {"image_size": (32, 32), "num_classes": 10, "depth": 3, **settings}
    with torch.device(device):
        network = from_config(parse_variant("Pico/4", **settings))
        freeze_and_adapt(network, recipe.lora, recipe.train.freeze, 0)
    preprocess = Preprocess(image_size=(32, 32), mean=(0.5,), std=(0.5,))
    model = LoadedModel(network, preprocess=preprocess)
    return build_objective(model, recipe.objective, 0)


def traced(recipe, fake=True, **step):
    step = StepShape(SIZE, **{"batch": 6, "micro_batch": 6, "precision": "fp32", **step})
    return step_memory(lambda: objective(recipe), recipe, step, fake=fake)


# Bytes beside each parameter that learns, but for a step counter or two.
STATES = [
    ({"name": "adamw"}, 8.0),
    ({"name": "sgd"}, 4.0),
    ({"name": "sgd", "momentum_dtype": "bf16"}, 2.0),
    ({"name": "sgd", "momentum": 0.0}, 0.0),
    ({"name": "lion"}, 4.0),
    ({"name": "lamb"}, 8.0),
]


@pytest.mark.parametrize(("optim", "each"), STATES)
def test_weights_gradients_and_states(optim, each):
    recipe = tiny_recipe(optim=optim, train={"ema_decay": 0.9})
    found = traced(recipe)
    count = sum(p.numel() for p in objective(recipe).parameters())
    assert found.weights == found.gradients == found.average == 4 * count
    assert found.optimizer == pytest.approx(each * count, abs=8 * 100)
    assert found.peak > found.weights + found.optimizer + found.activations


def test_muon_keeps_one_number_of_a_matrix_and_two_of_the_rest():
    recipe = tiny_recipe(optim={"name": "muon"})
    named = dict(objective(recipe).named_parameters())
    matrices = sum(p.numel() for n, p in named.items() if ".blocks." in n and p.ndim == 2)
    count = sum(p.numel() for p in named.values())
    wanted = 4 * matrices + 8 * (count - matrices)
    assert traced(recipe).optimizer == pytest.approx(wanted, abs=800)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(precision, checkpointing):
    """Counted in a real pass by autograd's own hooks."""
    recipe = tiny_recipe(optim={"name": "adamw"})
    real = objective(recipe, "cpu").train()
    real.model.init_weights()
    real.model.checkpoint_activations = checkpointing
    own = {p.untyped_storage().data_ptr() for p in real.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    images, labels = torch.randn(6, *SIZE), torch.zeros(6, dtype=torch.long)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        real(images, labels)
    kept = sum(size for size, _ in seen.values())
    found = traced(recipe, precision=precision, checkpointing=checkpointing).activations
    if checkpointing:
        # What a block is given is held by the block's call, not by a saved tensor.
        assert found < traced(recipe, precision=precision).activations / 4
    else:
        assert found == pytest.approx(kept, rel=0.05)


def test_tensors_without_content_take_as_much_as_real_ones():
    recipe = tiny_recipe(train={"ema_decay": 0.9}, optim={"name": "muon", "grad_clip": 1.0})
    fake, real = traced(recipe, micro_batch=4), traced(recipe, micro_batch=4, fake=False)
    assert fake.optimizer == real.optimizer and fake.activations == real.activations
    assert fake.peak == pytest.approx(real.peak, rel=0.02)


def test_smaller_parts_and_fewer_patches_take_less():
    recipe = tiny_recipe(optim={"name": "adamw"})
    whole = traced(recipe)
    assert traced(recipe, micro_batch=2).activations < whole.activations / 2.5
    assert traced(recipe, patch_drop_rate=0.5).activations < 0.65 * whole.activations
    assert traced(recipe, side=16).activations < 0.4 * whole.activations


def test_adapters_have_gradients_alone():
    settings = {**tiny_recipe().model_dump(mode="json", exclude_none=True), "command": "finetune"}
    settings |= {"lora": {"rank": 2}, "optim": {"name": "adamw"}}
    recipe = check(Recipe, settings, "tiny")
    found = traced(recipe)
    learning = sum(p.numel() for p in objective(recipe).parameters() if p.requires_grad)
    assert found.gradients == 4 * learning < found.weights / 10


def test_an_evaluation_needs_little_beside_the_weights():
    model = create_network("Pico/4", image_size=32, num_classes=10, depth=3)
    few, many = (evaluation_memory(from_config(model.config), SIZE, n) for n in (2, 8))
    assert 0 < few.peak < many.peak < 8 * 2**20
    assert many.large == 0
    whole = evaluation_memory(from_config(model.config), SIZE, 2048)
    assert whole.peak == pytest.approx(256 * many.peak, rel=0.05)
    assert 0.8 * whole.peak < whole.large <= whole.peak


def test_an_evaluation_adds_to_what_the_steps_left():
    """Gradients are still there, and a copy of the weights that the average replaces."""
    step = traced(tiny_recipe(optim={"name": "adamw"}, train={"ema_decay": 0.9}))
    nothing, large = ForwardMemory(), ForwardMemory(10**9, 10**9)
    assert step.cpu_evaluation_peak(nothing) == 0
    assert step.cpu_evaluation_peak(ForwardMemory(1, 0)) <= step.cpu_peak + 2
    # Large blocks are unmapped when they are freed: no holes are left beside them.
    first, second = (step.cpu_evaluation_peak(ForwardMemory(n, n)) for n in (10**9, 2 * 10**9))
    assert second - first == 10**9
    assert step.cpu_evaluation_peak(ForwardMemory(10**9, 0)) > first + 10**8
    kept = step.weights + step.gradients + step.optimizer + 2 * step.average
    assert step.evaluation_peak(large) == kept + 10**9


@pytest.mark.parametrize("name", ["mae", "masked_patch"])
def test_objectives_with_masks_are_traced_without_content(name):
    """No shape depends on the content of a mask, so the trace is nearly what a real step needs."""
    recipe = tiny_recipe(objective={"name": name}, optim={"name": "adamw"})
    found, real = traced(recipe), traced(recipe, fake=False)
    assert found.activations == pytest.approx(real.activations, rel=0.02)
    assert found.peak == pytest.approx(real.peak, rel=0.02)


def test_a_process_on_a_cpu_needs_more_than_its_tensors():
    recipe = tiny_recipe(optim={"name": "adamw"})
    plain, checkpointed = traced(recipe), traced(recipe, checkpointing=True)
    assert plain.cpu_peak > 1.1 * plain.peak
    # Checkpointing saves tensors, and leaves more holes between them.
    assert checkpointed.peak < plain.peak
    assert checkpointed.cpu_peak / checkpointed.peak > plain.cpu_peak / plain.peak
