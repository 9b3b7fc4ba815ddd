"""What training minimises. An objective owns the model and any heads that only training needs."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcli.config.schema import ObjectiveSection
from vitcli.data.augment.mixing import soft_targets
from vitcli.errors import VitcliError, nearest
from vitcli.train.objectives.descriptors import TARGET_DIM, quadrant_targets
from vitcli.train.objectives.distillation import Distill
from vitcli.train.objectives.mae import Mae
from vitcli.train.objectives.masked_patch import MaskedPatch
from vitcli.vit import Network, ResNet
from vitcli.weights.loaded import LoadedModel

Figures = dict[str, Tensor]


class Softmax(nn.Module):
    """Cross-entropy over classes, with label smoothing."""

    views = 1
    supervised = True

    def __init__(self, model: LoadedModel, section: ObjectiveSection) -> None:
        super().__init__()
        self.model = model.network
        model.head_activation = "softmax"
        self.label_smoothing = section.label_smoothing

    def forward(
        self, images: Tensor, labels: Tensor, factors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Figures]:
        """(B, C, Y, X), (B,) or (B, K) shares -> the mean loss (), and figures to show."""
        logits = self.model(images).float()  # (B, K)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        accuracy = (logits.argmax(dim=1) == main_class(labels)).float().mean()
        return loss, {"loss": loss.detach(), "accuracy": accuracy}


class Sigmoid(nn.Module):
    """Binary cross-entropy of each class, summed over the classes, as big_vision trains with.

    For images with any number of labels, and for the paper's pre-training on ImageNet-21k. A new
    head starts from `head_bias`, so that the first loss is that of classes that are rare.
    """

    views = 1
    supervised = True

    def __init__(self, model: LoadedModel, section: ObjectiveSection) -> None:
        super().__init__()
        self.model = model.network
        model.head_activation = "sigmoid"
        head = model.network.head
        if section.head_bias is not None and isinstance(head, nn.Linear) and not head.weight.any():
            nn.init.constant_(head.bias, section.head_bias)

    def forward(
        self, images: Tensor, labels: Tensor, factors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Figures]:
        """(B, C, Y, X), (B,) or (B, K) shares -> the mean loss () over images, and figures."""
        logits = self.model(images).float()  # (B, K)
        targets = soft_targets(labels, logits.shape[1])
        loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1).mean()
        # Of several labels it is enough to have one of them on top.
        best = targets.gather(1, logits.argmax(dim=1, keepdim=True)) > 0.5
        return loss, {"loss": loss.detach(), "accuracy": best.float().mean()}


class Descriptors(nn.Module):
    """Each quadrant of the picture, through its pooled tokens, predicts its local descriptors.

    Hand-made targets are those of MaskFeat (Wei et al., 2022); here nothing is masked, and the
    prediction is linear in what `pool = "quadrants"` hands on, so that the ridge of few-shot finds
    them there. Of all that was tried for a few minutes of drawn pictures it is both the simplest
    and the best (recipes/LOG.md).
    """

    views = 1
    supervised = False
    scale: Tensor

    def __init__(self, model: LoadedModel, section: ObjectiveSection) -> None:
        super().__init__()
        if isinstance(model.network, ResNet):
            raise VitcliError(
                "objective `descriptors` reads quadrants of patches, which a ResNet has not",
                "`--set objective.name=softmax`, or a Vision Transformer",
            )
        config, preprocess = model.network.config, model.preprocess
        if config.pool != "quadrants" or config.representation_size:
            raise VitcliError(
                f"objective `descriptors` reads quadrants, the model pools `{config.pool}`",
                "`--set model.pool=quadrants`, without `model.representation_size`",
            )
        if any(side % 4 for side in config.image_size):
            raise VitcliError(
                f"objective `descriptors` needs an image size that 4 divides: {config.image_size}",
                "another `--image-size`, such as 32",
            )
        assert preprocess is not None
        self.model = model.network
        self.decoder = nn.Linear(config.embed_dim, TARGET_DIM)
        scale = torch.tensor([preprocess.mean, preprocess.std])  # (2, C)
        self.register_buffer("scale", scale[:, :, None, None], persistent=False)

    def forward(
        self, images: Tensor, labels: Tensor, factors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Figures]:
        """(B, C, Y, X) -> the mean squared error () of standardised descriptors, and figures."""
        loss = self.error(self.model.features(images), images)
        return loss, {"loss": loss.detach(), "explained": 1.0 - loss.detach()}

    def error(self, features: Tensor, images: Tensor) -> Tensor:
        """(B, 4 D), (B, C, Y, X) -> the mean squared error () of the standardised descriptors."""
        mean, std = self.scale.unbind()
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            targets = quadrant_targets(images.float() * std + mean)  # (B, 4, 144)
        quadrants = features.reshape(len(images), 4, -1)  # (B, 4, D)
        return F.mse_loss(self.decoder(quadrants).float(), targets)


class Guided(nn.Module):
    """Cross-entropy and descriptors together: classes tell what matters, descriptors where to look.

    On a few minutes of a small labelled set the dense targets teach the first blocks what the
    labels alone would take many epochs to (recipes/LOG.md).
    """

    views = 1
    supervised = True

    def __init__(self, model: LoadedModel, section: ObjectiveSection) -> None:
        super().__init__()
        self.descriptors = Descriptors(model, section)
        model.head_activation = "softmax"
        self.label_smoothing = section.label_smoothing
        self.weight = section.descriptor_weight

    @property
    def model(self) -> Network:
        return self.descriptors.model

    def forward(
        self, images: Tensor, labels: Tensor, factors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Figures]:
        """(B, C, Y, X), (B,) or (B, K) -> the weighted sum of both losses (), and figures."""
        features = self.model.features(images)  # (B, 4 D)
        logits = self.model.classify(features).float()  # (B, K)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        error = self.descriptors.error(features, images)
        accuracy = (logits.argmax(dim=1) == main_class(labels)).float().mean()
        figures = {"loss": loss.detach(), "accuracy": accuracy, "explained": 1.0 - error.detach()}
        return loss + self.weight * error, figures


def main_class(labels: Tensor) -> Tensor:
    """(B,) classes, or (B, K) shares of classes as mixing makes them -> (B,) the largest."""
    return labels if labels.ndim == 1 else labels.argmax(dim=1)


AUTO = "auto"  # by the data: see `settled`

# `views` of each image come in a batch; `supervised` ones train the head for the data's classes.
OBJECTIVES: dict[str, Any] = {
    "softmax": Softmax,
    "sigmoid": Sigmoid,
    "descriptors": Descriptors,
    "guided": Guided,
    "masked_patch": MaskedPatch,
    "mae": Mae,
    "distill": Distill,
}


# Settings that one objective alone has, or a few. With another one they do nothing, and that is
# said; no error, since whoever lays another objective over a recipe leaves those of its own behind.
OWNERS: dict[str, tuple[str, ...]] = {
    "descriptor_weight": ("guided",),
    "target": ("masked_patch",),
    "mask_rate": ("masked_patch", "mae"),
    **dict.fromkeys(("decoder_depth", "decoder_dim", "decoder_heads", "norm_pixels"), ("mae",)),
    **dict.fromkeys(
        ("teacher", "distillation", "distillation_weight", "temperature"), ("distill",)
    ),
}
SMOOTHED = ("softmax", "guided", "distill")


def is_supervised(name: str) -> bool:
    """Whether the objective `name` learns classes.

    Raises:
        VitcliError: there is no such objective.
    """
    known = [AUTO, *OBJECTIVES]
    if name not in known:
        close = nearest(name, known)
        hint = f"did you mean `{close}`?" if close else f"there are {', '.join(known)}"
        raise VitcliError(f"no objective `{name}`", hint)
    return name == AUTO or bool(OBJECTIVES[name].supervised)


def settled(section: ObjectiveSection, multi_label: bool) -> tuple[ObjectiveSection, list[str]]:
    """(the section with an objective that suits the data, what the user should know).

    Args:
        section: `auto` becomes `softmax`, or `sigmoid` where images have several labels.
        multi_label: whether they have.

    Raises:
        VitcliError: an objective that takes one class an image, for images with several; a head
            bias without `sigmoid`.
    """
    name, notes = section.name, []
    if name == AUTO:
        name = "sigmoid" if multi_label else "softmax"
        if multi_label:
            notes.append("an image has any number of labels: objective `sigmoid`")
    if multi_label and name != "sigmoid" and is_supervised(name):
        raise VitcliError(
            f"objective `{name}` takes one class an image, and here an image has any number",
            "`--set objective.name=sigmoid`",
        )
    if name != "sigmoid" and section.head_bias is not None:
        raise VitcliError(
            f"`objective.head_bias` is for `sigmoid`, and the objective is `{name}`",
            "leave it out, or `--set objective.name=sigmoid`",
        )
    defaults = ObjectiveSection()
    foreign = [key for key, owners in OWNERS.items() if name not in owners]
    if name == "distill" and section.distillation == "hard":
        foreign.append("temperature")
    if foreign := [key for key in foreign if getattr(section, key) != getattr(defaults, key)]:
        keys = ", ".join(f"`objective.{key}`" for key in foreign)
        notes.append(f"objective `{name}` has no use for {keys}")
    if section.label_smoothing and name not in SMOOTHED:
        notes.append(f"labels are not smoothed under objective `{name}`")
    return section.model_copy(update={"name": name}), notes


def build_objective(
    model: LoadedModel, section: ObjectiveSection, seed: int, multi_label: bool = False
) -> nn.Module:
    """The objective that `section` names, around `model`; its own heads are drawn from `seed`.

    Raises:
        VitcliError: it does not suit the data; see `settled`.
    """
    section, _ = settled(section, multi_label)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        objective: nn.Module = OBJECTIVES[section.name](model, section)
        return objective
