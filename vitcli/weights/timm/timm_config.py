"""timm's Hub `config.json`, and the settings that the name of an architecture determines.

An architecture of timm is a function. The tables below hold the settings that it fixes and that no
tensor shows (heads, epsilon, GELU), for architectures with the tensors of a plain ViT. Source: timm
1.0.31, models/vision_transformer.py and deit.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitcli.config.choices import Gelu, ResizeMode
from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.vit import Config, ViTConfig
from vitcli.weights.overrides import PICTURES, Overrides, are_pictures, per_channel
from vitcli.weights.store import readable_values

REPAIR = "correct the file, or replace it by `--set model.…` and `--set preprocess.…`"
Moments = tuple[tuple[float, ...], tuple[float, ...]]

IMAGENET: Moments = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP: Moments = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF: Moments = (0.5,), (0.5,)

# Architectures with the tensors of a plain ViT -> the difference in their computation.
OTHER_COMPUTATION = {
    "_rpn_": "normalisation after the residual branches",
    "eva02_enormous": "normalisation after the residual branches",
    "_rope_|_pe_|lingbot|sapiens": "other rotary positions than EVA-02 and DINOv3",
}
# Numbers of heads, for the architectures whose heads are not 64 wide.
NUM_HEADS = {
    "vit_base_patch16_gap": 16,
    "vit_huge_plus_.*dinov3": 20,
    "vit_7b_": 32,
    "eva_giant_": 16,
    "vit_(huge|gigantic|so400m|giantopt)_": 16,
    "vit_giant_(?!.*(dinov2|tipsv2|radio))": 16,
    "deit3_huge_": 16,
    "test_vit2?$": 2,
    "test_vit[34]$": 3,
}
TANH_GELU = "patch32_siglip|giantopt_|large_patch16_siglip_(gap_)?512|so400m_patch16_siglip"
MEANS: dict[str, Moments] = {"deit|dino|mae|jepa|resnet|beitv2": IMAGENET, "_clip_|eva": CLIP}
GELUS: dict[str, Gelu] = {"gelu": "exact", "gelu_tanh": "tanh", "quick_gelu": "quick"}
CROP_MODES: dict[str, ResizeMode] = {"center": "crop", "squash": "squash", "border": "pad"}


@dataclass(frozen=True)
class TimmHubConfig:
    """A Hub `config.json`, in today's form or the older one without `pretrained_cfg`.

    Attributes:
        architecture: timm's name for the function that builds the model; "" if there is none.
        arguments: the arguments of that function (`model_args`).
        pretrained: the preprocessing of the weights (`pretrained_cfg`).
        described: the whole file.
        pool: timm's name of the pooling; "" for no pooling, None if the file has none.
        num_heads: None if the file does not have it.
        image_size: (Y, X) in pixels; None if the file does not have it.
        layer_scale: the initial value of LayerScale.
        dropout_rate, drop_path_rate: the rates of the training.
    """

    architecture: str
    arguments: Mapping[str, Any]
    pretrained: Mapping[str, Any]
    described: Mapping[str, Any]
    pool: str | None
    num_heads: int | None
    image_size: tuple[int, int] | None
    layer_scale: float
    dropout_rate: float
    drop_path_rate: float


def read_hub_config(described: Mapping[str, Any] | None, source: str) -> TimmHubConfig:
    """Read the `config.json` of weights in timm's layout.

    Raises:
        VitcliError: an architecture or argument changes the computation, or a value is invalid.
    """
    with readable_values("config.json", source, REPAIR):
        hub = _parse(described or {})
    for pattern, what in OTHER_COMPUTATION.items():
        if re.search(pattern, hub.architecture):
            raise VitcliError(
                f"`{source}` is timm's `{hub.architecture}`, which has {what}: not supported",
                hint="use another architecture; this one has the tensor names of a plain ViT, but "
                "not its computation",
            )
    for key, supported in {
        "pool_include_prefix": False,
        "scale_attn_norm": False,
        "scale_mlp_norm": False,
    }.items():
        if hub.arguments.get(key, supported) != supported:
            raise VitcliError(
                f"`{source}` has `{key}={hub.arguments[key]}`, which is not supported",
                hint=f"use a model with `{key}={supported}`",
            )
    return hub


def _parse(described: Mapping[str, Any]) -> TimmHubConfig:
    pretrained = described.get("pretrained_cfg")
    if not isinstance(pretrained, Mapping):  # before 2023 these keys were at the top level
        pretrained = described if {"input_size", "mean"} & set(described) else {}
    arguments = described.get("model_args")
    arguments = arguments if isinstance(arguments, Mapping) else {}
    pools = arguments.get("global_pool"), described.get("global_pool")
    heads = arguments.get("num_heads")
    return TimmHubConfig(
        architecture=str(described.get("architecture") or "").partition(".")[0],
        arguments=arguments,
        pretrained=pretrained,
        described=described,
        pool=str(pools[0] or pools[1]) if any(pools) else "" if "" in pools else None,
        num_heads=_count(heads, "num_heads") if heads else None,
        image_size=_size(arguments.get("img_size"), pretrained.get("input_size")),
        layer_scale=_number(arguments.get("init_values") or 1e-5, "init_values", most=1e6),
        dropout_rate=_number(arguments.get("proj_drop_rate") or 0.0, "proj_drop_rate"),
        drop_path_rate=_number(arguments.get("drop_path_rate") or 0.0, "drop_path_rate"),
    )


def _size(img_size: Any, input_size: Any) -> tuple[int, int] | None:
    """Return (Y, X) of `img_size`, an int or [Y, X], else of `input_size`, [C, Y, X]."""
    if img_size:
        sides = img_size if isinstance(img_size, (list, tuple)) else [img_size] * 2
        key, count = "img_size", 2
    elif input_size:
        sides, key, count = input_size, "input_size", 3
    else:
        return None
    if not isinstance(sides, (list, tuple)) or len(sides) != count:
        raise ValueError(f"`{key}` is {sides!r:.60}")
    return _count(sides[-2], key), _count(sides[-1], key)


def _count(value: Any, key: str) -> int:
    # No model is larger than 10^6, and torch counts bytes with 64 bits.
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10**6:
        raise ValueError(f"`{key}` is {value!r:.60}")
    return value


def _number(value: Any, key: str, *, most: float = 1.0) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        raise ValueError(f"`{key}` is {value!r:.60}")
    return float(value)


def architecture_heads(hub: TimmHubConfig, embed_dim: int) -> int | None:
    """Return the number of heads of the named architecture at this width; None if unknown."""
    if "embed_dim" in hub.arguments:  # a changed width: the table does not apply
        return None
    for pattern, heads in NUM_HEADS.items():
        if re.match(pattern, hub.architecture):
            return heads
    plain = re.match(r"(vit|deit3?|flexivit|eva|eva02|beit|beitv2)_", hub.architecture)
    return embed_dim // 64 if plain and embed_dim % 64 == 0 else None


def architecture_eps(hub: TimmHubConfig) -> float:
    """Return the epsilon of the LayerNorms: 1e-6 in timm, 1e-5 in its CLIP models and DINOv3."""
    other = re.match(r"vit_\w+_(clip|dinov3)(_|$)", hub.architecture)
    return 1e-5 if other and not hub.arguments.get("norm_layer") else 1e-6


def architecture_gelu(hub: TimmHubConfig, source: str, *, gated: bool) -> Gelu:
    """Return the activation of the MLPs; for a SwiGLU (`gated`), a placeholder.

    Raises:
        VitcliError: an unsupported activation.
    """
    act = hub.arguments.get("act_layer")
    if act and gated and str(act).lower() in ("silu", "swish"):
        return "exact"
    if act and (gated or str(act).lower() not in GELUS):
        raise VitcliError(
            f"`{source}` has the unsupported activation `{act}`",
            hint=f"supported: `silu` in a gated MLP, else {', '.join(f'`{a}`' for a in GELUS)}",
        )
    if act:
        return GELUS[str(act).lower()]
    if "quickgelu" in hub.architecture:
        return "quick"
    return "tanh" if re.search(TANH_GELU, hub.architecture) else "exact"


def hub_preprocess_and_labels(
    hub: TimmHubConfig, config: Config, source: str, notes: list[str]
) -> tuple[Preprocess | None, tuple[str, ...] | None]:
    """Return the evaluation transform and the class names; None for each that the file lacks.

    Raises:
        VitcliError: a value is invalid.
    """
    base = None
    with readable_values("config.json", source, REPAIR):
        if are_pictures(config.num_channels, notes):
            base = _preprocess(hub, config.image_size, config.num_channels, notes)
        return base, _labels(hub, config.num_classes)


def _preprocess(
    hub: TimmHubConfig, image_size: tuple[int, int], channels: int, notes: list[str]
) -> Preprocess | None:
    """Return timm's evaluation transform; None if there is no `pretrained_cfg`.

    timm's defaults fill the gaps: crop 0.875, bicubic, ImageNet's mean and std.
    """
    values = hub.pretrained
    if not values:
        return None
    mode = CROP_MODES.get(str(values.get("crop_mode") or "center"), "crop")
    crop = _number(values.get("crop_pct") or 0.875, "crop_pct")
    if mode == "pad" and crop != 1.0:
        notes.append(f"the whole image is padded; timm would crop {crop} of it")
        crop = 1.0
    means, stds = IMAGENET if channels == 3 else HALF
    return Preprocess(
        image_size=image_size,
        resize_mode=mode,
        crop_fraction=crop,
        interpolation=values.get("interpolation") or "bicubic",
        mean=_per_channel(values.get("mean") or means, channels, "mean", notes),
        std=_per_channel(values.get("std") or stds, channels, "std", notes),
        num_channels=channels,
    )


def _per_channel(value: Any, channels: int, key: str, notes: list[str]) -> tuple[float, ...]:
    """Return one value per channel; timm's grey models often keep the three of an RGB model."""
    if channels == 1 and isinstance(value, (list, tuple)) and len(value) == 3:
        if len(set(value)) > 1:
            notes.append(f"`{key}` has three values for one channel: assumed their mean")
        value = [sum(value) / 3] if len(set(value)) > 1 else value[:1]
    return per_channel(value, channels, key)


