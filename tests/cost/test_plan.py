"""The time of a run from the measurements of a few steps."""

from types import SimpleNamespace

import pytest

from vitcli.config.recipe import check
from vitcli.config.schema import Recipe
from vitcli.cost.plan import ProbeResult, run_time


@pytest.mark.parametrize("eval_steps", [None, 100, 7])
def test_a_budget_has_time_for_its_evaluations(eval_steps):
    train = {"budget": "100s", "batch_size": 2, "eval_steps": eval_steps}
    recipe = check(Recipe, {"command": "pretrain", "data": {"name": "x"}, "train": train}, "test")
    counts = SimpleNamespace(steps=None, stages=(SimpleNamespace(fraction=1.0),))
    measured = ProbeResult(
        startup=3.0, steps=(0.1,), evaluation=2.0, last_evaluation=4.0, writing=0.0,
        peak_flops=1e9, memory=None,
    )  # fmt: skip
    found = run_time(recipe, counts, measured)
    # 100 s without start and the two last evaluations are 91 s of steps of 0.1 s, each with its
    # share of an evaluation of 2 s.
    wanted = 91.0 / (0.1 + (2.0 / eval_steps if eval_steps else 0.0))
    assert found.steps == pytest.approx(wanted, abs=1.0)
    assert 100.0 - 2.2 <= found.seconds <= 100.0 + 1e-6
