"""Edit a loaded model in place: image size, patch size, pooling, head; the load report notes it."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vitcli.config.choices import Resize
from vitcli.data.labels import label_text
from vitcli.errors import VitcliError, quoted
from vitcli.vit import ResNet, ResNetConfig, VisionTransformer, ViTConfig
from vitcli.vit.config import canonical_pool
from vitcli.vit.patches import PatchEmbed, resample_kernel
from vitcli.vit.position import (
    OffsetBias,
    describe_resampling,
    is_position,
    resample_offsets,
    resample_table,
)
from vitcli.weights.load_report import LoadReport, TensorStatus
from vitcli.weights.loaded import LoadedModel, TargetScale


def set_position_resize(network: VisionTransformer, method: Resize) -> None:
    """Set the method that resamples the positions of `network` for images of another size.

    Raises:
        VitcliError: `computed`, but the positions are not fixed.
    """
    if method == "computed" and network.config.position != "sincos2d":
        raise VitcliError(
            f"`model.position_resize` is `computed`, but the positions are "
            f"`{network.config.position}`, not `sincos2d`",
            hint="use another method, for example `bicubic`",
        )
    network.position_resize = method


def resize(model: LoadedModel, image_size: tuple[int, int]) -> None:
    """Change the image size in place: keep the patch size and resample the positions.

    The entries of prefix tokens do not change (section 3.2 of the paper).

    Raises:
        VitcliError: the patch size does not divide the image size.
    """
    if image_size == model.config.image_size:
        return
    network = model.network
    if isinstance(network, ResNet):
        new = replace(network.config, image_size=image_size)
        if new.axial:  # other ResNets have no positions
            _resample_offsets(network, new, model.load_report)
        network.config = new
    else:
        resample_positions(network, resized_config(network.config, image_size), model.load_report)
    if model.preprocess is not None:
        model.preprocess = model.preprocess.resized_to(image_size)


def _resample_offsets(network: ResNet, new: ResNetConfig, report: LoadReport | None) -> None:
    """Resample the relative positions of an AxialResNet for the image size of `new`."""
    with torch.device("meta"):
        wanted = {name: p.shape[0] for name, p in ResNet(new).named_parameters()}
    for name, p in list(network.named_parameters()):
        before, after = (p.shape[0] + 1) // 2, (wanted[name] + 1) // 2
        if is_position(name) and before != after:
            table = nn.Parameter(resample_offsets(p.detach(), after))
            owner, _, last = name.rpartition(".")
            setattr(network.get_submodule(owner), last, table)
            if report is not None:
                detail = f"offsets of {before} -> {after} cells, linear"
                report.status[name] = ("resampled", detail)


def resample_positions(
    network: VisionTransformer, new: ViTConfig, report: LoadReport | None
) -> None:
    """Resample the positions for the grid of `new`, which becomes the network's configuration."""
    old = network.config
    method = network.position_resize
    for name, old_table in list(network.state_dict(keep_vars=True).items()):
        if not is_position(name):
            continue
        stored = old_table.detach()
        table = resample_table(name, stored, old, new.grid, method)
        if table is stored:  # the table of an axis that does not change
            continue
        # Learned tables are parameters, fixed ones are buffers; the kind must not change.
        owner, _, last = name.rpartition(".")
        learned = isinstance(old_table, nn.Parameter)
        module = network.get_submodule(owner)
        setattr(module, last, nn.Parameter(table) if learned else table)
        if isinstance(module, OffsetBias):
            module.grid = new.grid
        if report is not None:
            detail = describe_resampling(name, old.grid, new.grid, method)
            report.status[name] = ("resampled", detail)
    network.config = new


def resized_config(config: ViTConfig, image_size: tuple[int, int]) -> ViTConfig:
    """Return `config` with another image size.

    Raises:
        VitcliError: the patch size does not divide it.
    """
    try:
        return replace(config, image_size=image_size)
    except ValueError as error:
        patch = config.pixels_per_patch
        near = "x".join(str(max(patch, round(side / patch) * patch)) for side in image_size)
        fits = near == "x".join(map(str, image_size))
        hint = "use a smaller size" if fits else f"the nearest multiple of {patch} is {near}"
        raise VitcliError(str(error), hint=hint) from error


