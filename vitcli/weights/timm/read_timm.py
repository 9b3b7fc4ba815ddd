"""Read timm's layout: ViTs, hybrids and BiT ResNets.

Our tensors have timm's names, so few are renamed. Tensors do not show the number of heads, epsilon,
pooling, preprocessing and class names. These come from the caller's settings, else from the Hub
`config.json` in the folder of the file, else from the architecture or variant that fits.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from vitcli.config.choices import Gelu, Pool
from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.vit.config import ViTConfig, canonical_pool
from vitcli.vit.position import fold_shared_bias
from vitcli.vit.resnet import ResNetConfig
from vitcli.vit.variants import VARIANTS
from vitcli.weights.find_network import FoundNetwork
from vitcli.weights.loaded import as_activation
from vitcli.weights.overrides import (
    PICTURES,
    Overrides,
    matching_variant,
    missing_settings,
    override_preprocess,
)
from vitcli.weights.store import Checkpoint, readable_values
from vitcli.weights.timm.beit import image_size_of_bias, offset_bias_kind
from vitcli.weights.timm.eva import rotary_settings, unify_eva
from vitcli.weights.timm.timm_config import (
    REPAIR,
    TimmHubConfig,
    architecture_eps,
    architecture_gelu,
    architecture_heads,
    assumed_preprocess,
    find_facebook_tensor,
    hub_preprocess_and_labels,
    read_hub_config,
)
from vitcli.weights.timm.timm_names import (
    CHECK_FILE,
    TensorShapes,
    check_timm_names,
    check_timm_shapes,
    not_plain,
    timm_names,
)


def read_timm(
    network: FoundNetwork, source: str, hub: Mapping[str, Any] | None, overrides: Overrides
) -> Checkpoint:
    """Convert a network in timm's layout to a checkpoint.

    Args:
        network: the network and what else is in its file.
        source: the name of the file in messages.
        hub: the Hub `config.json` in its folder, if there is one.
        overrides: the caller's settings, which override everything else.

    Raises:
        VitcliError: the tensors are not those of a supported model, or the number of heads is
            unknown.
    """
    tensors, bit = network.tensors, network.layout == "bit"
    found, dropped, notes = timm_names(tensors, source)
    unify_eva(found, dropped)
    if fold_shared_bias(found):
        notes.append("added the shared attention bias to the bias of each block")
    hub_config = read_hub_config(hub, source)
    for kind in ("weight", "bias") if bit else ():
        if f"head.fc.{kind}" in found:  # (K, F, 1, 1) or (K,): a convolution on the pooled map
            head = found.pop(f"head.fc.{kind}")
            found[f"head.{kind}"] = head.flatten(1) if head.ndim == 4 else head
    _unname_projection(found, dropped, hub_config, notes)
    shape = {name: tuple(tensor.shape) for name, tensor in found.items()}
    check_timm_names(shape, source)
    check_timm_shapes(shape, source)
    config: ViTConfig | ResNetConfig
    if bit:
        config = _bit_config(shape, source, hub_config, overrides, notes)
    else:
        with readable_values("config.json", source, REPAIR):
            rotary = rotary_settings(tensors, hub_config, source, notes)
        config = _vit_config(shape, source, hub_config, overrides, notes, rotary)
    base, labels = hub_preprocess_and_labels(hub_config, config, source, notes)
    if base is None and isinstance(config, ViTConfig):
        variant = matching_variant(config.embed_dim, config.depth, config.mlp_dim)
        sign = find_facebook_tensor(shape, network.dropped | dropped)
        base = assumed_preprocess(config, variant, hub_config, sign, overrides, notes)
    elif base is None and config.num_channels in PICTURES:
        base = Preprocess(
            config.image_size, interpolation="bilinear", num_channels=config.num_channels
        )
        notes.append("assumed mean and std 0.5, bilinear resize and crop 1.0, as timm does")
    size, channels = config.image_size, config.num_channels
    return Checkpoint(
        config=config,
        tensors=found,
        layout="timm",
        labels=overrides.labels or labels,
        preprocess=override_preprocess(base, overrides.preprocess, size, channels),
        head_trained=config.num_classes > 0,
        dropped=dropped,
        notes=notes,
        # `write_timm` adds this key; timm itself leaves the activation to the caller.
        activation=as_activation((hub or {}).get("activation")),
    )


def _unname_projection(
    found: dict[str, Tensor], dropped: dict[str, str], hub: TimmHubConfig, notes: list[str]
) -> None:
    """Rename the head of timm's CLIP towers in place: it is the projection to text embeddings.

    timm gives it a bias of zeros; a trained classifier has another bias, or class names.
    """
    head, bias = found.get("head.weight"), found.get("head.bias")
    named = {"label_names", "labels"} & {*hub.described, *hub.pretrained}
    if "norm_pre.weight" not in found or head is None or bias is None or named:
        return
    if head.any() and not bias.any():
        found["projection.weight"] = found.pop("head.weight")
        del found["head.bias"]
        dropped["head.bias"] = "zero"
        notes.append("the head is CLIP's projection to text embeddings, not a classifier")


def _stages(shape: TensorShapes, prefix: str) -> tuple[int, ...]:
    """Return the number of units in each stage of the ResNet whose names begin with `prefix`."""
    # One digit: a damaged name must not create 10^9 stages. The comparison of names reports it.
    pattern = re.compile(re.escape(prefix) + r"stages\.(\d)\.blocks\.(\d{1,6})\.conv1\.weight")
    units: dict[int, int] = {}
    for name in shape:
        if m := pattern.fullmatch(name):
            units[int(m[1])] = max(units.get(int(m[1]), 0), int(m[2]) + 1)
    return tuple(units.get(i, 0) for i in range(max(units, default=-1) + 1))


def _bit_config(
    shape: TensorShapes, source: str, hub: TimmHubConfig, overrides: Overrides, notes: list[str]
) -> ResNetConfig:
    root, unit = shape["stem.conv.weight"], "stages.0.blocks.0.norm1.weight"
    if root[2:] != (7, 7) or unit not in shape or "stem.norm.weight" in shape:
        raise not_plain(source, shape, "pre-activation ResNet (BiT)", [unit])
    size = overrides.image_size or hub.image_size
    if size is None:
        size = (224, 224)
        notes.append("assumed images of 224x224 px (change with `--set model.image_size=…`)")
    try:
        return ResNetConfig(
            image_size=size,
            num_channels=root[1],
            layers=_stages(shape, ""),
            width=root[0] / 64,
            num_classes=shape.get("head.weight", (0,))[0],
            arithmetic="timm",
        )
    except ValueError as error:
        raise VitcliError(f"`{source}` is not a ResNet: {error}", hint=CHECK_FILE) from error


def _vit_config(
    shape: TensorShapes,
    source: str,
    hub: TimmHubConfig,
    overrides: Overrides,
    notes: list[str],
    rotary: Mapping[str, Any],
) -> ViTConfig:
    wanted = ["patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"]
    if missing := [name for name in wanted if name not in shape]:
        raise not_plain(source, shape, "Vision Transformer", missing)
    width, channels, patch, patch_x = shape[wanted[0]]
    hidden, mlp_dim = shape[wanted[1]][0], shape[wanted[2]][1]
    if patch != patch_x:
        raise VitcliError(
            f"`{source}` has patches of {patch}x{patch_x} pixels, which are not square",
            hint="use a model with square patches",
        )
    stem, stem_width = None, 1.0
    if any(name.startswith("patch_embed.backbone.") for name in shape):
        root = shape.get("patch_embed.backbone.stem.conv.weight", ())
        if root[2:] != (7, 7) or "patch_embed.backbone.stem.norm.weight" not in shape:
            missing = ["patch_embed.backbone.stem.conv.weight (7x7)"]
            raise not_plain(source, shape, "hybrid", missing)
        stem, stem_width, channels = _stages(shape, "patch_embed.backbone."), root[0] / 64, root[1]
    depth = 1 + max(int(m[1]) for n in shape if (m := re.match(r"blocks\.(\d+)\.", n)))
    registers = shape["reg_token"][1] if "reg_token" in shape else 0
    prefix = registers + ("cls_token" in shape) + ("dist_token" in shape)
    gated = hidden == 2 * mlp_dim
    if "norm_pre.weight" in shape and not (overrides.norm_eps or hub.architecture):
        notes.append("assumed epsilon 1e-6 (for models of CLIP set `--set model.norm_eps=1e-5`)")
    pool = _pool(shape, width, hub, source, overrides, notes)
    pixels = patch if stem is None else patch * 4 * 2 ** max(len(stem) - 1, 0)
    dinov3 = rotary.get("rope") == "centred"
    assumed = dinov3 and not hub.architecture
    if dinov3 and not (overrides.image_size or hub.image_size):
        overrides = replace(overrides, image_size=(14 * pixels, 14 * pixels))
        notes.append(f"assumed images of {14 * pixels}x{14 * pixels} px, as DINOv3's authors")
    size, covers = _image_size(shape, pixels, prefix, hub, source, overrides)
    gelu: Gelu = overrides.gelu or architecture_gelu(hub, source, gated=gated)  # type: ignore[assignment]
    try:
        return ViTConfig(
            image_size=size,
            patch_size=patch,
            num_channels=channels,
            embed_dim=width,
            depth=depth,
            num_heads=_num_heads(
                shape, (width, depth, mlp_dim), hub, source, overrides, notes, dinov3
            ),
            mlp_dim=mlp_dim,
            pool=pool,
            distillation_head=pool == "distilled" and "head_dist.weight" in shape,
            num_registers=registers,
            position_covers_prefix=covers,
            layer_scale=hub.layer_scale if "blocks.0.ls1.gamma" in shape else None,
            mlp="swiglu" if gated else "gelu",
            gelu=gelu,
            norm_eps=overrides.norm_eps or (1e-5 if assumed else architecture_eps(hub)),
            final_norm=hub.arguments.get("final_norm", True) is not False,
            crop_to_patches=stem is None and any(side % patch for side in size),
            stem=stem,
            stem_width=stem_width,
            stem_arithmetic="timm" if stem is not None else "google",
            dropout_rate=hub.dropout_rate,
            drop_path_rate=hub.drop_path_rate,
            **_shown_settings(shape),
            **rotary,
        )
    except ValueError as error:
        raise VitcliError(
            f"`{source}` is not a Vision Transformer: {error}", hint=CHECK_FILE
        ) from error


def _shown_settings(shape: TensorShapes) -> dict[str, Any]:
    """Return the settings that the presence and the sizes of single tensors show."""
    block = {n.removeprefix("blocks.0.") for n in shape if n.startswith("blocks.0.")}
    # A norm with a scale and without a bias is RMSNorm.
    rms = "norm1.weight" in block and not {"norm1.bias", "norm2.bias"} & block
    return {
        "num_classes": shape.get("head.weight", (0,))[0],
        "class_token": "cls_token" in shape,
        "distillation_token": "dist_token" in shape,
        "position": "learned" if "pos_embed" in shape else "none",
        "position_bias": offset_bias_kind(shape),
        "representation_size": shape.get("pre_logits.fc.weight", (None,))[0],
        "qkv_bias": bool({"attn.qkv.bias", "attn.q_bias"} & block),
        "key_bias": "attn.q_bias" not in block,
        "qk_norm": "attn.q_norm.weight" in block,
        "attention_norm": "attn.norm.weight" in block,
        "mlp_norm": "mlp.norm.weight" in block,
        "norm": "rms" if rms else "layer",
        "norm_before_blocks": "norm_pre.weight" in shape,
        "norm_after_pool": "fc_norm.weight" in shape and "norm.weight" not in shape,
        "patch_bias": "patch_embed.proj.bias" in shape,
        "pixel_norm": "patch_embed.norm_pixels.weight" in shape,
        "patch_norm": "patch_embed.norm.weight" in shape,
        "projection_size": shape.get("projection.weight", (None,))[0],
    }


def _pool(
    shape: TensorShapes,
    width: int,
    hub: TimmHubConfig,
    source: str,
    overrides: Overrides,
    notes: list[str],
) -> Pool:
    """Return the pooling that the head was trained on; if unknown, the caller's setting."""
    head = shape.get("head.weight", (0, width))[1]
    if "attn_pool.latent" in shape:
        return "map"
    if "dist_token" in shape and ("head_dist.weight" in shape or "head.weight" not in shape):
        return "distilled"
    if head == 2 * width:
        return "distilled" if "dist_token" in shape else "token_mean"
    named = hub.pool
    if not named and overrides.pool in ("token", "mean", "cls", "tok", "avg", "gap", "map"):
        named = overrides.pool  # no file of timm has a head for the other poolings
    if named:
        try:
            pool = canonical_pool(named)
            if pool == "token" and "cls_token" not in shape:
                raise ValueError("pool `token` needs a class token, and there is none (try `mean`)")
            if pool == "map":
                raise ValueError("pool `map` needs an attention pool, and there is none")
            return pool
        except ValueError as error:
            whose = "the config.json of" if hub.pool else "`model.pool` does not fit"
            raise VitcliError(
                f"{whose} `{source}`: {error}",
                hint="correct `global_pool` in it, or remove this key"
                if hub.pool
                else "try another `--set model.pool=…`",
            ) from error
    normed = "fc_norm.weight" in shape and "norm.weight" not in shape
    assumed: Pool = "mean" if normed or "cls_token" not in shape else "token"
    if hub.pool == "":
        notes.append(f"the config.json has no pooling (a logit per token): assumed `{assumed}`")
    elif normed and "cls_token" in shape:
        notes.append("assumed pool `mean`, because of `fc_norm` (change with `--set model.pool=…`)")
    return assumed


