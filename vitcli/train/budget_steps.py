"""`--budget 10m`: as many steps as this machine makes in that time."""

import time
from dataclasses import dataclass

from vitcli.config.schema import TrainSection
from vitcli.errors import VitcliError
from vitcli.train.budget import Deadline, Timeline
from vitcli.train.loop import Loop
from vitcli.train.optimizers.registry import set_rates
from vitcli.train.validate import EVAL_BATCH

WARM_STEPS, TIMED_STEPS = 1, 4
PARTS = 1000  # a run of so many steps stands for any run while its stages are timed
# Batches a process that a look at the speed of the last evaluation takes, after one in which
# threads and kernels come to be; where that one alone takes so many seconds, they do not matter.
EVAL_BATCHES, EVAL_SECONDS = 3, 2.0
TIMING_SHARE = 0.1  # of the budget; when it is spent, one timed step of a stage has to do
# The last checkpoint, weights, curves and the program's end: seconds, and shares of a step.
WRITING_SECONDS, WRITING_STEPS = 1.0, 1.0
EVAL_MARGIN = 1.15  # an evaluation beside other work may take longer than measured


class NoStepFits(VitcliError):
    """The budget is spent before the first step could be made."""


@dataclass(frozen=True)
class Budget:
    """A time turned into steps: how many fit, and what keeps them within it."""

    steps: int
    deadline: Deadline


def settle_budget(loop: Loop, seconds: float, test_images: int) -> Budget:
    """The steps that fit into `seconds` from now, the last evaluation included.

    Each stage of the run (`train.smaller_sizes`, patch dropout) is timed on real batches with all
    rates at zero, so that no weight moves; the optimizers' states are cleared afterwards. While the
    run trains, its `Deadline` makes the steps more or fewer by what they really take.

    Raises:
        NoStepFits: not one does.
    """
    at = time.monotonic() + seconds
    import matplotlib.figure  # noqa: F401  # loaded now, the curves cost nothing at the end

    late = time.monotonic() - at
    if loop.agree(int(late > 0.0)):  # all processes together
        raise NoStepFits(
            "no step fits into the budget: it was over before one could be timed, "
            f"{max(0.0, late):.1f} s ago",
            "a longer `--budget`: loading the libraries and the data counts too",
        )
    stages = stage_shares(loop.recipe.train)
    enough = time.monotonic() + TIMING_SHARE * seconds
    costs = [seconds_per_step(loop, place, enough) for place, _ in stages]
    average = sum(share * cost for (_, share), cost in zip(stages, costs, strict=True))
    reserve = WRITING_SECONDS + WRITING_STEPS * max(costs) + _evaluation(loop, test_images)
    steps = int((at - time.monotonic() - reserve) / average)
    if steps < 1:
        raise NoStepFits(
            f"no step fits into the budget: one takes {average:.2f} s, start and test the rest",
            "a longer `--budget`, a smaller model, or a larger patch",
        )
    ends, begin = [], 0.0
    for (_, share), cost in zip(stages, costs, strict=True):
        begin += share
        ends.append((begin, cost))
    return Budget(steps, Deadline(at, reserve, ends))


def stage_shares(train: TrainSection) -> list[tuple[int, float]]:
    """(a step of `PARTS` inside the stage, the stage's share of the run) for each stage."""
    ends = [until for _, until in train.smaller_sizes]
    if train.patch_drop_rate:
        ends.append(train.patch_drop_until)
    stages, begin = [], 0.0
    for end in [*sorted(end for end in ends if 0.0 < end < 1.0), 1.0]:
        if end > begin:
            stages.append((int(begin * PARTS), end - begin))
        begin = max(begin, end)
    return stages


def _evaluation(loop: Loop, test_images: int) -> float:
    """Seconds of an evaluation on all test images, by one on a few."""
    if loop.validate is None or not test_images:
        return 0.0
    at_once = EVAL_BATCH * loop.accelerator.num_processes
    loop.module.eval()
    for few in (at_once, EVAL_BATCHES * at_once):
        few = min(few, test_images)
        start = time.perf_counter()
        loop.validate(limit=few)
        seconds = time.perf_counter() - start
        if loop.agree(int(seconds > EVAL_SECONDS)):
            break
    loop.module.train()
    return seconds * test_images / few * EVAL_MARGIN


def seconds_per_step(
    loop: Loop, at: int, enough: float, most: int = TIMED_STEPS, warm: int = WARM_STEPS
) -> float:
    """The mean time of a few steps as the run makes them at step `at` of `PARTS`.

    Of slow ones fewer do: from the moment `enough` on there is no other after the first.

    Args:
        most: steps that are timed.
        warm: steps before them, while which threads fill their queue.
    """
    state = loop.state
    timeline, step, state.timeline, state.step = state.timeline, state.step, Timeline.of(PARTS), at
    set_rates(state.optimizers, 0.0)
    loop.module.train()
    begin, timed = time.perf_counter(), 0
    batches = loop.loader.batches(0, warm + most)
    for number, batch in enumerate(batches):
        if number == warm:
            begin = time.perf_counter()
        loop.update(batch)
        timed = number + 1 - warm
        if timed > 0 and loop.agree(int(time.monotonic() > enough)):
            break  # all processes together
    if loop.accelerator.device.type == "cuda":
        import torch

        torch.cuda.synchronize()
    seconds = (time.perf_counter() - begin) / timed
    state.timeline, state.step = timeline, step
    for optimizer in state.optimizers:
        optimizer.state.clear()
    return seconds