def _labels(hub: TimmHubConfig, num_classes: int) -> tuple[str, ...] | None:
    """Return the class names: the descriptions if they all differ, else the names."""
    names = hub.described.get("label_names") or hub.pretrained.get("label_names")
    names = names or hub.described.get("labels")
    texts = hub.described.get("label_descriptions") or hub.pretrained.get("label_descriptions")
    if isinstance(names, Mapping):  # index -> name, possibly with gaps
        names = [names.get(str(i)) for i in range(num_classes)]
    if not isinstance(names, (list, tuple)) or len(names) != num_classes or None in names:
        return None
    if wrong := [name for name in names if not isinstance(name, (str, int))]:
        raise ValueError(f"a class has the name {wrong[0]!r:.60}")
    texts = texts if isinstance(texts, Mapping) else {}
    found = [str(texts.get(name, name)) for name in names]
    return tuple(found if len(set(found)) == len(found) else map(str, names))


def find_facebook_tensor(shape: Mapping[str, Any], dropped: Mapping[str, str]) -> str | None:
    """Return a tensor that shows a file of DeiT, DINO or MAE, which use ImageNet's mean and std."""
    signs = re.compile(r"(.*\.)?(dist_token|mask_token|decoder[._]|head\.(mlp|last_layer)\b)")
    return next((name for name in [*shape, *dropped] if signs.match(name)), None)