def _num_heads(
    shape: TensorShapes,
    sizes: tuple[int, int, int],
    hub: TimmHubConfig,
    source: str,
    overrides: Overrides,
    notes: list[str],
    dinov3: bool,
) -> int:
    """Find it in the caller's settings, config.json, QK-norm, architecture, then variant."""
    heads = overrides.num_heads or hub.num_heads
    if not heads and "blocks.0.attn.q_norm.weight" in shape:
        heads = sizes[0] // shape["blocks.0.attn.q_norm.weight"][0]
    if not heads and (heads := architecture_heads(hub, sizes[0])):
        notes.append(f"assumed {heads} heads, as in timm's {hub.architecture}")
    if not heads and dinov3:  # its H+ has the sizes of ViT-H, and other heads
        heads = 32 if sizes[0] == 4096 else sizes[0] // 64
        notes.append(f"assumed {heads} heads, as DINOv3's authors")
    if not heads and (name := matching_variant(*sizes)):
        heads = VARIANTS[name].num_heads
        notes.append(f"assumed {heads} heads, as in ViT-{name}")
    if not heads and sizes == (1536, 40, 4096):
        heads = 24
        notes.append("assumed 24 heads, as in DINOv2's ViT-g")
    if not heads:
        missing = ["model.num_heads"]
        root = shape.get("patch_embed.backbone.stem.conv.weight", shape["patch_embed.proj.weight"])
        if not hub.pretrained and root[1] in PICTURES:
            missing += [f"preprocess.{k}" for k in ("mean", "std") if k not in overrides.preprocess]
        raise missing_settings(source, missing)
    if sizes[0] % heads:
        raise VitcliError(
            f"`model.num_heads` is {heads}, which does not divide the width {sizes[0]}",
            hint="give the number of heads that the model was trained with",
        )
    return int(heads)


