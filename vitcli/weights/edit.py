"""Changing a model that was read: another resolution, another head; and the report of a load.

Other patches for a model that was read: the kernel and the positions are resampled.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vitcli.errors import VitcliError
from vitcli.vit import ResNet, VisionTransformer, ViTConfig
from vitcli.vit.patches import PatchEmbed, resample_kernel
from vitcli.vit.position import Grid, Resize, attended_length, carry, is_position
from vitcli.weights.load_report import Fate, LoadReport
from vitcli.weights.loaded import LoadedModel
from vitcli.weights.meta_init import unfilled
from vitcli.weights.store import Checkpoint
from vitcli.weights.validation import check_depth, compare


def build(
    checkpoint: Checkpoint,
    source: str,
    *,
    image_size: tuple[int, int] | None = None,
    position_resize: Resize = "bicubic",
) -> LoadedModel:
    """The model that `checkpoint` describes, in eval mode, at `image_size` if one is given.

    Raises:
        VitcliError: tensors that are missing, too many or of another shape, all of them named.
    """
    config = checkpoint.config
    report = LoadReport(source, checkpoint.layout, notes=list(checkpoint.notes))
    shapes = {name: tuple(t.shape) for name, t in checkpoint.tensors.items()}
    report.shapes = checkpoint.dropped_shapes | shapes
    check_depth(config, len(shapes), source)
    network = unfilled(config)
    if isinstance(network, VisionTransformer):
        network.position_resize = position_resize
    tensors = _floats(checkpoint.tensors, source)
    expected = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    compare({name: tuple(t.shape) for name, t in tensors.items()}, expected, source)
    network.load_state_dict(tensors, assign=True)
    for name in expected:
        dtype = checkpoint.tensors[name].dtype
        report.fates[name] = ("loaded", "" if dtype == torch.float32 else f"from {dtype}")
    for name, reason in checkpoint.dropped.items():
        report.fates[name] = ("dropped", reason)
    network.requires_grad_(True)
    model = LoadedModel(
        network,
        labels=checkpoint.labels,
        preprocess=checkpoint.preprocess,
        head_activation=checkpoint.activation,
        temperature=checkpoint.temperature,
        head_trained=checkpoint.head_trained and config.num_classes > 0,
        load_report=report,
    )
    if image_size is not None:
        resize(model, image_size)
    return model.eval()


def _floats(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    if wrong := [f"{n} ({t.dtype})" for n, t in tensors.items() if not t.is_floating_point()]:
        raise VitcliError(
            f"`{source}` holds tensors that are no weights: {', '.join(wrong[:5])}",
            hint="quantised files are not read; take the float32 one",
        )
    return {name: tensor.float() for name, tensor in tensors.items()}


def resize(model: LoadedModel, image_size: tuple[int, int]) -> None:
    """Change the resolution in place: the patch size stays, positions are carried to the new grid.

    The entries of class token and registers are kept (section 3.2 of the paper).

    Raises:
        VitcliError: the patch size does not divide the image size.
    """
    if image_size == model.config.image_size:
        return
    network = model.network
    if isinstance(network, ResNet):  # it has no positions
        network.config = replace(network.config, image_size=image_size)
    else:
        carry_positions(network, resized_config(network.config, image_size), model.load_report)
    if model.preprocess is not None:
        model.preprocess = model.preprocess.resized_to(image_size)


def carry_positions(network: VisionTransformer, new: ViTConfig, report: LoadReport | None) -> None:
    """Make `new`, of another grid, the network's own; the report names what is resampled."""
    old = network.config
    method = network.position_resize
    for name, table in list(network.state_dict(keep_vars=True).items()):
        if not is_position(name):
            continue
        stored = table.detach()
        carried = carry(name, stored, old, new.grid, method)
        if carried is stored:  # of the side that stays
            continue
        # The same kind as before: a parameter where learned, a buffer where fixed.
        owner, _, last = name.rpartition(".")
        learned = isinstance(table, nn.Parameter)
        setattr(network.get_submodule(owner), last, nn.Parameter(carried) if learned else carried)
        if report is not None:
            told = _resampled(name, old.grid, new.grid, method)
            report.fates[name] = ("resampled", told)
    network.config = new


def _resampled(name: str, old: Grid, new: Grid, method: Resize) -> str:
    """What the report says of the position table `name`: from where to where, and how."""
    if name.endswith("rel_pos"):
        before, after = attended_length(name, old), attended_length(name, new)
        return f"offsets of {before} -> {after} patches, linear"
    if name.endswith(("_x", "_y")):
        side = 1 if name.endswith("_x") else 0
        return f"{old[side]} -> {new[side]}, linear"
    return f"{old[0]}x{old[1]} -> {new[0]}x{new[1]}, {method}"


