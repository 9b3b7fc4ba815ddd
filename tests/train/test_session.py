"""Whole training runs: what they leave, that they repeat, and that they go on exactly."""

import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from support.pages import check_page
from support.tiny import records, tiny_recipe, train_recipe, weights, write_tiny

import vitcli
import vitcli.commands.pretrain as pretrain
from vitcli.config.recipe import check
from vitcli.config.schema import Recipe
from vitcli.errors import VitcliError
from vitcli.evals.features import extract
from vitcli.progress import Quiet
from vitcli.train import loop, resolve
from vitcli.train.build import open_source, start_accelerator
from vitcli.train.checkpoint import TrainState
from vitcli.train.objectives.classification import Softmax
from vitcli.train.report import smooth
from vitcli.train.schedules import step_seed
from vitcli.train.signals import Stopped
from vitcli.weights.load import load_model
from vitcli.weights.store import read_header

COMPLETE = {
    "recipe.toml",
    "provenance.json",
    "metrics.jsonl",
    "log.txt",
    "curves.png",
    "report.html",
    "checkpoints",
    "images.tsv",  # beyond the contract: the split of each image
    "model.safetensors",
    "outcomes.safetensors",  # beyond the contract: what `vitcli compare` pairs image by image
    "result.json",
}


class Interrupt:
    """Behaves as if a signal had come when so many steps are finished."""

    def __init__(self, monkeypatch, after, number):
        self.calls = itertools.count(1)
        monkeypatch.setattr(
            loop,
            "max_over_processes",
            lambda _, value: number if next(self.calls) == after else value,
        )


