"""The Vision Transformer, in pure torch: readable beside section 3.1 of the paper."""

from vitcli.vit.model import VisionTransformer, create_model
from vitcli.vit.variants import VARIANTS, ViTConfig, parse_variant

__all__ = ["VARIANTS", "ViTConfig", "VisionTransformer", "create_model", "parse_variant"]