def replace_head(
    model: LoadedModel,
    labels: Sequence[str],
    *,
    keep_pre_logits: bool = False,
    keep_projection: bool = False,
) -> None:
    """Replace the head in place by a zero head for `labels` (section 3.2).

    This also removes the hidden layer of the pre-training head, which is "a little more robust than
    re-initialising the last layer" (appendix D.3). If there is a distilled head, the new head reads
    both tokens: it can express everything that the mean of two heads can. A projection to text
    embeddings and the norm of a zero-shot head are removed too, unless `keep_projection`.
    """
    status = model.load_report.status if model.load_report else {}
    network = model.network
    if isinstance(network, VisionTransformer):
        _drop_pretraining_head(network, status, keep_pre_logits=keep_pre_logits)
        if not keep_projection:
            drop_projection(network, status)
    network.config = replace(network.config, num_classes=len(labels))
    device = next(network.parameters()).device
    width = getattr(network.config, "head_dim", network.config.feature_dim)
    network.head = nn.Linear(width, len(labels), device=device)
    nn.init.zeros_(network.head.weight)
    nn.init.zeros_(network.head.bias)
    for name in ("head.weight", "head.bias"):
        status[name] = ("new", f"zero, {len(labels)} classes")
    model.labels = tuple(labels)
    model.head_activation, model.head_trained = "softmax", False
    model.temperature, model.target_scale, model.thresholds = 1.0, TargetScale(), None


def _drop_pretraining_head(
    network: VisionTransformer,
    status: dict[str, tuple[TensorStatus, str]],
    *,
    keep_pre_logits: bool,
) -> None:
    config = network.config
    size = config.representation_size if keep_pre_logits else None
    network.config = replace(config, representation_size=size, distillation_head=False)
    if config.representation_size and not keep_pre_logits:
        network.pre_logits = nn.Identity()
        for name in ("pre_logits.fc.weight", "pre_logits.fc.bias"):
            status[name] = ("dropped", "pre-training head")
    if network.head_dist is not None:
        network.head_dist = None
        for name in ("head_dist.weight", "head_dist.bias"):
            status[name] = ("dropped", "the new head reads both tokens")


def drop_projection(
    network: VisionTransformer, status: dict[str, tuple[TensorStatus, str]]
) -> None:
    """Remove the projection to text embeddings and the norm of a zero-shot head, in place."""
    if network.config.projection_size:
        network.projection = nn.Identity()
        status["projection.weight"] = ("dropped", "projects to text embeddings")
    network.config = replace(network.config, projection_size=None, head_norm=False)


def linear_head(model: LoadedModel) -> tuple[Tensor, Tensor] | None:
    """Return weight (K, F) and bias (K,) of the head, or of the mean of two heads; or None."""
    head, second = model.network.head, getattr(model.network, "head_dist", None)
    if not isinstance(head, nn.Linear):
        return None
    if second is None:
        return head.weight.detach(), head.bias.detach()
    weight = torch.cat([head.weight, second.weight], dim=1) / 2  # (K, 2 D)
    return weight.detach(), (head.bias + second.bias).detach() / 2


def fold_temperature(model: LoadedModel) -> None:
    """Divide the head by the temperature in place, and set the temperature to 1.

    Layouts without a temperature then give the same probabilities.
    """
    if model.temperature == 1.0:
        return
    with torch.no_grad():
        for head in _heads(model):
            head.weight.div_(model.temperature)
            head.bias.div_(model.temperature)
    model.temperature = 1.0


def fold_target_scale(model: LoadedModel) -> None:
    """Put the scale of a regression into the head in place: it then gives numbers in their unit."""
    scale = model.target_scale
    with torch.no_grad():
        for head in _heads(model):  # of a mean of two heads, each has the scale
            head.weight.mul_(scale.std)
            head.bias.copy_(scale.restore(head.bias))
    model.target_scale = TargetScale()


def _heads(model: LoadedModel) -> list[nn.Linear]:
    heads = (model.network.head, getattr(model.network, "head_dist", None))
    return [head for head in heads if isinstance(head, nn.Linear)]


def change_pool(model: LoadedModel, pool: str) -> None:
    """Change the pooling in place. Drop the head, which belongs to the old pooling.

    Raises:
        VitcliError: the model lacks a class token or an attention pool that the pooling needs.
    """
    try:
        wanted = canonical_pool(pool)
        network = model.network
        if isinstance(network, ResNet):
            if wanted != "mean":
                raise ValueError(f"a ResNet pools `mean`, not `{wanted}`")
            return
        config = network.config
        two_heads = config.distillation_head and wanted == config.pool
        new = replace(config, pool=wanted, distillation_head=two_heads)
    except ValueError as error:
        raise VitcliError(
            f"this pooling does not fit the model: {error}", hint="change `--set model.pool`"
        ) from error
    if wanted == config.pool:
        return
    if wanted == "map":
        raise VitcliError(
            "this model has no attention pool", hint="use `token`, `mean` or `quadrants`"
        )
    # A head that was trained on one pooling gives meaningless logits on another.
    status = model.load_report.status if model.load_report else {}
    going = ("head.", "head_dist.", "pre_logits.", "attn_pool.")
    drop_projection(network, status)
    config, new = network.config, replace(new, projection_size=None, head_norm=False)
    for name in [n for n in model.state_dict() if n.startswith(going)]:
        status[name] = ("dropped", f"belongs to pool `{config.pool}`, not `{wanted}`")
    if config.norm_after_pool and new.pooled_dim != config.pooled_dim:
        raise VitcliError(
            f"pool `{wanted}` does not fit a model that normalises after pooling",
            hint="use `token` or `mean`",
        )
    network.config = replace(new, num_classes=0, representation_size=None)
    network.head, network.pre_logits = nn.Identity(), nn.Identity()
    network.head_dist, network.attn_pool = None, None
    model.labels, model.head_trained, model.temperature = None, False, 1.0
    model.thresholds = None


