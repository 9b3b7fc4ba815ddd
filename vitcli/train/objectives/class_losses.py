"""Cross-entropy over classes, and what it may do about classes of different sizes.

Both losses are plain PyTorch without such settings. With them, the terms of a class are multiplied
by its weight and by a focusing factor:

* class weights: `balanced` is scikit-learn's n / (K n_c); `effective` is 1 / E_c with the effective
  number of images E_c = (1 - beta^n_c) / (1 - beta) (Cui et al., 2019, equation 2)
* focal loss: (1 - p)^gamma (Lin et al., 2017, equation 4 with softmax, appendix A with sigmoid)
* asymmetric loss for many labels (Ridnik et al., 2021, equation 7)
* logit adjustment (Menon et al., 2021, equation 10), in training only
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcli.config.schema import ObjectiveSection
from vitcli.data.augment.mixing import soft_targets
from vitcli.data.batch import Batch
from vitcli.errors import VitcliError, quoted
from vitcli.weights.loaded import LoadedModel

# Where a probability rounds to 0, x^gamma with gamma < 1 would have an infinite derivative.
SMALLEST = 1e-12
BETA = 0.999  # of the effective number; Cui et al. try 0.9 to 0.9999
CLIP = 0.05  # of the asymmetric loss, the value of its authors
MAX_NAMES = 8  # classes that an error lists


class CrossEntropy(nn.Module):
    """Softmax cross-entropy with label smoothing: (B, K) logits, (B,) or (B, K) shares -> ().

    With class weights it is the mean over images weighted by w of their class, which is PyTorch's
    `cross_entropy(weight=w)`. The weight of a mixed image is the mixture of the weights of its
    classes. (PyTorch divides by the number of images there, so that the scale of w would matter.)

    Attributes:
        class_weights: (K,), or None.
        mean_weight: () the mean weight of the images of a step, in all micro-batches and processes.
            `share_mean_weight` sets it. None: the mean of the images of a call.
        adjustment: (K,) what logit adjustment adds to the logits, or None.
    """

    class_weights: Tensor | None
    adjustment: Tensor | None
    settings = frozenset(
        {"label_smoothing", "class_weights", "class_weights_beta", "focal_gamma",
         "logit_adjustment"}
    )  # fmt: skip

    def __init__(self, model: LoadedModel, section: ObjectiveSection) -> None:
        super().__init__()
        self.label_smoothing, self.gamma = section.label_smoothing, section.focal_gamma
        adjustment = None
        if section.logit_adjustment is not None:
            # A class without training images counts as one, because its logarithm must be finite.
            counts = np.maximum(_counts(model, "logit_adjustment"), 1)
            adjustment = section.logit_adjustment * np.log(counts / counts.sum())
            adjustment = torch.tensor(adjustment).float()
        self.register_buffer("adjustment", adjustment, persistent=False)
        weights = resolve_class_weights(section, model)
        self.register_buffer("class_weights", weights, persistent=False)
        self.mean_weight: Tensor | None = None

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean loss over the images."""
        if self.adjustment is not None:
            logits = logits + self.adjustment.to(logits)
        if self.class_weights is None and self.gamma is None:
            return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        targets = soft_targets(labels, logits.shape[1]).to(logits.dtype)
        smoothed = torch.lerp(
            targets, torch.full_like(targets, 1 / logits.shape[1]), self.label_smoothing
        )
        log_p = logits.log_softmax(dim=1)
        terms = -smoothed * log_p  # (B, K)
        if self.gamma is not None:
            # expm1: 1 - p keeps its digits where p is almost 1.
            terms = terms * (-log_p.expm1()).clamp(min=SMALLEST).pow(self.gamma)
        if self.class_weights is None:
            return terms.sum(dim=1).mean()
        weights = self.class_weights.to(logits)
        mean = (targets @ weights).mean() if self.mean_weight is None else self.mean_weight
        # A batch may hold only classes of weight 0.
        return (terms @ weights).mean() / mean.to(logits).clamp(min=SMALLEST)


