"""What an eye would measure around each point of a picture: the targets of `Descriptors`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_ORIENTATIONS = 8
NUM_LEVELS = 4
# Per pixel: unsigned orientations at two scales, signed ones at a third, and a soft histogram of
# three colour channels.
NUM_DESCRIPTORS = 3 * NUM_ORIENTATIONS + 3 * NUM_LEVELS
TARGET_DIM = 4 * NUM_DESCRIPTORS  # of one quadrant: its 2x2 parts


def orientations(images: Tensor, signed: bool) -> Tensor:
    """(B, C, Y, X) -> (B, 8, Y, X): the gradient's root magnitude, shared among directions.

    Of the channel whose gradient is largest, as HOG takes it (Dalal and Triggs, 2005). Unsigned
    directions do not tell light on dark from dark on light.
    """
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    dx = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    dy = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    strongest = (dx * dx + dy * dy).argmax(dim=1, keepdim=True)  # (B, 1, Y, X)
    dx, dy = dx.gather(1, strongest), dy.gather(1, strongest)
    angle = torch.atan2(dy, dx) * (1 if signed else 2)
    step = 2 * math.pi / NUM_ORIENTATIONS
    centres = torch.arange(NUM_ORIENTATIONS, device=images.device) * step
    near = torch.cos(angle - centres[None, :, None, None])  # (B, 8, Y, X)
    share = (NUM_ORIENTATIONS / 2 * near).softmax(dim=1)
    return (dx * dx + dy * dy + 1e-12).pow(0.25) * share


def describe(images: Tensor) -> Tensor:
    """(B, C, Y, X) in 0..1 -> (B, 36, Y, X): orientations at three scales, and colours.

    Sides must be multiples of 4. A grey picture is described as one with three equal channels.
    """
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    half, quarter = F.avg_pool2d(images, 2), F.avg_pool2d(images, 4)
    levels = torch.linspace(0, 1, NUM_LEVELS, device=images.device)
    colours = torch.exp(-(((images[:, :, None] - levels[:, None, None]) * NUM_LEVELS) ** 2))
    return torch.cat(
        [
            orientations(images, signed=False),
            F.interpolate(orientations(half, signed=False), scale_factor=2.0),
            F.interpolate(orientations(quarter, signed=True), scale_factor=4.0),
            colours.flatten(1, 2),
        ],
        dim=1,
    )


def quadrant_targets(images: Tensor) -> Tensor:
    """(B, C, Y, X) in 0..1 -> (B, 4, 144): what each quadrant's 2x2 parts look like, standardised.

    Over the batch and the quadrants each value has mean 0 and deviation 1.
    """
    cells = F.adaptive_avg_pool2d(describe(images), 4)  # (B, 36, 4, 4)
    parts = cells.reshape(*cells.shape[:2], 2, 2, 2, 2)  # (B, 36, 2, 2, 2, 2)
    targets = parts.permute(0, 2, 4, 1, 3, 5).reshape(len(images), 4, -1)  # (B, 4, 144)
    mean, std = targets.mean(dim=(0, 1)), targets.std(dim=(0, 1))
    return (targets - mean) / (std + 1e-4)
