"""LAMB against its algorithm."""

import numpy as np
from support.stepping import compare

from vitcli.train.optimizers import Lamb


def by_hand(w, gradients, decay, rates):
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        r = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-6)
        if decay:
            r = r + decay * w
            r = r * np.linalg.norm(w) / np.linalg.norm(r)
        w = w - lr * r
    return w


def test_lamb_is_algorithm_2_where_weights_decay():
    compare(lambda groups: Lamb(groups, lr=1.0, betas=(0.9, 0.999), eps=1e-6), by_hand, atol=3e-6)
