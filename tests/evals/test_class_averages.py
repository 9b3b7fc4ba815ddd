"""Figures averaged over classes: against scikit-learn, by computing again, and by coverage."""

import json
import math
import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from vitcli.evals.class_averages import (
    class_intervals,
    multi_label_averages,
    single_label_averages,
)
from vitcli.evals.intervals import LeaveOneOut, mean_of_intervals, wilson_interval
from vitcli.evals.ranking import Ranking
from vitcli.evals.scoring import (
    multi_label_metrics,
    multi_label_per_class,
    single_label_per_class,
)


def drawn(n=300, k=5, seed=0, skew=0.0, ties=False):
    """(n,) labels and (n, k) probabilities of a model that is often right."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(k, n, p=np.exp(-skew * np.arange(k)) / np.exp(-skew * np.arange(k)).sum())
    logits = rng.normal(size=(n, k))
    logits[np.arange(n), labels] += 1.0
    if ties:
        logits = np.round(logits)
    p = np.exp(logits)
    return labels, p / p.sum(axis=1, keepdims=True)


def single(labels, p, predicted=None, binary=False):
    names = [f"class {k}" for k in range(p.shape[1])]
    predicted = p.argmax(axis=1) if predicted is None else predicted
    return single_label_averages(
        labels,
        predicted,
        names,
        lambda k: (p[:, k], labels == k),
        single_label_per_class(labels, predicted, names),
        binary=binary,
    )


def several(p, targets):
    names = [f"class {k}" for k in range(p.shape[1])]
    found = multi_label_metrics(p, targets)
    table = multi_label_per_class(p, targets, found, names)
    return multi_label_averages(targets, p >= 0.5, names, lambda k: (p[:, k], targets[:, k]), table)


@pytest.mark.parametrize(("skew", "ties"), [(0.0, False), (0.8, False), (0.3, True)])
def test_single_label_figures_are_scikit_learns(skew, ties):
    labels, p = drawn(skew=skew, ties=ties)
    predicted, found = p.argmax(axis=1), single(labels, p)
    assert set(labels) == set(range(5))
    values = found.values
    assert values["balanced_accuracy"] == pytest.approx(
        sk.balanced_accuracy_score(labels, predicted)
    )
    averages = sk.precision_recall_fscore_support(labels, predicted, average="macro")
    for name, wanted in zip(("precision", "recall", "f1"), averages, strict=False):
        assert values[f"macro_{name}"] == pytest.approx(wanted)
    wanted = sk.roc_auc_score(labels, p, multi_class="ovr", average="macro")
    assert values["roc_auc"] == pytest.approx(wanted, abs=1e-12)
    one_hot = np.eye(5)[labels]
    wanted = sk.average_precision_score(one_hot, p, average="macro")
    assert values["map"] == pytest.approx(wanted, abs=1e-12)
    for k, row in enumerate(found.per_class.values()):
        assert row["roc_auc"] == pytest.approx(sk.roc_auc_score(one_hot[:, k], p[:, k]))
        wanted = sk.average_precision_score(one_hot[:, k], p[:, k])
        assert row["average_precision"] == pytest.approx(wanted)
    for name, value in values.items():
        low, high = found.intervals.of[name]
        assert 0 < low < value + 0.01 and value - 0.01 < high < 1, name


def test_two_classes_have_the_plain_area():
    labels, p = drawn(k=2, seed=3)
    found = single(labels, p, binary=True)
    assert found.values["roc_auc"] == pytest.approx(sk.roc_auc_score(labels, p[:, 1]))
    row = found.per_class["class 1"]
    assert row["average_precision"] == pytest.approx(sk.average_precision_score(labels, p[:, 1]))


def test_predictions_of_other_classes_are_wrong():
    labels, p = drawn(seed=1)
    predicted = p.argmax(axis=1)
    predicted[::7] = 5  # a class that the data do not have
    found = single(labels, p, predicted)
    with warnings.catch_warnings(action="ignore"):
        assert found.values["balanced_accuracy"] == pytest.approx(
            sk.balanced_accuracy_score(labels, predicted)
        )
    wanted = sk.f1_score(labels, predicted, average="macro", labels=range(5))
    assert found.values["macro_f1"] == pytest.approx(wanted)


def test_multi_label_figures_are_scikit_learns():
    rng = np.random.default_rng(0)
    targets = (rng.random((200, 4)) < 0.3).astype(np.uint8)
    p = np.clip(0.4 * targets + rng.random((200, 4)) * 0.6, 0, 1)
    found = several(p, targets)
    averages = sk.precision_recall_fscore_support(targets, p >= 0.5, average="macro")
    for name, wanted in zip(("precision", "recall", "f1"), averages, strict=False):
        assert found.values[f"macro_{name}"] == pytest.approx(wanted)
    assert found.values["roc_auc"] == pytest.approx(sk.roc_auc_score(targets, p))
    assert all(found.intervals.of[name] is not None for name in found.values)


def finite(value):
    """Every number in a JSON value is finite."""
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def test_a_class_without_images_is_named_and_left_out():
    labels, p = drawn(k=4)
    labels[labels == 3] = 0
    found = single(labels, p)
    assert found.without_images == ("class 3",) and "class 3" not in found.per_class
    one_hot = np.eye(4)[labels][:, :3]
    assert found.values["roc_auc"] == pytest.approx(sk.roc_auc_score(one_hot, p[:, :3]))
    assert found.values["map"] == pytest.approx(sk.average_precision_score(one_hot, p[:, :3]))
    wanted = sk.f1_score(labels, p.argmax(1), average="macro", labels=range(3))
    assert found.values["macro_f1"] == pytest.approx(wanted)
    targets = np.eye(4, dtype=np.uint8)[labels]
    found = several(p, targets)
    row = found.per_class["class 3"]
    assert (row["recall"], row["f1"], row["roc_auc"]) == (None, None, None)
    assert row["undefined"] == "no image has this label"
    assert found.values["roc_auc"] == pytest.approx(sk.roc_auc_score(targets[:, :3], p[:, :3]))


@pytest.mark.parametrize("n", [1, 40])
def test_one_class_only_has_a_reason_for_each_missing_figure(n):
    _, p = drawn(n=n, k=3)
    found = single(np.ones(n, dtype=np.int64), p)
    assert found.values["roc_auc"] is None and found.values["map"] is None
    assert found.undefined["roc_auc"] == "all images are of the class `class 1`"
    assert found.values["balanced_accuracy"] == pytest.approx((p.argmax(1) == 1).mean())
    facts = {**found.to_json(), "per_class": found.per_class, **found.intervals.to_json()}
    assert finite(facts) and json.loads(json.dumps(facts)) == facts
    nothing = several(p, np.zeros((n, 3), np.uint8))
    assert set(nothing.values.values()) == {None}
    assert nothing.undefined["macro_f1"] == "no image has a label"
    everything = several(p, np.ones((n, 3), np.uint8))
    assert everything.values["roc_auc"] is None and "every label" in everything.undefined["roc_auc"]
    for found in (nothing, everything):
        assert finite({**found.to_json(), "of": found.intervals.to_json(), "t": found.per_class})


def test_leaving_out_an_image_is_computing_again():
    labels, p = drawn(n=40, k=3, ties=True)
    for k in range(3):
        found = Ranking.of(p[:, k], labels == k).roc_auc()
        for i in range(40):
            rest = np.arange(40) != i
            wanted = sk.roc_auc_score(labels[rest] == k, p[rest, k])
            assert found.without[i] == pytest.approx(wanted, abs=1e-12)


def test_the_variance_of_the_area_is_delongs():
    """Placement values written out: DeLong et al. (1988), equations 5 and 6."""
    labels, p = drawn(n=400, k=2)
    found = Ranking.of(p[:, 1], labels == 1).roc_auc()
    x, y = p[labels == 1, 1], p[labels == 0, 1]
    psi = (x[:, None] > y).astype(float)
    wanted = psi.mean(1).var(ddof=1) / len(x) + psi.mean(0).var(ddof=1) / len(y)
    assert found.variance == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize(
    ("right", "images", "chosen"), [(5, 5, 5), (0, 7, 0), (0, 4, 3), (6, 9, 8)]
)
def test_intervals_of_a_class_are_scipys(right, images, chosen):
    found = class_intervals(right, images, chosen)
    for name, n in (("precision", chosen), ("recall", images)):
        if not n:
            assert found[name] is None
            continue
        wanted = stats.binomtest(right, n).proportion_ci(method="wilson")
        assert found[name] == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    wanted = stats.binomtest(right, images + chosen - right).proportion_ci(method="wilson")
    assert found["f1"] == pytest.approx([2 * x / (1 + x) for x in wanted], abs=1e-12)
    f1 = 2 * right / (images + chosen)
    assert found["f1"][0] <= f1 <= found["f1"][1]


def test_a_perfect_model_is_not_proved_perfect():
    labels = np.arange(60) % 3
    found = single(labels, np.eye(3)[labels] * 0.8 + 0.1)
    assert set(found.values.values()) == {1.0}
    for name, (low, high) in found.intervals.of.items():
        assert 0.8 < low < 0.97 and high == 1.0, name
    facts = found.intervals.to_json()
    assert facts["methods"]["map"] == "wilson" and facts["methods"]["per_class"] == "wilson"
    assert facts["methods"]["macro_f1"] == "score"


def test_without_a_rare_class_the_average_is_a_proportion():
    """Classes with equally many images and equal recall: the interval is near Wilson's."""
    correct = np.tile([1] * 16 + [0] * 4, 10)
    rest = (correct.sum() - correct) / 199
    limits = [wilson_interval(0.8, 20)] * 10
    found = mean_of_intervals(LeaveOneOut(0.8, rest), [0.8] * 10, limits, [20] * 10)
    assert found == pytest.approx(wilson_interval(0.8, 200), abs=0.012)


