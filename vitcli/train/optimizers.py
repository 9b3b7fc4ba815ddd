"""The optimizers: those of torch, the ones that torch lacks, and the registry of all.

To add an optimizer, write its builder here and enter it in `OPTIMIZERS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitcli.config.schema import OptimSection
from vitcli.errors import VitcliError, unknown
from vitcli.train.muon import Muon
from vitcli.train.param_groups import (
    NamedParameters,
    encoder_names,
    is_hidden_matrix,
    layer_of,
    param_groups,
)

FACTORED_SIZE = 32  # Adafactor factors a matrix if both sides have at least this length
DECAY_POWER, MAX_DECAY = 0.8, 0.999  # Adafactor's decay in step t is min(MAX, 1 - t^-POWER)
EPSILON = 1e-30  # Adafactor adds this to squared gradients


class Sgd(torch.optim.SGD):
    """torch's SGD with momentum and decoupled weight decay (SGDW, Loshchilov and Hutter, 2019).

    torch adds the decay to the gradient, and so to the momentum. Here each step decays by
    lr * weight_decay, as in every other optimizer of this module.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays, strict=True):
            params = [p for p in group["params"] if p.grad is not None]
            if decay and params:
                torch._foreach_mul_(params, 1.0 - group["lr"] * decay)
            group["weight_decay"] = 0.0
        try:
            super().step()
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay


class SgdBf16(torch.optim.Optimizer):
    """SGD with momentum in bf16, which takes half the memory; used by the paper's fine-tuning.

    Matches `optax.sgd(accumulator_dtype=bfloat16)` of the official code.
    """

    def __init__(self, params: Any, lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                total = p.grad.float()
                if (buffer := self.state[p].get("momentum_buffer")) is not None:
                    total = total.add(buffer.float(), alpha=group["momentum"])
                # Only the stored sum is rounded. optax moves the weights by the unrounded one.
                self.state[p]["momentum_buffer"] = total.bfloat16()
                if group["weight_decay"]:
                    p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(total.to(p.dtype), alpha=-group["lr"])


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al., 2023, algorithm 2): moves weights by the sign of an averaged gradient.

    The authors use 3 to 10 times the weight decay of AdamW and a rate that is lower by the same
    factor, so that lr * weight_decay stays the same, and betas of 0.9 and 0.99.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            averages = [self.state[p]["exp_avg"] for p in params]
            beta1, beta2 = group["betas"]
            updates = torch._foreach_lerp(grads, averages, beta1)
            torch._foreach_sign_(updates)
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1.0 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-group["lr"])
            # The update uses beta1, the stored average beta2: that is what Lion adds to signSGD.
            torch._foreach_lerp_(averages, grads, 1.0 - beta2)


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al., 2020, algorithm 2): Adam steps, scaled by the norm of each weight tensor.

    r = m / (sqrt(v) + eps) + weight_decay * w, with bias-corrected m and v; then
    w -= lr * |w| / |r| * r.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p]["step"] = torch.zeros((), dtype=torch.float32)
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            for p in params:
                self.state[p]["step"] += 1
            steps = float(self.state[params[0]]["step"])
            means = [self.state[p]["exp_avg"] for p in params]
            squares = [self.state[p]["exp_avg_sq"] for p in params]
            beta1, beta2 = group["betas"]
            torch._foreach_lerp_(means, grads, 1.0 - beta1)
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, grads, grads, 1.0 - beta2)
            roots = torch._foreach_sqrt(squares)
            torch._foreach_div_(roots, (1.0 - beta2**steps) ** 0.5)
            torch._foreach_add_(roots, group["eps"])
            updates = torch._foreach_div(means, roots)
            torch._foreach_div_(updates, 1.0 - beta1**steps)
            # Biases, norms and tokens do not decay and are not scaled by the ratio of norms
            # either, as in the implementations that trained DeiT III.
            if group["weight_decay"]:
                torch._foreach_add_(updates, params, alpha=group["weight_decay"])
                norms, update_norms = torch._foreach_norm(params), torch._foreach_norm(updates)
                for update, norm, update_norm in zip(updates, norms, update_norms, strict=True):
                    # A new head is all zeros: a ratio of 0 would keep it there for ever.
                    both = (norm > 0) & (update_norm > 0)
                    update.mul_(torch.where(both, norm / update_norm, torch.ones_like(norm)))
            torch._foreach_add_(params, updates, alpha=-group["lr"])


