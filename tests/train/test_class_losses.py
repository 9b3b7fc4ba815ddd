"""Class weights, focal and asymmetric loss, logit adjustment, against independent references."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from support.tiny import records, tiny_recipe, train_tiny, weights

from vitcli.config.recipe import check, parse_overrides
from vitcli.config.schema import ObjectiveSection
from vitcli.data.batch import make_batch
from vitcli.data.image_set import ArrayStore, ImageSet
from vitcli.data.source import Source
from vitcli.errors import VitcliError
from vitcli.train.imbalance import imbalance_notes
from vitcli.train.loop import Loop
from vitcli.train.objectives import build_objective
from vitcli.train.objectives.class_losses import (
    BinaryCrossEntropy,
    CrossEntropy,
    resolve_class_weights,
    share_mean_weight,
)
from vitcli.train.signals import Stopped
from vitcli.weights.loaded import create_model

COUNTS = (90, 30, 7, 1)
K, B = len(COUNTS), 6


def section(**settings):
    return check(ObjectiveSection, settings, "test")


def model(counts=COUNTS):
    made = create_model("mu/4", num_classes=K, image_size=8)
    made.labels, made.class_counts = ("a", "b", "c", "d"), counts
    return made


def losses(kind, **settings):
    return kind(model(), section(**settings))


@pytest.fixture
def logits():
    drawn = torch.randn(B, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (3 * drawn).requires_grad_()


LABELS = torch.tensor([0, 0, 1, 2, 0, 3])
MIXED = torch.tensor([[0.7, 0.3, 0, 0], [0, 0.4, 0, 0.6], [1, 0, 0, 0]] * 2, dtype=torch.float64)
SEVERAL = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1]] * 2, dtype=torch.uint8)


# Resolved weights.
def test_balanced_weights_are_those_of_scikit_learn():
    labels = np.repeat(np.arange(K), COUNTS)
    wanted = compute_class_weight("balanced", classes=np.arange(K), y=labels)
    found = resolve_class_weights(section(class_weights="balanced"), model())
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.9999999])
def test_effective_weights_are_those_of_the_paper(beta):
    settings = {"class_weights": "effective", "class_weights_beta": beta}
    found = resolve_class_weights(section(**settings), model()).double().numpy()
    counts = np.array(COUNTS)
    wanted = (1 - beta) / (1 - beta**counts) if beta else np.ones(K)
    np.testing.assert_allclose(found / found[0], wanted / wanted[0], rtol=1e-5)
    assert found @ counts == pytest.approx(counts.sum(), rel=1e-6)  # the mean over images is 1
    if beta > 0.999999:  # the effective number of n images becomes n
        np.testing.assert_allclose(found, counts.sum() / (K * counts), rtol=1e-4)


def test_a_class_without_training_images_changes_no_weight():
    found = resolve_class_weights(section(class_weights="balanced"), model((90, 0, 7, 1)))
    present = compute_class_weight(
        "balanced", classes=np.array([0, 2, 3]), y=[0] * 90 + [2] * 7 + [3]
    )
    np.testing.assert_allclose(found, [present[0], 1, *present[1:]], rtol=1e-6)
    adjusted = CrossEntropy(model((90, 0, 7, 1)), section(logit_adjustment=1.0))
    assert adjusted.adjustment.isfinite().all()


# Softmax.
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_cross_entropy_is_that_of_torch(logits, smoothing):
    given = [0.5, 1.0, 3.0, 0.0]
    ours = losses(CrossEntropy, class_weights=given, label_smoothing=smoothing)(logits, LABELS)
    weight = torch.tensor(given, dtype=torch.float64)
    theirs = F.cross_entropy(logits, LABELS, weight=weight, label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs)
    for loss in (ours, theirs):
        loss.backward(retain_graph=True)
        if loss is ours:
            mine, logits.grad = logits.grad, None
    torch.testing.assert_close(mine, logits.grad)


def test_mixed_labels_have_the_mixed_weight(logits):
    weight = torch.tensor([0.5, 1.0, 3.0, 2.0], dtype=torch.float64)
    loss = losses(CrossEntropy, class_weights=weight.tolist())
    summed = F.cross_entropy(logits, MIXED, weight=weight, reduction="sum")
    torch.testing.assert_close(loss(logits, MIXED), summed / (MIXED @ weight).sum())
    shares = F.one_hot(LABELS, K).double()
    torch.testing.assert_close(loss(logits, shares), loss(logits, LABELS))
    tenfold = losses(CrossEntropy, class_weights=(10 * weight).tolist())
    torch.testing.assert_close(loss(logits, MIXED), tenfold(logits, MIXED))


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def focal_softmax(z, gamma):
    """Equation 4 of Lin et al., with softmax probabilities."""
    p = softmax(z)[np.arange(len(z)), LABELS]
    return np.mean(-((1 - p) ** gamma) * np.log(p))


def adjusted(z, tau):
    """Equation 10 of Menon et al., as the sum over the other classes that stands there."""
    prior = np.array(COUNTS) / sum(COUNTS)
    total = 0.0
    for row, y in zip(z, LABELS, strict=True):
        others = [k for k in range(K) if k != y]
        terms = (prior[others] / prior[y]) ** tau * np.exp(row[others] - row[y])
        total += np.log(1 + terms.sum())
    return total / len(z)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def focal_sigmoid(z, gamma, present=1.0):
    """Equation 5 of Lin et al. per class: p_t is p for a present class, else 1 - p."""
    total = 0.0
    for i, k in np.ndindex(z.shape):
        p_t = sigmoid(z[i, k]) if SEVERAL[i, k] else 1 - sigmoid(z[i, k])
        total += (present if SEVERAL[i, k] else 1.0) * -((1 - p_t) ** gamma) * np.log(p_t)
    return total / len(z)


def asymmetric(z, gammas, clip):
    """Equations 5 to 7 of Ridnik et al."""
    total = 0.0
    for i, k in np.ndindex(z.shape):
        p = sigmoid(z[i, k])
        shifted = max(p - clip, 0)
        plus = (1 - p) ** gammas[0] * np.log(p)
        minus = shifted ** gammas[1] * np.log(1 - shifted)
        total -= plus if SEVERAL[i, k] else minus
    return total / len(z)


CASES = {
    "focal": (CrossEntropy, {"focal_gamma": 2.0}, LABELS, lambda z: focal_softmax(z, 2.0)),
    "focal below 1": (CrossEntropy, {"focal_gamma": 0.5}, LABELS, lambda z: focal_softmax(z, 0.5)),
    "adjusted": (CrossEntropy, {"logit_adjustment": 1.5}, LABELS, lambda z: adjusted(z, 1.5)),
    "sigmoid focal": (
        BinaryCrossEntropy, {"focal_gamma": 2.0}, SEVERAL, lambda z: focal_sigmoid(z, 2.0)
    ),
    "weighted sigmoid focal": (
        BinaryCrossEntropy, {"focal_gamma": 0.5, "class_weights": [3.0] * K}, SEVERAL,
        lambda z: focal_sigmoid(z, 0.5, 3.0),
    ),
    "asymmetric": (
        BinaryCrossEntropy, {"asymmetric_gammas": [0.0, 4.0]}, SEVERAL,
        lambda z: asymmetric(z, (0, 4), 0.05),
    ),
    "asymmetric without clip": (
        BinaryCrossEntropy, {"asymmetric_gammas": [1.0, 3.0], "asymmetric_clip": 0.0}, SEVERAL,
        lambda z: asymmetric(z, (1, 3), 0.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_loss_is_its_formula_in_value_and_gradient(name, logits):
    kind, settings, labels, formula = CASES[name]
    loss = losses(kind, **settings)
    z = logits.detach().numpy()
    found = loss(logits, labels)
    assert found.item() == pytest.approx(formula(z), rel=1e-6)
    found.backward()
    numeric, step = np.empty_like(z), 1e-6
    for at in np.ndindex(z.shape):
        up, down = z.copy(), z.copy()
        up[at], down[at] = z[at] + step, z[at] - step
        numeric[at] = (formula(up) - formula(down)) / (2 * step)
    np.testing.assert_allclose(logits.grad, numeric, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", [CrossEntropy, BinaryCrossEntropy])
def test_weighted_sigmoid_and_plain_losses_are_those_of_torch(kind, logits):
    plain = losses(kind)(logits, LABELS)
    if kind is CrossEntropy:
        assert torch.equal(plain, F.cross_entropy(logits, LABELS))
        return
    shares = F.one_hot(LABELS, K).double()
    wanted = F.binary_cross_entropy_with_logits(logits, shares, reduction="none").sum(1).mean()
    torch.testing.assert_close(plain, wanted)
    weight = torch.tensor([0.5, 1.0, 3.0, 2.0], dtype=torch.float64)
    ours = losses(kind, class_weights=weight.tolist())(logits, SEVERAL)
    wanted = F.binary_cross_entropy_with_logits(logits, SEVERAL.double(), pos_weight=weight) * K
    torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_extreme_logits_give_finite_gradients(name, scale):
    kind, settings, labels, _ = CASES[name]
    z = (scale * torch.randn(B, K, generator=torch.Generator().manual_seed(1))).requires_grad_()
    loss = losses(kind, **settings)(z, labels)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


def test_a_zero_gamma_and_clip_are_the_plain_loss(logits):
    zero = losses(BinaryCrossEntropy, asymmetric_gammas=[0, 0], asymmetric_clip=0.0)
    torch.testing.assert_close(zero(logits, SEVERAL), losses(BinaryCrossEntropy)(logits, SEVERAL))


# Steps.
class Alone:
    """An accelerator of `parts` processes that all have the batches given to `reduce`."""

    def __init__(self, means):
        self.means = means

    def reduce(self, value, reduction):
        assert reduction == "mean"
        return torch.stack([*self.means, value]).mean()


def test_parts_of_a_step_add_up_to_the_weighted_mean_of_the_whole(logits):
    """Two processes with two micro-batches each; PyTorch sees all twelve images at once."""
    objective = build_objective(model(), section(class_weights="balanced"), 0)
    loss = objective.class_loss
    z, labels = torch.cat([logits, -logits]), torch.cat([LABELS, LABELS.flip(0)])
    weight = loss.class_weights.double()
    total = 0.0
    for mine, other in ((slice(0, 6), slice(6, 12)), (slice(6, 12), slice(0, 6))):
        indices = np.arange(6)
        batch = make_batch(torch.zeros(6, 3, 8, 8), labels[mine].numpy(), indices, indices)
        share_mean_weight(objective, batch, Alone([loss.class_weights[labels[other]].mean()]))
        for part in (slice(0, 2), slice(2, 6)):
            images = z[mine][part]
            total += loss(images, labels[mine][part]) * len(images) / 12
    torch.testing.assert_close(total, F.cross_entropy(z, labels, weight=weight), rtol=1e-6, atol=0)


def test_micro_batches_train_the_same(tmp_path):
    """Up to the order of sums."""
    settings = {
        "objective": {"class_weights": [0.1, 5.0, *[1.0] * 8]},
        "model": {"dropout_rate": 0.0, "drop_path_rate": 0.0},
        "augment": {"mixup_alpha": 0.5, "mix_rate": 0.5},
        "optim": {"name": "sgd", "lr": 0.01},
    }
    for size in (32, 8):
        train = {"steps": 2, "micro_batch_size": size}
        train_tiny(tmp_path / str(size), **settings, train=train)
    one, other = (
        [r["train/loss"] for r in records(tmp_path / str(size)) if "train/loss" in r]
        for size in (32, 8)
    )
    assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"class_weights": "balanced", "focal_gamma": 2.0},
        {"logit_adjustment": 1.0, "label_smoothing": 0.1},
        {"name": "sigmoid", "class_weights": "effective", "asymmetric_gammas": [0.0, 4.0]},
    ],
)
def test_a_resume_is_exact_and_keeps_the_recorded_class_sizes(tmp_path, settings):
    settings = {"objective": settings, "train": {"steps": 4}}
    train_tiny(tmp_path / "whole", **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_stop_request", lambda run, _: 15 if run.state.step == 2 else None)
        with pytest.raises(Stopped):
            train_tiny(tmp_path / "parts", **settings)
    known = json.loads((tmp_path / "parts/provenance.json").read_text())
    assert len(known["class_counts"]) == 10 and 1000 < sum(known["class_counts"]) < 1797
    if "class_weights" in settings["objective"]:
        wanted = build_objective(
            _digits(known["class_counts"]), tiny_recipe(**settings).objective, 0
        ).class_loss.class_weights
        assert known["class_weights"] == wanted.tolist()
    train_tiny(tmp_path / "parts", resume=True, **settings)
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")


def _digits(counts):
    made = create_model("mu/4", num_classes=10, image_size=8)
    made.labels, made.class_counts = tuple("0123456789"), tuple(counts)
    return made


# Notes.
@pytest.mark.parametrize("settings", [{}, {"class_weights": "balanced"}, {"focal_gamma": 2.0}])
def test_strong_imbalance_is_one_note_if_nothing_is_set(settings):
    labels = np.array([0] * 200 + [1] * 50 + [2] * 9)
    images = ImageSet("train", ("a", "b", "c"), labels, ArrayStore("m", np.zeros((259, 8, 8))))
    source = Source("memory", {"train": images}, images.classes, "")
    notes = imbalance_notes(tiny_recipe(objective=settings), source)
    assert len(notes) == (not settings)
    for note in notes:
        assert "22 times" in note and "(`a` 200, `c` 9)" in note and len(note) < 200
        (setting,) = re.findall(r"`--set ([^`]+)`", note)
        tuned = parse_overrides([setting])
        assert imbalance_notes(tiny_recipe(**tuned), source) == []  # what it says ends it
    assert imbalance_notes(tiny_recipe(objective={"name": "mae"}), source) == []
    assert imbalance_notes(tiny_recipe(data={"sampler": "square_root"}), source) == []
    balanced = Source("memory", {"train": images.subset(np.arange(190, 259))}, images.classes, "")
    assert imbalance_notes(tiny_recipe(), balanced) == []


# Bad input.
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"class_weights": [1.0, 2.0]}, "has 2 weights, and the data has 10 classes"),
        ({"class_weights": [0.0] * 10}, "must have a weight above 0"),
        ({"class_weights_beta": 0.9}, 'needs `class_weights = "effective"`'),
        ({"asymmetric_clip": 0.1}, "`asymmetric_clip` needs `asymmetric_gammas`"),
        ({"focal_gamma": 2.0, "asymmetric_gammas": [0, 4], "name": "sigmoid"}, "not both"),
        ({"class_weights": "balanced", "logit_adjustment": 1.0}, "not both"),
        ({"asymmetric_gammas": [0, 4]}, "is for `sigmoid`, and the objective is `softmax`"),
        (
            {"name": "sigmoid", "logit_adjustment": 1.0},
            "for `softmax`, `guided`, `distill`, and",
        ),
        ({"name": "mae", "focal_gamma": 2.0}, "the objective is `mae`"),
    ],
)
def test_settings_that_do_not_fit_are_one_error(tmp_path, settings, words):
    with pytest.raises(VitcliError, match=words) as caught:
        train_tiny(tmp_path / "run", objective=settings)
    assert caught.value.hint
    assert not (tmp_path / "run").exists()


def test_a_wrong_length_lists_the_classes_in_their_order(tmp_path):
    with pytest.raises(VitcliError) as caught:
        train_tiny(tmp_path / "run", objective={"class_weights": [1.0] * 3})
    assert "`0`, `1`, `2`, `3`, `4`, `5`, `6`, `7` and 2 more" in caught.value.hint


def test_predict_uses_plain_logits(tmp_path):
    """The adjustment is part of the training loss only."""
    objective = build_objective(model(), section(logit_adjustment=1.0), 0)
    images = torch.randn(2, 3, 8, 8)
    assert not any("adjustment" in name for name in objective.state_dict())
    torch.testing.assert_close(objective.model(images), torch.zeros(2, K))
