"""Adafactor against big_vision's chain, written out in numpy."""

import numpy as np
import torch
from support.stepping import compare, half

from vitcli.train.optimizers import Adafactor


def by_hand(w, gradients, decay, rates):
    shape = w.shape
    w = w.reshape(shape[0], -1) if w.ndim > 1 else w
    factored = w.ndim == 2 and min(w.shape) >= 32
    full = row = column = 0.0
    momentum = np.zeros_like(w)
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        g = g.reshape(w.shape)
        beta = min(0.999, 1 - t**-0.8)
        square = g**2 + 1e-30
        if factored:
            row = beta * row + (1 - beta) * square.mean(axis=1)
            column = beta * column + (1 - beta) * square.mean(axis=0)
            second = np.outer(row / row.mean(), column)
        else:
            full = beta * full + (1 - beta) * square
            second = full
        update = 0.9 * momentum + 0.1 * g / np.sqrt(second)
        momentum = half(update)
        w = w - lr * (update + decay * w)
    return w.reshape(shape)


def test_adafactor_is_big_visions():
    optimizer = compare(lambda groups: Adafactor(groups, lr=1.0, momentum=0.9), by_hand, atol=3e-4)
    states = list(optimizer.state.values())
    assert sum("row" in s for s in states) == 2  # the matrix, and the kernel as one
    kept = sum(t.numel() * t.element_size() for t in states[0].values())
    assert kept < 0.6 * 4 * 40 * 48  # of the matrix itself


def test_its_first_update_is_the_sign_where_nothing_is_factored():
    """The first decay is 0, so that the second moment is the gradient's own square."""
    p = torch.nn.Parameter(torch.zeros(4))
    p.grad = torch.tensor([1.0, -2.0, 3.0, -0.5])
    Adafactor([p], lr=0.1, momentum=0.0).step()
    torch.testing.assert_close(p.detach(), -0.1 * p.grad.sign())