class Adafactor(torch.optim.Optimizer):
    """Adafactor as in big_vision (Zhai et al., 2022): factored second moments, bf16 momentum.

    It differs from Shazeer and Stern (2018): the rate is not multiplied by the size of the weights,
    updates are not clipped, the decay of the second moments is capped, and there is a first moment.
    An n x m matrix stores n + m second moments. The state takes half the memory of the weights.
    """

    def __init__(self, params: Any, lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] = state.get("step", torch.zeros((), dtype=torch.float32)) + 1
                decay = min(MAX_DECAY, 1.0 - float(state["step"]) ** -DECAY_POWER)
                update = rms_scaled(p.grad.float(), state, decay)
                average = update * (1.0 - group["momentum"])
                if (old := state.get("exp_avg")) is not None:
                    average = average.add(old.float(), alpha=group["momentum"])
                state["exp_avg"] = average.bfloat16()
                if group["weight_decay"]:
                    p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(average.to(p.dtype), alpha=-group["lr"])


def rms_scaled(gradient: Tensor, state: dict[str, Any], decay: float) -> Tensor:
    """Divide a gradient by the root of its second moment, which is stored in `state`."""
    # Convolution kernels are factored as (outputs, inputs * height * width).
    g = gradient.flatten(1) if gradient.ndim > 2 else gradient
    square = g.square() + EPSILON
    if g.ndim < 2 or min(g.shape) < FACTORED_SIZE:
        state["exp_avg_sq"] = _moving_average(state.get("exp_avg_sq"), square, decay)
        return (g * state["exp_avg_sq"].rsqrt()).reshape(gradient.shape)
    state["row"] = _moving_average(state.get("row"), square.mean(dim=1), decay)  # (outputs,)
    state["column"] = _moving_average(state.get("column"), square.mean(dim=0), decay)  # (inputs,)
    rows = (state["row"] / state["row"].mean()).rsqrt()
    return (g * rows[:, None] * state["column"].rsqrt()).reshape(gradient.shape)


def _moving_average(old: Tensor | None, new: Tensor, decay: float) -> Tensor:
    return new * (1.0 - decay) if old is None else old * decay + new * (1.0 - decay)


# Every builder takes (named parameters, the `[optim]` settings, the number of blocks).
def adamw(named: NamedParameters, s: OptimSection, depth: int) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov and Hutter, 2019), where each step decays by lr * weight_decay."""
    groups = param_groups(named, s, s.lr, depth)
    return [torch.optim.AdamW(groups, lr=s.lr, betas=s.betas, eps=s.eps, fused=True)]


def sgd(named: NamedParameters, s: OptimSection, depth: int) -> list[torch.optim.Optimizer]:
    """SGD with momentum as the paper fine-tunes: no dampening, no Nesterov, decoupled decay."""
    groups = param_groups(named, s, s.lr, depth)
    if s.momentum_dtype == "bf16":
        return [SgdBf16(groups, lr=s.lr, momentum=s.momentum)]
    # A fused step skips itself if fp16 gradients overflow; the decay must be skipped with it.
    return [Sgd(groups, lr=s.lr, momentum=s.momentum, fused=not s.weight_decay)]


def muon(named: NamedParameters, s: OptimSection, depth: int) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the matrices of the blocks, AdamW for everything else.

    On budgets of minutes it gains more than any other single choice (recipes/LOG.md).
    """
    matrices = [(name, p) for name, p in named if is_hidden_matrix(name, p)]
    rest = [(name, p) for name, p in named if not is_hidden_matrix(name, p)]
    if not matrices:  # a ResNet
        return adamw(rest, s, depth)
    first = Muon(
        param_groups(matrices, s, s.matrix_lr, depth),
        lr=s.matrix_lr,
        momentum=s.momentum,
        weight_decay=s.weight_decay,
    )
    return [first, *adamw(rest, s, depth)]


def lion(named: NamedParameters, s: OptimSection, depth: int) -> list[torch.optim.Optimizer]:
    """Lion for all parameters."""
    return [Lion(param_groups(named, s, s.lr, depth), lr=s.lr, betas=s.betas)]


