"""A run as long as the time it is given."""

import json
import math
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.tiny import records, tiny_recipe, train_recipe
from support.watching import Told

from vitcli.errors import VitcliError
from vitcli.train import budget, loop
from vitcli.train.budget import Budget, Deadline, Timeline, stage_fractions
from vitcli.train.signals import Stopped
from vitcli.vit.variants import parse_variant

SETTINGS = {
    "train": {"steps": None, "eval_steps": None, "budget": "8s", "smaller_sizes": [[4, 0.5]]}
}


def test_stages_share_the_run():
    def shares(sizes, **settings):
        recipe = tiny_recipe(train={"smaller_sizes": sizes, **settings})
        return stage_fractions(recipe.train)

    assert shares([]) == [(0, 1.0)]
    assert shares([[16, 0.4], [24, 0.7]]) == [
        (0, 0.4),
        (400, pytest.approx(0.3)),
        (700, pytest.approx(0.3)),
    ]
    assert shares([[16, 1.0]]) == [(0, 1.0)]
    dropped = {"patch_drop_rate": 0.5, "patch_drop_until": 0.5}
    assert [at for at, _ in shares([[16, 0.4]], **dropped)] == [0, 400, 500]


def test_a_budget_is_kept_and_its_steps_are_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "WRITING_SECONDS", 1.0)  # no curves and no report are drawn here
    train_recipe(
        tmp_path / "warm", tiny_recipe(train={"steps": 1})
    )  # what is imported late is now there
    recipe = tiny_recipe(**SETTINGS)
    # On a machine that slows down, time is up before the schedule has come to its end: try again.
    for name in ("first", "second", "third"):
        start = time.monotonic()
        whole = train_recipe(tmp_path / name, recipe)
        seconds = time.monotonic() - start
        schedule = [r["lr"] for r in records(tmp_path / name) if "lr" in r]
        if schedule[-1] < 0.1 * max(schedule):
            break
    # A busy machine may be slower after the measurement than in it; far off would be a mistake.
    assert 1.0 < seconds < 60.0
    assert whole.steps > 1
    facts = json.loads((tmp_path / name / "provenance.json").read_text())
    assert facts["steps"] == whole.steps
    assert schedule[-1] < 0.1 * max(schedule)  # it came to its end
    # Stopped, and resumed with the steps that were settled first: the same run of that length.
    fixed = Budget(7, Deadline(time.monotonic() + 1e6, 0.0, [(1.0, 1e-3)]))
    monkeypatch.setattr(Deadline, "is_due", lambda *_: False)
    monkeypatch.setattr("vitcli.train.resuming.plan_budget", lambda *_: fixed)
    asked = iter([None] * 4 + [15] + [None] * 100)
    monkeypatch.setattr(loop, "max_over_processes", lambda _, value: next(asked) or value)
    with pytest.raises(Stopped):
        train_recipe(tmp_path / "parts", recipe)
    monkeypatch.undo()
    parts = train_recipe(tmp_path / "parts", recipe, resume=True)
    exact = train_recipe(
        tmp_path / "exact", tiny_recipe(train={"steps": 7, "smaller_sizes": [[4, 0.5]]})
    )
    assert parts.steps == exact.steps == 7
    a, b = (tmp_path / n / "model.safetensors" for n in ("parts", "exact"))
    assert a.read_bytes()[-1000:] == b.read_bytes()[-1000:]


def test_measuring_moves_no_weight(tmp_path, monkeypatch):
    """A budget of exactly the steps of a fixed run gives that run."""
    monkeypatch.setattr(budget, "WRITING_SECONDS", 1.0)  # no curves and no report are drawn here
    measured = budget.plan_budget
    monkeypatch.setattr(Deadline, "is_due", lambda *_: False)
    monkeypatch.setattr(
        "vitcli.train.resuming.plan_budget", lambda *a: replace(measured(*a), steps=6)
    )
    train_recipe(tmp_path / "budget", tiny_recipe(**SETTINGS))
    train_recipe(tmp_path / "fixed", tiny_recipe(train={"steps": 6, "smaller_sizes": [[4, 0.5]]}))
    from safetensors.torch import load_file

    a, b = (load_file(tmp_path / n / "model.safetensors") for n in ("budget", "fixed"))
    assert all((a[name] == b[name]).all() for name in a)


def test_a_budget_too_small_for_one_step(tmp_path, monkeypatch):
    recipe = tiny_recipe(train={"steps": None, "budget": "1s"})
    monkeypatch.setattr("vitcli.train.resuming.parse_duration", lambda text: 5.0)
    monkeypatch.setattr("vitcli.train.budget.WRITING_SECONDS", 60.0)
    with pytest.raises(VitcliError, match="no step fits into the budget"):
        train_recipe(tmp_path / "run", recipe)
    assert not (tmp_path / "run").exists()  # free for another try


