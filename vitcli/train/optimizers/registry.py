"""Optimizers, and which parameters they have at which rate."""

import re
from collections.abc import Callable, Iterable

import torch
from torch import nn

from vitcli.config.schema import OptimSection, ScheduleSection
from vitcli.errors import VitcliError
from vitcli.train.optimizers.adafactor import Adafactor
from vitcli.train.optimizers.lamb import Lamb
from vitcli.train.optimizers.lion import Lion
from vitcli.train.optimizers.sgd_bf16 import HalfMomentum
from vitcli.vit.position import is_position

# Learned tokens that are not kernels, although they have two dimensions or more; nor are positions.
NOT_KERNELS = ("cls_token", "dist_token", "reg_token", "latent", "mask_token")

Named = list[tuple[str, nn.Parameter]]
Groups = list[dict[str, object]]


def is_kernel(name: str, p: torch.Tensor) -> bool:
    """Whether `p` is a matrix or a convolution kernel: only these decay (big_vision)."""
    last = name.rpartition(".")[2]
    return p.ndim >= 2 and last not in NOT_KERNELS and not is_position(last)


def is_hidden_matrix(name: str, p: torch.Tensor) -> bool:
    """Whether Muon may have `p`: a matrix inside an encoder block, not embedding or head."""
    adapter = name.rpartition(".")[2].startswith("lora_")
    return p.ndim == 2 and not adapter and is_kernel(name, p) and ".blocks." in f".{name}"


def layer_of(name: str, depth: int) -> int:
    """Where a parameter stands: 0 the embedding, 1 .. depth the blocks, depth + 1 what follows.

    The numbering of BEiT and MAE, whose rate of layer i is `layer_decay` to the power of
    depth + 1 - i. Heads that only an objective has count as what follows.
    """
    own = name.rpartition("model.")[2]  # without what the objective puts before it
    if found := re.match(r"blocks\.(\d+)\.", own):
        return int(found[1]) + 1
    early = own.startswith(("patch_embed.", "norm_pre.")) or own.partition(".")[0] in NOT_KERNELS
    return 0 if early or is_position(own.rpartition(".")[2]) else depth + 1


def groups_of(named: Named, section: OptimSection, lr: float, depth: int) -> Groups:
    """Parameter groups: kernels decay, the rest does not; each layer with its own rate.

    Without `layer_decay` there are two; biases, norms, tokens and positions never decay.
    """
    found: dict[tuple[bool, int], list[nn.Parameter]] = {}
    for name, p in named:
        layer = layer_of(name, depth) if section.layer_decay != 1.0 else depth + 1
        found.setdefault((not is_kernel(name, p), layer), []).append(p)
    return [
        {
            "params": params,
            "weight_decay": 0.0 if rest else section.weight_decay,
            "lr": lr * section.layer_decay ** (depth + 1 - layer),
        }
        for (rest, layer), params in sorted(found.items())
    ]


def adamw(groups: Groups, section: OptimSection) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019), fused; the decay is multiplied by the rate."""
    return torch.optim.AdamW(
        groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=True
    )


def sgd(groups: Groups, section: OptimSection) -> torch.optim.Optimizer:
    """SGD with momentum as the paper fine-tunes: no dampening, no Nesterov."""
    if section.momentum_dtype == "bf16":
        return HalfMomentum(groups, lr=section.lr, momentum=section.momentum)
    return torch.optim.SGD(groups, lr=section.lr, momentum=section.momentum, fused=True)


def lion(groups: Groups, section: OptimSection) -> torch.optim.Optimizer:
    """Lion: see `lion.py`."""
    return Lion(groups, lr=section.lr, betas=section.betas)


def lamb(groups: Groups, section: OptimSection) -> torch.optim.Optimizer:
    """LAMB: see `lamb.py`."""
    return Lamb(groups, lr=section.lr, betas=section.betas, eps=section.eps)


def adafactor(groups: Groups, section: OptimSection) -> torch.optim.Optimizer:
    """Adafactor as big_vision has it: see `adafactor.py`."""
    return Adafactor(groups, lr=section.lr, momentum=section.momentum)


# `muon` is not one optimizer but two: see `build_optimizers`.
OPTIMIZERS: dict[str, Callable[[Groups, OptimSection], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "sgd": sgd,
    "muon": adamw,
    "lion": lion,
    "lamb": lamb,
    "adafactor": adafactor,
}


# Of the settings that not every optimizer has, those that each has; of schedules likewise.
OWN = {
    "adamw": {"betas", "eps"},
    "sgd": {"momentum", "momentum_dtype"},
    "muon": {"matrix_lr", "momentum", "betas", "eps"},
    "lion": {"betas"},
    "lamb": {"betas", "eps"},
    "adafactor": {"momentum"},
}
OWN_OF_SCHEDULES = {
    "linear": {"final_lr_fraction"},
    "cosine": {"final_lr_fraction"},
    "wsd": {"final_lr_fraction", "decay_fraction"},
    "constant": set[str](),
    "rsqrt": {"timescale", "cooldown_steps"},
}


def unused(section: OptimSection, schedule: ScheduleSection) -> list[str]:
    """A note on settings, given or the recipe's, that the optimizer or the schedule has not.

    No errors: whoever lays another optimizer over a recipe leaves the settings of its own behind.
    """
    notes = []
    for what, table, given, own in (
        ("optimizer", "optim", section, OWN),
        ("schedule", "schedule", schedule, OWN_OF_SCHEDULES),
    ):
        name, defaults = given.name, type(given)()
        foreign = sorted(set().union(*own.values()) - own[name])
        foreign = [key for key in foreign if getattr(given, key) != getattr(defaults, key)]
        if foreign:
            keys = ", ".join(f"`{table}.{key}`" for key in foreign)
            notes.append(f"{what} `{name}` has no use for {keys}")
    return notes


def muon(groups: Groups, section: OptimSection) -> torch.optim.Optimizer:
    """Muon (Jordan et al., 2024) for the matrices of the blocks.

    On budgets of minutes it is worth more than any other single choice (recipes/LOG.md).
    """
    return torch.optim.Muon(
        groups,
        lr=section.matrix_lr,
        momentum=section.momentum,
        weight_decay=section.weight_decay,
    )


def build_optimizers(module: nn.Module, section: OptimSection) -> list[torch.optim.Optimizer]:
    """The optimizers that `section` names, over the parameters of `module` that learn.

    `muon` has the matrices of the blocks, AdamW everything else; a ResNet has no such matrices, so
    AdamW has all of it. Each group keeps its full rate under `base_lr`; `set_rates` multiplies it
    by the schedule.

    Raises:
        VitcliError: rates by layer for a model without blocks.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    depth = max((layer_of(name, 0) for name, _ in module.named_parameters()), default=0)
    if section.layer_decay != 1.0 and all(layer_of(n, depth) in (0, depth + 1) for n, _ in named):
        raise VitcliError(
            "`optim.layer_decay` goes by the blocks of a ViT, and here none learns",
            "`--set optim.layer_decay=1.0`",
        )
    optimizers = []
    if section.name == "muon":
        matrices = [(name, p) for name, p in named if is_hidden_matrix(name, p)]
        named = [(name, p) for name, p in named if not is_hidden_matrix(name, p)]
        if matrices:
            optimizers.append(muon(groups_of(matrices, section, section.matrix_lr, depth), section))
    rest = groups_of(named, section, section.lr, depth)
    optimizers.append(OPTIMIZERS[section.name](rest, section))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def set_rates(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Set every rate to `factor` times its base."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
