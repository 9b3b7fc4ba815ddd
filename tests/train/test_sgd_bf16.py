"""SGD with a momentum in bf16."""

import numpy as np
import torch
from support.stepping import compare, half

from vitcli.train.optimizers import SgdBf16


def by_hand(w, gradients, decay, rates):
    buffer = np.zeros_like(w)
    for g, lr in zip(gradients, rates, strict=True):
        total = g + 0.9 * buffer
        w = w - lr * decay * w - lr * total
        buffer = half(total)
    return w


def test_only_the_buffer_is_rounded():
    optimizer = compare(lambda groups: SgdBf16(groups, lr=1.0, momentum=0.9), by_hand, atol=3e-4)
    buffers = [s["momentum_buffer"] for s in optimizer.state.values()]
    assert {b.dtype for b in buffers} == {torch.bfloat16}
