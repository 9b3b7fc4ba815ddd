"""Other patches for a model that was read: the kernel and the positions are resampled."""

from dataclasses import replace

from torch import nn

from vitcli.errors import VitcliError
from vitcli.vit import Model, VisionTransformer
from vitcli.vit.patches import PatchEmbed, resample_kernel
from vitcli.weights.surgery import carry_positions


def change_patch_size(
    model: Model, patch_size: int, image_size: tuple[int, int] | None = None
) -> None:
    """Cut images into patches of `patch_size` pixels, in place, and carry the positions over.

    Args:
        image_size: (Y, X), or None for the model's own.

    Raises:
        VitcliError: a model without patches of pixels, or sizes that do not divide.
    """
    old = model.config.patch_size if isinstance(model, VisionTransformer) else None
    if old == patch_size and image_size in (None, model.config.image_size):
        return
    if not isinstance(model, VisionTransformer) or not isinstance(model.patch_embed, PatchEmbed):
        raise VitcliError(
            "a ResNet, and the one of a hybrid, sees no patches of pixels",
            hint="leave `model.patch_size` out",
        )
    size = image_size or model.config.image_size
    try:
        config = replace(model.config, patch_size=patch_size, image_size=size)
    except ValueError as error:
        raise VitcliError(
            f"`model.patch_size` = {patch_size} does not fit: {error}",
            hint="`--set model.image_size=[Y,X]`, multiples of it, makes other pictures of it",
        ) from error
    proj = model.patch_embed.proj
    embed = PatchEmbed(config.num_channels, patch_size, config.embed_dim, config.patch_bias)
    embed.proj.weight = nn.Parameter(resample_kernel(proj.weight.detach(), patch_size))
    embed.proj.bias = proj.bias
    model.patch_embed = embed
    if model.load_report is not None and patch_size != old:
        told = f"{old}x{old} -> {patch_size}x{patch_size}, pseudo-inverse"
        model.load_report.fates["patch_embed.proj.weight"] = ("resampled", told)
    carry_positions(model, config)
    if model.preprocess is not None and model.preprocess.image_size != size:
        model.preprocess = model.preprocess.resized_to(size)
