"""Averaged weights."""

import pytest
import torch
from support.tiny import tiny_recipe
from torch import nn

from vitcli.progress import Quiet
from vitcli.run import Run
from vitcli.train.build import build_loop, open_source, start_accelerator
from vitcli.train.ema import Ema
from vitcli.train.resolve import random_model


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


def test_without_warm_up_the_paper_s_run_averages_as_many_steps_as_its_factor_says():
    """20,000 steps at 0.9999: the mean age of the weights, and the share of the last tenth."""
    steps, decay = 20_000, 0.9999
    plain, warm = Ema(nn.Linear(1, 1), decay, warmup=False), Ema(nn.Linear(1, 1), decay)
    found = {}
    for ema in (plain, warm):
        # Track the average of the step number, and of the last tenth, as two parameters would be.
        module = nn.Linear(1, 2, bias=False).double()
        nn.init.zeros_(module.weight)
        ema.tensors = {"weight": module.weight.detach().clone()}
        for step in range(1, steps + 1):
            with torch.no_grad():
                module.weight[0], module.weight[1] = float(step), float(step > 0.9 * steps)
            ema.update(module, step)
        found[ema] = ema.state_dict()["weight"].flatten().tolist()
    ages = decay ** torch.arange(steps, dtype=torch.float64) * (1 - decay)  # (T,) newest first
    place = steps - torch.arange(steps, dtype=torch.float64)
    assert found[plain][0] == pytest.approx(float((ages * place).sum()), rel=1e-9)
    assert found[plain][1] == pytest.approx(1 - decay**2000, rel=1e-9)  # 18 %
    # The warm-up: a mean age of 2,000 steps, and 61 % from the last tenth.
    assert found[warm][0] == pytest.approx(18_000, abs=100)
    assert found[warm][1] == pytest.approx(0.61, abs=0.02)


def test_the_setting_reaches_the_average(tmp_path):
    recipe = tiny_recipe(train={"steps": 1, "ema_decay": 0.9999, "ema_warmup": False})
    source = open_source(recipe, Quiet())
    accelerator, _ = start_accelerator(recipe)
    loop = build_loop(
        recipe, source, lambda s: random_model(recipe, s), Run(tmp_path / "x"), accelerator, Quiet()
    )
    assert loop.state.ema.warmup is False