def resized_config(config: ViTConfig, image_size: tuple[int, int]) -> ViTConfig:
    """`config` at another image size.

    Raises:
        VitcliError: the patch size does not divide it.
    """
    patch = config.pixels_per_patch
    if any(side < patch or side % patch for side in image_size):
        near = "x".join(str(max(patch, round(side / patch) * patch)) for side in image_size)
        raise VitcliError(
            f"image size {image_size[0]}x{image_size[1]} is not a multiple of patch size {patch}",
            hint=f"the nearest that is: {near}",
        )
    return replace(config, image_size=image_size)


def replace_head(
    model: LoadedModel, labels: Sequence[str], *, keep_pre_logits: bool = False
) -> None:
    """A new zero head for `labels`, in place; the pre-training head goes, both of its layers.

    Removing the hidden layer too is "a little more robust than re-initialising the last layer"
    (paper, D.3). Where there was a second, distilled head, the new one reads both tokens: it can
    be whatever the mean of two is.
    """
    fates = model.load_report.fates if model.load_report else {}
    network = model.network
    if isinstance(network, VisionTransformer):
        _drop_pretraining_head(network, fates, keep_pre_logits=keep_pre_logits)
    network.config = replace(network.config, num_classes=len(labels))
    device = next(network.parameters()).device
    network.head = nn.Linear(network.config.feature_dim, len(labels), device=device)
    nn.init.zeros_(network.head.weight)
    nn.init.zeros_(network.head.bias)
    for name in ("head.weight", "head.bias"):
        fates[name] = ("new", f"zero, {len(labels)} classes")
    model.labels = tuple(labels)
    model.head_activation, model.head_trained = "softmax", False
    model.temperature = 1.0


def _drop_pretraining_head(
    network: VisionTransformer, fates: dict[str, tuple[Fate, str]], *, keep_pre_logits: bool
) -> None:
    config = network.config
    size = config.representation_size if keep_pre_logits else None
    network.config = replace(config, representation_size=size, distillation_head=False)
    if config.representation_size and not keep_pre_logits:
        network.pre_logits = nn.Identity()
        for name in ("pre_logits.fc.weight", "pre_logits.fc.bias"):
            fates[name] = ("dropped", "pre-training head")
    if network.head_dist is not None:
        network.head_dist = None
        for name in ("head_dist.weight", "head_dist.bias"):
            fates[name] = ("dropped", "the new head reads both tokens")


def linear_head(model: LoadedModel) -> tuple[Tensor, Tensor] | None:
    """(K, F) weight and (K,) bias of the head, of two distilled ones their mean; None for none."""
    head, second = model.network.head, getattr(model.network, "head_dist", None)
    if not isinstance(head, nn.Linear):
        return None
    if second is None:
        return head.weight.detach(), head.bias.detach()
    weight = torch.cat([head.weight, second.weight], dim=1) / 2  # (K, 2 D)
    return weight.detach(), (head.bias + second.bias).detach() / 2


def fold_temperature(model: LoadedModel) -> None:
    """Divide the head by the model's temperature, in place, which is 1 then.

    For layouts that have no word for it: the probabilities stay, and so does every prediction.
    """
    if model.temperature == 1.0:
        return
    with torch.no_grad():
        for head in (model.network.head, getattr(model.network, "head_dist", None)):
            if isinstance(head, nn.Linear):
                head.weight.div_(model.temperature)
                head.bias.div_(model.temperature)
    model.temperature = 1.0


def change_pool(model: LoadedModel, pool: str) -> None:
    """Let the features be pooled otherwise, in place; a head of another width goes with it.

    Raises:
        VitcliError: the model has no class token to pool, or no attention pool.
    """
    from vitcli.vit.config import normal_pool

    try:
        wanted = normal_pool(pool)
        network = model.network
        if isinstance(network, ResNet):
            if wanted != "mean":
                raise ValueError(f"a ResNet takes the mean of its feature map, not `{wanted}`")
            return
        config = network.config
        two_heads = config.distillation_head and wanted == config.pool
        new = replace(config, pool=wanted, distillation_head=two_heads)
    except ValueError as error:
        raise VitcliError(
            f"this model cannot be pooled so: {error}", hint="another `--set model.pool=…`"
        ) from error
    if wanted == config.pool:
        return
    if wanted == "map":
        raise VitcliError(
            "this model has no attention pool", hint="`token`, `mean` or `quadrants` will do"
        )
    # What was trained on one pooling means nothing on another.
    fates = model.load_report.fates if model.load_report else {}
    going = ("head.", "head_dist.", "pre_logits.", "attn_pool.")
    for name in [n for n in model.state_dict() if n.startswith(going)]:
        fates[name] = ("dropped", f"belongs to pool `{config.pool}`, not `{wanted}`")
    if config.norm_after_pool and new.pooled_dim != config.pooled_dim:
        raise VitcliError(
            f"pool `{wanted}` does not fit a model that normalises after pooling",
            hint="`token` or `mean` will do",
        )
    network.config = replace(new, num_classes=0, representation_size=None)
    network.head, network.pre_logits = nn.Identity(), nn.Identity()
    network.head_dist, network.attn_pool = None, None
    model.labels, model.head_trained, model.temperature = None, False, 1.0


