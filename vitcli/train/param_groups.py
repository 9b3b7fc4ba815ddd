"""Which parameters decay, which belong to Muon, and the learning rate of each layer."""

import re
from collections.abc import Iterable

import torch
from torch import nn

from vitcli.config.schema import OptimSection
from vitcli.vit.position import is_position

# Learned tokens. They have two dimensions or more, but they are not kernels and do not decay.
TOKENS = ("cls_token", "dist_token", "reg_token", "latent", "mask_token")

NamedParameters = list[tuple[str, nn.Parameter]]
ParamGroups = list[dict[str, object]]


def is_kernel(name: str, p: torch.Tensor) -> bool:
    """True for matrices and convolution kernels: only these decay (as in big_vision)."""
    last = name.rpartition(".")[2]
    return p.ndim >= 2 and last not in TOKENS and not is_position(last)


def encoder_names(module: nn.Module) -> NamedParameters:
    """The parameters of a network or an objective, named as in the network.

    The own parameters of an objective get the prefix `objective.`, so that a decoder with `blocks`
    is not taken for the encoder.
    """
    prefix = getattr(module, "encoder_prefix", "")
    return [
        (name.removeprefix(prefix) if name.startswith(prefix) else f"objective.{name}", p)
        for name, p in module.named_parameters()
    ]


def is_hidden_matrix(name: str, p: torch.Tensor) -> bool:
    """True for matrices of encoder blocks and kernels of a convolutional stem.

    Muon trains these. It is not meant for the embedding and the head.
    """
    if name.startswith("patch_embed.stages."):
        return p.ndim == 4
    # LoRA adapters are matrices too, but of low rank: orthogonalising them makes no sense.
    adapter = name.rpartition(".")[2].startswith("lora_")
    return p.ndim == 2 and not adapter and is_kernel(name, p) and name.startswith("blocks.")


def layer_of(name: str, depth: int) -> int:
    """The layer number of a parameter: 0 embedding, 1 .. depth blocks, depth + 1 the rest.

    BEiT and MAE number layers in this way; layer i has the rate lr * layer_decay^(depth + 1 - i).
    Names are those of `encoder_names`; what belongs to the objective counts as the rest.
    """
    if name.startswith("objective."):
        return depth + 1
    if found := re.match(r"blocks\.(\d+)\.", name):
        return int(found[1]) + 1
    embedding = name.startswith(("patch_embed.", "norm_pre.")) or name.partition(".")[0] in TOKENS
    return 0 if embedding or is_position(name.rpartition(".")[2]) else depth + 1


def param_groups(
    named: NamedParameters, section: OptimSection, lr: float, depth: int
) -> ParamGroups:
    """Group parameters by weight decay (kernels only) and, with `layer_decay`, by layer."""
    found: dict[tuple[bool, int], list[nn.Parameter]] = {}
    for name, p in named:
        layer = layer_of(name, depth) if section.layer_decay != 1.0 else depth + 1
        found.setdefault((not is_kernel(name, p), layer), []).append(p)
    # Sorted, because a checkpoint stores optimizer states by the index of the parameter.
    return [
        {
            "params": params,
            "weight_decay": 0.0 if rest else section.weight_decay,
            "lr": lr * section.layer_decay ** (depth + 1 - layer),
        }
        for (rest, layer), params in sorted(found.items())
    ]


def set_lr(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Set the rate of every group to `factor` times its base rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            # Computed from the base rate in every step, so that a checkpoint needs no rates.
            group["lr"] = group["base_lr"] * factor
