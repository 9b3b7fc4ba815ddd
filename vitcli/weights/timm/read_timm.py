"""What the shapes of tensors in timm's layout say, before a model is made of them.

Reading timm's layout: what the tensors, a Hub `config.json` beside them and the caller say.

The names are ours as well, so little is renamed; what has to be found out is what the tensors
do not say: the number of heads, epsilon, pooling, normalisation and class names.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitcli.errors import VitcliError
from vitcli.vit.config import Gelu, Pool, ViTConfig, canonical_pool
from vitcli.vit.variants import VARIANTS
from vitcli.weights.overrides import PICTURES, Stated, stated_preprocess
from vitcli.weights.store import Checkpoint
from vitcli.weights.timm.timm_config import (
    Hub,
    assumed_preprocess,
    eps_of,
    facebook_sign,
    gelu_of,
    heads_of,
    hub_says,
    read_hub,
)
from vitcli.weights.timm.timm_names import timm_names

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


def read_timm(
    tensors: Mapping[str, Tensor], source: str, hub: Mapping[str, Any] | None, stated: Stated
) -> Checkpoint:
    """Tensors of a Vision Transformer in timm's layout -> a checkpoint.

    Args:
        tensors: names -> tensors, as in the file.
        source: how messages call the file.
        hub: the Hub `config.json` beside it, if there is one.
        stated: what the caller says; it goes before everything else.

    Raises:
        VitcliError: another kind of model, with the tensors that contradict; or the number of
            heads is not to be found out, with the keys that say it.
    """
    found, dropped, notes = timm_names(tensors, source)
    beside = read_hub(hub, source)
    shape = {name: tuple(tensor.shape) for name, tensor in found.items()}
    refuse_foreign(shape, source)
    if "pos_embed" not in shape and any("gamma_" in name for name in tensors):
        raise VitcliError(
            f"`{source}` has no `pos_embed`, and the names of a model with rotary positions",
            hint="EVA and DINOv3 are not understood",
        )
    check_dimensions(shape, source)
    config = _config(shape, source, beside, stated, notes)
    base, named = hub_says(beside, config, source, notes)
    if base is None:
        variant = matching_variant(config.embed_dim, config.depth, config.mlp_dim)
        base = assumed_preprocess(
            config, variant, beside, facebook_sign(shape, dropped), stated, notes
        )
    preprocess = stated_preprocess(base, stated.preprocess, config.image_size, config.num_channels)
    labels = stated.labels or named
    trained = config.num_classes > 0
    return Checkpoint(config, found, "timm", labels, preprocess, trained, None, dropped, notes)


def _config(shape: Shapes, source: str, hub: Hub, stated: Stated, notes: list[str]) -> ViTConfig:
    wanted = ["patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"]
    if missing := [name for name in wanted if name not in shape]:
        raise another(source, shape, "Vision Transformer", missing)
    width, channels, patch, patch_x = shape[wanted[0]]
    hidden, mlp_dim = shape[wanted[1]][0], shape[wanted[2]][1]
    if patch != patch_x:
        raise VitcliError(
            f"`{source}` has patches of {patch}x{patch_x} pixels; ours are square",
            hint="give weights of another model",
        )
    stem, stem_width = None, 1.0
    if any(name.startswith("patch_embed.backbone.") for name in shape):
        root = shape.get("patch_embed.backbone.stem.conv.weight", ())
        if root[2:] != (7, 7) or "patch_embed.backbone.stem.norm.weight" not in shape:
            raise another(source, shape, "hybrid", ["patch_embed.backbone.stem.conv.weight (7x7)"])
        stem, stem_width, channels = stages(shape, "patch_embed.backbone."), root[0] / 64, root[1]
    depth = 1 + max(int(m[1]) for n in shape if (m := re.match(r"blocks\.(\d+)\.", n)))
    registers = shape["reg_token"][1] if "reg_token" in shape else 0
    tokens = {name: name in shape for name in ("cls_token", "dist_token")}
    gated = hidden == 2 * mlp_dim
    if "norm_pre.weight" in shape and not (stated.norm_eps or hub.architecture):
        notes.append("epsilon 1e-6: assumed; CLIP's models have `--set model.norm_eps=1e-5`")
    pool = _pool(shape, width, hub, source, stated, notes)
    pixels = patch if stem is None else patch * 4 * 2 ** max(len(stem) - 1, 0)
    size, covers = _image_size(shape, pixels, registers + sum(tokens.values()), hub, source, stated)
    gelu: Gelu = stated.gelu or gelu_of(hub, source, gated=gated)  # type: ignore[assignment]
    try:
        return ViTConfig(
            image_size=size,
            patch_size=patch,
            num_channels=channels,
            embed_dim=width,
            depth=depth,
            num_heads=_num_heads(shape, (width, depth, mlp_dim), hub, source, stated, notes),
            mlp_dim=mlp_dim,
            num_classes=shape["head.weight"][0] if "head.weight" in shape else 0,
            pool=pool,
            class_token=tokens["cls_token"],
            distillation_token=tokens["dist_token"],
            distillation_head=pool == "distilled" and "head_dist.weight" in shape,
            num_registers=registers,
            position="learned" if "pos_embed" in shape else "none",
            position_covers_prefix=covers,
            representation_size=shape.get("pre_logits.fc.weight", (None,))[0],
            qkv_bias="blocks.0.attn.qkv.bias" in shape,
            qk_norm="blocks.0.attn.q_norm.weight" in shape,
            layer_scale=hub.layer_scale if "blocks.0.ls1.gamma" in shape else None,
            mlp="swiglu" if gated else "gelu",
            gelu=gelu,
            norm_eps=stated.norm_eps or eps_of(hub),
            norm_before_blocks="norm_pre.weight" in shape,
            norm_after_pool="fc_norm.weight" in shape and "norm.weight" not in shape,
            patch_bias="patch_embed.proj.bias" in shape,
            stem=stem,
            stem_width=stem_width,
            stem_arithmetic="timm" if stem is not None else "google",
            dropout_rate=hub.dropout_rate,
            drop_path_rate=hub.drop_path_rate,
        )
    except ValueError as error:
        raise VitcliError(
            f"`{source}` cannot be understood as a Vision Transformer: {error}",
            hint=ANOTHER,
        ) from error


def _pool(
    shape: Shapes, width: int, hub: Hub, source: str, stated: Stated, notes: list[str]
) -> Pool:
    """What the head was trained on; the caller goes first where the file has no pool of its own."""
    head = shape.get("head.weight", (0, width))[1]
    if "attn_pool.latent" in shape:
        return "map"
    if "dist_token" in shape and ("head_dist.weight" in shape or "head.weight" not in shape):
        return "distilled"
    if head == 2 * width:
        return "distilled" if "dist_token" in shape else "token_mean"
    said = hub.pool
    if not said and stated.pool in ("token", "mean", "cls", "tok", "avg", "gap", "map"):
        said = stated.pool  # no file of timm's has a head for the others
    if said:
        try:
            return _possible(canonical_pool(said), shape)
        except ValueError as error:
            whose = "the config.json of" if hub.pool else "`model.pool` does not fit"
            raise VitcliError(
                f"{whose} `{source}`: {error}",
                hint="mend it, or remove it" if hub.pool else "another `--set model.pool=…`",
            ) from error
    if hub.pool == "":
        notes.append("the file has no pooling (a logit for every token); one is chosen")
    if "cls_token" not in shape:
        return "mean"
    if "fc_norm.weight" in shape and "norm.weight" not in shape:
        notes.append("pool `mean`, as the last norm is `fc_norm`; `--set model.pool=…` changes it")
        return "mean"
    return "token"


def _possible(pool: Pool, shape: Shapes) -> Pool:
    """`pool`, where the tensors have what it takes; a ValueError where they have not."""
    if pool == "token" and "cls_token" not in shape:
        raise ValueError("pool `token` takes a class token, and there is none (`mean` would do)")
    if pool == "map":  # with its tensors it would not have been asked for
        raise ValueError("pool `map` takes an attention pool, and there is none")
    return pool


def _num_heads(
    shape: Shapes,
    sizes: tuple[int, int, int],
    hub: Hub,
    source: str,
    stated: Stated,
    notes: list[str],
) -> int:
    """From the caller, the config, the width of QK-norm, the architecture, or these sizes."""
    heads = stated.num_heads or hub.num_heads
    if not heads and "blocks.0.attn.q_norm.weight" in shape:
        heads = sizes[0] // shape["blocks.0.attn.q_norm.weight"][0]
    if not heads and (heads := heads_of(hub, sizes[0])):
        notes.append(f"{heads} heads, as timm has them for {hub.architecture}")
    if not heads and (name := matching_variant(*sizes)):
        heads = VARIANTS[name].num_heads
        notes.append(f"{heads} heads, from the variant {name} that the shapes match")
    if not heads and sizes == (1536, 40, 4096):
        heads = 24
        notes.append("24 heads, from DINOv2's ViT-g that the shapes match")
    if not heads:
        missing = ["model.num_heads"]
        root = shape.get("patch_embed.backbone.stem.conv.weight", shape["patch_embed.proj.weight"])
        if not hub.pretrained and root[1] in PICTURES:
            missing += [f"preprocess.{k}" for k in ("mean", "std") if k not in stated.preprocess]
        raise unsaid(source, missing)
    if sizes[0] % heads:
        raise VitcliError(
            f"`model.num_heads` is {heads}, which does not divide width {sizes[0]}",
            hint="the number of heads that it was trained with is wanted",
        )
    return int(heads)


def unsaid(source: str, keys: list[str]) -> VitcliError:
    """The error for a file that says nothing of `keys` and matches no variant."""
    example = {"model.num_heads": "4", "model.image_size": "224"}
    settings = " ".join(f"--set {key}={example.get(key, '0.5')}" for key in keys)
    return VitcliError(
        f"`{source}` does not say {', '.join(f'`{key}`' for key in keys)}, no config.json "
        "lies beside it, and its shapes match no variant",
        hint=f"say it, for example `{settings}`",
    )


def matching_variant(embed_dim: int, depth: int, mlp_dim: int) -> str | None:
    """The published variant of exactly these sizes; ours (Pico, Nano) come with a header."""
    for name, v in VARIANTS.items():
        sizes = v.embed_dim, v.depth, v.mlp_dim
        if sizes == (embed_dim, depth, mlp_dim) and name not in ("Pico", "Nano", "mu"):
            return name
    return None


def _image_size(
    shape: Shapes, pixels: int, prefix: int, hub: Hub, source: str, stated: Stated
) -> tuple[tuple[int, int], bool]:
    """The (Y, X) that the stored positions belong to, and whether prefix tokens have one too."""
    said = hub.image_size
    if "pos_embed" not in shape:
        size = stated.image_size or said
        if size is None:
            raise unsaid(source, ["model.image_size"])
        if size[0] % pixels or size[1] % pixels:
            raise VitcliError(
                f"images of {size[0]}x{size[1]} pixels do not divide into patches of {pixels}, "
                f"as `{source}` has them",
                hint=f"`--set model.image_size=[Y,X]`, multiples of {pixels}",
            )
        return size, not hub.arguments.get("no_embed_class")
    count = shape["pos_embed"][1]
    uncovered = bool(hub.arguments.get("no_embed_class"))
    counts = [(count, False)] if uncovered else [(count - prefix, True), (count, False)]
    for size in (said, stated.image_size):
        for n, covers in counts:
            if size and (size[0] // pixels) * (size[1] // pixels) == n:
                return (size[0] // pixels * pixels, size[1] // pixels * pixels), covers
    for n, covers in counts:
        if n > 0 and math.isqrt(n) ** 2 == n:
            return (math.isqrt(n) * pixels, math.isqrt(n) * pixels), covers
    raise VitcliError(
        f"`{source}` has {count} positions, no square grid, and does not say which one",
        hint=f"`--set model.image_size=[Y,X]` in pixels, the patch size is {pixels}",
    )
