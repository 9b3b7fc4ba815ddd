"""Steps of an optimizer on given gradients, beside the same in plain numpy."""

import numpy as np
import torch

SHAPES = {"matrix": (40, 48), "kernel": (33, 2, 4, 5), "small": (3, 5), "bias": (7,)}
STEPS = 6


def compare(make, by_hand, *, decay=0.1, lr=0.01, atol=1e-6):
    """Both from the same weights, over the same gradients.

    Args:
        make: groups -> optimizer.
        by_hand: (weights, gradients of all steps, decay, rates) -> weights at the end, in numpy.
    """
    rng = np.random.default_rng(0)
    start = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    gradients = {
        n: [rng.normal(size=s) * 10.0 ** rng.integers(-3, 1) for _ in range(STEPS)]
        for n, s in SHAPES.items()
    }
    params = {n: torch.nn.Parameter(torch.tensor(v, dtype=torch.float32)) for n, v in start.items()}
    decayed = [p for n, p in params.items() if n != "bias"]
    optimizer = make(
        [
            {"params": decayed, "weight_decay": decay},
            {"params": [params["bias"]], "weight_decay": 0.0},
        ]
    )
    rates = [lr * (step + 1) / STEPS for step in range(STEPS)]
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, p in params.items():
            p.grad = torch.tensor(gradients[name][step], dtype=torch.float32)
        optimizer.step()
    for name, p in params.items():
        expected = by_hand(start[name], gradients[name], 0.0 if name == "bias" else decay, rates)
        moved = np.abs(expected - start[name]).max()
        assert moved > 1e-4
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=0, atol=atol)
    return optimizer


def half(x):
    return torch.tensor(x).bfloat16().double().numpy()
