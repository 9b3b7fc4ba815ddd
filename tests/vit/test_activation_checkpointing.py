"""Activation checkpointing: the same numbers from less memory."""

import pytest
import torch
from support.kinds import pictures, small


class Stored:
    """Counts the bytes that autograd keeps for the backward pass, each storage once."""

    def __init__(self, model):
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.kept = {}

    def __enter__(self):
        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.own:
                self.kept[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *exc):
        self.hooks.__exit__(*exc)

    @property
    def bytes(self):
        return sum(size for size, _ in self.kept.values())


@pytest.mark.parametrize(
    "name", ["plain", "all of today", "learned2d, every", "rope, DINOv3", "axial", "hybrid"]
)
def test_recomputed_activations_give_the_same_gradients_from_less_memory(name):
    found = {}
    for again in (False, True):
        model = small(name, depth=6, dropout_rate=0.2, drop_path_rate=0.3).train()
        model.checkpoint_activations = again
        torch.manual_seed(3)
        with Stored(model) as stored:
            loss = model(pictures(model, number=4)).square().sum()
        loss.backward()
        after = torch.rand(2)  # the generator stands where it stood
        found[again] = [loss, after, *(p.grad for p in model.parameters())], stored.bytes
    (plain, much), (recomputed, little) = found[False], found[True]
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    # The root of a hybrid's ResNet is kept: its map is the largest there is.
    assert little < (0.6 if name == "hybrid" else 0.2) * much


def test_nothing_is_recomputed_outside_training():
    model = small()
    images = pictures(model)
    expected = model(images)
    model.checkpoint_activations = True
    with torch.no_grad():
        assert torch.equal(model(images), expected)
        assert torch.equal(model.train()(images), expected)
