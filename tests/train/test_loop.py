"""What the loop does when something goes wrong, and what it may leave out."""

import json
import math
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from support.launching import PLAIN
from support.tiny import records, train_tiny, weights
from support.watching import Told

from vitcli.errors import VitcliError
from vitcli.train import build as setup
from vitcli.train import loop as loops
from vitcli.train.agreement import (
    NONE,
    TIME_IS_UP,
    max_over_processes,
    min_over_processes,
)
from vitcli.train.loop import Loop
from vitcli.train.objectives import Softmax
from vitcli.train.signals import Stopped
from vitcli.weights.load import load_model


@pytest.fixture
def small_memory(monkeypatch):
    """Training passes over more than 8 images fail as torch's allocator does."""
    real = Softmax.forward

    def forward(self, images, labels):
        if self.training and len(images) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return real(self, images, labels)

    monkeypatch.setattr(Softmax, "forward", forward)


def test_the_same_weights_in_smaller_parts_when_memory_runs_out(tmp_path, monkeypatch):
    train_tiny(tmp_path / "whole", **PLAIN)
    expected = load_model(tmp_path / "whole").state_dict()
    heard = Told()
    with monkeypatch.context() as patch:
        small_memory.__wrapped__(patch)
        train_tiny(tmp_path / "parts", watch=heard, **PLAIN)
    assert heard.warnings == [
        "out of memory with a micro-batch of 32 images: continuing with 16",
        "out of memory with a micro-batch of 16 images: continuing with 8",
    ]
    for key, value in load_model(tmp_path / "parts").state_dict().items():
        torch.testing.assert_close(expected[key], value, rtol=0, atol=1e-5)
    state = json.loads((tmp_path / "parts/checkpoints/step_000008/state.json").read_text())
    assert state["micro_batch"] == 8


def test_a_resumed_run_begins_with_the_size_that_fitted(tmp_path, small_memory):
    """With dropout the masks depend on it, and must be the same again."""
    train_tiny(tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_stop_request", lambda run, _: 15 if run.state.step == 3 else None)
        with pytest.raises(Stopped):
            train_tiny(tmp_path / "parts")
    heard = Told()
    train_tiny(tmp_path / "parts", resume=True, watch=heard)
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")
    assert not heard.warnings


def test_mixed_pairs_stay_together(tmp_path, small_memory):
    train_tiny(
        tmp_path / "run", augment={"mixup_alpha": 1.0, "mix_rate": 1.0}, train={"batch_size": 18}
    )
    state = json.loads((tmp_path / "run/checkpoints/step_000008/state.json").read_text())
    assert state["micro_batch"] == 8  # of 18 first 8, not 9


def test_nothing_fits(tmp_path, monkeypatch):
    def forward(self, images, labels):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    monkeypatch.setattr(Softmax, "forward", forward)
    with pytest.raises(VitcliError, match=r"out of memory with a micro-batch of 1 image$"):
        train_tiny(tmp_path / "run")


def test_another_error_is_not_taken_for_it(tmp_path, monkeypatch):
    def forward(self, images, labels):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Softmax, "forward", forward)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train_tiny(tmp_path / "run")


def spoil(monkeypatch, step, times=1):
    """The loss of update `step` is not a number, so many times."""
    real, left = Loop.gradients, [times]

    def gradients(self, batch, alone=False):
        figures = real(self, batch, alone)
        if self.state.step == step and left[0]:
            left[0] -= 1
            for p in self.state.objective.parameters():
                p.grad = None if p.grad is None else p.grad * math.nan
            figures["loss"] = figures["loss"] * math.nan
        return figures

    monkeypatch.setattr(Loop, "gradients", gradients)


REWIND = {"train": {"steps": 10, "on_nan": "rewind", "checkpoint_steps": 2, "keep_checkpoints": 9}}


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    spoil(monkeypatch, 5)
    with pytest.raises(VitcliError, match=r"the loss is not finite \(nan\) in steps 6 to 6"):
        train_tiny(tmp_path / "run", train={"steps": 10})


def test_it_goes_back_with_half_the_rate_where_asked(tmp_path, monkeypatch):
    spoil(monkeypatch, 5)
    heard = Told()
    result = train_tiny(tmp_path / "run", watch=heard, **REWIND)
    assert result.steps == 10
    assert "going back to step 4, with 0.5 of the learning rate" in heard.warnings[0]
    found = records(tmp_path / "run")
    steps = [r["step"] for r in found if "train/loss" in r]
    assert steps == list(range(1, 11))
    told = [(r["step"], r["event"], r["from"], r["lr_scale"]) for r in found if "event" in r]
    assert told == [(4, "rewind", 6, 0.5)]
    monkeypatch.undo()
    train_tiny(tmp_path / "plain", train={"steps": 10})
    pairs = zip(
        [r for r in found if "lr" in r],
        [r for r in records(tmp_path / "plain") if "lr" in r],
        strict=True,
    )
    for ours, plain in pairs:
        assert ours["lr"] == pytest.approx(plain["lr"] * (0.5 if ours["step"] > 4 else 1.0))