def assumed_preprocess(
    config: ViTConfig,
    variant: str | None,
    hub: TimmHubConfig,
    sign: str | None,
    overrides: Overrides,
    notes: list[str],
) -> Preprocess | None:
    """Return timm's usual evaluation transform for a file that describes none; None if unknown.

    Args:
        variant: the published variant that the shapes match.
        sign: the tensor that `find_facebook_tensor` found.
    """
    channels = config.num_channels
    if channels not in PICTURES or not (variant or hub.architecture or sign):
        return None
    known = (pair for pattern, pair in MEANS.items() if re.search(pattern, hub.architecture))
    beit = config.position_bias != "none"  # its pre-training has a `mask_token` too
    pair = IMAGENET if sign and not beit else next(known, HALF)
    mean, std = pair = pair if channels == 3 else HALF
    crop = 0.9 if config.image_size == (224, 224) else 1.0
    if not {"mean", "std"} <= set(overrides.preprocess):
        name = {IMAGENET: "ImageNet's mean and std", CLIP: "CLIP's mean and std"}.get(pair)
        whose = f"models with `{sign}`" if sign else f"ViT-{variant}"
        whose = hub.architecture or ("BEiT, unlike BEiT v2" if beit else whose)
        notes.append(
            f"assumed {name or 'mean and std 0.5'}, bicubic resize and crop {crop}, as timm does "
            f"for {whose} (change with `--set preprocess.mean=…`)"
        )
    return Preprocess(
        image_size=config.image_size,
        crop_fraction=crop,
        mean=per_channel(mean, channels, "mean"),
        std=per_channel(std, channels, "std"),
        num_channels=channels,
    )