def test_kernels_are_deterministic_if_a_run_asks(monkeypatch):
    """The setting is global in torch, so the next run in the process must not inherit it."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for asked in (True, False):
        start_accelerator(tiny_recipe(train={"deterministic": asked}))
        assert torch.are_deterministic_algorithms_enabled() == asked
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.draws_curves
def test_a_run_leaves_what_the_contract_says(tmp_path):
    recipe = tiny_recipe()
    result = train_recipe(tmp_path / "run", recipe)
    assert {p.name for p in (tmp_path / "run").iterdir()} == COMPLETE
    assert [r["step"] for r in records(tmp_path / "run") if "train/loss" in r] == list(range(1, 9))
    assert result.figures["images"] == 359  # every test image once
    assert 0 <= result.figures["accuracy"] <= 1
    model = load_model(tmp_path / "run")
    assert model.labels == tuple("0123456789") and model.head_trained
    assert read_header(tmp_path / "run/model.safetensors")["recipe_hash"] == recipe.fingerprint()
    assert json.loads((tmp_path / "run/result.json").read_text())["steps"] == 8
    text = (tmp_path / "run/report.html").read_text()
    page = check_page(text)
    assert page.headings == [
        "Curves", "Figures", "Data and splits", "Confusion matrix", "Calibration", "Mistakes",
        "Classes", "Recipe", "Provenance",
    ]  # fmt: skip
    assert f"{100 * result.figures['accuracy']:.2f} %" in page.text
    assert (tmp_path / "run/recipe.toml").read_text().splitlines()[5] in page.text
    # One line of training only, and the hashes for a resume are for programs.
    assert "faint line" not in page.text and "fingerprint" not in page.text
    wrong = round(359 * (1 - result.figures["accuracy"]))
    assert f"{wrong} images are classified wrongly" in page.text and page.tags["svg"] == 4


def test_smoothed_curves_keep_lines_straight():
    """A mean of as many neighbours on both sides: a line stays, and noise becomes smaller."""
    line = [0.5 * step - 3 for step in range(40)]
    assert smooth(line, 7) == pytest.approx(line)
    noise = np.random.default_rng(0).standard_normal(400)
    found = np.array(smooth(noise.tolist(), 9))
    assert found[20] == pytest.approx(noise[16:25].mean()) and found[0] == noise[0]
    assert found[10:-10].std() < noise.std() / 2


def test_the_resolved_recipe_repeats_the_run(tmp_path):
    train_recipe(tmp_path / "one", tiny_recipe())
    again = pretrain.run(recipe=str(tmp_path / "one/recipe.toml"), out=tmp_path / "two")
    assert again.figures == json.loads((tmp_path / "one/result.json").read_text())["figures"]
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


CONFIGURATIONS = {
    "muon, ema, dropout": {},
    "adamw": {"optim": {"name": "adamw"}},
    "sgd with clipping": {"optim": {"name": "sgd", "grad_clip": 1.0, "lr": 0.1}},
    "micro-batches": {"train": {"micro_batch_size": 10}},
    "bf16": {"train": {"precision": "bf16"}},
    "smaller sizes": {"train": {"smaller_sizes": [[4, 0.6]]}, "model": {"patch_size": 2}},
    "epochs and photographs' crops": {"augment": {"crop": "inception", "flip_rate": 0.5}},
    "activations computed again": {"train": {"activation_checkpointing": True}},
    "other positions and tokens": {
        "model": {
            "position": "learned2d",
            "position_at": "every",
            "mlp": "swiglu",
            "distillation_token": True,
            "distillation_head": True,
            "pool": "distilled",
        }
    },
    "relative positions along axes": {
        "model": {"position": "relative", "axial": True, "class_token": False}
    },
    "all augmentation": {
        "augment": {
            "crop": "inception",
            "flip_rate": 0.5,
            "preset": "strong1",
            "brightness": 0.4,
            "grey_rate": 0.2,
            "erase_rate": 0.25,
            "cutmix_alpha": 1.0,
            "repeats": 2,
        },
        "train": {"micro_batch_size": 10},
    },
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_stopped_and_resumed_is_never_stopped(name, tmp_path, monkeypatch):
    settings = CONFIGURATIONS[name]
    train = {"eval_steps": 4, **settings.get("train", {})}
    recipe = tiny_recipe(**{**settings, "train": train})
    train_recipe(tmp_path / "whole", recipe)
    Interrupt(monkeypatch, after=9, number=15)  # two questions a step: this is within step 5
    with pytest.raises(Stopped) as stopped:
        train_recipe(tmp_path / "parts", recipe)
    assert stopped.value.number == 15
    monkeypatch.undo()
    assert not (tmp_path / "parts/result.json").exists()
    train_recipe(tmp_path / "parts", recipe, resume=True)
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")
    steps = [r["step"] for r in records(tmp_path / "parts") if "train/loss" in r]
    assert steps == list(range(1, 9))
    result = json.loads((tmp_path / "parts/result.json").read_text())
    times = [r["seconds"] for r in records(tmp_path / "parts") if "train/loss" in r]
    assert result["seconds"] == pytest.approx(sum(times), abs=0.01)  # of both parts


def test_resume_before_a_checkpoint_starts_again_and_a_finished_run_is_left_alone(tmp_path):
    heard = []

    class Watch(Quiet):
        def note(self, message):
            heard.append(message)

    recipe = tiny_recipe()
    train_recipe(tmp_path / "run", recipe, resume=True, watch=Watch())
    assert any("starting from step 0" in line for line in heard)
    before = weights(tmp_path / "run")
    result = train_recipe(tmp_path / "run", recipe, resume=True, watch=Watch())
    assert result.already_finished and result.steps == 8
    assert any("already finished" in line for line in heard)
    assert weights(tmp_path / "run") == before


def test_resume_with_another_recipe_names_the_keys(tmp_path):
    train_recipe(tmp_path / "run", tiny_recipe())
    with pytest.raises(VitcliError, match=r"these differ: optim\.lr, train\.seed"):
        train_recipe(
            tmp_path / "run", tiny_recipe(optim={"lr": 2e-3}, train={"seed": 1}), resume=True
        )


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(
        TrainState, "has_finite_weights", lambda _: True
    )  # or the weights would be found first
    recipe = tiny_recipe(
        optim={"name": "sgd", "lr": 1e30}, train={"checkpoint_steps": 1, "ema_decay": None}
    )
    recipe = recipe.model_copy(
        update={"schedule": recipe.schedule.model_copy(update={"warmup_fraction": 0.0})}
    )
    with pytest.raises(
        VitcliError, match=r"the loss is not finite .* in steps \d+ to \d+"
    ) as caught:
        train_recipe(tmp_path / "run", recipe)
    assert "--lr" in caught.value.hint
    kept = sorted((tmp_path / "run/checkpoints").iterdir())
    assert kept and not (tmp_path / "run/model.safetensors").exists()
    assert "error: the loss is not finite" in (tmp_path / "run/log.txt").read_text()
    losses = [r["train/loss"] for r in records(tmp_path / "run") if "train/loss" in r]
    assert all(math.isfinite(loss) for loss in losses)


def test_accumulation_does_not_change_the_result(tmp_path):
    settings = {
        "model": {"dropout_rate": 0.0, "drop_path_rate": 0.0},
        "optim": {"name": "sgd", "lr": 0.1},
    }
    for name, micro in (("whole", None), ("parts", 8)):
        train_recipe(tmp_path / name, tiny_recipe(**settings, train={"micro_batch_size": micro}))
    a, b = (load_model(tmp_path / n).state_dict() for n in ("whole", "parts"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputed_activations_do_not_change_the_result(precision, tmp_path):
    for again in (False, True):
        train = {"activation_checkpointing": again, "precision": precision, "steps": 4}
        train_recipe(tmp_path / str(again), tiny_recipe(train=train))
    a, b = (load_model(tmp_path / str(again)).state_dict() for again in (False, True))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_training_learns_the_digits(tmp_path):
    recipe = tiny_recipe(
        train={"steps": 300, "log_steps": 50, "eval_steps": 300, "ema_decay": None},
        model={"dropout_rate": 0.0, "drop_path_rate": 0.0},
    )
    result = train_recipe(tmp_path / "run", recipe)
    assert result.figures["accuracy"] > 0.6  # chance is 0.1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": {"image_size": 9}}, "not a multiple of patch size 4"),
        ({"model": {"name": "Q/4"}}, "no model variant `Q/4`"),
        ({"data": {"name": "builtin:digit"}}, "unknown dataset `builtin:digit`"),
        ({"train": {"precision": "fp16"}}, "needs a GPU"),
        (
            {"augment": {"preset": "light2"}, "train": {"batch_size": 33}},
            "even number of images per process, not 33",
        ),
        ({"augment": {"preset": "light2"}, "train": {"micro_batch_size": 5}}, "needs pairs"),
        ({"augment": {"repeats": 3}}, "does not divide by `augment.repeats` = 3"),
        ({"augment": {"policy": "trivail"}}, "unknown augment.policy `trivail`"),
        ({"augment": {"mixup_alpha": 0.2}, "objective": {"name": "descriptors"}}, "no classes"),
        (
            {"augment": {"policy": "trivial"}, "data": {"name": "builtin:formula"}},
            "generates whole batches",
        ),
    ],
)
def test_bad_settings_leave_no_run(settings, words, tmp_path):
    with pytest.raises(VitcliError, match=words):
        train_recipe(tmp_path / "run", tiny_recipe(**settings))
    assert not (tmp_path / "run").exists()


def test_step_seeds_differ():
    seeds = {step_seed(s, t, p) for s in range(4) for t in range(500) for p in range(4)}
    assert len(seeds) == 8000 and all(0 <= s < 2**63 for s in seeds)


def test_five_frames_from_the_command_to_the_gradients(tmp_path, monkeypatch):
    """run -> train -> fit -> step -> gradients; frames of torch and of the objective do not count.

    The frames are those of the package in the traceback of an error in the objective's forward.
    """

    class Reached(Exception):
        pass

    def forward(self, images, labels):
        raise Reached

    monkeypatch.setattr(Softmax, "forward", forward)
    recipe = write_tiny(tmp_path / "tiny.toml")
    with pytest.raises(Reached) as caught:
        pretrain.run(recipe=str(recipe), out=tmp_path / "run")
    package = str(Path(vitcli.__file__).parent)
    frames = [frame.name for frame in caught.traceback if str(frame.path).startswith(package)]
    assert frames == ["run", "train", "fit", "step", "gradients"]


def test_a_pretrain_run_stores_how_it_resamples_positions(tmp_path):
    recipe = tiny_recipe(model={"position_resize": "bilinear"}, train={"steps": 1})
    train_recipe(tmp_path / "run", recipe)
    assert load_model(tmp_path / "run").network.position_resize == "bilinear"
    resnet = recipe.model_copy(
        update={"model": type(recipe.model)(name="R26x1", position_resize="bilinear")}
    )
    with pytest.raises(VitcliError, match="no positions"):
        train_recipe(tmp_path / "other", resnet)


def test_smaller_sizes_are_checked_before_the_run(tmp_path):
    with pytest.raises(VitcliError, match=r"smaller_sizes` has 6 px.*patch size 4"):
        train_recipe(tmp_path / "run", tiny_recipe(train={"smaller_sizes": [[6, 0.5]]}))
    assert not (tmp_path / "run").exists()


def test_settings_that_contradict_each_other_stop_before_the_run(tmp_path):
    with pytest.raises(VitcliError, match=r"`preprocess.image_size` is \(16, 16\)"):
        train_recipe(tmp_path / "run", tiny_recipe(preprocess={"image_size": 16}))
    formula = {"data": {"name": "builtin:formula"}, "model": {"num_channels": 1}}
    with pytest.raises(VitcliError, match="draws RGB images"):
        train_recipe(tmp_path / "run", tiny_recipe(**formula))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("objective", ["softmax", "masked_patch"])
def test_the_few_shot_accuracy_during_training(objective, tmp_path):
    """The last one equals that of `vitcli.fewshot` on the stored weights, and the best is named."""
    recipe = tiny_recipe(
        objective={"name": objective},
        train={"steps": 6, "eval_steps": 2, "fewshot_shots": 3, "ema_decay": None},
    )
    figures = train_recipe(tmp_path / "run", recipe).figures
    logged = {
        record["step"]: value
        for record in records(tmp_path / "run")
        for name, value in record.items()
        if name.endswith("/fewshot_accuracy")
    }
    assert set(logged) == {2, 4, 6}
    best = max(logged.values())
    assert figures["best_fewshot_accuracy"] == best == logged[figures["best_fewshot_step"]]
    assert figures["fewshot_split"] == "test"
    assert ("accuracy" in figures) == (objective == "softmax")
    model = load_model(tmp_path / "run")
    source = open_source(recipe, Quiet())
    train, test = (extract(model, source.splits[name]) for name in ("train", "test"))
    expected = vitcli.fewshot(
        train.outputs, train.labels, test.outputs, test.labels, shots=3, seed=0
    )
    assert figures["fewshot_accuracy"] == logged[6] == pytest.approx(expected, abs=1e-3)


def test_few_shot_accuracy_where_it_cannot_be(tmp_path):
    for more, words in (
        ({"data": {"name": "builtin:formula"}}, "single-label"),
        ({"train": {"budget": "5s", "steps": None}}, "budget"),
    ):
        settings = {**more, "train": {"fewshot_shots": 2, **more.get("train", {})}}
        with pytest.raises(VitcliError, match=words):
            train_recipe(tmp_path / "run", tiny_recipe(**settings))


def test_finetune_takes_every_model_setting_that_other_commands_take(monkeypatch):
    class Reached(Exception):
        pass

    def record(name, **given):
        assert given["stem_arithmetic"] == "timm"
        raise Reached

    monkeypatch.setattr(resolve, "load_model", record)
    model = {"name": "weights.npz", "stem_arithmetic": "timm"}
    sections = {"command": "finetune", "model": model, "train": {"steps": 1}}
    with pytest.raises(Reached):
        resolve.pretrained_model(check(Recipe, sections, "it"), None, Quiet())
