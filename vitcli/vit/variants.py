"""The table of model sizes, and the names built from it: `B/16`, `R50+B/16`, `R50x1`."""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vitcli.vit.config import ViTConfig, canonical_pool
from vitcli.vit.conv_stem import MAX_STAGES, default_channels
from vitcli.vit.model import VisionTransformer
from vitcli.vit.resnet import ResNet, ResNetConfig

Network = VisionTransformer | ResNet
Config = ViTConfig | ResNetConfig


@dataclass(frozen=True)
class Variant:
    """The width, depth, MLP width and number of heads of a size."""

    embed_dim: int
    depth: int
    mlp_dim: int
    num_heads: int


# To add a size, add a row: the error messages, `plan` and the readers of weights use this table.
VARIANTS = {
    # Our own sizes, for images of about 32 px and an hour on two CPU cores.
    "Pico": Variant(128, 6, 512, 4),
    "Nano": Variant(192, 6, 768, 3),
    # DeiT and AugReg (Ti, S), table 1 of the paper (B, L, H), big_vision's models/vit.py (all).
    "mu": Variant(32, 1, 128, 2),
    "Ti": Variant(192, 12, 768, 3),
    "S": Variant(384, 12, 1536, 6),
    "M": Variant(512, 12, 2048, 8),
    "B": Variant(768, 12, 3072, 12),
    "L": Variant(1024, 24, 4096, 16),
    "So400m": Variant(1152, 27, 4304, 16),
    "H": Variant(1280, 32, 5120, 16),
    "g": Variant(1408, 40, 6144, 16),
    "G": Variant(1664, 48, 8192, 16),
    "e": Variant(1792, 56, 15360, 16),
}

# Sizes with one patch size only. The paper's ViT-b/32 is "ViT-B with all hidden dimensions halved"
# (Figure 4); that the number of heads stays is our reading. So `b/16` is a misspelling of `B/16`.
ONE_PATCH = {"b/32": Variant(384, 12, 1536, 12)}

# Number of layers in the name of a ResNet -> units in each stage; 26 and 200 are big_vision's.
RESNETS = {
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}

FORMS = (
    f"a size ({', '.join(VARIANTS)}), `/`, a patch size, as in `B/16`; `Axial-B/16`; "
    "`Conv+Pico/4`; "
    f"`R50+B/16`, or `R50x1` (R{', R'.join(str(layers) for layers in RESNETS)}); `Axial-R50x0.5`"
)


def is_variant(name: str) -> bool:
    """Return True if `name` has the form of a variant. The variant need not exist."""
    form = r"(Axial-)?([A-Za-z0-9]*\+)?(ViT-)?[A-Za-z0-9]+/\d+"
    return is_resnet(name) or re.fullmatch(form, name) is not None


def is_resnet(name: str) -> bool:
    """Return True if `name` has the form of a ResNet, such as `R50x1`. It need not exist."""
    return _resnet_parts(name) is not None


def _resnet_parts(name: str) -> tuple[int, float, bool] | None:
    """Return layers, width and `axial` of a ResNet's name; None for other names."""
    if found := re.fullmatch(r"(Axial-)?R(\d+)x(\d+(?:\.\d+)?)", name):
        return int(found[2]), float(found[3]), found[1] is not None
    # D.6 gives no width. This is the model that the code named there trains: half of all widths.
    found = re.fullmatch(r"AxialResNet-(\d+)", name)
    return (int(found[1]), 0.5, True) if found else None