def test_a_resume_after_it_is_exact(tmp_path, monkeypatch):
    spoil(monkeypatch, 5)
    train_tiny(tmp_path / "whole", **REWIND)
    monkeypatch.undo()
    spoil(monkeypatch, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Loop,
            "_stop_request",
            lambda run, _: 15 if run.state.step == 5 and run.state.num_rewinds else None,
        )
        with pytest.raises(Stopped):
            train_tiny(tmp_path / "parts", **REWIND)
    monkeypatch.undo()
    train_tiny(tmp_path / "parts", resume=True, **REWIND)
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")


def test_too_often_is_the_end(tmp_path, monkeypatch):
    spoil(monkeypatch, 5, times=9)
    with pytest.raises(VitcliError, match="after 3 rewinds"):
        train_tiny(tmp_path / "run", **REWIND)
    assert not (tmp_path / "run/result.json").exists()


def test_weights_that_are_not_finite_are_never_a_checkpoint(tmp_path, monkeypatch):
    """The loss of step 4 was good, its update was not: the last good state is that of step 2."""
    real = Loop.step

    def update(self, batch):
        figures = real(self, batch)
        if self.state.step == 3 and not self.state.num_rewinds:
            next(self.state.objective.parameters()).data.fill_(math.nan)
        return figures

    monkeypatch.setattr(Loop, "step", update)
    train_tiny(tmp_path / "run", **REWIND)
    event = next(r for r in records(tmp_path / "run") if "event" in r)
    assert event["step"] == 2


def test_patches_are_left_out_in_training_only(tmp_path, monkeypatch):
    lengths = []
    real = loops.torch.nn.Module.__call__

    def call(self, x, *rest, **more):
        if type(self).__name__ == "Block":
            lengths.append((self.training, x.shape[1]))
        return real(self, x, *rest, **more)

    monkeypatch.setattr(torch.nn.Module, "__call__", call)
    settings = {"patch_drop_rate": 0.5, "patch_drop_until": 0.5, "steps": 4}
    train_tiny(tmp_path / "run", train=settings, model={"patch_size": 2})
    whole = 16 + 1  # 8x8 pixels, patches of 2, a class token
    trained = [n for training, n in lengths if training]
    assert trained == [8 + 1] * 4 + [whole] * 4
    assert {n for training, n in lengths if not training} == {whole}


def test_patches_that_are_left_out_resume_exactly(tmp_path):
    settings = {"train": {"patch_drop_rate": 0.25, "steps": 6}, "model": {"patch_size": 2}}
    train_tiny(tmp_path / "whole", **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_stop_request", lambda run, _: 15 if run.state.step == 3 else None)
        with pytest.raises(Stopped):
            train_tiny(tmp_path / "parts", **settings)
    train_tiny(tmp_path / "parts", resume=True, **settings)
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"pool": "quadrants", "patch_size": 2}, "pool `quadrants` needs all of them"),
        ({"position": "relative"}, "positions inside the blocks need all of them"),
    ],
)
def test_patches_that_cannot_be_left_out(tmp_path, model, words):
    with pytest.raises(VitcliError, match=words):
        train_tiny(tmp_path / "run", model=model, train={"patch_drop_rate": 0.5})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["masked_patch", "mae"])
def test_an_objective_that_hides_patches_has_none_left_out(tmp_path, name):
    with pytest.raises(VitcliError, match=f"`{name}` masks patches and cannot"):
        train_tiny(tmp_path / "run", objective={"name": name}, train={"patch_drop_rate": 0.5})


def test_records_say_what_the_machine_gave(tmp_path):
    train_tiny(tmp_path / "run")
    record = next(r for r in records(tmp_path / "run") if "train/loss" in r)
    assert 0 < record["mfu"] < 1 and record["memory_mb"] > 50


