"""A network together with everything that travels with its weights."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from vitcli.data.split_record import SplitRecord
from vitcli.preprocess import Preprocess
from vitcli.vit import Config, Network, ViTConfig, create_network
from vitcli.weights.load_report import LoadReport

# `identity` is that of regression: the output is the number, up to `TargetScale`.
HeadActivation = Literal["softmax", "sigmoid", "identity"]
HEAD_PREFIXES = ("head.", "head_dist.")


def as_activation(stored: Any) -> HeadActivation:
    """The activation that a file names; softmax for files of programs that store none."""
    return stored if stored in get_args(HeadActivation) else "softmax"


@dataclass(frozen=True)
class TargetScale:
    """Mean and standard deviation of the training numbers of a regression, in their unit."""

    mean: float = 0.0
    std: float = 1.0

    def standardise(self, values: Tensor) -> Tensor:
        """Numbers in their unit -> numbers with mean 0 and standard deviation 1, float64."""
        return (values.double() - self.mean) / self.std

    def restore(self, outputs: Tensor) -> Tensor:
        """Outputs of the network -> float64 numbers in their unit."""
        return outputs.double() * self.std + self.mean


@dataclass(frozen=True)
class PixelDecoder:
    """The decoder of a masked autoencoder, as a weights file holds it; objective `mae` trains it.

    Attributes:
        config: width, depth, heads and MLP of the decoder; the rest is that of the encoder.
        tensors: `entry`, `mask`, `positions` (1, 1 + N, W), `blocks.I`, `norm` and `exit`.
        norm_pixels: the targets are standardised in each patch.
    """

    config: ViTConfig
    tensors: Mapping[str, Tensor]
    norm_pixels: bool


@dataclass(eq=False)
class LoadedModel:
    """A network, and the facts that a weights file holds about its use.

    Call it with images (B, C, Y, X) to get logits (B, K), or the features if it has no head. After
    a regression, it returns numbers (B, 1) in their unit.

    Attributes:
        network: the `VisionTransformer` or `ResNet`, a plain `nn.Module`.
        labels: class names in the order of the logits, or None. The name of a regression's number.
        preprocess: the evaluation transform of the weights, or None if it is not known.
        head_activation: turns logits into probabilities. `sigmoid` treats each class alone, and
            `identity` means that the output is a number (regression).
        target_scale: turns the output of the network into that number.
        class_counts: training images per class, while an objective that uses them is trained.
        temperature: divides the logits before the activation. Above 1, the model is less confident.
        thresholds: for each output of a sigmoid head, the probability from which on its class
            counts as predicted; None if they were not fitted.
        head_trained: True if the head has learned the classes, so that `predict` may use it.
        load_report: how each tensor was loaded, or None if the model was not loaded.
        split_record: the images that it was trained on and that were held out, or None if unknown.
        decoder: that of a masked autoencoder, for further pre-training; None for other weights.
    """

    network: Network
    labels: tuple[str, ...] | None = None
    preprocess: Preprocess | None = None
    head_activation: HeadActivation = "softmax"
    temperature: float = 1.0
    head_trained: bool = False
    load_report: LoadReport | None = None
    split_record: SplitRecord | None = None
    target_scale: TargetScale = TargetScale()
    thresholds: tuple[float, ...] | None = None
    class_counts: tuple[int, ...] | None = None
    decoder: PixelDecoder | None = None

    @property
    def is_regression(self) -> bool:
        """True if the output is a number and not a logit per class."""
        return self.head_activation == "identity" and self.config.num_classes > 0

    @property
    def config(self) -> Config:
        """The configuration of the network."""
        return self.network.config

    @property
    def training(self) -> bool:
        """True if the network is in training mode."""
        return self.network.training

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> (B, K): logits, or numbers; the features if there is no head."""
        logits: Tensor = self.network(images)
        return self.target_scale.restore(logits).float() if self.is_regression else logits

    def features(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> (B, F): the representation that the head reads."""
        return self.network.features(images)

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, K) logits -> (B, K) float64: divided by the temperature, then activated."""
        assert not self.is_regression, "numbers have no probabilities"
        x = logits.double() / self.temperature
        return x.sigmoid() if self.head_activation == "sigmoid" else x.softmax(dim=1)

    def mean_logits(self, views: Sequence[Tensor]) -> Tensor:
        """Logits (B, K) of several views -> (B, K): their probabilities are the mean of all.

        For a regression the mean of the numbers.
        """
        x = torch.stack(list(views)).double() / self.temperature  # (views, B, K)
        if self.is_regression:
            return x.mean(dim=0)
        # By logarithms: a probability of 0 or 1 after rounding has no finite logit.
        if self.head_activation == "sigmoid":
            mean = logsigmoid(x).logsumexp(dim=0) - logsigmoid(-x).logsumexp(dim=0)
        else:
            mean = x.log_softmax(dim=2).logsumexp(dim=0)
        return mean * self.temperature

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of the network, under timm's names."""
        return self.network.state_dict()

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Load tensors with the names of `state_dict()`; all of them must be there."""
        self.network.load_state_dict(tensors)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters of the network, for an optimizer."""
        return self.network.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return (name, parameter) of the network, under timm's names."""
        return self.network.named_parameters()

    def to(self, device: torch.device | str) -> "LoadedModel":
        """Move the network to `device` in place; returns self."""
        self.network.to(device)
        return self

    def eval(self) -> "LoadedModel":
        """Switch the network to evaluation mode; returns self."""
        self.network.eval()
        return self

    def train(self, mode: bool = True) -> "LoadedModel":
        """Switch the network to training mode, or back; returns self."""
        self.network.train(mode)
        return self


def create_model(
    name: str,
    *,
    num_classes: int = 0,
    image_size: int | tuple[int, int] = 224,
    seed: int = 0,
    **settings: Any,
) -> LoadedModel:
    """Create a model with random weights: `create_model("B/16", num_classes=1000)`.

    The model is in evaluation mode. It has no labels and no preprocessing: set both before saving.

    Args:
        name: a variant such as `B/16`, `R50+B/16`, `Axial-B/32` or `R50x1` (see `parse_variant`).
        num_classes: outputs of the head; 0 for no head.
        image_size: pixels, one number or (Y, X).
        seed: random seed of the weights.
        settings: further fields of `ViTConfig`, for `R50x1` of `ResNetConfig`.

    Raises:
        ValueError: the variant does not exist, or the settings contradict each other.
    """
    return LoadedModel(
        create_network(name, num_classes=num_classes, image_size=image_size, seed=seed, **settings)
    )


def model_hash(model: LoadedModel, *, head: bool = True) -> str:
    """SHA-256 of everything that the outputs depend on: weights, configuration, preprocessing.

    Args:
        head: include the head. Without it, models that differ only in the head have the same hash,
            which is the hash of their features.
    """
    digest = hashlib.sha256()
    config = model.config.to_dict()
    facts = {
        "config": config if head else {k: v for k, v in config.items() if k != "num_classes"},
        "preprocess": model.preprocess.to_dict() if model.preprocess is not None else None,
        "position_resize": getattr(model.network, "position_resize", None),
        "labels": model.labels if head else None,
    }
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if head or not name.startswith(HEAD_PREFIXES):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
    if head and model.config.num_classes:
        # Outputs for fixed logits depend on activation, temperature and scale.
        probe = torch.linspace(-2, 2, model.config.num_classes)[None]  # (1, K)
        activate = model.target_scale.restore if model.is_regression else model.probabilities
        digest.update(_bytes(activate(probe)))
        if model.thresholds is not None:
            digest.update(_bytes(torch.tensor(model.thresholds, dtype=torch.float64)))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().data
