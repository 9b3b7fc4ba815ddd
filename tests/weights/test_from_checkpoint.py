import pytest
import torch

from vitcli.vit import from_config, parse_variant
from vitcli.weights.from_checkpoint import empty_network


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        (
            "Pico/8",
            {"pool": "map", "num_registers": 2, "layer_scale": 0.1, "representation_size": 8},
        ),
        ("Pico/8", {"pool": "mean", "position": "sincos2d"}),
        ("R26+S/32", {"depth": 1}),
        ("R50x1", {}),
    ],
)
def test_the_same_tensors_without_memory_or_chance(variant, settings):
    config = parse_variant(variant, num_classes=3, image_size=(64, 64), **settings)
    real = from_config(config).state_dict()
    before = torch.random.get_rng_state()
    model = empty_network(config)
    assert torch.equal(torch.random.get_rng_state(), before)
    found = model.state_dict()
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {
        n: (t.shape, t.dtype) for n, t in real.items()
    }
    assert all(p.is_meta and p.requires_grad for p in model.parameters())


def test_what_is_initialised_afterwards_is_initialised():
    empty_network(parse_variant("Pico/8", image_size=(32, 32)))
    layer = torch.nn.Linear(8, 8)
    assert layer.weight.abs().sum() > 0
    assert torch.nn.init.ones_(torch.zeros(2)).sum() == 2
