"""torch.compile takes every model whole: one graph, no break, and the same numbers."""

import pytest
import torch
from support.kinds import KINDS, pictures, small
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounter

from vitcli.vit import ResNet, ResNetConfig

DROPPING = {"dropout_rate": 0.1, "drop_path_rate": 0.1, "depth": 2}
IN_TRAINING = ("plain", "all of today", "distilled", "relative", "learned2d, every", "axial")
IN_TRAINING += ("hybrid",)
# Many options at once. The other kinds are in the slow group, because a graph takes a second.
MANY_OPTIONS = ("all of today", "tower", "distilled", "bias, shared", "axial, 2-D, every, map")
MANY_OPTIONS += ("rope, EVA-02", "hybrid")
IN_EVALUATION = [n if n in MANY_OPTIONS else pytest.param(n, marks=pytest.mark.slow) for n in KINDS]


def compiled(function):
    """`function` through dynamo alone, which is what breaks graphs, and the graphs it made.

    With `fullgraph` a break is an error that says where it is.
    """
    torch._dynamo.reset()
    counter = CompileCounter()
    return torch.compile(function, backend=counter, fullgraph=True), counter


@pytest.mark.parametrize("name", IN_EVALUATION)
def test_one_graph_in_evaluation(name):
    model = small(name, depth=1)
    images = pictures(model)
    fast, counter = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(fast(images), model(images), rtol=0, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("name", "again"),
    [*((name, False) for name in IN_TRAINING), ("plain", True), ("relative", True)],
)
def test_one_graph_in_training(name, again):
    """`again`: activations are recomputed in the backward pass."""
    model = small(name, **DROPPING).train()
    model.checkpoint_activations = again
    fast, counter = compiled(model)
    fast(pictures(model)).sum().backward()
    assert counter.frame_count == 1
    assert all(p.grad is not None for p in model.parameters())


def test_one_graph_at_another_size():
    model = small("all of today", depth=1)
    fast, counter = compiled(model)
    with torch.no_grad():
        fast(pictures(model, size=(24, 32)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("training", [False, True])
def test_one_graph_of_the_resnet(training):
    model = ResNet(ResNetConfig((32, 32), layers=(1, 1), width=0.5, num_classes=3))
    model.train(training)
    fast, counter = compiled(model)
    fast(torch.randn(2, 3, 32, 32)).sum().backward()
    assert counter.frame_count == 1


def test_a_break_would_be_an_error():
    fast, _ = compiled(lambda x: x + 1 if x.sum() > 0 else x - 1)
    with pytest.raises(Unsupported):
        fast(torch.ones(3))