def test_a_budget_that_is_over_is_not_exceeded_by_measuring(tmp_path, monkeypatch):
    from vitcli import distributed as launch

    monkeypatch.setattr(launch, "started_at", time.monotonic() - 100.0)
    monkeypatch.setattr(loop.Loop, "step", lambda *_: pytest.fail("a step was made"))
    recipe = tiny_recipe(train={"steps": None, "budget": "60s"})
    with pytest.raises(VitcliError, match=r"was over before one could be timed, 4\d\.\d s ago"):
        train_recipe(tmp_path / "run", recipe)
    assert not (tmp_path / "run").exists()


def fixed(monkeypatch, steps):
    given = Budget(steps, Deadline(time.monotonic() + 1e6, 0.0, [(1.0, 1e-3)]))
    monkeypatch.setattr("vitcli.train.resuming.plan_budget", lambda *_: given)
    return given


def test_a_run_that_became_longer_is_evaluated_at_its_end_only(tmp_path, monkeypatch):
    fixed(monkeypatch, 4)
    monkeypatch.setattr(Deadline, "is_due", lambda self, line, step: step == 2)
    monkeypatch.setattr(Deadline, "total", lambda *_: 8)
    assert train_recipe(tmp_path / "run", tiny_recipe(**SETTINGS)).steps == 8
    assert [r["step"] for r in records(tmp_path / "run") if "test/loss" in r] == [8]


def test_time_that_is_up_is_the_end_whatever_the_marks_say(tmp_path, monkeypatch):
    fixed(monkeypatch, 40)
    monkeypatch.setattr(Deadline, "is_up", lambda _: len(list(seen)) == 3)
    seen = []
    real = loop.Loop.step
    monkeypatch.setattr(
        loop.Loop, "step", lambda self, batch: [seen.append(0), real(self, batch)][1]
    )
    assert train_recipe(tmp_path / "run", tiny_recipe(**SETTINGS)).steps == 3


def test_slow_steps_are_timed_fewer_times(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "WRITING_SECONDS", 1.0)  # no curves and no report are drawn here
    count, real = [], loop.Loop.step
    monkeypatch.setattr(budget, "TIMING_FRACTION", 0.0)
    monkeypatch.setattr(loop.Loop, "fit", lambda _: None)
    monkeypatch.setattr(
        loop.Loop, "step", lambda self, batch: [count.append(0), real(self, batch)][1]
    )
    train_recipe(tmp_path / "run", tiny_recipe(**SETTINGS))
    assert len(count) == 2 * (budget.WARMUP_STEPS + 1)  # two stages


def test_a_run_that_goes_back_makes_the_steps_that_there_is_time_for(tmp_path, monkeypatch):
    fixed(monkeypatch, 10)
    monkeypatch.setattr(Deadline, "is_due", lambda self, line, step: step == 5)
    monkeypatch.setattr(Deadline, "total", lambda *_: 12)
    real, left = loop.Loop.gradients, [1]

    def gradients(self, batch, alone=False):
        figures = real(self, batch, alone)
        if self.state.step == 7 and left:
            left.pop()
            figures["loss"] = figures["loss"] * float("nan")
        return figures

    monkeypatch.setattr(loop.Loop, "gradients", gradients)
    train_settings = {**SETTINGS["train"], "on_nan": "rewind"}
    result = train_recipe(tmp_path / "run", tiny_recipe(train=train_settings))
    # Back from step 8 of 12 to the start: four more; and no rate below zero on the way.
    rates = [r["lr"] for r in records(tmp_path / "run") if "lr" in r]
    assert result.steps == len(rates) == 4 and min(rates) >= 0


