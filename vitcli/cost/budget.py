"""`--budget 10m`: as many steps as this machine makes in that time."""

import time
from collections.abc import Sequence

from vitcli.errors import VitcliError
from vitcli.train.loop import Loop
from vitcli.train.optim import set_rates

WARM_STEPS, TIMED_STEPS = 1, 4
SPARE = 0.05  # of the time, for checkpoints, pictures and a machine that gets busier
PARTS = 1000  # a run of so many steps stands for any run while its stages are timed


def steps_within(loop: Loop, seconds: float, test_images: int) -> int:
    """The steps that fit into `seconds` from now, the last evaluation included.

    Each stage of the run (`train.smaller_sizes`) is timed on real batches with all rates at zero,
    so that no weight moves; the optimizers' states are cleared afterwards.

    Raises:
        VitcliError: not one step fits.
    """
    start = time.perf_counter()
    stages = stage_shares(loop.recipe.train.smaller_sizes)
    costs = [_seconds_per_step(loop, at) for at, _ in stages]
    average = sum(share * cost for (_, share), cost in zip(stages, costs, strict=True))
    # A forward pass is a third of a training step.
    evaluation = test_images / loop.recipe.train.batch_size * costs[-1] / 3
    left = (seconds - (time.perf_counter() - start)) * (1 - SPARE) - evaluation
    steps = int(left / average)
    if steps < 1:
        raise VitcliError(
            f"no step fits into the budget: one takes {average:.2f} s, start and test the rest",
            "a longer `--budget`, a smaller model, or a larger patch",
        )
    return steps


def stage_shares(smaller_sizes: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """(a step of `PARTS` inside the stage, the stage's share of the run) for each stage."""
    ends = [until for _, until in smaller_sizes if until > 0] + [1.0]
    stages, begin = [], 0.0
    for end in ends:
        end = min(max(end, begin), 1.0)
        if end > begin:
            stages.append((int(begin * PARTS), end - begin))
        begin = end
    return stages


def _seconds_per_step(loop: Loop, at: int) -> float:
    """The mean time of a few steps as the run makes them at step `at` of `PARTS`."""
    total, step = loop.total_steps, loop.state.step
    loop.total_steps, loop.state.step = PARTS, at
    set_rates(loop.state.optimizers, 0.0)
    loop.module.train()
    begin = time.perf_counter()
    batches = loop.loader.batches(0, WARM_STEPS + TIMED_STEPS)
    for number, batch in enumerate(batches):
        if number == WARM_STEPS:
            begin = time.perf_counter()
        loop.update(batch)
    seconds = (time.perf_counter() - begin) / TIMED_STEPS
    loop.total_steps, loop.state.step = total, step
    for optimizer in loop.state.optimizers:
        optimizer.state.clear()
    return seconds
