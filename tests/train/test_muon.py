"""Muon: the same updates as torch's and as singular value decompositions, in every precision."""

import pytest
import torch

from vitcli.config.schema import OptimSection
from vitcli.train.muon import NEWTON_SCHULZ_STEPS, Muon, newton_schulz
from vitcli.train.optimizers import build_optimizers
from vitcli.vit import create_network

SHAPES = [(8, 8), (24, 8), (8, 24), (8, 24), (10, 8)]


def by_decomposition(gradients):
    """(matrices, m, n): the quintic polynomial on the singular values, in double precision."""
    left, values, right = torch.linalg.svd(gradients.double(), full_matrices=False)
    values = values / values.norm(dim=-1, keepdim=True)
    for _ in range(NEWTON_SCHULZ_STEPS):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ torch.diag_embed(values) @ right


@pytest.mark.parametrize("shape", [(3, 8, 64), (3, 16, 20), (1, 12, 12)])
def test_newton_schulz_moves_singular_values_only(shape):
    """Wide matrices take another path than nearly square ones; rank one has many values of 0."""
    torch.manual_seed(0)
    gradients = torch.randn(*shape)
    gradients[0] = gradients[0, :, :1] @ gradients[0, :1, :]
    moved = newton_schulz(gradients)
    torch.testing.assert_close(moved.double(), by_decomposition(gradients), rtol=0, atol=1e-4)
    assert not newton_schulz(torch.zeros(*shape)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_of_matrices_moves_as_each_of_them_alone(dtype):
    torch.manual_seed(0)
    gradients = torch.randn(6, 16, 64, dtype=dtype)
    alone = torch.cat([newton_schulz(one[None]) for one in gradients])
    atol = 1e-5 if dtype == torch.float32 else 0.04  # a few of the last of 8 bits
    torch.testing.assert_close(newton_schulz(gradients), alone, rtol=0, atol=atol)


def two_steps(make_optimizer):
    """The parameters after two steps; the last one gets no gradient in the second."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(*shape)) for shape in SHAPES]
    optimizer = make_optimizer(params)
    for count in (len(SHAPES), len(SHAPES) - 1):
        optimizer.zero_grad(set_to_none=True)
        for p in params[:count]:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return params


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_of_torch(dtype):
    """torch computes in bf16, so the updates of 0.1 agree within its 8 bits."""
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}

    def ours(params):
        optimizer = Muon(params, **settings)
        optimizer.dtype = dtype
        return optimizer

    found, wanted = two_steps(ours), two_steps(lambda params: torch.optim.Muon(params, **settings))
    for p, q in zip(found, wanted, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=4e-3)


def test_a_step_in_double_precision_follows_the_algorithm():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(24, 8))
    optimizer = Muon([p], lr=0.1, momentum=0.9, weight_decay=0.5)
    expected, average = p.detach().double(), torch.zeros(24, 8).double()
    for _ in range(3):
        p.grad = torch.randn(24, 8)
        average = 0.9 * average + 0.1 * p.grad.double()
        update = by_decomposition(0.1 * p.grad.double() + 0.9 * average)
        expected = (1 - 0.1 * 0.5) * expected - 0.1 * (24 / 8) ** 0.5 * update
        optimizer.step()
    torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("fp16", torch.float32), ("bf16", torch.bfloat16)],
)
def test_the_precision_of_the_run_decides(precision, dtype):
    network = create_network("Pico/8", image_size=32, num_classes=5)
    muon, _ = build_optimizers(network, OptimSection(name="muon"), precision)
    assert isinstance(muon, Muon) and muon.dtype == dtype
