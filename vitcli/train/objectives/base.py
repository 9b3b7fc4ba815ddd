"""What every objective knows about itself; the loop and `vitcli plan` ask for it."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitcli.config.schema import ObjectiveSection
from vitcli.data.batch import Batch
from vitcli.data.source import Source
from vitcli.progress import Watcher
from vitcli.vit import ResNetConfig, ViTConfig
from vitcli.weights.loaded import HeadActivation

Metrics = dict[str, Tensor]


class Objective(nn.Module):
    """A loss around a model, with the heads that only training needs.

    A call with images (B, C, Y, X) and labels (B,) or (B, K) returns the loss () and the metrics.

    Its constructor takes (model, section): a `LoadedModel` and the `[objective]` settings.

    Attributes:
        model: the network that is trained.
        encoder_prefix: the prefix of the network's parameters among those of the objective. Only
            these belong to encoder layers (`layer_decay`, Muon), whatever the others are called.
        supervised: True if it trains a head for the classes of the data.
        multi_label: True if it takes (B, K) multi-hot labels of images with several classes.
        regression: True if it takes a number per image, and the head has one output for it.
        head_activation: `softmax` or `sigmoid`: turns the logits of the head into probabilities, in
            `predict` and in the validation loss. `identity`: the output is a number.
        class_loss: the cross-entropy of an objective that learns classes; it weighs them.
        settings: the keys of `[objective]` that it reads.
        masks_patches: True if it chooses patches to hide, so that no others can be dropped.
    """

    model: Any
    class_loss: nn.Module
    encoder_prefix: ClassVar[str] = "model."
    supervised: ClassVar[bool]
    multi_label: ClassVar[bool] = False
    regression: ClassVar[bool] = False
    head_activation: ClassVar[HeadActivation] = "softmax"
    settings: ClassVar[frozenset[str]] = frozenset()
    masks_patches: ClassVar[bool] = False

    def prepare(self, source: Source, watch: Watcher) -> None:
        """Compute before the first step what depends on the training images."""

    def known(self, batch: Batch) -> tuple[Tensor, ...]:
        """Further arguments of `forward` in this class: facts about the images of `batch`."""
        return ()

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Metrics]:
        """(B, C, Y, X), (B,) or (B, K) -> the mean loss (), and metrics.

        The metrics hold `loss`. If the optimised sum has more terms, they hold it as `objective`.
        Labels are (B, K) shares under mixup and cutmix.
        """
        raise NotImplementedError

    @classmethod
    def notes(cls, section: ObjectiveSection) -> list[str]:
        """What the user should know about these settings."""
        return []

    @property
    def hidden_rate(self) -> float:
        """The fraction of patches that the encoder does not see; 0 if it sees all of them."""
        return 0.0

    @property
    def frozen_modules(self) -> tuple[nn.Module, ...]:
        """Modules that are neither trained nor stored, such as a teacher."""
        return ()

    def extra_macs(self, config: ViTConfig | ResNetConfig) -> int:
        """Forward multiply-adds per image of the parts that only the objective has."""
        return 0

    def teacher_macs(self) -> int:
        """Forward multiply-adds per image of frozen teachers, which have no backward pass."""
        return 0


def main_class(labels: Tensor) -> Tensor:
    """(B,) classes, or (B, K) shares of classes after mixing -> (B,) the class of each image."""
    return labels if labels.ndim == 1 else labels.argmax(dim=1)


def count_macs(module: nn.Module, shape: tuple[int, ...], *arguments: Any) -> int:
    """Multiply-adds of a call of `module` with an input of `shape`, counted on the meta device."""
    # On the meta device nothing is computed, so that a large decoder costs no time and no memory.
    counter = FlopCounterMode(display=False)
    empty = {name: torch.empty_like(p, device="meta") for name, p in module.named_parameters()}
    with counter, torch.no_grad():
        inputs = (torch.empty(shape, device="meta"), *arguments)
        torch.func.functional_call(module, empty, inputs)
    return int(counter.get_total_flops()) // 2
