"""The names of models: `B/16`, `R50+B/16`, `Axial-B/32`, `R50x1`."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vitcli.vit.config import ViTConfig, normal_pool
from vitcli.vit.model import VisionTransformer
from vitcli.vit.resnet import ResNet, ResNetConfig

Network = VisionTransformer | ResNet
Config = ViTConfig | ResNetConfig


@dataclass(frozen=True)
class Variant:
    """The four numbers behind a name."""

    embed_dim: int
    depth: int
    mlp_dim: int
    num_heads: int


VARIANTS = {
    # For images of about 32 pixels and an hour of two CPU cores; ours.
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

# Units of each stage of a ResNet by the layers in its name; 26 and 200 as in big_vision.
RESNETS = {
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}

FORMS = (
    f"a size ({', '.join(VARIANTS)}), `/`, a patch size, as in `B/16`; `Axial-B/16`; "
    f"`R50+B/16`, or `R50x1` (R{', R'.join(str(layers) for layers in RESNETS)})"
)


def is_variant(name: str) -> bool:
    """Whether `name` is spelled like one of `parse_variant`, known or not."""
    form = r"(Axial-)?([A-Za-z0-9]*\+)?(ViT-)?[A-Za-z0-9]+/\d+"
    return is_resnet(name) or re.fullmatch(form, name) is not None


def is_resnet(name: str) -> bool:
    """Whether `name` is spelled like a BiT ResNet (`R50x1`), known or not."""
    return re.fullmatch(r"R\d+x\d+", name) is not None


def parse_variant(name: str, **settings: Any) -> Config:
    """`B/16` -> its configuration, with `settings` laid over it.

    `R50+B/16` puts a ResNet before the patches, which are single cells of its feature map
    (section 3.1). The number after the slash is the distance of two cells in pixels: 32 is the
    whole ResNet; for 16 its last stage is left out and the units of that stage stand in the third
    (section 4.1). `R+Ti/16` is the exception, in the official code and here: the root of the
    ResNet alone (7x7 convolution and max-pool, stride 4) and patches of 8x8 cells, so that a patch
    is 32 pixels wide in spite of the name.

    `Axial-B/32` has axial blocks, and as there is no sequence to put a class token into, the mean
    of its patches (appendix D.6). `R50x1` is a BiT ResNet; the last number is a factor of its
    widths. The paper's longer names do as well: `ViT-B/16`, `R50+ViT-B/16`, `Axial-ViT-B/32`.

    Args:
        name: of the model.
        settings: fields of ViTConfig, for a BiT ResNet of ResNetConfig.

    Raises:
        ValueError: there is no such variant, or the settings contradict each other.
    """
    if found := re.fullmatch(r"R(\d+)x(\d+)", name):
        layers, width = int(found[1]), float(found[2])
        return ResNetConfig.from_dict({"layers": _units(name, layers), "width": width, **settings})
    found = re.fullmatch(r"(?:(Axial)-|R(\d*)\+)?(?:ViT-)?([A-Za-z0-9]+)/(\d+)", name)
    axial, stem, size, patch = found.groups() if found else (None, None, "", "")
    if size not in VARIANTS:
        close = next((v for v in VARIANTS if v.lower() == size.lower()), None)
        meant = f"; `{name.replace(f'{size}/', f'{close}/')}` is one" if close else ""
        raise ValueError(f"no model variant `{name}`: {FORMS}{meant}")
    values: dict[str, Any] = {"patch_size": int(patch), **asdict(VARIANTS[size])}
    if axial:
        values.update(axial=True, class_token=False, pool="mean")
    if stem is not None:
        values["stem"], values["patch_size"] = _stem(name, stem, int(patch))
    values.update(settings)
    values["pool"] = normal_pool(values.get("pool", "token"))
    return ViTConfig.from_dict(values)


def _units(name: str, layers: int) -> tuple[int, ...]:
    if layers not in RESNETS:
        known = ", ".join(str(n) for n in RESNETS)
        raise ValueError(f"no model variant `{name}`: a ResNet has {known} layers")
    return RESNETS[layers]


def _stem(name: str, layers: str, stride: int) -> tuple[tuple[int, ...], int]:
    """Units of the stages and cells of a patch for `R50` and 16."""
    if stride not in (16, 32):
        raise ValueError(f"no model variant `{name}`: a hybrid ends in `/16` or `/32`")
    if not layers:
        if stride != 16:
            raise ValueError(f"no model variant `{name}`: without stages it ends in `/16`")
        return (), 8
    one, two, three, four = _units(name, int(layers))
    return ((one, two, three + four) if stride == 16 else (one, two, three, four)), 1


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """The inverse of `to_dict` of either configuration, told apart by `kind`.

    Raises:
        ValueError: a kind that is not known, an unknown key, or a combination that cannot be built.
    """
    kind = values.get("kind")
    if kind not in (None, "resnet"):
        raise ValueError(f"a model of kind `{kind}` is not known")
    return ResNetConfig.from_dict(values) if kind == "resnet" else ViTConfig.from_dict(values)


def from_config(config: Config) -> Network:
    """The model of a configuration; its weights are yet to be drawn or loaded.

    Raises:
        ValueError: a combination that cannot be built.
    """
    return ResNet(config) if isinstance(config, ResNetConfig) else VisionTransformer(config)


def create_network(
    name: str,
    *,
    num_classes: int = 0,
    image_size: int | tuple[int, int] = 224,
    seed: int = 0,
    **settings: Any,
) -> Network:
    """A model with random weights: `create_network("B/16", num_classes=1000)`.

    Args:
        name: a variant such as `B/16`, `R50+B/16`, `Axial-B/32` or `R50x1` (see `parse_variant`).
        num_classes: outputs of the head; 0 for none.
        image_size: pixels, one number or (Y, X).
        seed: of the random weights.
        settings: further fields of `ViTConfig`, for `R50x1` of `ResNetConfig`.

    Raises:
        ValueError: no such variant, or settings that contradict each other.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    config = parse_variant(name, num_classes=num_classes, image_size=size, **settings)
    return from_config(config).init_weights(torch.Generator().manual_seed(seed)).eval()
