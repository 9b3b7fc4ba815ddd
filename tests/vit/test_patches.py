"""One definition of a patch: exact inverse, and equal to the strided convolution."""

import pytest
import torch

from vitcli.vit.patches import PatchEmbed, grid_size, patchify, unpatchify


@pytest.mark.parametrize(
    ("size", "patch"), [((32, 32), 8), ((24, 40), 8), ((6, 4), 1), ((14, 14), 7)]
)
def test_unpatchify_is_the_exact_inverse(size, patch):
    images = torch.randn(2, 3, *size)
    patches = patchify(images, patch)
    assert patches.shape == (2, size[0] // patch * (size[1] // patch), patch * patch * 3)
    assert torch.equal(unpatchify(patches, patch, size), images)


def test_patches_are_row_major_and_hold_the_pixels():
    images = torch.arange(2 * 4 * 6.0).reshape(1, 2, 4, 6)
    patches = patchify(images, 2)
    # The second patch of the second row of the grid; rows, columns, channels inside.
    assert torch.equal(patches[0, 4], images[0, :, 2:4, 2:4].permute(1, 2, 0).flatten())


@pytest.mark.parametrize("channels", [1, 3])
def test_embedding_equals_the_strided_convolution(channels):
    torch.manual_seed(0)
    embed = PatchEmbed(channels, 8, 48).double()
    images = torch.randn(2, channels, 32, 24, dtype=torch.float64)
    as_convolution = embed.proj(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(images), as_convolution, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "patch"), [((30, 32), 8), ((32, 30), 8), ((8, 8), 16), ((8, 8), 0)]
)
def test_a_size_that_the_patch_does_not_divide_is_refused(size, patch):
    with pytest.raises((ValueError, ZeroDivisionError)):
        grid_size(size, patch)