class BinaryCrossEntropy(nn.Module):
    """Sigmoid cross-entropy summed over the classes: (B, K) logits, (B,) or (B, K) -> ().

    A class weight multiplies the terms of the images that have the class: PyTorch's `pos_weight`.
    Then as much of the loss comes from the images of a rare class as from those of any other.
    """

    class_weights: Tensor | None
    settings = frozenset(
        {"class_weights", "class_weights_beta", "focal_gamma", "asymmetric_gammas",
         "asymmetric_clip"}
    )  # fmt: skip

    def __init__(self, model: LoadedModel, section: ObjectiveSection) -> None:
        super().__init__()
        gamma, self.clip = section.focal_gamma, 0.0
        self.gammas = None if gamma is None else (gamma, gamma)
        if section.asymmetric_gammas is not None:
            given = section.asymmetric_clip
            self.gammas, self.clip = section.asymmetric_gammas, CLIP if given is None else given
        weights = resolve_class_weights(section, model)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean loss over the images."""
        targets = soft_targets(labels, logits.shape[1]).to(logits.dtype)
        weights = None if self.class_weights is None else self.class_weights.to(logits)
        if self.gammas is None:
            terms = F.binary_cross_entropy_with_logits(
                logits, targets, reduction="none", pos_weight=weights
            )
            return terms.sum(dim=1).mean()
        present, absent = self.gammas
        # log p and log (1 - p), exact where a probability rounds to 0 or 1. x^gamma is computed as
        # exp(gamma log x), whose derivative is finite for every gamma.
        log_p, log_q = F.logsigmoid(logits), F.logsigmoid(-logits)
        hit = -targets * (present * log_q).exp() * log_p  # (B, K)
        if self.clip:
            p = (logits.sigmoid() - self.clip).clamp(min=SMALLEST)
            q = ((-logits).sigmoid() + self.clip).clamp(max=1.0)
            miss = -(1 - targets) * p.pow(absent) * q.log()
        else:
            miss = -(1 - targets) * (absent * log_p).exp() * log_q
        return (hit * weights if weights is not None else hit).add(miss).sum(dim=1).mean()


def resolve_class_weights(section: ObjectiveSection, model: LoadedModel) -> Tensor | None:
    """(K,) the weights of `objective.class_weights`, or None without them.

    Those that are computed have the mean 1 over the training images, and a class without training
    images has the weight 1.

    Raises:
        VitcliError: a list of another length than the number of classes, or unknown class sizes.
    """
    given, classes = section.class_weights, model.labels or ()
    if given is None:
        return None
    if not isinstance(given, str):
        if len(given) != (expected := model.config.num_classes):
            raise VitcliError(
                f"`objective.class_weights` has {len(given):,} weights, and the data has "
                f"{expected:,} classes",
                f"give one weight per class, in this order: {quoted(classes, MAX_NAMES)}",
            )
        return torch.tensor(given)
    counts = _counts(model, f"class_weights={given}")
    present = counts > 0
    weights = np.ones(len(counts))
    if given == "balanced":
        weights[present] = counts.sum() / (present.sum() * counts[present])
    else:
        beta = BETA if section.class_weights_beta is None else section.class_weights_beta
        # 1 - beta^n, exact for a beta of almost 1; the smallest number stands for a beta of 0.
        log_beta = np.log(max(beta, np.finfo(float).tiny))
        inverse = (1 - beta) / -np.expm1(counts[present] * log_beta)
        weights[present] = inverse * counts.sum() / (inverse * counts[present]).sum()
    return torch.tensor(weights).float()


def _counts(model: LoadedModel, setting: str) -> Any:
    """(K,) float64 training images per class."""
    if model.class_counts is None:
        raise VitcliError(
            f"`objective.{setting}` needs the number of images per class, and a stream does not "
            "know it",
            "`--set objective.class_weights=[…]` with one weight per class, or remove "
            "`data.streaming`",
        )
    return np.array(model.class_counts, dtype=np.float64)


def share_mean_weight(objective: nn.Module, batch: Batch, accelerator: Any) -> None:
    """Tell the cross-entropy of `objective` the mean class weight of a whole step.

    So micro-batches and processes together compute the weighted mean over all images. Every process
    must call this.
    """
    loss = getattr(objective, "class_loss", None)
    if not isinstance(loss, CrossEntropy) or loss.class_weights is None:
        return
    weights = loss.class_weights
    targets = soft_targets(batch.labels, len(weights))
    targets = targets if batch.mix is None else batch.mix.targets(targets)
    loss.mean_weight = accelerator.reduce((targets.to(weights) @ weights).mean(), reduction="mean")