def match_classes(wanted: Sequence[str], known: Sequence[str]) -> list[int] | None:
    """Return the index in `known` of each name in `wanted`, or None if a name has no match.

    Two names that match the same class have none, see `find_classes`.
    """
    indices = [i for i in find_classes(wanted, known) if i is not None]
    is_exact = set(wanted) <= set(known)
    return indices if is_exact or len(set(indices)) == len(wanted) else None


def find_classes(wanted: Sequence[str], known: Sequence[str]) -> list[int | None]:
    """Return the index in `known` of each name in `wanted`; None for a name without a match.

    Exact names are tried first. Then case, `_`, `-`, spaces and the encoding of accents are
    ignored, and one of ImageNet's comma-separated synonyms is enough.
    """
    exact = {name: i for i, name in enumerate(known)}
    if all(name in exact for name in wanted):
        return [exact[name] for name in wanted]
    loose: dict[str, int | None] = {}
    for i, name in enumerate(known):
        for synonym in {_plain(name), *map(_plain, name.split(","))}:
            loose[synonym] = None if synonym in loose else i  # two classes share the synonym
    return [exact.get(name, loose.get(_plain(name))) for name in wanted]


def _plain(name: str) -> str:
    return " ".join(label_text(name).casefold().replace("_", " ").replace("-", " ").split())


def prepare_finetune(
    model: LoadedModel,
    labels: Sequence[str],
    *,
    image_size: tuple[int, int] | None = None,
    pool: str | None = None,
    keep_head: bool = False,
) -> LoadedModel:
    """Prepare `model` in place for fine-tuning on the classes `labels`, with a zero head.

    Args:
        labels: class names of the data, in the order of its labels.
        image_size: (Y, X), or None to keep the model's.
        pool: a new pooling, or None to keep the model's.
        keep_head: keep the rows of the trained head for `labels`, matched by name, and the hidden
            layer before it.

    Raises:
        VitcliError: the patch size does not divide the image size, the pooling does not fit, or the
            head that is to be kept is not trained or does not know all of `labels`.
    """
    rows = match_classes(labels, model.labels) if keep_head and model.labels else None
    if keep_head and (rows is None or not model.head_trained):
        missing = [name for name in labels if name not in (model.labels or ())]
        lacking = f"does not know {quoted(missing, 5)}" if missing else "is not trained"
        raise VitcliError(
            f"the head of the model cannot be kept: it {lacking}",
            "leave out `keep_head`: a new head is made for the classes of the data",
        )
    if pool is not None:
        change_pool(model, pool)
    old = linear_head(model) if rows is not None else None
    kept = old is not None
    replace_head(model, labels, keep_pre_logits=kept, keep_projection=kept)
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
    """Change the patch size in place: resample the patch projection and the positions.

    Args:
        image_size: (Y, X), or None to keep the model's.

    Raises:
        VitcliError: the model has a stem, or the sizes do not divide.
    """
    network = model.network
    old = network.config.patch_size if isinstance(network, VisionTransformer) else None
    if old == patch_size and image_size in (None, model.config.image_size):
        return
    if not isinstance(network, VisionTransformer) or not isinstance(
        network.patch_embed, PatchEmbed
    ):
        raise VitcliError(
            "this model has no patches of pixels, because it begins with convolutions",
            hint="remove `model.patch_size`",
        )
    if network.config.pixel_norm and patch_size != old:
        raise VitcliError(
            "this model normalises the pixels of a patch, so its patch size cannot change",
            hint="remove `model.patch_size`",
        )
    size = image_size or model.config.image_size
    try:
        config = replace(network.config, patch_size=patch_size, image_size=size)
    except ValueError as error:
        raise VitcliError(
            f"`model.patch_size` = {patch_size} does not fit: {error}",
            hint="set `--set model.image_size=[Y,X]` to multiples of the patch size",
        ) from error
    if patch_size != old:
        proj = network.patch_embed.proj
        embed = PatchEmbed(config.num_channels, patch_size, config.embed_dim, config.patch_bias)
        embed.proj.weight = nn.Parameter(resample_kernel(proj.weight.detach(), patch_size))
        embed.proj.bias = proj.bias
        embed.norm = network.patch_embed.norm
        network.patch_embed = embed
        if model.load_report is not None:
            detail = f"{old}x{old} -> {patch_size}x{patch_size}, pseudo-inverse"
            model.load_report.status["patch_embed.proj.weight"] = ("resampled", detail)
    resample_positions(network, config, model.load_report)
    if model.preprocess is not None and model.preprocess.image_size != size:
        model.preprocess = model.preprocess.resized_to(size)
