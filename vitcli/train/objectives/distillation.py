"""Distillation from a teacher: section 3 of DeiT (Touvron et al., 2021), equations 2 and 3.

A teacher without a head for the classes teaches its features: the student predicts their direction
with a linear layer, as the summary loss of AM-RADIO (Ranzinger et al., 2024, section 3.2).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vitcli.config.schema import ObjectiveSection
from vitcli.data.batch import Batch
from vitcli.data.image_set import ImageSet
from vitcli.data.source import Source
from vitcli.errors import VitcliError, quoted
from vitcli.evals.feature_cache import CachedFeatures
from vitcli.preprocess import channel_tensor
from vitcli.progress import Watcher
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
    the same augmented images, at its own size and in its own normalisation. With `teacher_cache` it
    sees each image once, without augmentation, and its features are read from the disk.
    """

    supervised = True
    columns: Tensor
    settings = CrossEntropy.settings | {
        "teacher", "distillation", "distillation_weight", "temperature", "teacher_cache"
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
        self.name, self.follows = section.teacher, section.distillation == "features"
        check_teacher(teacher, model, section)
        self.model, self.preprocess = model.network, model.preprocess
        # In a tuple, so that it is neither trained nor averaged, nor stored in checkpoints: a
        # resumed run loads it again.
        self.teachers = (teacher.eval(),)
        teacher.network.requires_grad_(False)
        self.hard = section.distillation == "hard"
        self.weight, self.temperature = section.distillation_weight, section.temperature
        self.class_loss = CrossEntropy(model, section)
        self.cached = section.teacher_cache
        self.rows: NDArray[Any] | None = None  # (n, F) bits of bfloat16, mapped; see `prepare`
        self.follow: nn.Module = nn.Identity()
        columns: list[int] = []
        if self.follows:
            self.follow = nn.Linear(model.config.feature_dim, teacher.config.feature_dim)
        else:
            columns = teacher_columns(teacher, model.labels or (), section.teacher)
        self.register_buffer("columns", torch.tensor(columns, dtype=torch.long), persistent=False)

    @classmethod
    def notes(cls, section: ObjectiveSection) -> list[str]:
        """A temperature changes soft distillation only."""
        default = ObjectiveSection().temperature
        if section.distillation != "soft" and section.temperature != default:
            return [f"`{section.distillation}` distillation does not use `objective.temperature`"]
        return []

    def prepare(self, source: Source, watch: Watcher) -> None:
        """With `teacher_cache`, compute the features of all training images that are not stored.

        An interrupted computation continues with the missing images.
        """
        if not self.cached:
            return
        images: Any = source.splits["train"]
        if not isinstance(images, ImageSet):
            raise VitcliError(
                "`objective.teacher_cache` needs stored images, and these are drawn or streamed",
                "`--set objective.teacher_cache=false`",
            )
        about = {"model": self.name, "of": source.notation}
        cache = CachedFeatures(self.teachers[0], source.fingerprint, about, watch=watch, half=True)
        self.rows, self.present = cache.rows_of(images, label="the teacher's features")

    def known(self, batch: Batch) -> tuple[Tensor, ...]:
        """(B, F): the teacher's features of the images of `batch`, mixed as the images are."""
        if not self.cached:
            return ()
        if self.rows is None:  # `plan` times steps, and what they compute does not matter
            rows = torch.ones(len(batch), self.teachers[0].config.feature_dim)
        else:
            indices = batch.indices.numpy()
            assert self.present[indices].all(), "the loader replaces images that cannot be read"
            rows = torch.from_numpy(np.asarray(self.rows[indices])).view(torch.bfloat16).float()
        device = batch.images.device
        if device.type == "cuda":  # from other memory the copy would wait for the queued steps
            rows = rows.pin_memory()
        rows = rows.to(device, non_blocking=True)
        return (rows if batch.mix is None else batch.mix.targets(rows),)

    @property
    def frozen_modules(self) -> tuple[nn.Module, ...]:
        """The teacher."""
        return tuple(teacher.network for teacher in self.teachers)

    def teacher_macs(self) -> int:
        """One forward pass of the teacher, if its features are not stored."""
        return 0 if self.cached else sum(macs(teacher.config) for teacher in self.teachers)

    def forward(self, images: Tensor, labels: Tensor, *known: Tensor) -> tuple[Tensor, Metrics]:
        """(B, C, Y, X), (B,) or (B, K) shares -> the weighted sum of both losses (), metrics.

        `known` (B, F) are features of the teacher; without them they are computed.
        """
        features = self.model.features(images)
        logits, distilled = self.logits(features)  # (B, K) each
        loss = self.class_loss(logits, labels)
        with torch.no_grad():
            lesson = known[0] if known else self.teacher_features(images)  # (B, F)
        if self.follows:
            agreement = F.cosine_similarity(self.follow(features).float(), lesson.float())
            distillation = 1.0 - agreement.mean()
        else:
            targets = self.teacher_logits(lesson)  # (B, K)
            distillation = self.compare(distilled, targets)
            # At test time DeiT adds the outputs of both heads.
            agreement = (logits + distilled).argmax(dim=1) == targets.argmax(dim=1)
        predicted = (logits + distilled).argmax(dim=1)
        total = (1.0 - self.weight) * loss + self.weight * distillation
        metrics = {
            "loss": loss.detach(),
            "objective": total.detach(),
            "lesson": distillation.detach(),
            "accuracy": (predicted == main_class(labels)).float().mean(),
            "agreement": agreement.detach().float().mean(),
        }
        return total, metrics

    def compare(self, distilled: Tensor, targets: Tensor) -> Tensor:
        """2 x (B, K) logits of student and teacher -> the loss () that follows the teacher."""
        if self.hard:  # equation 3
            return F.cross_entropy(distilled, targets.argmax(dim=1))
        # Equation 2; t^2 keeps the size of the gradients (Hinton et al., 2015).
        t = self.temperature
        return t**2 * F.kl_div(
            F.log_softmax(distilled / t, dim=1),
            F.log_softmax(targets / t, dim=1),
            reduction="batchmean",
            log_target=True,
        )

    def logits(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, F) -> (B, K) for the labels, (B, K) for the teacher; equal with one head."""
        second = getattr(self.model, "head_dist", None)
        if second is None:
            logits = self.model.classify(features).float()
            return logits, logits
        token, distilled = features.chunk(2, dim=-1)
        return self.model.head(token).float(), second(distilled).float()

    @torch.no_grad()
    def teacher_features(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) normalised for the student -> (B, F): the features of the teacher.

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
        return teacher.features((pixels - mean) / std)

    @torch.no_grad()
    def teacher_logits(self, features: Tensor) -> Tensor:
        """(B, F) of the teacher -> (B, K): its logits of the student's classes."""
        teacher = self.teachers[0].to(features.device)
        # A calibrated teacher's probabilities are those after its own temperature.
        logits = teacher.network.classify(features).float() / teacher.temperature
        return logits[:, self.columns]  # (B, K)


def check_teacher(teacher: LoadedModel, model: LoadedModel, section: ObjectiveSection) -> None:
    """Raise a VitcliError if `teacher` cannot teach `model` in this way."""
    require_preprocess(teacher)
    name, kind = section.teacher, section.distillation
    mine, theirs = model.config.num_channels, teacher.config.num_channels
    if mine != theirs and not section.teacher_cache:
        raise VitcliError(
            f"the teacher `{name}` takes {theirs} channels, and the model {mine}",
            f"`--set model.num_channels={theirs}`, `--set objective.teacher_cache=true`, or use "
            "another teacher",
        )
    if kind == "features":
        if getattr(model.network, "head_dist", None) is not None:
            raise VitcliError(
                "a distillation head learns classes of the teacher, and `features` are none",
                "`--set model.distillation_head=false`, or use `soft` or `hard` distillation",
            )
        return
    if teacher.is_regression:
        raise VitcliError(
            f"the teacher `{name}` predicts numbers (regression), not classes",
            "use a teacher that was trained with `softmax`, or "
            "`--set objective.distillation=features`",
        )
    if not teacher.config.num_classes:
        raise VitcliError(
            f"the teacher `{name}` has no head for classes",
            "`--set objective.distillation=features`",
        )
    if teacher.head_activation == "sigmoid" and kind == "soft":
        raise VitcliError(
            f"the teacher `{name}` has sigmoid probabilities, and `soft` distillation needs "
            "probabilities that sum to 1",
            "`--set objective.distillation=hard`, or use a teacher trained with `softmax`",
        )


def teacher_columns(teacher: LoadedModel, classes: Sequence[str], name: str) -> list[int]:
    """The outputs of the teacher that stand for `classes`, matched by name."""
    if not teacher.labels:
        raise VitcliError(
            f"the teacher `{name}` has no class names, so its outputs cannot be matched",
            "use a fine-tuned run, or weights that contain class names",
        )
    column = {label: i for i, label in enumerate(teacher.labels)}
    if missing := [label for label in classes if label not in column]:
        raise VitcliError(
            f"the teacher `{name}` does not know these classes: {quoted(missing, MAX_NAMES)}",
            "fine-tune the teacher on this data first: `vitcli finetune DATA --model TEACHER`",
        )
    return [column[label] for label in classes]
