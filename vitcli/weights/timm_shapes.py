"""What the shapes of tensors in timm's layout say, before a model is made of them."""

import re
from collections.abc import Mapping

from vitcli.errors import VitcliError

Shapes = Mapping[str, tuple[int, ...]]
ANOTHER = "is this the file of another architecture, or a part of one?"

# The names of a Vision Transformer in timm's layout, options included.
KNOWN = re.compile(
    r"(cls|dist|reg)_token|pos_embed|patch_embed\.backbone\..*|attn_pool\..*"
    r"|(norm|norm_pre|fc_norm|head|head_dist|patch_embed\.proj|pre_logits\.fc)\.(weight|bias)"
    r"|blocks\.\d{1,6}\.(norm[12]|attn\.(qkv|proj|[qk]_norm)|mlp\.fc[12])\.(weight|bias)"
    r"|blocks\.\d{1,6}\.ls[12]\.gamma"
)
# What a tensor's name gives away of the models that are built of other blocks.
OTHERS = re.compile(r"relative_position|rel_pos|rope|layers\.\d|stages\.|\bq_bias|network\.|window")
# The tensors whose sizes become settings of the model -> their number of dimensions.
DIMENSIONS = {
    "pos_embed": 3,
    "cls_token": 3,
    "dist_token": 3,
    "reg_token": 3,
    "head.weight": 2,
    "pre_logits.fc.weight": 2,
    "patch_embed.proj.weight": 4,
    "patch_embed.backbone.stem.conv.weight": 4,
    "stem.conv.weight": 4,
    "blocks.0.mlp.fc1.weight": 2,
    "blocks.0.mlp.fc2.weight": 2,
    "blocks.0.attn.q_norm.weight": 1,
}


def another(source: str, shape: Shapes, kind: str, missing: list[str]) -> VitcliError:
    """The error for another architecture: what is missing of `kind`, and what is there instead."""
    strange = [name for name in shape if OTHERS.search(name)]
    told = f"; it has {', '.join(f'`{name}`' for name in strange[:3])}" if strange else ""
    return VitcliError(
        f"`{source}` is not a plain {kind}: no {', '.join(f'`{name}`' for name in missing)}{told}",
        hint=ANOTHER,
    )


def refuse_foreign(shape: Shapes, source: str) -> None:
    """Raises a VitcliError that names the tensors which no Vision Transformer of timm's has."""
    if "blocks.0.mlp.fc1.weight" not in shape:
        return  # then another name is the better one to begin with
    if foreign := [name for name in shape if not KNOWN.fullmatch(name)]:
        more = f" and {len(foreign) - 6} more" * (len(foreign) > 6)
        raise VitcliError(
            f"`{source}` does not fit a plain Vision Transformer; not part of the model: "
            f"{', '.join(foreign[:6])}{more}",
            hint=ANOTHER,
        )


def check_dimensions(shape: Shapes, source: str) -> None:
    """Raises a VitcliError that names the tensors which no setting could be read from."""
    wrong = [
        f"{name} is {shape[name]}, where {count} sizes above 0 are wanted"
        for name, count in DIMENSIONS.items()
        if name in shape and (len(shape[name]) != count or 0 in shape[name])
    ]
    if wrong:
        raise VitcliError(
            f"`{source}` holds tensors of another shape: {', '.join(wrong)}", hint=ANOTHER
        )


def stages(shape: Shapes, prefix: str) -> tuple[int, ...]:
    """Units of each stage of the ResNet whose names begin with `prefix`."""
    # One digit: a stage of a large number would have as many before it. `compare` names it.
    pattern = re.compile(re.escape(prefix) + r"stages\.(\d)\.blocks\.(\d{1,6})\.conv1\.weight")
    units: dict[int, int] = {}
    for name in shape:
        if m := pattern.fullmatch(name):
            units[int(m[1])] = max(units.get(int(m[1]), 0), int(m[2]) + 1)
    return tuple(units.get(i, 0) for i in range(max(units, default=-1) + 1))