def test_steps_of_a_gpu_are_timed_without_those_of_the_warm_up(monkeypatch):
    """The program queues steps of a second and goes on; only `synchronize` waits for them."""
    now, queued = [0.0], [0.0]

    def synchronize(device):
        now[0], queued[0] = now[0] + queued[0], 0.0

    def step(batch):
        queued[0] += 1.0

    monkeypatch.setattr(budget.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(budget, "synchronize", synchronize)
    run = SimpleNamespace(
        state=SimpleNamespace(timeline=Timeline.of(10), step=3, optimizers=[]),
        wrapped=SimpleNamespace(train=lambda: None),
        loader=SimpleNamespace(batches=lambda start, count: iter(range(count))),
        accelerator=SimpleNamespace(num_processes=1),
        device="cuda",
        step=step,
    )
    assert budget.time_steps_and_reset(run, 0, math.inf) == pytest.approx(1.0)
    assert (run.state.timeline.total, run.state.step) == (10, 3)


class Machine:
    """A run on a clock of its own; each part takes the seconds that it is given."""

    def __init__(self, monkeypatch, step, image, slowdown=1.0):
        self.now, self.step_seconds, self.image_seconds = 0.0, step, image
        self.slowdown = slowdown  # of everything after the measurement
        clock = SimpleNamespace(monotonic=lambda: self.now, perf_counter=lambda: self.now)
        monkeypatch.setattr(budget, "time", clock)
        self.state = SimpleNamespace(timeline=Timeline.of(10), step=0, optimizers=[])
        self.wrapped = SimpleNamespace(train=lambda: None, eval=lambda: None)
        self.loader = SimpleNamespace(batches=lambda start, count: iter(range(count)))
        self.accelerator, self.device = SimpleNamespace(num_processes=1), torch.device("cpu")
        self.recipe, self.loaded = tiny_recipe(**SETTINGS), None
        self.evaluations = {"test": self.evaluate}

    def step(self, batch=None):
        self.now += self.step_seconds

    def evaluate(self, model=None, limit=0):
        self.now += limit * self.image_seconds

    def command(self, seconds, images, start, writing):
        """The whole command; returns its steps."""
        self.now = start
        plan = budget.plan_budget(self, seconds - start, (images, 0))
        plan.deadline._before = self.now
        self.step_seconds, self.image_seconds = (
            self.slowdown * s for s in (self.step_seconds, self.image_seconds)
        )
        timeline, done = Timeline.of(plan.steps), 0
        while done < timeline.total:
            self.step()
            done += 1
            if plan.deadline.is_up():
                break
            if plan.deadline.is_due(timeline, done):
                timeline.replan(done, plan.deadline.total(timeline, done))
        self.evaluate(limit=images)
        self.now += writing
        return done


@pytest.mark.parametrize(
    ("seconds", "step", "image", "images", "slowdown"),
    [
        (20.0, 0.01, 1e-5, 100, 1.0),  # small: writing takes longer than a step and the evaluation
        (240.0, 4.0, 8e-3, 10_000, 1.0),  # one core of Zen 3: speedrun_hybrid
        (120.0, 0.3, 8e-4, 10_000, 1.0),
        (120.0, 0.3, 8e-4, 10_000, 1.3),
        (120.0, 0.3, 8e-4, 10_000, 0.8),
    ],
)
def test_the_whole_command_keeps_to_the_budget(monkeypatch, seconds, step, image, images, slowdown):
    """Curves and report took 1.5 to 2.1 CPU-seconds of a Zen 3 core, the exit 0.3."""
    machine = Machine(monkeypatch, step, image, slowdown)
    steps = machine.command(seconds, images, start=9.0, writing=2.4)
    assert machine.now <= seconds
    # The rest of the time is spent on steps, but for measurements and a margin.
    spent = steps * machine.step_seconds + images * machine.image_seconds
    assert spent > 0.75 * (seconds - 9.0 - 2.4)


@pytest.mark.parametrize(
    ("steps", "images", "words"),
    [
        (
            4,
            270,
            ["4 steps are 0.47 epochs of 270", "`--budget 12m` for 3 epochs", "image_size=112"],
        ),
        (1, 270, ["1 step is 0.12 epochs"]),
        (9, 270, []),  # more than an epoch, see below
        (300, 10**6, []),  # steps enough
    ],
)
def test_a_budget_of_too_few_steps_is_said(steps, images, words):
    """A step of 27 s: three epochs of 270 images are 25.3 steps, 21.3 more than the 4 of 2 min."""
    watch = Told()
    run = SimpleNamespace(
        recipe=tiny_recipe(train={"steps": None, "budget": "2m", "batch_size": 32}),
        loaded=SimpleNamespace(network=SimpleNamespace(config=parse_variant("Ti/16"))),
        watch=watch,
    )
    plan = Budget(steps, Deadline(0.0, 0.0, [(0.5, 20.0), (1.0, 34.0)]))
    budget.warn_of_few_steps(run, steps, plan, images)
    assert len(watch.warnings) == bool(words)
    assert all(word in watch.warnings[0] for word in words)
    short = 1.0 <= 32 * steps / images < 3.0
    assert ["more usually give" in line for line in watch.notes] == [True] * short


def test_a_run_with_a_small_budget_warns_before_it_trains(tmp_path, monkeypatch):
    few = Budget(2, Deadline(time.monotonic() + 1e6, 0.0, [(1.0, 1e-3)]))
    monkeypatch.setattr("vitcli.train.resuming.plan_budget", lambda *_: few)
    watch = Told()
    train_recipe(tmp_path / "run", tiny_recipe(train={"steps": None, "budget": "9m"}), watch=watch)
    lines = [line for line in watch.warnings if "too few to learn from" in line]
    assert len(lines) == 1 and "2 steps are" in lines[0]
