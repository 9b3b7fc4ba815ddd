"""Distillation: the losses are their formulas, and the teacher stays as it was."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from support.tiny import tiny_recipe, train_recipe
from support.watching import Told

from vitcli.config.schema import ObjectiveSection
from vitcli.data.source import load_data
from vitcli.errors import VitcliError
from vitcli.evals.features import extract
from vitcli.preprocess import Preprocess
from vitcli.train.objectives.distillation import Distill
from vitcli.train.signals import Stopped
from vitcli.weights.load import load_model
from vitcli.weights.loaded import create_model
from vitcli.weights.store import save_model

CLASSES = ("a", "b", "c")


def built(labels, size, mean, **more):
    settings = {"depth": 1, "embed_dim": 32, "num_heads": 2, "mlp_dim": 64, **more}
    net = create_model("Pico/4", image_size=size, num_classes=len(labels), **settings)
    torch.nn.init.normal_(net.network.head.weight)
    net.labels = tuple(labels)
    net.preprocess = Preprocess((size, size), mean=(mean,), std=(0.5,))
    return net


@pytest.fixture
def teacher(tmp_path):
    """A file of a teacher with the classes in another order, one more, and another size."""
    net = built(("c", "x", "a", "b"), 16, 0.4)
    net.head_trained, net.temperature = True, 1.6  # as after `evaluate --calibrate`
    save_model(tmp_path / "teacher.safetensors", net)
    return str(tmp_path / "teacher.safetensors"), net


def objective(teacher, student=None, **more):
    section = ObjectiveSection(name="distill", teacher=teacher, **more)
    return Distill(student or built(CLASSES, 8, 0.5), section)


def entropy(logits, targets):
    return -(targets * log_softmax(logits, axis=1)).sum(axis=1).mean()


@pytest.mark.parametrize("two_heads", [False, True])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_loss_is_the_formula_of_deit(teacher, kind, two_heads):
    name, net = teacher
    more = (
        {"distillation_token": True, "distillation_head": True, "pool": "distilled"}
        if two_heads
        else {}
    )
    student = built(CLASSES, 8, 0.5, **more)
    if two_heads:
        torch.nn.init.normal_(student.network.head_dist.weight)
    task = objective(
        name,
        student,
        distillation=kind,
        distillation_weight=0.3,
        temperature=2.0,
        label_smoothing=0.1,
    )
    images, labels = torch.rand(5, 3, 8, 8) * 2 - 1, torch.tensor([0, 1, 2, 1, 0])
    loss, _ = task(images, labels)
    features = student.features(images)
    if two_heads:
        one, two = features.chunk(2, dim=-1)
        a, b = student.network.head(one), student.network.head_dist(two)
    else:
        a = b = student.network.head(features)
    pixels = images * 0.5 + 0.5
    big = torch.nn.functional.interpolate(pixels, (16, 16), mode="bilinear", antialias=True)
    wanted = net((big - 0.4) / 0.5)[:, [2, 3, 0]].detach().double().numpy() / 1.6
    a, b = a.detach().double().numpy(), b.detach().double().numpy()
    smoothed = np.eye(3)[labels] * 0.9 + 0.1 / 3
    if kind == "hard":
        lesson = entropy(b, np.eye(3)[wanted.argmax(1)])
    else:
        p = softmax(wanted / 2, axis=1)
        lesson = 4 * (p * (np.log(p) - log_softmax(b / 2, axis=1))).sum(axis=1).mean()
    expected = 0.7 * entropy(a, smoothed) + 0.3 * lesson
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)


def test_the_teacher_is_neither_trained_nor_stored(teacher):
    name, _ = teacher
    task = objective(name)
    assert not any("teachers" in key for key in task.state_dict())
    before = {k: v.clone() for k, v in task.teachers[0].state_dict().items()}
    loss, _ = task(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))
    loss.backward()
    torch.optim.SGD(task.parameters(), lr=1.0).step()
    after = task.teachers[0].state_dict()
    assert all((after[key] == value).all() for key, value in before.items())
    assert all(p.grad is None for p in task.teachers[0].network.parameters())
    assert not task.teachers[0].network.training


def test_what_cannot_be_is_said(teacher):
    name, net = teacher
    with pytest.raises(VitcliError, match="does not know these classes: `d`"):
        objective(name, built(("a", "d"), 8, 0.5))
    with pytest.raises(VitcliError, match="takes 3 channels, and the model 1"):
        objective(name, built(CLASSES, 8, 0.5, num_channels=1))
    net.head_activation = "sigmoid"
    save_model(Path(name), net)
    with pytest.raises(VitcliError, match="has sigmoid probabilities"):
        objective(name, distillation="soft")
    objective(name, distillation="hard")
    with pytest.raises(VitcliError, match="needs a teacher"):
        Distill(built(CLASSES, 8, 0.5), ObjectiveSection(name="distill"))


def test_a_token_without_a_head_is_said(teacher):
    student = built(CLASSES, 8, 0.5, distillation_token=True, class_token=True, pool="token")
    with pytest.raises(VitcliError, match="no head that reads it") as caught:
        objective(teacher[0], student)
    assert "model.distillation_head=true" in caught.value.hint


def test_a_teacher_that_cannot_be_leaves_no_run(tmp_path):
    recipe = tiny_recipe(objective={"name": "distill", "teacher": str(tmp_path / "gone")})
    with pytest.raises(VitcliError, match="no such model"):
        train_recipe(tmp_path / "run", recipe)
    assert not (tmp_path / "run").exists()


def test_the_loss_of_features_is_their_angle(teacher):
    """Without class names: the teacher needs no head for the classes of the student."""
    name, net = teacher
    student = built(("d", "e"), 8, 0.5)
    task = objective(name, student, distillation="features", distillation_weight=0.3)
    images, labels = torch.rand(5, 3, 8, 8), torch.tensor([0, 1, 0, 1, 0])
    lessons = torch.randn(5, 32)
    loss, figures = task(images, labels, lessons)
    with torch.no_grad():
        features = student.features(images)
        guess = (features @ task.follow.weight.T + task.follow.bias).double().numpy()
        logits = student.network.head(features).double().numpy()
        lengths = np.linalg.norm(guess, axis=1) * np.linalg.norm(lessons.numpy(), axis=1)
        angle = (guess * lessons.numpy()).sum(axis=1) / lengths
        whole = net.network.features((torch.zeros(1, 3, 16, 16) - 0.4) / 0.5)
    expected = 0.7 * entropy(logits, np.eye(2)[labels]) + 0.3 * (1 - angle.mean())
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    assert float(figures["agreement"]) == pytest.approx(angle.mean(), abs=1e-5)
    # Without stored features the teacher sees the images of the step, at its size.
    black = torch.full((1, 3, 8, 8), -1.0)
    torch.testing.assert_close(task.teacher_features(black), whole, atol=1e-5, rtol=0)
    bare = built(CLASSES, 16, 0.4)
    bare.network.head, bare.labels = torch.nn.Identity(), None
    bare.network.config = replace(bare.config, num_classes=0)
    save_model(Path(name), bare)
    with pytest.raises(VitcliError, match="has no head for classes") as error:
        objective(name)
    assert "objective.distillation=features" in error.value.hint


def test_a_teacher_is_computed_once_per_image(tmp_path, monkeypatch):
    """Its features are bfloat16 on the disk; a damaged row is computed again, the others are read.

    Four steps are two, a resume and two more, bit for bit.
    """
    from vitcli.train import loop

    monkeypatch.setenv("VITCLI_CACHE", str(tmp_path / "cache"))
    train_recipe(tmp_path / "teacher", tiny_recipe(train={"steps": 2}))
    lesson = {
        "name": "distill",
        "teacher": str(tmp_path / "teacher"),
        "distillation": "features",
        "teacher_cache": True,
    }
    recipe = tiny_recipe(
        objective=lesson, train={"steps": 4}, augment={"mixup_alpha": 0.2}, model={"depth": 1}
    )
    first, again = Told(), Told()
    train_recipe(tmp_path / "whole", recipe, watch=first)
    said = " ".join(first.lines)  # `pretrain` has no `--no-cache`
    assert "disable with `--set objective.teacher_cache=false`" in said
    rows = next((tmp_path / "cache").rglob("rows.bf16"))
    source = load_data("builtin:digits")
    images = source.splits["train"]
    assert rows.stat().st_size == 2 * 32 * len(images)
    stored = torch.from_numpy(np.fromfile(rows, dtype="<i2")).view(torch.bfloat16).reshape(-1, 32)
    taught = extract(load_model(tmp_path / "teacher"), images.subset(np.arange(5))).outputs
    assert torch.equal(stored[:5], torch.from_numpy(taught).bfloat16())
    with rows.open("r+b") as file:
        file.write(b"\xff\xff\xff")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loop.Loop, "_stop_request", lambda run, _: 15 if run.state.step == 2 else None
        )
        with pytest.raises(Stopped):
            train_recipe(tmp_path / "parts", recipe, watch=again)
    told = " ".join(again.lines)
    assert "1 damaged row" in told and f"{len(images) - 1:,} of {len(images):,} features" in told
    train_recipe(tmp_path / "parts", recipe, resume=True)
    a, b = (tmp_path / n / "model.safetensors" for n in ("whole", "parts"))
    assert a.read_bytes() == b.read_bytes()


def test_images_without_a_place_have_no_stored_features(teacher):
    task = objective(teacher[0], teacher_cache=True, distillation="features")
    with pytest.raises(VitcliError, match="needs stored images"):
        task.prepare(load_data("builtin:formula"), Told())


def test_a_run_learns_from_a_run_and_resumes_exactly(tmp_path):
    from vitcli.train import loop

    train_recipe(tmp_path / "teacher", tiny_recipe(train={"steps": 2}))
    lesson = {"name": "distill", "teacher": str(tmp_path / "teacher"), "distillation": "soft"}
    recipe = tiny_recipe(
        objective=lesson, train={"steps": 4, "activation_checkpointing": True}, model={"depth": 1}
    )
    result = train_recipe(tmp_path / "whole", recipe)
    assert result.figures["images"] == 359
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loop.Loop, "_stop_request", lambda run, _: 15 if run.state.step == 2 else None
        )
        with pytest.raises(Stopped):
            train_recipe(tmp_path / "parts", recipe)
    train_recipe(tmp_path / "parts", recipe, resume=True)
    a, b = (tmp_path / n / "model.safetensors" for n in ("whole", "parts"))
    assert a.read_bytes() == b.read_bytes()