@pytest.mark.proof
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with a C++ compiler here")
def test_a_compiled_run_gives_the_same_and_resumes_exactly(tmp_path):
    """Sums in another order: close to the plain run, equal to itself."""
    train_section = {"steps": 6, "smaller_sizes": [[4, 0.5]]}
    compiled = {**PLAIN, "train": {**train_section, "compile": True}}
    train_tiny(tmp_path / "whole", **compiled)
    train_tiny(tmp_path / "plain", **PLAIN, train=train_section)
    expected = load_model(tmp_path / "plain").state_dict()
    for key, value in load_model(tmp_path / "whole").state_dict().items():
        torch.testing.assert_close(expected[key], value, rtol=0, atol=1e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_stop_request", lambda run, _: 15 if run.state.step == 4 else None)
        with pytest.raises(Stopped):
            train_tiny(tmp_path / "parts", **compiled)
    train_tiny(tmp_path / "parts", resume=True, **compiled)
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")


def test_weights_that_are_not_finite_at_the_end(tmp_path, monkeypatch):
    """The last update goes wrong, after a good loss: that of no later step could tell."""
    real = Loop.step

    def update(self, batch):
        figures = real(self, batch)
        if self.state.step == self.total_steps - 1 and not self.state.num_rewinds:
            next(self.state.objective.parameters()).data.fill_(math.nan)
        return figures

    monkeypatch.setattr(Loop, "step", update)
    assert train_tiny(tmp_path / "back", **REWIND).steps == 10
    event = next(r for r in records(tmp_path / "back") if "event" in r)
    assert event["step"] == 8
    with pytest.raises(VitcliError, match="weights are not finite after step 8") as caught:
        train_tiny(tmp_path / "stop")
    assert "--lr" in caught.value.hint
    assert not (tmp_path / "stop/result.json").exists()
    assert not list((tmp_path / "stop").glob("checkpoints/*"))


def test_what_several_processes_agree_on():
    """The largest and the smallest of what all say, negative numbers and None among them."""

    def two(other):
        gather = lambda mine: torch.cat([mine, torch.tensor([other])])  # noqa: E731
        return SimpleNamespace(num_processes=2, device="cpu", gather=gather)

    assert max_over_processes(two(7), 5) == 7
    assert max_over_processes(two(15), None) == 15
    assert max_over_processes(two(NONE), None) is None
    assert min_over_processes(two(-3), 5) == 3 and min_over_processes(two(-9), 5) == 5


def test_a_resume_removes_what_a_kill_left_half_written(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_stop_request", lambda run, _: 15 if run.state.step == 3 else None)
        with pytest.raises(Stopped):
            train_tiny(tmp_path / "run")
    left = tmp_path / "run/.model.safetensors.123.tmp"
    left.write_text("half")
    train_tiny(tmp_path / "run", resume=True)
    assert not left.exists()


@pytest.mark.parametrize("settings", [{}, {"train": {"ema_decay": None}}])
def test_a_signal_during_an_evaluation_waits_for_nothing(tmp_path, monkeypatch, settings):
    """The state is saved as it was, also where averaged weights were in their place just then."""
    sections = {"train": {"eval_steps": 3, **settings.get("train", {})}}
    train_tiny(tmp_path / "whole", **sections)
    real, asked = setup.run_validation, iter(range(9))

    def measured(*arguments, **more):
        if next(asked) == 0:
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("it went on")
        return real(*arguments, **more)

    monkeypatch.setattr(setup, "run_validation", measured)
    with pytest.raises(Stopped, match="SIGTERM after step 3, state saved"):
        train_tiny(tmp_path / "parts", **sections)
    train_tiny(tmp_path / "parts", resume=True, **sections)
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")


def test_a_signal_after_the_last_step_or_before_the_first_says_how_to_go_on(tmp_path, monkeypatch):
    def interrupted(*arguments, **more):
        raise KeyboardInterrupt(int(signal.SIGTERM))  # as the program's own handler does

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "run_validation", interrupted)
        with pytest.raises(Stopped, match="SIGTERM after step 8, state saved") as stopped:
            train_tiny(tmp_path / "late", train={"eval_steps": 100})
    assert (stopped.value.number, stopped.value.run) == (15, str(tmp_path / "late"))
    train_tiny(tmp_path / "late", resume=True, train={"eval_steps": 100})
    assert (tmp_path / "late/result.json").is_file()
    monkeypatch.setattr(Loop, "fit", interrupted)
    with pytest.raises(Stopped, match="SIGTERM before the first step"):
        train_tiny(tmp_path / "early")


def test_a_signal_in_the_last_step_stops_before_the_evaluation(tmp_path, monkeypatch):
    train_tiny(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_stop_request", lambda run, _: 15 if run.state.step == 8 else None)
        with pytest.raises(Stopped, match="SIGTERM after step 8, state saved"):
            train_tiny(tmp_path / "run")
    assert not (tmp_path / "run/result.json").exists()
    train_tiny(tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_a_signal_wins_over_a_time_that_is_up():
    """Processes agree on the largest value; one has the signal, another one's time is up."""
    assert min(signal.Signals) > TIME_IS_UP
    assert max(NONE, TIME_IS_UP, signal.SIGTERM) == signal.SIGTERM


def test_each_step_has_one_line_with_its_evaluation(tmp_path):
    train_tiny(tmp_path / "run", train={"steps": 7, "eval_steps": 2, "log_steps": 3})
    found = records(tmp_path / "run")
    assert [r["step"] for r in found] == [2, 3, 4, 6, 7]
    assert [r["step"] for r in found if "test/accuracy" in r] == [2, 4, 6, 7]
    assert all({"images", "seconds", "train/loss", "lr"} <= set(r) for r in found)
