"""What timm's side says beside the tensors: the Hub `config.json` and the architecture's name.

timm's architectures are functions; what they decide and no tensor shows (heads, epsilon, GELU) is
in the table below, for those whose tensors are a plain ViT's. Source: timm 1.0.31,
models/vision_transformer.py and deit.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess, ResizeMode
from vitcli.vit import Config, ViTConfig
from vitcli.vit.config import Gelu
from vitcli.weights.overrides import PICTURES, Stated, are_pictures, per_channel
from vitcli.weights.store import readable_values

MEND = "mend it, or remove it and say with `--set model.…` and `--set preprocess.…` what it says"
Moments = tuple[tuple[float, ...], tuple[float, ...]]

IMAGENET: Moments = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP: Moments = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF: Moments = (0.5,), (0.5,)

# Tensors named like a plain ViT's, but another computation; what it is.
REFUSED = {
    "quickgelu": "the activation x * sigmoid(1.702 x)",
    "_rpn_": "normalisation after the residual branches",
    "dinov3|eva|rope|_pe_": "rotary positions",
}
# Heads where they are not 64 wide.
HEADS = {
    "vit_base_patch16_gap": 16,
    "vit_(huge|gigantic|so400m|giantopt)_": 16,
    "vit_giant_(?!.*(dinov2|tipsv2|radio))": 16,
    "deit3_huge_": 16,
    "test_vit2?$": 2,
    "test_vit[34]$": 3,
}
TANH = "patch32_siglip|giantopt_|large_patch16_siglip_(gap_)?512|so400m_patch16_siglip"
MEANS: dict[str, Moments] = {"deit|dino|mae|jepa|resnet": IMAGENET, "_clip_": CLIP}
CROP_MODES: dict[str, ResizeMode] = {"center": "crop", "squash": "squash", "border": "pad"}


@dataclass(frozen=True)
class Hub:
    """A Hub `config.json`, in its present form or the older one without `pretrained_cfg`.

    Attributes:
        architecture: timm's name for the function that builds the model; "" where none is given.
        arguments: of that function (`model_args`).
        pretrained: how the weights want their images (`pretrained_cfg`).
        described: the whole file.
        pool: as timm calls it; "" where there is none, None where the file does not say.
        num_heads: None where the file does not say.
        image_size: (Y, X) in pixels; None where the file does not say.
        layer_scale: the value that LayerScale started from; it only matters for new weights.
        dropout_rate, drop_path_rate: of the training.
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


def read_hub(described: Mapping[str, Any] | None, source: str) -> Hub:
    """The `config.json` beside weights in timm's layout.

    Raises:
        VitcliError: an architecture or argument that computes something else with such tensors,
            or values that cannot be.
    """
    with readable_values("config.json", source, MEND):
        hub = _parsed(described or {})
    for pattern, what in REFUSED.items():
        if re.search(pattern, hub.architecture):
            raise VitcliError(
                f"`{source}` is timm's `{hub.architecture}`, which has {what}: not understood",
                hint="its tensors are named like a plain ViT's, but give other results in one",
            )
    for key, harmless in {
        "final_norm": True,
        "pool_include_prefix": False,
        "scale_attn_norm": False,
        "scale_mlp_norm": False,
    }.items():
        if hub.arguments.get(key, harmless) != harmless:
            raise VitcliError(
                f"`{source}` was made with `{key}={hub.arguments[key]}`, which is not understood",
                hint=f"what is: `{key}={harmless}`",
            )
    return hub