def _image_size(
    shape: TensorShapes,
    pixels: int,
    prefix: int,
    hub: TimmHubConfig,
    source: str,
    overrides: Overrides,
) -> tuple[tuple[int, int], bool]:
    """Return the (Y, X) of the stored positions, and True if they cover the prefix tokens."""
    if "pos_embed" not in shape and offset_bias_kind(shape) != "none":
        sizes = hub.image_size, overrides.image_size
        return image_size_of_bias(shape, pixels, prefix, sizes, source), True
    if "pos_embed" not in shape:
        size = overrides.image_size or hub.image_size
        if size is None:
            raise missing_settings(source, ["model.image_size"])
        if size[0] % pixels or size[1] % pixels:
            raise VitcliError(
                f"images of {size[0]}x{size[1]} px do not divide into the patches of `{source}`, "
                f"{pixels}x{pixels} px",
                hint=f"set `--set model.image_size=[Y,X]` to multiples of {pixels}",
            )
        return size, not hub.arguments.get("no_embed_class")
    count = shape["pos_embed"][1]
    hybrid = any(name.startswith("patch_embed.backbone.") for name in shape)
    uncovered = bool(hub.arguments.get("no_embed_class"))
    counts = [(count, False)] if uncovered else [(count - prefix, True), (count, False)]
    for size in (hub.image_size, overrides.image_size):
        for n, covers in counts:
            if size and (size[0] // pixels) * (size[1] // pixels) == n:
                if size == hub.image_size and not hybrid:
                    return size, covers  # So400m/14 has 27x27 patches at 384 px
                return (size[0] // pixels * pixels, size[1] // pixels * pixels), covers
    for n, covers in counts:
        if n > 0 and math.isqrt(n) ** 2 == n:
            return (math.isqrt(n) * pixels, math.isqrt(n) * pixels), covers
    raise VitcliError(
        f"`{source}` has {count} positions, which do not form a square grid",
        hint=f"set `--set model.image_size=[Y,X]` in px; a patch is {pixels}x{pixels} px",
    )
