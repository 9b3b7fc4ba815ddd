"""Training a part of the weights: frozen layers, and low-rank adapters (LoRA; Hu et al., 2021)."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcli.config.schema import LoraSection
from vitcli.errors import VitcliError
from vitcli.train.param_groups import layer_of
from vitcli.vit import Network, ResNet, VisionTransformer
from vitcli.vit.macs import BACKWARD
from vitcli.weights.store import save_tensors

HEADS = ("head.", "head_dist.")
ADAPTER = (".lora_down", ".lora_up")  # suffixes of the names of adapter tensors
LAYERS = {"qkv": ("attn.qkv",), "proj": ("attn.proj",), "mlp": ("mlp.fc1", "mlp.fc2")}


class LoraLinear(nn.Module):
    """A frozen linear layer plus a trainable one of low rank.

    `weight` and `bias` keep their names, so that checkpoints and exports find them.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias  # frozen by the caller
        self.lora_down = nn.Parameter(torch.empty(rank, base.in_features))
        # Zeros, so that the model starts exactly as it was pretrained (section 4.1).
        self.lora_up = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        low = F.linear(F.linear(x, self.lora_down), self.lora_up)
        return F.linear(x, self.weight, self.bias) + self.scale * low

    def merged(self) -> nn.Linear:
        """One ordinary linear layer that computes the same."""
        outputs, inputs = self.weight.shape
        layer = nn.Linear(inputs, outputs, bias=self.bias is not None, device="meta")
        # In fp64, so that merging rounds once only.
        added = self.scale * (self.lora_up.double() @ self.lora_down.double())
        layer.weight = nn.Parameter((self.weight.double() + added).to(self.weight.dtype).detach())
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach())
        return layer


def freeze_and_adapt(model: Network, section: LoraSection, frozen: str, seed: int) -> list[str]:
    """Freeze parameters and insert adapters as the recipe says; returns notes for the user.

    Args:
        section: the adapters, drawn from `seed`; only they and the heads are then trained.
        frozen: `none`, `backbone` (all but the heads), or `blocks:N` (embeddings and N blocks).

    Raises:
        VitcliError: a model without enough blocks, or a rank larger than the model's width.
    """
    if frozen == "none" and section.rank is None:
        return []
    first = _freeze(model, frozen)
    if section.rank is not None:
        _adapt(_with_blocks(model), section, first, seed)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() for n, p in model.named_parameters() if not n.endswith(ADAPTER))
    return [f"training {trainable:,} parameters; the model has {whole:,}"]


def _with_blocks(model: Network) -> VisionTransformer:
    if isinstance(model, ResNet):
        raise VitcliError(
            "adapters and `train.freeze=blocks:N` need encoder blocks, and a ResNet has none",
            "`--set train.freeze=backbone` trains its head alone",
        )
    return model


def _freeze(model: Network, what: str) -> int:
    """Freeze the parameters that `what` names; returns the index of the first trainable block."""
    if what == "none":
        return 0
    if what == "backbone":
        for name, p in model.named_parameters():
            p.requires_grad_(name.startswith(HEADS))
        return 0 if isinstance(model, ResNet) else model.config.depth
    # Block N freezes everything before it as well: no gradient goes back that far.
    count, depth = int(what.partition(":")[2]), _with_blocks(model).config.depth
    if count > depth:
        raise VitcliError(
            f"`train.freeze={what}` freezes more blocks than the model has: {depth}",
            "`--set train.freeze=backbone` trains the head alone",
        )
    for name, p in model.named_parameters():
        if layer_of(name, depth) <= count:
            p.requires_grad_(False)
    return count


def _adapt(model: VisionTransformer, section: LoraSection, first: int, seed: int) -> None:
    """Insert adapters into the blocks from `first` on, and train only them and the heads."""
    assert section.rank is not None
    if first >= model.config.depth:
        raise VitcliError(
            "`train.freeze` leaves no block for an adapter",
            "remove `lora.rank`, or freeze fewer blocks",
        )
    if section.rank > model.config.embed_dim:
        raise VitcliError(
            f"`lora.rank` = {section.rank} is larger than the width of the model, "
            f"{model.config.embed_dim}",
            "use for example `--lora 8`",
        )
    endings = tuple(name for target in section.targets for name in LAYERS[target])
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(HEADS))  # heads are new, an adapter would not do
    # In a fork, so that adapters do not change the random numbers that follow.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for block in list(model.blocks)[first:]:
            for name, layer in list(block.named_modules()):
                if name.endswith(endings) and isinstance(layer, nn.Linear):
                    parent, _, last = name.rpartition(".")
                    wrapped = LoraLinear(layer, section.rank, section.scale)
                    setattr(block.get_submodule(parent), last, wrapped)


def adapters(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers with an adapter, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}


def training_passes(model: nn.Module) -> float:
    """The cost of a training step in forward passes: three, and less if weights are frozen.

    The gradient of a layer's input costs as much as its output, and so does that of its weights.
    The count is over the encoder. Below the first trainable block there is no backward pass.
    """
    blocks = list(getattr(model, "blocks", ()))
    trainable = [i for i, b in enumerate(blocks) if any(p.requires_grad for p in b.parameters())]
    if not blocks:
        return BACKWARD if all(p.requires_grad for p in model.parameters()) else 1.0
    if not trainable:
        return 1.0
    reached = (len(blocks) - trainable[0]) / len(blocks)
    # Frozen weights inside adapted layers need the gradient of the input only.
    backward = BACKWARD - 2.0 if adapters(model) else BACKWARD - 1.0
    return 1.0 + backward * reached


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Inside the block, ordinary layers replace the adapted ones."""
    found = adapters(model)

    def put(name: str, layer: nn.Module) -> None:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)

    for name, layer in found.items():
        put(name, layer.merged())
    try:
        yield
    finally:  # a run that is interrupted while it writes continues with its adapters
        for name, layer in found.items():
            put(name, layer)


def save_adapters(path: Path, model: nn.Module, section: LoraSection, base: str) -> None:
    """Write the adapters, their settings and the name of the base model, if there are adapters."""
    tensors = {n: p for n, p in model.named_parameters() if n.endswith(ADAPTER)}
    if tensors and section.rank is not None:
        alpha = section.scale * section.rank
        facts = {**section.model_dump(mode="json"), "alpha": alpha, "base": base}
        save_tensors(path, tensors, {"vitcli": json.dumps(facts, sort_keys=True)})
