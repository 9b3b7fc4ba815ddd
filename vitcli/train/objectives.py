"""What training minimises. An objective owns the model and any heads that only training needs."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcli.config import ObjectiveSection
from vitcli.errors import VitcliError, nearest
from vitcli.train.descriptors import TARGET_DIM, quadrant_targets
from vitcli.vit import VisionTransformer

Figures = dict[str, Tensor]


class Softmax(nn.Module):
    """Cross-entropy over classes, with label smoothing."""

    views = 1
    supervised = True

    def __init__(self, model: VisionTransformer, section: ObjectiveSection) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = section.label_smoothing

    def forward(
        self, images: Tensor, labels: Tensor, factors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Figures]:
        """(B, C, Y, X), (B,) -> the mean loss (), and figures to show."""
        logits = self.model(images).float()  # (B, K)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        return loss, {"loss": loss.detach(), "accuracy": accuracy}


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

    def __init__(self, model: VisionTransformer, section: ObjectiveSection) -> None:
        super().__init__()
        config, preprocess = model.config, model.preprocess
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
        self.model = model
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

    def __init__(self, model: VisionTransformer, section: ObjectiveSection) -> None:
        super().__init__()
        self.descriptors = Descriptors(model, section)
        self.label_smoothing = section.label_smoothing
        self.weight = section.descriptor_weight

    @property
    def model(self) -> VisionTransformer:
        return self.descriptors.model

    def forward(
        self, images: Tensor, labels: Tensor, factors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Figures]:
        """(B, C, Y, X), (B,) -> the weighted sum of both losses (), and figures of the first."""
        features = self.model.features(images)  # (B, 4 D)
        logits = self.model.head(features).float()  # (B, K)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        error = self.descriptors.error(features, images)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        figures = {"loss": loss.detach(), "accuracy": accuracy, "explained": 1.0 - error.detach()}
        return loss + self.weight * error, figures


# `views` of each image come in a batch; `supervised` ones train the head for the data's classes.
OBJECTIVES: dict[str, type[Softmax] | type[Descriptors] | type[Guided]] = {
    "softmax": Softmax,
    "descriptors": Descriptors,
    "guided": Guided,
}


def is_supervised(name: str) -> bool:
    """Whether the objective `name` learns classes.

    Raises:
        VitcliError: there is no such objective.
    """
    if name not in OBJECTIVES:
        close = nearest(name, list(OBJECTIVES))
        hint = f"did you mean `{close}`?" if close else f"there are {', '.join(OBJECTIVES)}"
        raise VitcliError(f"no objective `{name}`", hint)
    return OBJECTIVES[name].supervised


def build_objective(model: VisionTransformer, section: ObjectiveSection, seed: int) -> nn.Module:
    """The objective that `section` names, around `model`; its own heads are drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return OBJECTIVES[section.name](model, section)
