"""Fine-tuning a part of the weights: frozen layers, and low-rank adapters (Hu et al., 2021)."""

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
ADAPTER = (".lora_down", ".lora_up")  # how the names of their tensors end
LAYERS = {"qkv": ("attn.qkv",), "proj": ("attn.proj",), "mlp": ("mlp.fc1", "mlp.fc2")}


class LoraLinear(nn.Module):
    """A dense layer that stays as it is, and beside it one of low rank that learns.

    `weight` and `bias` keep their names. `lora_up` starts at zero, so that nothing changes first.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias  # frozen by then
        self.lora_down = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_up = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        low = F.linear(F.linear(x, self.lora_down), self.lora_up)
        return F.linear(x, self.weight, self.bias) + self.scale * low

    def merged(self) -> nn.Linear:
        """One ordinary layer that computes the same."""
        outputs, inputs = self.weight.shape
        layer = nn.Linear(inputs, outputs, bias=self.bias is not None, device="meta")
        added = self.scale * (self.lora_up.double() @ self.lora_down.double())
        layer.weight = nn.Parameter((self.weight.double() + added).to(self.weight.dtype).detach())
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach())
        return layer


def choose_learning(model: Network, section: LoraSection, frozen: str, seed: int) -> list[str]:
    """Freeze what is not to learn, and put in the adapters; what the user should know of it.

    Args:
        section: the adapters, drawn from `seed`; with them nothing else learns but the heads.
        frozen: `none`, `backbone` (all but the heads), or `blocks:N` (embeddings and N blocks).

    Raises:
        VitcliError: a model without blocks, or without so many; a rank that is none.
    """
    if frozen == "none" and section.rank is None:
        return []
    first = _freeze(model, frozen)
    if section.rank is not None:
        _adapt(_with_blocks(model), section, first, seed)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() for n, p in model.named_parameters() if not n.endswith(ADAPTER))
    return [f"{learning:,} numbers learn, of a model of {whole:,}"]


def _with_blocks(model: Network) -> VisionTransformer:
    if isinstance(model, ResNet):
        raise VitcliError(
            "a ResNet has no encoder blocks, which adapters and `train.freeze=blocks:N` are about",
            "`--set train.freeze=backbone` trains its head alone",
        )
    return model


def _freeze(model: Network, what: str) -> int:
    """Keep what `what` names as it is; the number of the first block that is free."""
    if what == "none":
        return 0
    if what == "backbone":
        for name, p in model.named_parameters():
            p.requires_grad_(name.startswith(HEADS))
        return 0 if isinstance(model, ResNet) else model.config.depth
    count, depth = int(what.partition(":")[2]), _with_blocks(model).config.depth
    if count > depth:
        raise VitcliError(
            f"`train.freeze={what}`, and the model has {depth} blocks",
            "`--set train.freeze=backbone` trains the head alone",
        )
    for name, p in model.named_parameters():
        if layer_of(name, depth) <= count:
            p.requires_grad_(False)
    return count


def _adapt(model: VisionTransformer, section: LoraSection, first: int, seed: int) -> None:
    """Put adapters into the blocks from `first` on, and let them and the heads learn alone."""
    assert section.rank is not None
    if first >= model.config.depth:
        raise VitcliError(
            "`train.freeze` leaves no block that an adapter could change",
            "leave out `lora.rank`, or freeze fewer blocks",
        )
    if section.rank > model.config.embed_dim:
        raise VitcliError(
            f"`lora.rank` = {section.rank} is more than the width of the model, "
            f"{model.config.embed_dim}",
            "8 is usual",
        )
    endings = tuple(name for target in section.targets for name in LAYERS[target])
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(HEADS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for block in list(model.blocks)[first:]:
            for name, layer in list(block.named_modules()):
                if name.endswith(endings) and isinstance(layer, nn.Linear):
                    parent, _, last = name.rpartition(".")
                    wrapped = LoraLinear(layer, section.rank, section.scale)
                    setattr(block.get_submodule(parent), last, wrapped)


def adapters(model: nn.Module) -> dict[str, LoraLinear]:
    """Name -> layer of all that are adapted."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}


def passes(model: nn.Module) -> float:
    """Forward passes of work that a training step is: three, and less where weights are frozen.

    The gradient of a layer's input costs as much as its output, that of its weights once more.
    Counted over the encoder: nothing goes back below the first block that learns.
    """
    blocks = list(getattr(model, "blocks", ()))
    free = [i for i, b in enumerate(blocks) if any(p.requires_grad for p in b.parameters())]
    if not blocks:
        return BACKWARD if all(p.requires_grad for p in model.parameters()) else 1.0
    if not free:
        return 1.0
    reached = (len(blocks) - free[0]) / len(blocks)
    through = BACKWARD - 2.0 if adapters(model) else BACKWARD - 1.0
    return 1.0 + through * reached


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """For the length of a block, ordinary layers stand where adapted ones are."""
    found = adapters(model)

    def put(name: str, layer: nn.Module) -> None:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)

    for name, layer in found.items():
        put(name, layer.merged())
    try:
        yield
    finally:
        for name, layer in found.items():
            put(name, layer)


def save_adapters(path: Path, model: nn.Module, section: LoraSection, base: str) -> None:
    """Keep what LoRA learned by itself too, with its settings and what it was added to.

    Writes nothing where there are no adapters.
    """
    learned = {n: p for n, p in model.named_parameters() if n.endswith(ADAPTER)}
    if learned and section.rank is not None:
        alpha = section.scale * section.rank
        said = {**section.model_dump(mode="json"), "alpha": alpha, "base": base}
        save_tensors(path, learned, {"vitcli": json.dumps(said, sort_keys=True)})