def parse_variant(name: str, **settings: Any) -> Config:
    """Return the configuration of a variant such as `B/16`, with `settings` replacing fields.

    * `B/16`: a size and the side of a patch in pixels. `b/32` is B/32 at half of its widths.
    * `R50+B/16`: a hybrid (section 3.1). A patch is one cell of the ResNet's feature map. The
      number after the slash is the stride of the ResNet in pixels: 32 is the whole ResNet. At 16
      the units of the fourth stage move to the third (section 4.1).
    * `R+Ti/16`: the root of a ResNet (stride 4) and patches of 8x8 cells. As in the official code,
      a patch covers 32 px, in spite of the name.
    * `Conv+Pico/4`: a convolutional stem of stride 4 px, a power of two. A patch is one cell of its
      feature map. The stem takes the place of the early blocks: a third of them remains, because
      a shallow encoder learns more in minutes (recipes/LOG.md). So `Conv+Pico/4` has two blocks.
    * `Axial-B/32`: axial blocks and mean pooling, because rows and columns have no class token
      (appendix D.6).
    * `R50x1`: a BiT ResNet; the last number is a factor on all widths.
    * `Axial-R50x1`: the same with axial attention in place of the 3x3 convolutions (appendix D.6).

    The paper's longer names work too: `ViT-B/16`, `R50+ViT-B/16`, `Axial-ViT-B/32`, and
    `AxialResNet-50`, which is `Axial-R50x0.5`.

    Args:
        name: the name of the variant.
        settings: fields of `ViTConfig`, or of `ResNetConfig` for a BiT ResNet.

    Raises:
        ValueError: the variant does not exist, or the settings contradict each other.
    """
    values: dict[str, Any]
    if parts := _resnet_parts(name):
        layers, width, is_axial = parts
        values = {"layers": _units(name, layers), "width": width, "axial": is_axial}
        return ResNetConfig.from_dict(values | settings)
    form = r"(?:(Axial)-|R(\d*)\+|(Conv)\+)?(?:ViT-)?([A-Za-z0-9]+)/(\d+)"
    found = re.fullmatch(form, name)
    axial, stem, conv, size, patch = found.groups() if found else (None, None, None, "", "")
    variant = ONE_PATCH.get(name.removeprefix("ViT-")) or VARIANTS.get(size)
    if variant is None:
        close = next((v for v in VARIANTS if v.lower() == size.lower()), None)
        meant = f"; `{name.replace(f'{size}/', f'{close}/')}` is one" if close else ""
        raise ValueError(f"no model variant `{name}`: {FORMS}{meant}")
    values = {"patch_size": int(patch), **asdict(variant)}
    if axial:
        values.update(axial=True, class_token=False, pool="mean")
    if stem is not None:
        values["stem"], values["patch_size"] = _stem(name, stem, int(patch))
    if conv:
        values["conv_stem"], values["patch_size"] = _conv_stem(name, variant, int(patch)), 1
        values["depth"] = max(1, variant.depth // 3)
    values.update(settings)
    values["pool"] = canonical_pool(values.get("pool", "token"))
    return ViTConfig.from_dict(values)


def _units(name: str, layers: int) -> tuple[int, ...]:
    if layers not in RESNETS:
        known = ", ".join(str(n) for n in RESNETS)
        raise ValueError(f"no model variant `{name}`: a ResNet has {known} layers")
    return RESNETS[layers]


def _stem(name: str, layers: str, stride: int) -> tuple[tuple[int, ...], int]:
    """Return the units in each stage and the side of a patch in cells, e.g. for `50` and 16."""
    if stride not in (16, 32):
        raise ValueError(f"no model variant `{name}`: a hybrid ends in `/16` or `/32`")
    if not layers:
        if stride != 16:
            raise ValueError(f"no model variant `{name}`: without stages it ends in `/16`")
        return (), 8
    one, two, three, four = _units(name, int(layers))
    return ((one, two, three + four) if stride == 16 else (one, two, three, four)), 1


def _conv_stem(name: str, size: Variant, stride: int) -> tuple[int, ...]:
    """Return the feature maps of each stage of a convolutional stem."""
    strides = [2**stages for stages in range(1, MAX_STAGES + 1)]
    if stride not in strides:
        known = ", ".join(f"`/{stride}`" for stride in strides)
        raise ValueError(f"no model variant `{name}`: a convolutional stem ends in {known}")
    return default_channels(size.embed_dim, stride)


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """Build either configuration from its `to_dict` values; `kind` tells which one.

    Raises:
        ValueError: the kind or a key is unknown, or the network cannot be built.
    """
    kind = values.get("kind")
    if kind not in (None, "resnet"):
        raise ValueError(f"unknown kind of model: `{kind}`")
    return ResNetConfig.from_dict(values) if kind == "resnet" else ViTConfig.from_dict(values)


def from_config(config: Config) -> Network:
    """Build the network of a configuration. Its weights are not initialised yet."""
    return ResNet(config) if isinstance(config, ResNetConfig) else VisionTransformer(config)


def _machine_memory() -> float:
    """Bytes of memory; infinite where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return float("inf")


def create_network(
    name: str,
    *,
    num_classes: int = 0,
    image_size: int | tuple[int, int] = 224,
    seed: int = 0,
    **settings: Any,
) -> Network:
    """Return a network with random weights in evaluation mode; see `vitcli.create_model`."""
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    config = parse_variant(name, num_classes=num_classes, image_size=size, **settings)
    if isinstance(config, ViTConfig) and 4 * config.min_parameters > _machine_memory():
        raise ValueError(
            f"it has more than {config.min_parameters / 1e9:,.0f} G parameters, which do not fit "
            "into the memory of this machine"
        )
    return from_config(config).init_weights(torch.Generator().manual_seed(seed)).eval()