@pytest.mark.parametrize(
    ("counts", "recalls"),
    [([990, 10], [0.99, 0.95]), ([5] * 10, [0.9] * 10), ([200, 50, 10, 4], [0.95, 0.9, 0.8, 0.6])],
)
def test_coverage_of_balanced_accuracy_and_macro_f1(counts, recalls):
    """Often all images of a rare class are right, and resamples of them show no spread."""
    rng, k = np.random.default_rng(0), len(counts)
    chances = np.where(np.eye(k), recalls, (1 - np.array(recalls)[:, None]) / (k - 1))
    shares = chances * np.array(counts)[:, None] / sum(counts)
    f1 = (2 * np.diag(shares) / (shares.sum(0) + shares.sum(1))).mean()
    held = np.zeros(2)
    for _ in range(150):
        table = np.array([rng.multinomial(n, row) for n, row in zip(counts, chances, strict=True)])
        labels, predicted = (np.repeat(x, table.ravel()) for x in np.indices((k, k)).reshape(2, -1))
        of = single(labels, np.full((len(labels), k), 0.5), predicted).intervals.of
        pairs = ((of["balanced_accuracy"], np.mean(recalls)), (of["macro_f1"], f1))
        held += [low <= truth <= high for (low, high), truth in pairs]
    assert (held / 150 >= 0.92).all()


def test_coverage_of_the_area():
    rng, held = np.random.default_rng(0), 0
    truth = stats.norm.cdf(1.5 / math.sqrt(2))
    for _ in range(200):
        labels = (np.arange(80) < 15).astype(np.int64)
        scores = rng.normal(size=80) + 1.5 * labels
        low, high = single(labels, np.stack([-scores, scores], 1), binary=True).intervals.of[
            "roc_auc"
        ]
        held += low <= truth <= high
    assert held / 200 >= 0.92
