"""timm's layout: tensor names and shapes, and the `config.json` of its Hub repositories.

The names are ours as well, so nothing is renamed; what has to be found out is what the tensors
do not say: the number of heads, epsilon, pooling, normalisation and class names.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from vitcli.data.transforms import Preprocess
from vitcli.errors import VitcliError
from vitcli.vit.variants import VARIANTS, Gelu, Pool, ViTConfig, normal_pool
from vitcli.weights.stated import Stated, as_size, per_channel, stated_preprocess
from vitcli.weights.store import Checkpoint

PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")
# Training leftovers that a classifier does not use.
LEFTOVERS = ("mask_token", "decoder_", "decoder.", "teacher.", "optimizer.")


def is_timm(names: Mapping[str, Any] | list[str]) -> bool:
    """Whether these tensor names are timm's, a common prefix aside."""
    return any(re.fullmatch(r"([\w.]+\.)?patch_embed\.proj\.weight", name) for name in names)


def read_timm(
    tensors: Mapping[str, Tensor], source: str, hub: Mapping[str, Any] | None, stated: Stated
) -> Checkpoint:
    """Tensors in timm's layout -> a checkpoint.

    Args:
        tensors: names -> tensors, as in the file.
        source: how messages call the file.
        hub: the Hub `config.json` beside it, if there is one.
        stated: what the caller says; it goes before everything else.

    Raises:
        VitcliError: not a plain Vision Transformer; or the number of heads is not to be found out,
            with the keys that say it.
    """
    found = _without_prefix(tensors)
    dropped = {n: "not used by a classifier" for n in found if n.startswith(LEFTOVERS)}
    found = {n: t for n, t in found.items() if n not in dropped}
    hub = hub or {}
    notes: list[str] = []
    config = _config(found, source, hub, stated, notes)
    preprocess = _preprocess(config, hub, stated, notes)
    labels = stated.labels or _labels(hub, config.num_classes)
    return Checkpoint(
        config, found, "timm", labels, preprocess, config.num_classes > 0, None, dropped, notes
    )


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = dict(tensors)
    while prefix := next((p for p in PREFIXES if all(n.startswith(p) for n in found)), None):
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


def _config(
    found: Mapping[str, Tensor],
    source: str,
    hub: Mapping[str, Any],
    stated: Stated,
    notes: list[str],
) -> ViTConfig:
    shape = {name: tuple(tensor.shape) for name, tensor in found.items()}
    arguments = hub.get("model_args") or {}
    try:
        width, channels, patch, patch_x = shape["patch_embed.proj.weight"]
        mlp_dim = shape["blocks.0.mlp.fc1.weight"][0]
    except (KeyError, ValueError) as error:
        raise VitcliError(
            f"`{source}` is not a plain Vision Transformer: `{error.args[0]}`",
            hint="hybrids, DeiT with distillation and SwiGLU models are not understood yet",
        ) from error
    if patch != patch_x:
        raise VitcliError(
            f"`{source}` has patches of {patch}x{patch_x} pixels; ours are square",
            hint="give weights of another model",
        )
    blocks = [int(m[1]) for n in shape if (m := re.match(r"blocks\.(\d+)\.", n))]
    depth = max(blocks) + 1
    registers = shape["reg_token"][1] if "reg_token" in shape else 0
    class_token = "cls_token" in shape
    after = "fc_norm.weight" in shape and "norm.weight" not in shape
    size, covers = _image_size(shape, patch, registers + class_token, hub, source, stated)
    heads = _num_heads(shape, (width, depth, mlp_dim), hub, source, stated, notes)
    return ViTConfig(
        image_size=size,
        patch_size=patch,
        num_channels=channels,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_dim=mlp_dim,
        num_classes=shape["head.weight"][0] if "head.weight" in shape else 0,
        pool=_pool(shape, hub, stated),
        class_token=class_token,
        num_registers=registers,
        position="learned" if "pos_embed" in shape else "none",
        position_covers_prefix=covers,
        representation_size=shape.get("pre_logits.fc.weight", (None,))[0],
        qkv_bias="blocks.0.attn.qkv.bias" in shape,
        qk_norm="blocks.0.attn.q_norm.weight" in shape,
        layer_scale=1e-5 if "blocks.0.ls1.gamma" in shape else None,
        gelu=cast(Gelu, stated.gelu or _gelu(arguments)),
        norm_eps=stated.norm_eps or 1e-6,
        norm_after_pool=after,
    )


def _gelu(arguments: Mapping[str, Any]) -> str:
    return "tanh" if "tanh" in str(arguments.get("act_layer", "")) else "exact"


def _pool(shape: Mapping[str, Any], hub: Mapping[str, Any], stated: Stated) -> Pool:
    arguments = hub.get("model_args") or {}
    said = arguments.get("global_pool") or hub.get("global_pool")
    if stated.pool and stated.pool != "quadrants":  # no file of timm's has a head for these
        said = stated.pool
    if said:
        try:
            return normal_pool(said)
        except ValueError as error:
            raise VitcliError(str(error), hint="another `--set model.pool=…`") from error
    if "attn_pool.latent" in shape:
        return "map"
    return "mean" if "fc_norm.weight" in shape or "cls_token" not in shape else "token"


