"""Distillation from a teacher: section 3 of DeiT (Touvron et al., 2021), equations 2 and 3."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcli.config.schema import ObjectiveSection
from vitcli.errors import VitcliError
from vitcli.preprocess import channel_tensor
from vitcli.train.objectives.base import Metrics, Objective, main_class
from vitcli.train.objectives.class_losses import CrossEntropy
from vitcli.vit.macs import macs
from vitcli.weights.load import load_model, require_preprocess
from vitcli.weights.loaded import LoadedModel

MAX_NAMES = 5  # classes that an error lists


class Distill(Objective):
    """Cross-entropy with the labels, plus a loss that follows a frozen teacher.

    A model with a distillation head (`model.distillation_head`) learns from the teacher there and
    from the labels in its class head. Any other model learns both in its one head. The teacher sees
    the same augmented images, at its own size and in its own normalisation.
    """

    supervised = True
    columns: Tensor
    settings = CrossEntropy.settings | {
        "teacher", "distillation", "distillation_weight", "temperature"
    }  # fmt: skip

    def __init__(self, model: LoadedModel, section: ObjectiveSection) -> None:
        super().__init__()
        if section.teacher is None:
            raise VitcliError(
                "objective `distill` needs a teacher", "`--set objective.teacher=MODEL`"
            )
        two = getattr(model.network, "head_dist", None) is not None
        if getattr(model.config, "distillation_token", False) and not two:
            raise VitcliError(
                "the model has a distillation token, but no head that reads it",
                "`--set model.distillation_head=true --set model.pool=distilled`",
            )
        teacher = load_model(section.teacher)
        require_preprocess(teacher)
        mine, theirs = model.config.num_channels, teacher.config.num_channels
        if mine != theirs:
            raise VitcliError(
                f"the teacher `{section.teacher}` takes {theirs} channels, and the model {mine}",
                f"`--set model.num_channels={theirs}`, or use another teacher",
            )
        if teacher.is_regression:
            raise VitcliError(
                f"the teacher `{section.teacher}` predicts numbers (regression), not classes",
                "use a teacher that was trained with `softmax`",
            )
        if teacher.head_activation == "sigmoid" and section.distillation == "soft":
            raise VitcliError(
                f"the teacher `{section.teacher}` has sigmoid probabilities, and `soft` "
                "distillation needs probabilities that sum to 1",
                "`--set objective.distillation=hard`, or use a teacher trained with `softmax`",
            )
        self.model, self.preprocess = model.network, model.preprocess
        # In a tuple, so that it is neither trained nor averaged, nor stored in checkpoints: a
        # resumed run loads it again.
        self.teachers = (teacher.eval(),)
        teacher.network.requires_grad_(False)
        self.hard = section.distillation == "hard"
        self.weight, self.temperature = section.distillation_weight, section.temperature
        self.class_loss = CrossEntropy(model, section)
        columns = teacher_columns(teacher, model.labels or (), section.teacher)
        self.register_buffer("columns", torch.tensor(columns), persistent=False)

    @classmethod
    def notes(cls, section: ObjectiveSection) -> list[str]:
        """A temperature changes soft distillation only."""
        default = ObjectiveSection().temperature
        if section.distillation == "hard" and section.temperature != default:
            return ["`hard` distillation does not use `objective.temperature`"]
        return []

    @property
    def frozen_modules(self) -> tuple[nn.Module, ...]:
        """The teacher."""
        return tuple(teacher.network for teacher in self.teachers)

    def teacher_macs(self) -> int:
        """One forward pass of the teacher."""
        return sum(macs(teacher.config) for teacher in self.teachers)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Metrics]:
        """(B, C, Y, X), (B,) or (B, K) shares -> the weighted sum of both losses (), metrics."""
        logits, distilled = self.logits(images)  # (B, K) each
        targets = self.teacher_logits(images)  # (B, K)
        loss = self.class_loss(logits, labels)
        if self.hard:  # equation 3
            distillation = F.cross_entropy(distilled, targets.argmax(dim=1))
        else:  # equation 2; t^2 keeps the size of the gradients (Hinton et al., 2015)
            t = self.temperature
            distillation = t**2 * F.kl_div(
                F.log_softmax(distilled / t, dim=1),
                F.log_softmax(targets / t, dim=1),
                reduction="batchmean",
                log_target=True,
            )
        # At test time DeiT adds the outputs of both heads.
        predicted = (logits + distilled).argmax(dim=1)
        total = (1.0 - self.weight) * loss + self.weight * distillation
        metrics = {
            "loss": loss.detach(),
            "objective": total.detach(),
            "lesson": distillation.detach(),
            "accuracy": (predicted == main_class(labels)).float().mean(),
            "agreement": (predicted == targets.argmax(dim=1)).float().mean(),
        }
        return total, metrics

    def logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, Y, X) -> (B, K) for the labels, (B, K) for the teacher; equal with one head."""
        second = getattr(self.model, "head_dist", None)
        if second is None:
            logits = self.model(images).float()
            return logits, logits
        token, distilled = self.model.features(images).chunk(2, dim=-1)
        return self.model.head(token).float(), second(distilled).float()

    @torch.no_grad()
    def teacher_logits(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) normalised for the student -> (B, K): the teacher's logits of its classes.

        Normalisation and size are changed from those of the student to those of the teacher.
        """
        teacher = self.teachers[0].to(images.device)
        mine, theirs, device = self.preprocess, teacher.preprocess, images.device
        assert mine is not None and theirs is not None
        mean, std = (channel_tensor(values, device) for values in (mine.mean, mine.std))
        pixels = images.float() * std + mean
        if tuple(pixels.shape[2:]) != tuple(theirs.image_size):
            pixels = F.interpolate(
                pixels, size=theirs.image_size, mode="bilinear", antialias=True, align_corners=False
            )
        mean, std = (channel_tensor(values, device) for values in (theirs.mean, theirs.std))
        x = (pixels - mean) / std
        # A calibrated teacher's probabilities are those after its own temperature.
        logits = teacher(x).float() / teacher.temperature  # (B, K of the teacher)
        return logits[:, self.columns]


def teacher_columns(teacher: LoadedModel, classes: Sequence[str], name: str) -> list[int]:
    """The outputs of the teacher that stand for `classes`, matched by name."""
    if not teacher.labels:
        raise VitcliError(
            f"the teacher `{name}` has no class names, so its outputs cannot be matched",
            "use a fine-tuned run, or weights that contain class names",
        )
    column = {label: i for i, label in enumerate(teacher.labels)}
    if missing := [label for label in classes if label not in column]:
        more = f" and {len(missing) - MAX_NAMES} more" if len(missing) > MAX_NAMES else ""
        raise VitcliError(
            f"the teacher `{name}` does not know these classes: "
            f"{', '.join(missing[:MAX_NAMES])}{more}",
            "fine-tune the teacher on this data first: `vitcli finetune DATA --model TEACHER`",
        )
    return [column[label] for label in classes]