def match_classes(wanted: Sequence[str], known: Sequence[str]) -> list[int] | None:
    """For each of `wanted` its index in `known`, by name; None when one of them is not there.

    Names are equal as they stand; else without regard to case, `_` and spaces; else when one of
    the synonyms that ImageNet separates by commas is.
    """
    exact = {name: i for i, name in enumerate(known)}
    if all(name in exact for name in wanted):
        return [exact[name] for name in wanted]
    loose: dict[str, int | None] = {}
    for i, name in enumerate(known):
        for synonym in {_plain(name), *map(_plain, name.split(","))}:
            loose[synonym] = None if synonym in loose else i  # two classes share it: no match
    found = [exact.get(name, loose.get(_plain(name))) for name in wanted]
    indices = [i for i in found if i is not None]
    return indices if len(set(indices)) == len(wanted) else None


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def prepare_finetune(
    model: LoadedModel,
    labels: Sequence[str],
    *,
    image_size: tuple[int, int] | None = None,
    pool: str | None = None,
    keep_head: bool = False,
) -> LoadedModel:
    """`model` made ready for the classes `labels`, in place: resolution, pooling, new zero head.

    Args:
        labels: class names of the data, in the order of its labels.
        image_size: (Y, X), or None for the model's own.
        pool: another pooling than the model's.
        keep_head: where the trained head knows all of `labels`, by name, keep its rows (in the
            order of `labels`) and the hidden layer before it instead of starting at zero.

    Raises:
        VitcliError: a size that the patch size does not divide, or a pooling that does not fit.
    """
    if pool is not None:
        change_pool(model, pool)
    rows = match_classes(labels, model.labels) if keep_head and model.labels else None
    old = linear_head(model) if rows is not None and model.head_trained else None
    replace_head(model, labels, keep_pre_logits=old is not None)
    head = model.network.head
    if old is not None and rows is not None and isinstance(head, nn.Linear):
        with torch.no_grad():
            head.weight.copy_(old[0][rows])
            head.bias.copy_(old[1][rows])
        model.head_trained = True
    if image_size is not None:
        resize(model, image_size)
    return model


def change_patch_size(
    model: LoadedModel, patch_size: int, image_size: tuple[int, int] | None = None
) -> None:
    """Cut images into patches of `patch_size` pixels, in place, and carry the positions over.

    Args:
        image_size: (Y, X), or None for the model's own.

    Raises:
        VitcliError: a model without patches of pixels, or sizes that do not divide.
    """
    network = model.network
    old = network.config.patch_size if isinstance(network, VisionTransformer) else None
    if old == patch_size and image_size in (None, model.config.image_size):
        return
    if not isinstance(network, VisionTransformer) or not isinstance(
        network.patch_embed, PatchEmbed
    ):
        raise VitcliError(
            "a ResNet, and the one of a hybrid, sees no patches of pixels",
            hint="leave `model.patch_size` out",
        )
    size = image_size or model.config.image_size
    try:
        config = replace(network.config, patch_size=patch_size, image_size=size)
    except ValueError as error:
        raise VitcliError(
            f"`model.patch_size` = {patch_size} does not fit: {error}",
            hint="`--set model.image_size=[Y,X]`, multiples of it, makes other pictures of it",
        ) from error
    proj = network.patch_embed.proj
    embed = PatchEmbed(config.num_channels, patch_size, config.embed_dim, config.patch_bias)
    embed.proj.weight = nn.Parameter(resample_kernel(proj.weight.detach(), patch_size))
    embed.proj.bias = proj.bias
    network.patch_embed = embed
    if model.load_report is not None and patch_size != old:
        told = f"{old}x{old} -> {patch_size}x{patch_size}, pseudo-inverse"
        model.load_report.fates["patch_embed.proj.weight"] = ("resampled", told)
    carry_positions(network, config, model.load_report)
    if model.preprocess is not None and model.preprocess.image_size != size:
        model.preprocess = model.preprocess.resized_to(size)
