"""The Vision Transformer, in pure torch: readable beside section 3.1 of the paper."""

from vitcli.vit.config import ViTConfig
from vitcli.vit.model import VisionTransformer
from vitcli.vit.resnet import ResNet, ResNetConfig
from vitcli.vit.variants import (
    VARIANTS,
    Config,
    Network,
    config_from_dict,
    create_network,
    from_config,
    parse_variant,
)

__all__ = [
    "VARIANTS",
    "Config",
    "Network",
    "ResNet",
    "ResNetConfig",
    "ViTConfig",
    "VisionTransformer",
    "config_from_dict",
    "create_network",
    "from_config",
    "parse_variant",
]
