"""The objective that learns a number per image."""

import torch.nn.functional as F
from torch import Tensor

from vitcli.config.schema import ObjectiveSection, Recipe
from vitcli.train.objectives.base import Metrics, Objective
from vitcli.weights.loaded import LoadedModel


def regression_notes(recipe: Recipe) -> list[str]:
    """A note if the augmentation can change the number of an image, such as a count or an angle."""
    found = {"augment.crop=none": recipe.augment.crop != "none"}
    found["augment.flip_rate=0.0"] = recipe.augment.flip_rate > 0
    if recipe.objective.name != "mse" or not any(found.values()):
        return []
    flags = " ".join(f"`--set {setting}`" for setting, changes in found.items() if changes)
    return [f"if crops or flips change the number, such as a count, a size or an angle: {flags}"]


class Mse(Objective):
    """Mean squared error of a number that is standardised over the training images."""

    supervised = True
    regression = True
    head_activation = "identity"

    def __init__(self, model: LoadedModel, section: ObjectiveSection) -> None:
        super().__init__()
        self.model, self.scale = model.network, model.target_scale

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Metrics]:
        """(B, C, Y, X), (B,) numbers -> the mean loss (), and metrics; `mae` is in their unit."""
        outputs = self.model(images).float()[:, 0]  # (B,)
        # In float64, because the mean of years or timestamps is far above their spread.
        targets = self.scale.standardise(labels).float()
        loss = F.mse_loss(outputs, targets)
        mae = (outputs.detach() - targets).abs().mean() * self.scale.std
        return loss, {"loss": loss.detach(), "mae": mae}
