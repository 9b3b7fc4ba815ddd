"""Lion against its algorithm."""

import numpy as np
from support.stepping import compare

from vitcli.train.optimizers import Lion


def by_hand(w, gradients, decay, rates):
    m = np.zeros_like(w)
    for g, lr in zip(gradients, rates, strict=True):
        w = w - lr * (np.sign(0.9 * m + 0.1 * g) + decay * w)
        m = 0.99 * m + 0.01 * g
    return w


def test_lion_is_algorithm_2():
    compare(lambda groups: Lion(groups, lr=1.0, betas=(0.9, 0.99)), by_hand)
