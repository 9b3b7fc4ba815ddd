"""Records on a GPU: read one interval late, and the same as those of a loop that waits."""

import math

import pytest
import torch
from support.tiny import records, train_tiny

from vitcli.errors import VitcliError
from vitcli.train import build as setup
from vitcli.train.loop import Loop
from vitcli.train.recorder import MIN_LOSS_SCALE, Recorder
from vitcli.weights.load import load_model

TIMES = ("seconds", "images_per_second", "mfu", "memory_mb", "data/wait_fraction")


def figures(run):
    found = [r for r in records(run) if "train/loss" in r]
    return [{k: v for k, v in record.items() if k not in TIMES} for record in found]


@pytest.fixture
def ahead(monkeypatch):
    """The loop works as on a GPU, whose steps are queued while the program goes on."""
    monkeypatch.setattr(Recorder, "runs_ahead", True)


TRAIN = {"steps": 12, "log_steps": 2, "checkpoint_steps": 6, "eval_steps": 6}


def test_late_records_are_the_same(tmp_path, monkeypatch):
    train_tiny(tmp_path / "plain", train=TRAIN)
    written, real = {}, Loop._act

    def act(self, decision, *arguments):
        real(self, decision, *arguments)
        if (self.run.path / "metrics.jsonl").exists():
            written[self.state.step] = [r["step"] for r in figures(self.run.path)]

    monkeypatch.setattr(Loop, "_act", act)
    monkeypatch.setattr(Recorder, "runs_ahead", True)
    train_tiny(tmp_path / "late", train=TRAIN)
    assert figures(tmp_path / "late") == figures(tmp_path / "plain")
    # One interval late, but none is missing when a checkpoint is written.
    assert written[4] == [2] and written[5] == [2]
    assert written[6] == [2, 4, 6] and written[12] == [2, 4, 6, 8, 10, 12]


def test_a_loss_that_is_not_finite_is_found_before_a_checkpoint(tmp_path, monkeypatch, ahead):
    real = Loop.gradients

    def gradients(self, batch, alone=False):
        metrics = real(self, batch, alone)
        return {k: v * math.nan for k, v in metrics.items()} if self.state.step == 4 else metrics

    monkeypatch.setattr(Loop, "gradients", gradients)
    with pytest.raises(VitcliError, match=r"the loss is not finite \(nan\) in steps 5 to 6"):
        train_tiny(tmp_path / "run", train=TRAIN)
    assert not list((tmp_path / "run/checkpoints").glob("step_*"))


def test_a_rewind_forgets_the_late_record(tmp_path, monkeypatch, ahead):
    real, left = Loop.gradients, [1]

    def gradients(self, batch, alone=False):
        metrics = real(self, batch, alone)
        spoiled = self.state.step == 8 and left.pop() if left else False
        return {k: v * math.nan for k, v in metrics.items()} if spoiled else metrics

    monkeypatch.setattr(Loop, "gradients", gradients)
    train_tiny(tmp_path / "run", train={**TRAIN, "on_nan": "rewind"})
    assert [r["step"] for r in figures(tmp_path / "run")] == [2, 4, 6, 8, 10, 12]


def test_fp16_gradients_that_always_overflow_end_the_run(tmp_path, monkeypatch):
    """The scaler of a GPU, on the CPU: it halves its factor and skips the step, again and again."""
    start, step = setup.start_accelerator, Loop.gradients
    first = 5 * MIN_LOSS_SCALE

    def started(*arguments, **words):
        accelerator, precision = start(*arguments, **words)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=first)
        return accelerator, precision

    def gradients(self, batch, alone=False):
        metrics = step(self, batch, alone)
        next(self.state.objective.parameters()).grad.fill_(math.inf)
        return metrics

    monkeypatch.setattr("vitcli.train.session.start_accelerator", started)
    monkeypatch.setattr(Loop, "gradients", gradients)
    with pytest.raises(VitcliError, match="the fp16 gradients overflow in every step") as error:
        train_tiny(tmp_path / "run", train={"steps": 9})
    assert "`--precision bf16`" in error.value.hint
    scales = [r["loss_scale"] for r in figures(tmp_path / "run")]
    assert scales == pytest.approx([first / 2, first / 4])
    assert not list((tmp_path / "run/checkpoints").glob("step_*"))


def test_an_evaluation_that_does_not_fit_continues_in_parts(tmp_path, monkeypatch):
    """With the metrics of the whole batch, as the images do not depend on each other."""
    train_tiny(tmp_path / "run", train={"steps": 2})
    expected = [r for r in records(tmp_path / "run") if any("accuracy" in k for k in r)]
    forward = type(load_model(tmp_path / "run").network).forward

    def limited(self, images):
        if not self.training and len(images) > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, images)

    monkeypatch.setattr(type(load_model(tmp_path / "run").network), "forward", limited)
    train_tiny(tmp_path / "parts", train={"steps": 2})
    found = [r for r in records(tmp_path / "parts") if any("accuracy" in k for k in r)]
    assert [
        {k: pytest.approx(v, rel=1e-5) for k, v in r.items() if k not in TIMES} for r in expected
    ] == [{k: v for k, v in r.items() if k not in TIMES} for r in found]


def test_memory_that_runs_out_in_the_update_is_an_error_in_words(here, monkeypatch, capfd):
    """The states of the optimizer: no smaller micro-batch makes room for them."""
    from vitcli.cli.main import run
    from vitcli.train.optimizers import JointOptimizer

    def step(self, closure=None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setattr(JointOptimizer, "step", step)
    words = ["--set", "model.depth=1", "--set", "model.image_size=8", "--set", "model.name=Pico/4"]
    assert run(["pretrain", "builtin:digits", "--steps", "2", *words, "--out", "r"]) == 2
    err = capfd.readouterr().err
    assert "error: out of memory: CUDA out of memory. Tried to allocate 2.00 GiB" in err
    assert "use a smaller batch, image size or model" in " ".join(err.split())
