"""Learning from a teacher: section 3 of DeiT (Touvron et al., 2021), equations 2 and 3."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcli.config.schema import ObjectiveSection
from vitcli.errors import VitcliError
from vitcli.weights.load import load_model, require_preprocess
from vitcli.weights.loaded import LoadedModel

SHOWN = 5  # classes that an error names


class Distill(nn.Module):
    """Cross-entropy with the labels, and beside it what a frozen teacher says.

    A model with a distillation head (`model.distillation_head`) learns the teacher there and the
    labels in its class head; any other learns both in its one head. The teacher sees the same
    augmented pictures, at its own size and in its own normalisation. It is no part of the
    checkpoint: a resumed run loads it again.
    """

    views = 1
    supervised = True
    places: Tensor

    def __init__(self, model: LoadedModel, section: ObjectiveSection) -> None:
        super().__init__()
        if section.teacher is None:
            raise VitcliError(
                "objective `distill` needs a teacher", "`--set objective.teacher=MODEL`"
            )
        two = getattr(model.network, "head_dist", None) is not None
        if getattr(model.config, "distillation_token", False) and not two:
            raise VitcliError(
                "the model has a distillation token, and no head that reads it",
                "`--set model.distillation_head=true --set model.pool=distilled`",
            )
        teacher = load_model(section.teacher)
        require_preprocess(teacher)
        if model.config.num_channels != teacher.config.num_channels:
            raise VitcliError(
                f"the teacher `{section.teacher}` sees {teacher.config.num_channels} channels, and "
                f"the model {model.config.num_channels}",
                f"`--set model.num_channels={teacher.config.num_channels}`, or another teacher",
            )
        if teacher.head_activation == "sigmoid" and section.distillation == "soft":
            raise VitcliError(
                f"the teacher `{section.teacher}` gives each class a probability of its own, and "
                "`soft` compares shares of one",
                "`--set objective.distillation=hard`, or a teacher trained with `softmax`",
            )
        self.model, self.preprocess = model.network, model.preprocess
        model.head_activation = "softmax"
        # In a tuple, so that it is neither trained nor stored nor averaged with this module.
        teacher.network.requires_grad_(False)
        self.others = (teacher.eval(),)
        self.hard = section.distillation == "hard"
        self.weight, self.temperature = section.distillation_weight, section.temperature
        self.label_smoothing = section.label_smoothing
        places = known_classes(teacher, model.labels or (), section.teacher)
        self.register_buffer("places", torch.tensor(places), persistent=False)

    def forward(
        self, images: Tensor, labels: Tensor, factors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, C, Y, X), (B,) or (B, K) shares -> the weighted sum of both losses (), figures."""
        token, distilled = self.logits(images)  # (B, K) each
        wanted = self.teach(images)  # (B, K)
        loss = F.cross_entropy(token, labels, label_smoothing=self.label_smoothing)
        if self.hard:
            lesson = F.cross_entropy(distilled, wanted.argmax(dim=1))
        else:
            t = self.temperature
            lesson = t**2 * F.kl_div(
                F.log_softmax(distilled / t, dim=1),
                F.log_softmax(wanted / t, dim=1),
                reduction="batchmean",
                log_target=True,
            )
        main = labels if labels.ndim == 1 else labels.argmax(dim=1)
        answer = (token + distilled).argmax(dim=1)
        figures = {
            "loss": loss.detach(),
            "lesson": lesson.detach(),
            "accuracy": (answer == main).float().mean(),
            "agreement": (answer == wanted.argmax(dim=1)).float().mean(),
        }
        return (1.0 - self.weight) * loss + self.weight * lesson, figures

    def logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, Y, X) -> (B, K) for the labels and (B, K) for the teacher; one where one head."""
        second = getattr(self.model, "head_dist", None)
        if second is None:
            logits = self.model(images).float()
            return logits, logits
        token, distilled = self.model.features(images).chunk(2, dim=-1)
        return self.model.head(token).float(), second(distilled).float()

    @torch.no_grad()
    def teach(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) normalised for the student -> (B, K): the teacher's logits of its classes.

        The student's normalisation is undone, and its size made the teacher's.
        """
        teacher = self.others[0].to(images.device)
        mine, theirs = self.preprocess, teacher.preprocess
        assert mine is not None and theirs is not None
        pixels = images.float() * _column(mine.std, images) + _column(mine.mean, images)
        if tuple(pixels.shape[2:]) != tuple(theirs.image_size):
            pixels = F.interpolate(
                pixels, size=theirs.image_size, mode="bilinear", antialias=True, align_corners=False
            )
        x = (pixels - _column(theirs.mean, images)) / _column(theirs.std, images)
        logits = teacher(x).float()  # (B, K of the teacher)
        return logits[:, self.places]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """One or C values -> (C or 1, 1, 1) on the device of `like`."""
    return torch.tensor(values, device=like.device)[:, None, None]


def known_classes(teacher: LoadedModel, wanted: Sequence[str], name: str) -> list[int]:
    """Which outputs of the teacher stand for the classes `wanted`, matched by name.

    Raises:
        VitcliError: the teacher has no class names, or does not know them all.
    """
    if not teacher.labels:
        raise VitcliError(
            f"the teacher `{name}` has no class names, so its answers mean nothing here",
            "a fine-tuned run, or weights that carry their classes",
        )
    place = {label: i for i, label in enumerate(teacher.labels)}
    if unknown := [label for label in wanted if label not in place]:
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        raise VitcliError(
            f"the teacher `{name}` does not know these classes: {', '.join(unknown[:SHOWN])}{more}",
            "`vitcli finetune DATA --model` makes a teacher that knows them",
        )
    return [place[label] for label in wanted]
