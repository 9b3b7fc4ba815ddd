"""Mixing the pictures of a batch, two and two: mixup and cutmix.

Which two: positions 2 k and 2 k + 1 of the batch. The order of the images is random, so this pairs
them at random, and any number of processes (or parts of a batch) that hold whole pairs can mix
their own: what comes out does not depend on their number. The price is an even batch. big_vision
mixes each picture with the one before it in the whole batch, with one share for all; here each pair
draws its own, which tells the gradient more. Each picture is still in two mixtures.
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vitcli.data.augment.presets import Strength

# Behind (seed, epoch) and (seed, epoch, index, view + 1), which numpy pads with zeros.
STREAM = 1


@dataclass(frozen=True)
class Mix:
    """How the pictures of a batch are mixed with their partners.

    Attributes:
        share: (B,) float32: how much of each picture, and of its label, is its own.
        box: (B, 4) float32: top, left, bottom, right, as shares of the sides: what the partner
            fills with its own pixels there. Empty (all 0) where pictures are blended or left.
    """

    share: Tensor
    box: Tensor

    def part(self, start: int, stop: int) -> "Mix":
        """The pictures `start` to `stop`; both even."""
        assert start % 2 == stop % 2 == 0
        return Mix(self.share[start:stop], self.box[start:stop])

    def to(self, device: torch.device) -> "Mix":
        """The same on `device`."""
        return Mix(self.share.to(device, non_blocking=True), self.box.to(device, non_blocking=True))

    def images(self, images: Tensor) -> Tensor:
        """(V*B, C, Y, X) float, view-major -> the same mixed, each view with its partner's."""
        views = len(images) // len(self.share)
        cut = self._mask(images.shape[2], images.shape[3])  # (B, 1, Y, X)
        # A pair that is cut is not blended as well.
        blend = torch.where(self._is_cut(), 1.0, self.share).view(-1, 1, 1, 1)
        blend, cut = blend.repeat(views, 1, 1, 1), cut.repeat(views, 1, 1, 1)
        other = partners(images)
        mixed = torch.lerp(other, images, blend.to(images.dtype))
        return torch.where(cut, other, mixed)  # (V*B, C, Y, X)

    def targets(self, targets: Tensor) -> Tensor:
        """(B, K) -> the targets mixed in the same shares."""
        return torch.lerp(partners(targets), targets, self.share.to(targets.dtype)[:, None])

    def _is_cut(self) -> Tensor:
        return self.box[:, 2] > self.box[:, 0]

    def _mask(self, rows: int, columns: int) -> Tensor:
        """(B, 1, Y, X): where the partner's pixels lie."""
        y = torch.arange(rows, device=self.box.device) + 0.5
        x = torch.arange(columns, device=self.box.device) + 0.5
        top, left, bottom, right = (edge[:, None] for edge in self.box.unbind(1))
        inside_y = (y >= top * rows) & (y < bottom * rows)  # (B, Y)
        inside_x = (x >= left * columns) & (x < right * columns)  # (B, X)
        return (inside_y[:, :, None] & inside_x[:, None, :])[:, None]


def partners(x: Tensor) -> Tensor:
    """(B, ...) -> (B, ...): 1, 0, 3, 2, ..."""
    return x.view(-1, 2, *x.shape[1:]).flip(1).flatten(0, 1)


def soft_targets(labels: Tensor, num_classes: int) -> Tensor:
    """(B,) whole numbers -> (B, K) ones and zeros; (B, K) stays, as float."""
    return F.one_hot(labels, num_classes).float() if labels.ndim == 1 else labels.float()


def draw_mix(
    seed: int, start: int, batch_size: int, image_size: tuple[int, int], strength: Strength
) -> Mix:
    """The mixing of the whole batch that begins at position `start` of the stream of images.

    Mixup (Zhang et al. 2018): x' = l x + (1 - l) x_partner, l from Beta(a, a); as big_vision, the
    larger of l and 1 - l is a picture's own share. CutMix (Yun et al. 2019): a box of (1 - l) of
    the area about a random pixel comes from the partner; its part inside the picture counts.

    Args:
        seed: of the run.
        start: a multiple of `batch_size`.
        batch_size: over all processes; even.
        image_size: (Y, X): boxes lie on whole pixels of it.
        strength: says how often and how.
    """
    assert batch_size % 2 == 0
    rng = np.random.default_rng((seed, start, 0, 0, STREAM))
    share = np.ones(batch_size // 2)
    box = np.zeros((batch_size // 2, 4))
    both = strength.mixup_alpha > 0 and strength.cutmix_alpha > 0
    for pair in range(batch_size // 2):
        if rng.random() >= strength.mix_rate:
            continue
        cut = rng.random() < strength.cutmix_rate if both else strength.cutmix_alpha > 0
        if cut:
            own = float(rng.beta(strength.cutmix_alpha, strength.cutmix_alpha))
            box[pair], share[pair] = cut_box(own, image_size, rng)
        else:
            own = float(rng.beta(strength.mixup_alpha, strength.mixup_alpha))
            share[pair] = max(own, 1 - own)
    each = np.repeat(share, 2).astype(np.float32)
    return Mix(torch.from_numpy(each), torch.from_numpy(box.repeat(2, 0).astype(np.float32)))


def cut_box(
    own: float, image_size: tuple[int, int], rng: np.random.Generator
) -> tuple[NDArray[np.float64], float]:
    """((4,) the box as shares of the sides, the share of the area that is outside it)."""
    rows, columns = image_size
    side = sqrt(1 - own)
    height, width = int(rows * side), int(columns * side)
    y, x = int(rng.integers(rows)), int(rng.integers(columns))
    top, bottom = np.clip([y - height // 2, y + height // 2], 0, rows)
    left, right = np.clip([x - width // 2, x + width // 2], 0, columns)
    area = int(bottom - top) * int(right - left)
    if area == 0:
        return np.zeros(4), 1.0
    box = np.array([top / rows, left / columns, bottom / rows, right / columns])
    return box, 1 - area / (rows * columns)
