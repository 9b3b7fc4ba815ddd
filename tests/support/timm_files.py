"""Small models for the tests of timm's layout, and reading their tensors without a file."""

from pathlib import Path

import torch

from vitcli.vit import VisionTransformer, ViTConfig
from vitcli.weights.find_network import find_network
from vitcli.weights.from_checkpoint import build_model
from vitcli.weights.loaded import LoadedModel
from vitcli.weights.overrides import Overrides
from vitcli.weights.read import read_network


def tiny(**options) -> LoadedModel:
    """A small model with weights that are nowhere 0 or 1, so that each one counts."""
    stem = {"stem_arithmetic": "timm"} if "stem" in options else {}
    base = {"image_size": (32, 32), "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    net = VisionTransformer(
        ViTConfig(**{**base, "mlp_dim": 80, "num_classes": 5, **stem, **options})
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return LoadedModel(net.eval())


def read(tensors, **said):
    """What `load_model` does with a file of these tensors."""
    hub = said.pop("hub", None)
    network = find_network({"": tensors}, "w")
    return build_model(read_network(network, Path("w"), "w", Overrides(**said), hub or {}), "w")
