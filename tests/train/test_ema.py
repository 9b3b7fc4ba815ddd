"""Averaged weights."""

import pytest
from torch import nn

from vitcli.train.ema import Ema


def test_the_decay_warms_up():
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    ema = Ema(module, 0.9)
    expected = 0.0
    for step in range(1, 200):
        nn.init.constant_(module.weight, float(step))
        ema.update(module, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert ema.state_dict()["weight"].item() == pytest.approx(expected, rel=1e-5)


def test_a_short_run_is_not_an_average_of_its_start():
    module = nn.Linear(4, 4)
    ema = Ema(module, 0.9999)
    for p in module.parameters():
        nn.init.ones_(p)
    for step in range(1, 50):
        ema.update(module, step)
    assert all((t > 0.99).all() for t in ema.state_dict().values())