def _parsed(described: Mapping[str, Any]) -> Hub:
    pretrained = described.get("pretrained_cfg")
    if not isinstance(pretrained, Mapping):  # before 2023 all of it lay at the top
        pretrained = described if {"input_size", "mean"} & set(described) else {}
    arguments = described.get("model_args")
    arguments = arguments if isinstance(arguments, Mapping) else {}
    pools = arguments.get("global_pool"), described.get("global_pool")
    heads = arguments.get("num_heads")
    return Hub(
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
    """`img_size`, an int or [Y, X]; else the last two of `input_size`, [C, Y, X]."""
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
    # Beyond 10^6 lies no model, and torch takes sizes of 64 bits only.
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10**6:
        raise ValueError(f"`{key}` is {value!r:.60}")
    return value


def _number(value: Any, key: str, *, most: float = 1.0) -> float:
    """A number from 0 to `most`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        raise ValueError(f"`{key}` is {value!r:.60}")
    return float(value)


def heads_of(hub: Hub, embed_dim: int) -> int | None:
    """Heads of a named architecture of timm's with this width; None where that is not known."""
    if "embed_dim" in hub.arguments:  # then not of the architecture as it is in the table
        return None
    for pattern, heads in HEADS.items():
        if re.match(pattern, hub.architecture):
            return heads
    plain = re.match(r"(vit|deit3?|flexivit)_", hub.architecture)
    return embed_dim // 64 if plain and embed_dim % 64 == 0 else None


def eps_of(hub: Hub) -> float:
    """Epsilon of the LayerNorms: 1e-6 in timm, 1e-5 in its CLIP models."""
    return 1e-5 if "_clip_" in hub.architecture and not hub.arguments.get("norm_layer") else 1e-6


def gelu_of(hub: Hub, source: str, *, gated: bool) -> Gelu:
    """The activation of the MLPs; that of a SwiGLU (`gated`) is SiLU and nothing to choose.

    Raises:
        VitcliError: another activation.
    """
    said = hub.arguments.get("act_layer")
    known: dict[str, Gelu] = {"gelu": "exact", "gelu_tanh": "tanh"}
    if said and gated and str(said).lower() in ("silu", "swish"):
        return "exact"
    if said and (gated or str(said).lower() not in known):
        raise VitcliError(
            f"`{source}` has the activation `{said}`, which is not understood",
            hint="`silu` in a gated MLP; else `gelu` or `gelu_tanh`",
        )
    if said:
        return known[str(said).lower()]
    return "tanh" if re.search(TANH, hub.architecture) else "exact"


def hub_says(
    hub: Hub, config: Config, source: str, notes: list[str]
) -> tuple[Preprocess | None, tuple[str, ...] | None]:
    """The evaluation transform and the class names; None where the file does not say them.

    Raises:
        VitcliError: values that cannot be.
    """
    base = None
    with readable_values("config.json", source, MEND):
        if are_pictures(config.num_channels, notes):
            base = _preprocess(hub, config.image_size, config.num_channels, notes)
        return base, _labels(hub, config.num_classes)


def _preprocess(
    hub: Hub, image_size: tuple[int, int], channels: int, notes: list[str]
) -> Preprocess | None:
    """timm's evaluation transform as `pretrained_cfg` describes it; None where it does not.

    What a `pretrained_cfg` leaves out has timm's defaults (crop 0.875, bicubic, ImageNet's mean).
    """
    said = hub.pretrained
    if not said:
        return None
    mode = CROP_MODES.get(str(said.get("crop_mode") or "center"), "crop")
    crop = _number(said.get("crop_pct") or 0.875, "crop_pct")
    if mode == "pad" and crop != 1.0:
        notes.append(f"the whole picture is padded; timm would crop {crop} of it")
        crop = 1.0
    means, stds = IMAGENET if channels == 3 else HALF
    return Preprocess(
        image_size=image_size,
        resize_mode=mode,
        crop_fraction=crop,
        interpolation=said.get("interpolation") or "bicubic",
        mean=_per_channel(said.get("mean") or means, channels, "mean", notes),
        std=_per_channel(said.get("std") or stds, channels, "std", notes),
        num_channels=channels,
    )


def _per_channel(value: Any, channels: int, key: str, notes: list[str]) -> tuple[float, ...]:
    """One value a channel; a grey model of timm's often keeps the three of its colour parent."""
    if channels == 1 and isinstance(value, (list, tuple)) and len(value) == 3:
        if len(set(value)) > 1:
            notes.append(f"{key} {list(value)} of three channels: their mean is taken for the one")
        value = [sum(value) / 3] if len(set(value)) > 1 else value[:1]
    return per_channel(value, channels, key)


def _labels(hub: Hub, num_classes: int) -> tuple[str, ...] | None:
    """Class names: the descriptions where they differ from each other, else the names."""
    names = hub.described.get("label_names") or hub.pretrained.get("label_names")
    names = names or hub.described.get("labels")
    said = hub.described.get("label_descriptions") or hub.pretrained.get("label_descriptions")
    if isinstance(names, Mapping):  # from the index, where some indices have no name
        names = [names.get(str(i)) for i in range(num_classes)]
    if not isinstance(names, (list, tuple)) or len(names) != num_classes or None in names:
        return None
    if strange := [name for name in names if not isinstance(name, (str, int))]:
        raise ValueError(f"a class is called {strange[0]!r:.60}")
    described = said if isinstance(said, Mapping) else {}
    texts = [str(described.get(name, name)) for name in names]
    return tuple(texts if len(set(texts)) == len(texts) else map(str, names))


def facebook_sign(shape: Mapping[str, Any], dropped: Mapping[str, str]) -> str | None:
    """What shows that a file is of the DeiT, DINO or MAE families, which use ImageNet's mean."""
    signs = re.compile(r"(.*\.)?(dist_token|mask_token|decoder[._]|head\.(mlp|last_layer)\b)")
    return next((name for name in [*shape, *dropped] if signs.match(name)), None)


def assumed_preprocess(
    config: ViTConfig,
    variant: str | None,
    hub: Hub,
    sign: str | None,
    stated: Stated,
    notes: list[str],
) -> Preprocess | None:
    """timm's evaluation transform where no file describes one; None where nothing is known."""
    channels = config.num_channels
    if channels not in PICTURES or not (variant or hub.architecture or sign):
        return None
    pair = IMAGENET if sign else _means_of(hub.architecture)
    mean, std = pair = pair if channels == 3 else HALF
    crop = 0.9 if config.image_size == (224, 224) else 1.0
    if not {"mean", "std"} <= set(stated.preprocess):
        told = {IMAGENET: "ImageNet's mean and std", CLIP: "CLIP's mean and std"}.get(pair)
        told = told or "mean and std 0.5"
        whose = hub.architecture or (f"models with `{sign}`" if sign else f"ViT-{variant}")
        notes.append(
            f"{told}, resize bicubic, crop {crop}: assumed, as timm has them for {whose}; "
            "`--set preprocess.mean=…` changes it"
        )
    return Preprocess(
        image_size=config.image_size,
        crop_fraction=crop,
        mean=per_channel(mean, channels, "mean"),
        std=per_channel(std, channels, "std"),
        num_channels=channels,
    )


def _means_of(architecture: str) -> Moments:
    """Mean and std that timm has for a named architecture."""
    found = (pair for pattern, pair in MEANS.items() if re.search(pattern, architecture))
    return next(found, HALF)