def _num_heads(
    shape: Mapping[str, tuple[int, ...]],
    sizes: tuple[int, int, int],
    hub: Mapping[str, Any],
    source: str,
    stated: Stated,
    notes: list[str],
) -> int:
    """From the caller, the config, the width of QK-norm, or the variant of these sizes."""
    arguments = hub.get("model_args") or {}
    heads = stated.num_heads or arguments.get("num_heads")
    if not heads and "blocks.0.attn.q_norm.weight" in shape:
        heads = sizes[0] // shape["blocks.0.attn.q_norm.weight"][0]
    if not heads and (name := matching_variant(*sizes)):
        heads = VARIANTS[name].num_heads
        notes.append(f"{heads} heads, from the variant {name} that the shapes match")
    if not heads:
        missing = ["model.num_heads"]
        if not hub.get("pretrained_cfg"):
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
    for name in ("Ti", "S", "B", "L", "H"):
        v = VARIANTS[name]
        if (v.embed_dim, v.depth, v.mlp_dim) == (embed_dim, depth, mlp_dim):
            return name
    return None


def _image_size(
    shape: Mapping[str, tuple[int, ...]],
    patch: int,
    prefix: int,
    hub: Mapping[str, Any],
    source: str,
    stated: Stated,
) -> tuple[tuple[int, int], bool]:
    """The (Y, X) that the stored positions belong to, and whether prefix tokens have one too."""
    pretrained = hub.get("pretrained_cfg") or {}
    arguments = hub.get("model_args") or {}
    said = as_size(arguments.get("img_size") or (pretrained.get("input_size") or [])[1:] or None)
    if "pos_embed" not in shape:
        size = stated.image_size or said
        if size is None:
            raise unsaid(source, ["model.image_size"])
        return size, True
    count = shape["pos_embed"][1]
    uncovered = bool(arguments.get("no_embed_class"))
    counts = [(count, False)] if uncovered else [(count - prefix, True), (count, False)]
    for size in (said, stated.image_size):
        for n, covers in counts:
            if size and (size[0] // patch) * (size[1] // patch) == n:
                return (size[0] // patch * patch, size[1] // patch * patch), covers
    for n, covers in counts:
        if n > 0 and math.isqrt(n) ** 2 == n:
            return (math.isqrt(n) * patch, math.isqrt(n) * patch), covers
    raise VitcliError(
        f"`{source}` has {count} positions, no square grid, and does not say which one",
        hint=f"`--set model.image_size=[Y,X]` in pixels, the patch size is {patch}",
    )


def _preprocess(
    config: ViTConfig, hub: Mapping[str, Any], stated: Stated, notes: list[str]
) -> Preprocess | None:
    """timm's evaluation transform for these weights; None where nothing says mean and std."""
    pretrained = hub.get("pretrained_cfg") or {}
    variant = matching_variant(config.embed_dim, config.depth, config.mlp_dim)
    base: Preprocess | None = None
    channels = config.num_channels
    if "mean" in pretrained or "std" in pretrained or variant is not None:
        base = Preprocess(
            image_size=config.image_size,
            resize_mode="squash" if pretrained.get("crop_mode") == "squash" else "crop",
            crop_fraction=_crop_fraction(pretrained, config),
            interpolation=pretrained.get("interpolation") or "bicubic",
            mean=per_channel(pretrained.get("mean") or 0.5, channels, "mean"),
            std=per_channel(pretrained.get("std") or 0.5, channels, "std"),
            num_channels=channels,
        )
    if not pretrained and base is not None and not {"mean", "std"} <= set(stated.preprocess):
        notes.append(
            f"mean and std 0.5, resize {base.interpolation}, crop {base.crop_fraction}: assumed, "
            f"as timm has them for ViT-{variant}; `--set preprocess.mean=…` changes it"
        )
    return stated_preprocess(base, stated.preprocess, config.image_size, channels)


def _crop_fraction(pretrained: Mapping[str, Any], config: ViTConfig) -> float:
    """As stated; timm's general default beside a config; else what its ViTs at 224 pixels have."""
    if pretrained:
        return float(pretrained.get("crop_pct") or 0.875)
    return 0.9 if config.image_size == (224, 224) else 1.0


def _labels(hub: Mapping[str, Any], num_classes: int) -> tuple[str, ...] | None:
    pretrained = hub.get("pretrained_cfg") or {}
    names = hub.get("label_names") or pretrained.get("label_names")
    described = hub.get("label_descriptions") or pretrained.get("label_descriptions") or {}
    if not isinstance(names, (list, tuple)) or len(names) != num_classes:
        return None
    texts = [str(described.get(n, n)) if isinstance(described, Mapping) else str(n) for n in names]
    return tuple(texts if len(set(texts)) == len(texts) else map(str, names))
