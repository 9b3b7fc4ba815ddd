"""Mixing of a batch: against its formulas, by its statistics, and whoever does it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from vitcli.config.schema import AugmentSection, ObjectiveSection
from vitcli.data.augment.mixing import (
    mixes_pairs,
    sample_cutmix_box,
    sample_mix,
    soft_targets,
    swap_pairs,
)
from vitcli.data.augment.transform import resolve_augment
from vitcli.preprocess import Preprocess
from vitcli.train.objectives import build_objective
from vitcli.weights.loaded import create_model

SIZE = (24, 32)
IMAGES = torch.randn(8, 3, *SIZE, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 4, 4, 1, 0])


def resolved(**settings):
    return resolve_augment(AugmentSection(**settings))


def test_partners_are_neighbours():
    assert swap_pairs(torch.arange(6)).tolist() == [1, 0, 3, 2, 5, 4]


def test_mixup_is_its_formula():
    mix = sample_mix(0, 0, 8, SIZE, resolved(mixup_alpha=0.8))
    images, targets = mix.images(IMAGES), mix.targets(soft_targets(LABELS, 5))
    order = [1, 0, 3, 2, 5, 4, 7, 6]
    for i, j in enumerate(order):
        own = float(mix.lam[i])
        assert 0.5 <= own <= 1 and own == float(mix.lam[j])
        torch.testing.assert_close(images[i], own * IMAGES[i] + (1 - own) * IMAGES[j])
        wanted = torch.zeros(5)
        wanted[LABELS[i]] += own
        wanted[LABELS[j]] += 1 - own
        torch.testing.assert_close(targets[i], wanted)


def test_cutmix_is_its_formula():
    mix = sample_mix(3, 0, 8, SIZE, resolved(cutmix_alpha=1.0))
    images, targets = mix.images(IMAGES), mix.targets(soft_targets(LABELS, 5))
    assert (mix.lam < 1).any()
    for i, j in enumerate([1, 0, 3, 2, 5, 4, 7, 6]):
        from_other = (images[i] == IMAGES[j]).all(0)
        from_own = (images[i] == IMAGES[i]).all(0)
        assert (from_other ^ from_own).all()  # every pixel is from exactly one of the two
        rows, columns = from_other.any(1).sum(), from_other.any(0).sum()
        assert from_other.sum() == rows * columns  # a box
        assert float(mix.lam[i]) == pytest.approx(1 - float(from_other.float().mean()), abs=1e-6)
        assert float(targets[i].sum()) == pytest.approx(1.0)
        if LABELS[i] != LABELS[j]:
            assert float(targets[i, LABELS[i]]) == pytest.approx(float(mix.lam[i]))


def test_the_loss_is_the_mixture_of_both_losses():
    """Zhang et al. 2018: cross-entropy with a mixed target is the mixture of cross-entropies."""
    mix = sample_mix(1, 0, 8, SIZE, resolved(mixup_alpha=0.5))
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    each = F.cross_entropy(logits, LABELS, reduction="none")
    other = F.cross_entropy(logits, swap_pairs(LABELS), reduction="none")
    wanted = (mix.lam * each + (1 - mix.lam) * other).mean()
    found = F.cross_entropy(logits, mix.targets(soft_targets(LABELS, 5)))
    torch.testing.assert_close(found, wanted)


def shares(many=3000, **settings):
    return sample_mix(0, 0, 2 * many, (200, 200), resolved(**settings))


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_shares_of_mixup_come_from_beta(alpha):
    own = shares(mixup_alpha=alpha).lam[::2].numpy()

    def larger(x):  # the distribution of the larger of l and 1 - l
        return stats.beta(alpha, alpha).cdf(x) - stats.beta(alpha, alpha).cdf(1 - x)

    below = own < 0.99  # nearer to 1, float32 has not all values
    assert stats.binomtest(int(below.sum()), len(own), larger(0.99)).pvalue > 0.01
    assert stats.kstest(own[below], lambda x: larger(x) / larger(0.99)).pvalue > 0.01


def test_boxes_of_cutmix_have_the_area_that_beta_says():
    rng = np.random.default_rng(0)
    for own in (0.1, 0.5, 0.9):
        inside = 0
        for _ in range(300):
            box, share = sample_cutmix_box(own, (200, 300), rng)
            height, width = (box[2] - box[0]) * 200, (box[3] - box[1]) * 300
            assert share == pytest.approx(1 - height * width / 60000)
            if box.min() > 0 and box.max() < 1:  # nothing of it was cut off by the border
                inside += 1
                assert abs(share - own) < 0.02
                assert height / width == pytest.approx(2 / 3, abs=0.03)
            assert share >= own - 0.02
        assert inside > 10 or own < 0.5


def test_rates():
    mix = shares(mixup_alpha=0.8, cutmix_alpha=1.0, mix_rate=0.6, cutmix_rate=0.3)
    cut = (mix.box[::2, 2] > mix.box[::2, 0]).sum()
    mixed = (mix.lam[::2] < 1).sum()
    assert stats.binomtest(int(mixed), 3000, 0.6).pvalue > 0.005
    assert stats.binomtest(int(cut), int(mixed), 0.3).pvalue > 0.005
    nothing = shares(many=5, mixup_alpha=0.8, mix_rate=0.0)
    assert (nothing.lam == 1).all() and not mixes_pairs(resolved(mixup_alpha=0.8, mix_rate=0.0))
    assert (shares(cutmix_alpha=1.0, cutmix_rate=0.0).box[:, 2] > 0).any()  # the only one there is


def test_it_is_of_the_seed_and_the_place_in_the_stream():
    how = resolved(mixup_alpha=0.8)
    first = sample_mix(0, 64, 8, SIZE, how).lam
    assert torch.equal(first, sample_mix(0, 64, 8, SIZE, how).lam)
    for other in (sample_mix(1, 64, 8, SIZE, how), sample_mix(0, 72, 8, SIZE, how)):
        assert not torch.equal(first, other.lam)


def test_parts_of_a_batch_mix_as_the_whole():
    mix = sample_mix(5, 0, 8, SIZE, resolved(mixup_alpha=0.8, cutmix_alpha=1.0))
    whole = mix.images(IMAGES)
    parts = [mix.part(a, b).images(IMAGES[a:b]) for a, b in ((0, 2), (2, 6), (6, 8))]
    assert torch.equal(torch.cat(parts), whole)


def test_several_labels_stay_several():
    many = torch.tensor([[1, 0, 1], [0, 1, 0]])
    assert torch.equal(soft_targets(many, 3), many.float())
    mix = sample_mix(0, 0, 2, SIZE, resolved(mixup_alpha=0.8))
    own = mix.lam[0]
    torch.testing.assert_close(
        mix.targets(soft_targets(many, 3))[0], torch.stack([own, 1 - own, own])
    )


@pytest.mark.parametrize("name", ["softmax", "guided"])
def test_objectives_take_shares_of_classes(name):
    """Ones and zeros are what the class itself is; a mixture lies between its two classes."""
    model = create_model("Pico/4", num_classes=5, image_size=8, pool="quadrants").eval()
    section = ObjectiveSection(name=name, label_smoothing=0.1, descriptor_weight=0.0)
    model.preprocess = Preprocess((8, 8))
    objective = build_objective(model, section, seed=0)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    one, other = torch.tensor([0, 1, 2, 3]), torch.tensor([4, 1, 0, 2])
    with torch.no_grad():
        losses = [objective(images, labels)[0] for labels in (one, other)]
        soft, figures = objective(images, soft_targets(one, 5))
        mixed = 0.7 * soft_targets(one, 5) + 0.3 * soft_targets(other, 5)
        between = objective(images, mixed)[0]
        plain = objective(images, one)[1]
    torch.testing.assert_close(soft, losses[0])
    assert figures["accuracy"] == plain["accuracy"]
    torch.testing.assert_close(between, 0.7 * losses[0] + 0.3 * losses[1])
