"""Changing a model that was read: another resolution, another head; and the report of a load."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from vitcli.errors import VitcliError
from vitcli.vit import VisionTransformer, ViTConfig
from vitcli.vit.position import Resize, resample
from vitcli.weights.store import Checkpoint

Fate = Literal["loaded", "resampled", "new", "dropped"]


@dataclass
class LoadReport:
    """What became of every tensor.

    Attributes:
        source: the MODEL that was asked for.
        layout: `vitcli`, `timm`, `huggingface`, `google`, or `variant` for random weights.
        position_resize: how this file's positions are carried to another grid.
        fates: tensor name -> (`loaded`, `resampled`, `new` or `dropped`; the reason or sizes).
        notes: what was assumed, one line each.
    """

    source: str
    layout: str
    position_resize: Resize = "bicubic"
    fates: dict[str, tuple[Fate, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def names(self, fate: Fate) -> list[str]:
        """The tensors that met with `fate`."""
        return [name for name, (met, _) in self.fates.items() if met == fate]

    def line(self) -> str:
        """One line: how many tensors of each kind, those not loaded as they were by name."""
        parts = [f"{len(self.names('loaded'))} tensors loaded ({self.layout})"]
        for fate in ("resampled", "new", "dropped"):
            if names := self.names(fate):
                shown = ", ".join(f"{n} ({self.fates[n][1]})" for n in names[:3])
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                parts.append(f"{fate}: {shown}{more}")
        return "; ".join(parts)


def build(
    checkpoint: Checkpoint,
    source: str,
    *,
    image_size: tuple[int, int] | None = None,
    position_resize: Resize = "bicubic",
) -> VisionTransformer:
    """The model that `checkpoint` describes, in eval mode, at `image_size` if one is given.

    Raises:
        VitcliError: tensors that are missing, too many or of another shape, all of them named.
    """
    config = checkpoint.config
    report = LoadReport(source, checkpoint.layout, position_resize, notes=list(checkpoint.notes))
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
        model = VisionTransformer(config)
    tensors = _floats(checkpoint.tensors, source)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    _compare({name: tuple(t.shape) for name, t in tensors.items()}, expected, source)
    model.load_state_dict(tensors, assign=True)
    for name in expected:
        dtype = checkpoint.tensors[name].dtype
        report.fates[name] = ("loaded", "" if dtype == torch.float32 else f"from {dtype}")
    for name, reason in checkpoint.dropped.items():
        report.fates[name] = ("dropped", reason)
    model.requires_grad_(True)
    model.labels, model.preprocess = checkpoint.labels, checkpoint.preprocess
    model.head_trained = checkpoint.head_trained and config.num_classes > 0
    model.load_report = report
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


def _compare(
    found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], source: str
) -> None:
    """Raises one error that names every tensor which contradicts the model."""
    missing = [n for n in expected if n not in found]
    foreign = [n for n in found if n not in expected]
    shapes = [
        f"{n} is {found[n]}, not {expected[n]}"
        for n in expected
        if n in found and found[n] != expected[n]
    ]
    groups = {"missing": missing, "not part of the model": foreign, "of another shape": shapes}
    told = [
        f"{kind}: {', '.join(names[:6])}" + (f" and {len(names) - 6} more" * (len(names) > 6))
        for kind, names in groups.items()
        if names
    ]
    if told:
        raise VitcliError(
            f"`{source}` does not fit a plain Vision Transformer; {'; '.join(told)}",
            hint="is this the file of another architecture, or a part of one?",
        )


def resize(model: VisionTransformer, image_size: tuple[int, int]) -> None:
    """Change the resolution in place: the patch size stays, positions are carried to the new grid.

    The entries of class token and registers are kept (section 3.2 of the paper).

    Raises:
        VitcliError: the patch size does not divide the image size.
    """
    old = model.config
    if image_size == old.image_size:
        return
    new = resized_config(old, image_size)
    method: Resize = model.load_report.position_resize if model.load_report else "bicubic"
    if model.pos_embed is not None and old.grid != new.grid:
        covered = old.num_prefix_tokens if old.position_covers_prefix else 0
        table = model.pos_embed.detach()
        prefix, grid = table[:, :covered], table[:, covered:]
        table = torch.cat([prefix, resample(grid, old.grid, new.grid, method)], dim=1)
        # The same kind as before: a parameter where learned, a buffer where fixed.
        learned = isinstance(model.pos_embed, nn.Parameter)
        model.pos_embed = nn.Parameter(table) if learned else table
        if model.load_report is not None:
            sizes = f"{old.grid[0]}x{old.grid[1]} -> {new.grid[0]}x{new.grid[1]}"
            model.load_report.fates["pos_embed"] = ("resampled", f"{sizes}, {method}")
    model.config = new
    if model.preprocess is not None:
        model.preprocess = model.preprocess.resized_to(image_size)


def resized_config(config: ViTConfig, image_size: tuple[int, int]) -> ViTConfig:
    """`config` at another image size.

    Raises:
        VitcliError: the patch size does not divide it.
    """
    patch = config.patch_size
    if any(side < patch or side % patch for side in image_size):
        near = "x".join(str(max(patch, round(side / patch) * patch)) for side in image_size)
        raise VitcliError(
            f"image size {image_size[0]}x{image_size[1]} is not a multiple of patch size {patch}",
            hint=f"the nearest that is: {near}",
        )
    return replace(config, image_size=image_size)


def replace_head(
    model: VisionTransformer, labels: Sequence[str], *, keep_pre_logits: bool = False
) -> None:
    """A new zero head for `labels`, in place; the pre-training head goes, both of its layers.

    Removing the hidden layer too is "a little more robust than re-initialising the last layer"
    (paper, D.3).
    """
    config = model.config
    size = config.representation_size if keep_pre_logits else None
    model.config = replace(config, num_classes=len(labels), representation_size=size)
    device = model.patch_embed.proj.weight.device
    fates = model.load_report.fates if model.load_report else {}
    if config.representation_size and not keep_pre_logits:
        model.pre_logits = nn.Identity()
        for name in ("pre_logits.fc.weight", "pre_logits.fc.bias"):
            fates[name] = ("dropped", "pre-training head")
    model.head = nn.Linear(model.config.feature_dim, len(labels), device=device)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    for name in ("head.weight", "head.bias"):
        fates[name] = ("new", f"zero, {len(labels)} classes")
    model.labels = tuple(labels)
    model.head_trained = False


def change_pool(model: VisionTransformer, pool: str) -> None:
    """Let the features be pooled otherwise, in place; a head of another width goes with it.

    Raises:
        VitcliError: the model has no class token to pool, or no attention pool.
    """
    from vitcli.vit.variants import normal_pool

    config = model.config
    try:
        wanted = normal_pool(pool)
        new = replace(config, pool=wanted)
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
    going = ("head.", "pre_logits.", "attn_pool.")
    for name in [n for n in model.state_dict() if n.startswith(going)]:
        fates[name] = ("dropped", f"belongs to pool `{config.pool}`, not `{wanted}`")
    if config.norm_after_pool and new.pooled_dim != config.pooled_dim:
        raise VitcliError(
            f"pool `{wanted}` does not fit a model that normalises after pooling",
            hint="`token` or `mean` will do",
        )
    model.config = replace(new, num_classes=0, representation_size=None)
    model.head, model.pre_logits, model.attn_pool = nn.Identity(), nn.Identity(), None
    model.labels, model.head_trained = None, False


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
    model: VisionTransformer,
    labels: Sequence[str],
    *,
    image_size: tuple[int, int] | None = None,
    pool: str | None = None,
    keep_head: bool = False,
) -> VisionTransformer:
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
    old = model.head if rows is not None and model.head_trained else None
    replace_head(model, labels, keep_pre_logits=old is not None)
    if rows is not None and isinstance(old, nn.Linear) and isinstance(model.head, nn.Linear):
        with torch.no_grad():
            model.head.weight.copy_(old.weight[rows])
            model.head.bias.copy_(old.bias[rows])
        model.head_trained = True
    if image_size is not None:
        resize(model, image_size)
    return model
