"""Mixup and cutmix: mix the images of a batch in pairs.

Positions 2k and 2k + 1 of the batch form a pair. The order of the images is random, so the pairs
are random too, and every process (or micro-batch) that holds whole pairs can mix its own part with
the same result. The price is an even batch size. big_vision mixes each image with its predecessor
in the whole batch with one lambda for all; here each pair draws its own lambda, so that one step
has weak and strong mixtures.
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vitcli.data.augment.policies import AugmentSettings, Rng

# numpy pads seeds with zeros. (seed, epoch) shuffles and (seed, epoch, index, view + 1) augments,
# so mixing takes a fifth word that both leave at 0.
MIX_STREAM = 1


@dataclass(frozen=True)
class Mix:
    """How the images of a batch are mixed with their partners.

    Attributes:
        lam: (B,) float32: lambda, the weight of an image's own pixels and label.
        box: (B, 4) float32: top, left, bottom, right as fractions of the sides. The partner's
            pixels fill this box. All 0 for an image that is blended or unchanged.
    """

    lam: Tensor
    box: Tensor

    def part(self, start: int, stop: int) -> "Mix":
        """The images `start` to `stop`; both are even."""
        assert start % 2 == stop % 2 == 0
        return Mix(self.lam[start:stop], self.box[start:stop])

    def to(self, device: torch.device) -> "Mix":
        """A copy on `device`."""
        return Mix(self.lam.to(device, non_blocking=True), self.box.to(device, non_blocking=True))

    def images(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) float -> (B, C, Y, X): each image mixed with its partner."""
        cut = self._mask(images.shape[2], images.shape[3])  # (B, 1, Y, X)
        # A pair under cutmix is not blended, although its lambda is below 1.
        blend = torch.where(self.box[:, 2] > self.box[:, 0], 1.0, self.lam).view(-1, 1, 1, 1)
        other = swap_pairs(images)
        mixed = torch.lerp(other, images, blend.to(images.dtype))
        return torch.where(cut, other, mixed)  # (B, C, Y, X)

    def targets(self, targets: Tensor) -> Tensor:
        """(B, K) -> (B, K): the targets mixed with the same lambda."""
        return torch.lerp(swap_pairs(targets), targets, self.lam.to(targets.dtype)[:, None])

    def _mask(self, rows: int, columns: int) -> Tensor:
        """(B, 1, Y, X): True for the partner's pixels."""
        y = torch.arange(rows, device=self.box.device) + 0.5
        x = torch.arange(columns, device=self.box.device) + 0.5
        top, left, bottom, right = (edge[:, None] for edge in self.box.unbind(1))
        inside_y = (y >= top * rows) & (y < bottom * rows)  # (B, Y)
        inside_x = (x >= left * columns) & (x < right * columns)  # (B, X)
        return (inside_y[:, :, None] & inside_x[:, None, :])[:, None]


def swap_pairs(x: Tensor) -> Tensor:
    """(B, ...) -> (B, ...) in the order 1, 0, 3, 2, ..."""
    return x.view(-1, 2, *x.shape[1:]).flip(1).flatten(0, 1)


def soft_targets(labels: Tensor, num_classes: int) -> Tensor:
    """(B,) class numbers -> (B, K) one-hot; (B, K) multi-label targets -> the same as float."""
    return F.one_hot(labels, num_classes).float() if labels.ndim == 1 else labels.float()


def mixes_pairs(settings: AugmentSettings) -> bool:
    """Mixup or cutmix is switched on."""
    return bool(settings.mix_rate and (settings.mixup_alpha or settings.cutmix_alpha))


def sample_mix(
    seed: int,
    start: int,
    batch_size: int,
    image_size: tuple[int, int],
    settings: AugmentSettings,
) -> Mix:
    """The mixing of the whole batch that begins after `start` images of the run.

    Mixup (Zhang et al. 2018): x' = lam * x + (1 - lam) * x_partner, lam from Beta(a, a). As in
    big_vision, an image keeps the larger of lam and 1 - lam. CutMix (Yun et al. 2019): a box with
    1 - lam of the area around a random pixel comes from the partner, clipped to the image; lam is
    then 1 - the clipped area. Boxes lie on whole pixels of `image_size`. `batch_size` is that of
    all processes, and even.
    """
    assert batch_size % 2 == 0
    rng = np.random.default_rng((seed, start, 0, 0, MIX_STREAM))
    lam = np.ones(batch_size // 2)
    box = np.zeros((batch_size // 2, 4))
    both = settings.mixup_alpha > 0 and settings.cutmix_alpha > 0
    for pair in range(batch_size // 2):
        if rng.random() >= settings.mix_rate:
            continue
        cut = rng.random() < settings.cutmix_rate if both else settings.cutmix_alpha > 0
        if cut:
            sampled = float(rng.beta(settings.cutmix_alpha, settings.cutmix_alpha))
            box[pair], lam[pair] = sample_cutmix_box(sampled, image_size, rng)
        else:
            sampled = float(rng.beta(settings.mixup_alpha, settings.mixup_alpha))
            lam[pair] = max(sampled, 1 - sampled)
    each = np.repeat(lam, 2).astype(np.float32)
    return Mix(torch.from_numpy(each), torch.from_numpy(box.repeat(2, 0).astype(np.float32)))


def sample_cutmix_box(
    lam: float, image_size: tuple[int, int], rng: Rng
) -> tuple[NDArray[np.float64], float]:
    """((4,) the clipped box as fractions of the sides, the fraction of the area outside it)."""
    rows, columns = image_size
    side = sqrt(1 - lam)
    height, width = int(rows * side), int(columns * side)
    y, x = int(rng.integers(rows)), int(rng.integers(columns))
    top, bottom = np.clip([y - height // 2, y + height // 2], 0, rows)
    left, right = np.clip([x - width // 2, x + width // 2], 0, columns)
    area = int(bottom - top) * int(right - left)
    if area == 0:
        return np.zeros(4), 1.0
    box = np.array([top / rows, left / columns, bottom / rows, right / columns])
    return box, 1 - area / (rows * columns)
