"""Muon: momentum whose matrices are orthogonalised before each step (Jordan et al., 2024)."""

from typing import Any

import torch
from torch import Tensor

# The quintic a x + b x^3 + c x^5 of Muon (Jordan et al., 2024), which moves every singular value of
# a matrix towards 1, and how often it is applied.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


class Muon(torch.optim.Muon):
    """torch's Muon, faster: matrices of equal shape in one batch, in the precision of the run.

    A convolution kernel (F, C, Y, X) counts as a matrix (F, C * Y * X), as in airbench (Jordan,
    2024).

    torch computes in bf16 everywhere. A processor without bf16 instructions takes 30 to 50 times as
    long for that as for fp32 (recipes/LOG.md).

    Attributes:
        dtype: the type in which gradients are orthogonalised.
    """

    dtype = torch.float32

    def __init__(
        self, params: Any, lr: float, momentum: float, weight_decay: float, eps: float = 1e-7
    ) -> None:
        # The constructor of torch's Muon refuses convolution kernels; that of its base class
        # does not.
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eps": eps}
        torch.optim.Optimizer.__init__(self, params, settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            batches: dict[tuple[int, int], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    rows, columns = p.flatten(1).shape
                    batches.setdefault((min(rows, columns), max(rows, columns)), []).append(p)
            for params in batches.values():
                self._update(params, group)

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Update matrices that have the same shape, or its transpose."""
        gradients: list[Tensor] = [p.grad for p in params if p.grad is not None]
        averages = []
        for p, g in zip(params, gradients, strict=True):
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(g)
            averages.append(self.state[p]["momentum_buffer"])
        torch._foreach_lerp_(averages, gradients, 1.0 - group["momentum"])
        nesterov = torch._foreach_lerp(gradients, averages, group["momentum"])
        matrices = [u.flatten(1) for u in nesterov]
        tall = [len(u) > u.shape[1] for u in matrices]
        wide = [u.mT if flip else u for u, flip in zip(matrices, tall, strict=True)]
        updates = newton_schulz(torch.stack(wide).to(self.dtype), group["eps"]).unbind()
        torch._foreach_mul_(params, 1.0 - group["lr"] * group["weight_decay"])
        for flip in {*tall}:  # all matrices of one orientation have one shape, and so one rate
            moved = [p for p, other in zip(params, tall, strict=True) if other == flip]
            found = [u.mT if flip else u for u, o in zip(updates, tall, strict=True) if o == flip]
            rows, columns = found[0].shape
            rate = group["lr"] * max(1.0, rows / columns) ** 0.5
            moves = [u.reshape(p.shape) for u, p in zip(found, moved, strict=True)]
            torch._foreach_add_(moved, moves, alpha=-rate)


def newton_schulz(x: Tensor, eps: float = 1e-7) -> Tensor:
    """Move the singular values of each matrix towards 1 and keep its singular vectors.

    Args:
        x: (matrices, m, n) with m <= n.
        eps: the least norm that a matrix is divided by.
    """
    a, b, c = NEWTON_SCHULZ
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    if x.dtype != torch.float32 or x.shape[-1] < 2 * x.shape[-2]:
        for _ in range(NEWTON_SCHULZ_STEPS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x
    # All factors are polynomials of the m x m Gram matrix and commute, so a wide matrix is needed
    # only at both ends: 2.2 times fewer operations for n = 4 m. Half precision is too coarse here.
    gram, product = x @ x.mT, None
    for step in range(NEWTON_SCHULZ_STEPS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if step < NEWTON_SCHULZ_STEPS - 1:
            gram = factor @ gram @ factor
    assert product is not None
    return product @ x
