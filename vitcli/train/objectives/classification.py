"""Objectives that learn classes: softmax and sigmoid cross-entropy."""

from torch import Tensor, nn

from vitcli.config.schema import ObjectiveSection
from vitcli.data.augment.mixing import soft_targets
from vitcli.train.objectives.base import Metrics, Objective, main_class
from vitcli.train.objectives.class_losses import BinaryCrossEntropy, CrossEntropy
from vitcli.weights.loaded import LoadedModel


class Softmax(Objective):
    """Cross-entropy over classes."""

    supervised = True
    settings = CrossEntropy.settings

    def __init__(self, model: LoadedModel, section: ObjectiveSection) -> None:
        super().__init__()
        self.model = model.network
        self.class_loss = CrossEntropy(model, section)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Metrics]:
        """(B, C, Y, X), (B,) or (B, K) shares -> the mean loss (), and metrics."""
        logits = self.model(images).float()  # (B, K)
        loss = self.class_loss(logits, labels)
        accuracy = (logits.argmax(dim=1) == main_class(labels)).float().mean()
        return loss, {"loss": loss.detach(), "accuracy": accuracy}


class Sigmoid(Objective):
    """Binary cross-entropy per class, summed over the classes as in big_vision.

    For images with any number of labels, and for the paper's pre-training on ImageNet-21k.
    """

    supervised = True
    multi_label = True
    head_activation = "sigmoid"
    settings = BinaryCrossEntropy.settings | {"head_bias"}

    def __init__(self, model: LoadedModel, section: ObjectiveSection) -> None:
        super().__init__()
        self.model, self.class_loss = model.network, BinaryCrossEntropy(model, section)
        head = model.network.head
        # Most classes are absent from an image. A new head that starts with probabilities of 0.5
        # would spend its first steps on learning just that. A pretrained head keeps its bias.
        if section.head_bias is not None and isinstance(head, nn.Linear) and not head.weight.any():
            nn.init.constant_(head.bias, section.head_bias)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Metrics]:
        """(B, C, Y, X), (B,) or (B, K) shares -> the mean loss () over images, and metrics."""
        logits = self.model(images).float()  # (B, K)
        targets = soft_targets(labels, logits.shape[1])
        loss = self.class_loss(logits, targets)
        # An image with several labels counts as correct if the top class is one of them.
        correct = targets.gather(1, logits.argmax(dim=1, keepdim=True)) > 0.5
        return loss, {"loss": loss.detach(), "accuracy": correct.float().mean()}
