"""Cutting images into patches (section 3.1 of the paper): the one definition of a patch.

The model's embedding, the `patchify` command and the masked-patch targets all read this file.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def grid_size(image_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches in an image of (Y, X) pixels.

    Raises:
        ValueError: `patch_size` does not divide both sides, or there is no patch.
    """
    rows, cols = (side // patch_size if patch_size > 0 else 0 for side in image_size)
    if (rows * patch_size, cols * patch_size) != tuple(image_size) or min(rows, cols) < 1:
        raise ValueError(
            f"image size {image_size[0]}x{image_size[1]} is not a multiple of patch size "
            f"{patch_size}"
        )
    return rows, cols


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, C, Y, X) -> (B, N, P*P*C): row-major patches; inside one, rows, columns, channels.

    `x_p` of equation 1 in the paper. The order inside a patch is that of the official code's
    patch kernel (height, width, input channel).
    """
    b, c = images.shape[:2]
    rows, cols = grid_size((images.shape[2], images.shape[3]), patch_size)
    patches = images.reshape(b, c, rows, patch_size, cols, patch_size)  # (B, C, rows, P, cols, P)
    patches = patches.permute(0, 2, 4, 3, 5, 1)  # (B, rows, cols, P, P, C)
    return patches.reshape(b, rows * cols, patch_size * patch_size * c)  # (B, N, P*P*C)


def unpatchify(patches: Tensor, patch_size: int, image_size: tuple[int, int]) -> Tensor:
    """(B, N, P*P*C) -> (B, C, Y, X): the exact inverse of `patchify`."""
    rows, cols = grid_size(image_size, patch_size)
    b, _, values = patches.shape
    c = values // patch_size**2
    images = patches.reshape(b, rows, cols, patch_size, patch_size, c)  # (B, rows, cols, P, P, C)
    images = images.permute(0, 5, 1, 3, 2, 4)  # (B, C, rows, P, cols, P)
    return images.reshape(b, c, *image_size)  # (B, C, Y, X)


def resample_kernel(kernel: Tensor, patch_size: int) -> Tensor:
    """(D, C, P, P) -> (D, C, Q, Q): the patch projection for patches of another size.

    The pseudo-inverse resize of FlexiViT (Beyer et al., 2023, section 3.4): of a patch that is
    resized to Q pixels, bicubic and antialiased, the new kernel makes what the old one made of
    the patch itself, exactly where Q is larger, else as nearly as can be.
    """
    old = kernel.shape[-1]
    if old == patch_size:
        return kernel
    pixels = torch.eye(old * old, dtype=torch.float64, device=kernel.device)
    size = (patch_size, patch_size)
    resized = F.interpolate(
        pixels.reshape(-1, 1, old, old), size=size, mode="bicubic", antialias=True
    )
    inverse = torch.linalg.pinv(resized.flatten(1))  # (Q*Q, P*P)
    new = kernel.double().flatten(2) @ inverse.T  # (D, C, Q*Q)
    return new.unflatten(2, size).to(kernel.dtype)


class PatchEmbed(nn.Module):
    """The linear projection of flattened patches, `E` of equation 1.

    The weight is stored as a convolution kernel (D, C, P, P), the layout of timm and of the
    official code, and applied as the matrix product that it is: on a CPU that is the faster of
    the two, and `tests/test_patches.py` proves both equal.
    """

    def __init__(
        self, num_channels: int, patch_size: int, embed_dim: int, bias: bool = True
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(num_channels, embed_dim, patch_size, stride=patch_size, bias=bias)
        # The norms before and after the projection, see `ViTConfig.pixel_norm` and `patch_norm`.
        self.norm_pixels: nn.Module = nn.Identity()
        self.norm: nn.Module = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> (B, N, D)."""
        kernel = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, P*P*C)
        patches = self.norm_pixels(patchify(images, self.patch_size))  # (B, N, P*P*C)
        x: Tensor = self.norm(F.linear(patches, kernel, self.proj.bias))  # (B, N, D)
        return x
