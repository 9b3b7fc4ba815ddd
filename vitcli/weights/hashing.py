"""What tells one model from another: a hash of everything that its answers depend on."""

import hashlib
import json

import torch
from torch import Tensor

from vitcli.weights.loaded import LoadedModel

HEADS = ("head.", "head_dist.")


def model_hash(model: LoadedModel, *, head: bool = True) -> str:
    """SHA-256 in hexadecimal digits of weights, configuration and preprocessing.

    Args:
        head: without it of what the features depend on alone, so that a model with another head, or
            with none, has the same hash.
    """
    digest = hashlib.sha256()
    config = model.config.to_dict()
    said = {
        "config": config if head else {k: v for k, v in config.items() if k != "num_classes"},
        "preprocess": model.preprocess.to_dict() if model.preprocess is not None else None,
        "position_resize": getattr(model.network, "position_resize", None),
        "labels": model.labels if head else None,
    }
    digest.update(json.dumps(said, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if head or not name.startswith(HEADS):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
    if head and model.config.num_classes:
        # Activation and whatever else stands between the logits and the probabilities.
        probe = torch.linspace(-2, 2, model.config.num_classes)[None]  # (1, K)
        digest.update(_bytes(model.probabilities(probe)))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().data
