"""A small model of every kind that can be configured, for tests that go through all of them."""

import torch

from vitcli.vit import VisionTransformer, ViTConfig

SMALL = {
    "image_size": (16, 24),  # 4 rows and 6 columns of patches
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 3,
    "num_heads": 2,
    "mlp_dim": 24,
    "num_classes": 5,
}
STEM = {"image_size": (32, 48), "patch_size": 2}  # a stem of stride 4: 4 rows, 6 columns again
AXIAL = {"axial": True, "class_token": False}

KINDS = {
    "plain": {},
    "mean": {"pool": "mean", "class_token": False, "norm_after_pool": True},
    "quadrants": {"pool": "quadrants", "position_covers_prefix": False},
    "map": {"pool": "map", "class_token": False},
    "token and mean": {"pool": "token_mean"},
    "pre-logits": {"representation_size": 7},
    "all of today": {
        "num_registers": 2,
        "qk_norm": True,
        "layer_scale": 0.1,
        "mlp": "swiglu",
        "norm_before_blocks": True,
        "patch_bias": False,
        "gelu": "tanh",
        "qkv_bias": False,
    },
    "tower": {
        "norm": "rms",
        "patch_norm": True,
        "gelu": "quick",
        "projection_size": 6,
        "head_norm": True,
        "crop_to_patches": True,
        "image_size": (19, 25),
    },
    "no final norm": {"final_norm": False},
    "pixel and patch norm": {"pixel_norm": True, "patch_norm": True},
    "distillation token": {"distillation_token": True},
    "distilled, one head": {"distillation_token": True, "pool": "distilled"},
    "distilled": {"distillation_token": True, "pool": "distilled", "distillation_head": True},
    "none": {"position": "none"},
    "sincos2d": {"position": "sincos2d"},
    "sincos2d, shared": {"position": "sincos2d", "position_at": "shared"},
    "learned, every": {"position_at": "every", "num_registers": 1},
    "learned, every, uncovered": {"position_at": "every", "position_covers_prefix": False},
    "learned, shared": {"position_at": "shared"},
    "learned2d": {"position": "learned2d", "num_registers": 1},
    "learned2d, every": {"position": "learned2d", "position_at": "every"},
    "learned2d, shared": {"position": "learned2d", "position_at": "shared"},
    "relative": {"position": "relative", "num_registers": 1, "pool": "token_mean"},
    "bias, every": {"position": "none", "position_bias": "every"},
    "bias, shared": {"position_bias": "shared", "pool": "mean", "norm_after_pool": True},
    "bias, no prefix": {"position_bias": "every", "pool": "mean", "class_token": False},
    "axial": {**AXIAL, "pool": "mean"},
    "axial, relative": {**AXIAL, "pool": "quadrants", "position": "relative"},
    "axial, 2-D, every, map": {
        **AXIAL,
        "pool": "map",
        "position": "learned2d",
        "position_at": "every",
    },
    "rope, DINOv3": {
        "position": "none",
        "num_registers": 2,
        "rope": "centred",
        "rope_rescale": 2.0,
        "key_bias": False,
        "layer_scale": 0.1,
    },
    "rope, EVA-02": {
        "rope": "index",
        "rope_theta": 1e4,
        "rope_pairs": "neighbours",
        "rope_grid": (3, 5),
        "key_bias": False,
        "mlp": "swiglu",
        "mlp_norm": True,
        "attention_norm": True,
        "pool": "mean",
        "norm_after_pool": True,
    },
    "root": {**STEM, "stem": ()},
    "conv stem": {"patch_size": 1, "conv_stem": (8, 12)},
    "hybrid": {**STEM, "stem": (1,), "stem_arithmetic": "timm", "stem_width": 0.5},
}


def small(name: str = "plain", seed: int = 0, **settings) -> VisionTransformer:
    """A model of the kind `name`; no weight is zero, so that every one of them matters."""
    model = VisionTransformer(ViTConfig(**{**SMALL, **KINDS[name], **settings}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            scale = 1.0 if "norm" in key and key.endswith("weight") else 0.0
            p.normal_(mean=scale, std=0.3, generator=generator)
    return model.eval()


def pictures(model: VisionTransformer, number: int = 2, seed: int = 1, size=None) -> torch.Tensor:
    """(B, C, Y, X): noise of the size that `model` is made for, or of another."""
    shape = (number, model.config.num_channels, *(size or model.config.image_size))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