def lamb(named: NamedParameters, s: OptimSection, depth: int) -> list[torch.optim.Optimizer]:
    """LAMB for all parameters."""
    return [Lamb(param_groups(named, s, s.lr, depth), lr=s.lr, betas=s.betas, eps=s.eps)]


def adafactor(named: NamedParameters, s: OptimSection, depth: int) -> list[torch.optim.Optimizer]:
    """Adafactor for all parameters."""
    return [Adafactor(param_groups(named, s, s.lr, depth), lr=s.lr, momentum=s.momentum)]


@dataclass(frozen=True)
class OptimizerEntry:
    """An optimizer in the registry.

    Attributes:
        build: makes the optimizers, one or more.
        settings: the keys of `[optim]` that only some optimizers read, and that this one does.
        elementwise: True if an update of a part of a tensor does not depend on the other parts.
            `train.fully_shard` needs this.
    """

    build: Callable[[NamedParameters, OptimSection, int], list[torch.optim.Optimizer]]
    settings: frozenset[str]
    elementwise: bool = False


OPTIMIZERS = {
    "adamw": OptimizerEntry(adamw, frozenset({"betas", "eps"}), elementwise=True),
    "sgd": OptimizerEntry(sgd, frozenset({"momentum", "momentum_dtype"}), elementwise=True),
    "muon": OptimizerEntry(muon, frozenset({"matrix_lr", "momentum", "betas", "eps"})),
    "lion": OptimizerEntry(lion, frozenset({"betas"})),
    "lamb": OptimizerEntry(lamb, frozenset({"betas", "eps"})),
    "adafactor": OptimizerEntry(adafactor, frozenset({"momentum"})),
}


def find_optimizer(section: OptimSection) -> OptimizerEntry:
    """The registry entry of `optim.name`."""
    if section.name not in OPTIMIZERS:
        raise unknown("optimizer", section.name, OPTIMIZERS)
    entry = OPTIMIZERS[section.name]
    # An error and not a note: the user asked for less memory and would not get it.
    if section.momentum_dtype != "fp32" and "momentum_dtype" not in entry.settings:
        able = [f"`{name}`" for name, e in OPTIMIZERS.items() if "momentum_dtype" in e.settings]
        raise VitcliError(
            f"`optim.momentum_dtype` is for {', '.join(able)}, not for `{section.name}`",
            "remove `optim.momentum_dtype`; `adafactor` always stores its momentum in bf16",
        )
    return entry


class JointOptimizer(torch.optim.Optimizer):
    """Several optimizers that step as one.

    The gradient scaler of fp16 unscales the gradients and looks for overflow once per optimizer and
    step, and then forgets that it has done so. With two optimizers, the gradients of the second
    would be divided by the scale twice, and an overflow would skip only one of them.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        # Not `super().__init__`: the parameters belong to the optimizers.
        self.optimizers = tuple(optimizers)
        self.defaults: dict[str, Any] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The parameter groups of all optimizers."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The states of the optimizers, in their order."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)


def build_optimizers(
    module: nn.Module, section: OptimSection, precision: str = "fp32"
) -> list[torch.optim.Optimizer]:
    """Build the optimizers of `section` over the trainable parameters of `module`.

    Each parameter group keeps its full rate as `base_lr`; `set_lr` multiplies it by the schedule.

    Args:
        precision: that of the run. Muon orthogonalises in bf16 if it is `bf16`, else in fp32.

    Raises:
        VitcliError: no such optimizer, or layer-wise rates for a model without blocks.
    """
    entry = find_optimizer(section)
    every = encoder_names(module)
    named = [(name, p) for name, p in every if p.requires_grad]
    # The depth counts frozen blocks too, so that freezing does not change the rates of the others.
    depth = max((layer_of(name, 0) for name, _ in every), default=0)
    if section.layer_decay != 1.0 and all(layer_of(n, depth) in (0, depth + 1) for n, _ in named):
        raise VitcliError(
            "`optim.layer_decay` needs trainable ViT blocks, and this model has none",
            "`--set optim.layer_decay=1.0`",
        )
    optimizers = entry.build(named, section, depth)
    for optimizer in optimizers:
        if isinstance(optimizer, Muon) and precision == "bf16":
            optimizer.dtype = torch.bfloat16
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers
