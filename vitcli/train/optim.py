"""Optimizers and schedules."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from vitcli.config import OptimSection, ScheduleSection
from vitcli.vit.position import is_position

# Learned tokens that are not kernels, although they have two dimensions or more; nor are positions.
NOT_KERNELS = ("cls_token", "dist_token", "reg_token", "latent", "mask_token")


def is_kernel(name: str, p: torch.Tensor) -> bool:
    """Whether `p` is a matrix or a convolution kernel: only these decay (big_vision)."""
    last = name.rpartition(".")[2]
    return p.ndim >= 2 and last not in NOT_KERNELS and not is_position(last)


def is_hidden_matrix(name: str, p: torch.Tensor) -> bool:
    """Whether Muon may have `p`: a matrix inside an encoder block, not embedding or head."""
    return p.ndim == 2 and is_kernel(name, p) and ".blocks." in f".{name}"


def decay_groups(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict[str, object]]:
    """Two parameter groups: kernels with weight decay; biases, norms, tokens, positions without."""
    kernels: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, p in named:
        (kernels if is_kernel(name, p) else rest).append(p)
    groups: list[dict[str, object]] = [
        {"params": kernels, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


Named = list[tuple[str, nn.Parameter]]


def adamw(named: Named, section: OptimSection) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov and Hutter, 2019), fused."""
    groups = decay_groups(named, section.weight_decay)
    return [
        torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=True)
    ]


def sgd(named: Named, section: OptimSection) -> list[torch.optim.Optimizer]:
    """SGD with momentum as the paper fine-tunes: no dampening, no Nesterov."""
    groups = decay_groups(named, section.weight_decay)
    return [torch.optim.SGD(groups, lr=section.lr, momentum=section.momentum)]


def muon(named: Named, section: OptimSection) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the matrices of the blocks, AdamW for everything else.

    On budgets of minutes it is worth more than any other single choice (recipes/LOG.md). A ResNet
    has no such matrices, so AdamW has all of it.
    """
    matrices = [p for name, p in named if is_hidden_matrix(name, p)]
    rest = [(name, p) for name, p in named if not is_hidden_matrix(name, p)]
    if not matrices:
        return adamw(rest, section)
    first = torch.optim.Muon(
        matrices,
        lr=section.matrix_lr,
        momentum=section.momentum,
        weight_decay=section.weight_decay,
    )
    return [first, *adamw(rest, section)]


OPTIMIZERS: dict[str, Callable[[Named, OptimSection], list[torch.optim.Optimizer]]] = {
    "adamw": adamw,
    "sgd": sgd,
    "muon": muon,
}


def build_optimizers(module: nn.Module, section: OptimSection) -> list[torch.optim.Optimizer]:
    """The optimizers that `section` names, over the parameters of `module` that learn.

    Each group keeps its full rate under `base_lr`; `set_rates` multiplies it by the schedule.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    optimizers = OPTIMIZERS[section.name](named, section)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def set_rates(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Set every rate to `factor` times its base."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor


def warmup_steps(section: ScheduleSection, total_steps: int) -> int:
    """Steps of warm-up in a run of `total_steps`."""
    if section.warmup_steps is not None:
        return min(section.warmup_steps, total_steps)
    return round((section.warmup_fraction or 0.0) * total_steps)


def linear(p: float, end: float, decay_fraction: float) -> float:
    """From 1 to `end` along a line, p from 0 to 1."""
    return end + (1.0 - end) * (1.0 - p)


def cosine(p: float, end: float, decay_fraction: float) -> float:
    """From 1 to `end` along half a cosine."""
    return end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * p))


def wsd(p: float, end: float, decay_fraction: float) -> float:
    """Warm-up, stable, decay: 1, then a line down to `end` over the last `decay_fraction`."""
    return linear(max(0.0, (p - 1.0 + decay_fraction) / decay_fraction), end, decay_fraction)


def constant(p: float, end: float, decay_fraction: float) -> float:
    """1 throughout."""
    return 1.0


SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "linear": linear,
    "cosine": cosine,
    "wsd": wsd,
    "constant": constant,
}


def schedule_factor(section: ScheduleSection, step: float, total_steps: int) -> float:
    """The share of the base rate that update `step` (the first is 0) is made with.

    As in the official code: `min(1, step / warmup)` times the curve over what follows the warm-up,
    so the first of several warm-up updates has rate 0.
    """
    warmup = warmup_steps(section, total_steps)
    p = min(1.0, max(0.0, (step - warmup) / max(1, total_steps - warmup)))
    factor = SCHEDULES[section.name](p, section.final_lr_fraction, section.decay_fraction)
    return factor * min(1.0, step / warmup) if warmup else factor
