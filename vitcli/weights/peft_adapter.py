"""Read LoRA adapters that PEFT wrote, and merge them into the weights of their base model.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. The names of its tensors are
those of the model that was trained, between `base_model.model.` and `.lora_A.weight`. Versions 4
and 5 of transformers have different names in memory, so names are compared after translation.
Source: peft 0.21, tuners/lora/layer.py and utils/save_and_load.py.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vitcli.errors import VitcliError, counted, quoted
from vitcli.files import read_json
from vitcli.weights.find_network import FoundNetwork
from vitcli.weights.pickles import load_pickle, own_tensors
from vitcli.weights.store import load_weights, readable_values

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
MERGE_HINT = "merge it with PEFT: `model.merge_and_unload().save_pretrained(FOLDER)`"
# These initialisations change the weights of the base model, which the folder does not hold.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "eva", "lora_ga")


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter folder.

    Attributes:
        path: its weights file.
        base: the MODEL that it was trained on; None if the folder does not say.
        added: names of the trained model -> what is added to these tensors.
        replaced: names of the trained model -> tensors that replace those of the base (a head).
        rank: the largest rank of its layers.
    """

    path: Path
    base: str | None
    added: Mapping[str, Tensor]
    replaced: Mapping[str, Tensor]
    rank: int


def is_adapter(path: Path) -> bool:
    """Return True for the weights file of an adapter, with its config beside it."""
    return path.stem == "adapter_model" and path.with_name(CONFIG).is_file()


def read_adapter(path: Path) -> LoraAdapter:
    """Read the adapter with the weights file `path`.

    Raises:
        VitcliError: it is no LoRA, it is a kind of LoRA that is not supported, or it is damaged.
    """
    folder = path.parent
    if path.suffix == ".safetensors":
        tensors = load_weights(path)
    else:
        tensors = own_tensors(load_pickle(path).get("", {}), path)
    with readable_values(CONFIG, folder, "copy the folder again, or save the adapter again"):
        config = dict(read_json(folder / CONFIG))
        _check_kind(config, folder)
        low = {n: t for n, t in tensors.items() if ".lora_" in n}
        added, ranks = _products(low, config, folder)
        base = config.get("base_model_name_or_path")
    replaced = {
        n.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", "."): t
        for n, t in tensors.items()
        if n not in low and ".original_module." not in n  # the head before the training
    }
    return LoraAdapter(path, str(base) if base else None, added, replaced, max(ranks, default=0))


def _check_kind(config: Mapping[str, Any], folder: Path) -> None:
    kind = config.get("peft_type")
    start = str(config.get("init_lora_weights", True)).lower()
    wrong = None
    if kind != "LORA":
        wrong = f"a `{kind}` adapter"
    elif config.get("use_dora"):
        wrong = "a DoRA adapter"
    elif start.startswith(CHANGES_BASE):
        wrong = f"a LoRA adapter with `init_lora_weights={start}`, which changes the base model"
    if wrong:
        raise VitcliError(f"`{folder}` is {wrong}: not supported", hint=MERGE_HINT)


def _products(
    low: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path
) -> tuple[dict[str, Tensor], list[int]]:
    """Return name -> scale * B A of each adapted tensor, and the ranks."""
    added: dict[str, Tensor] = {}
    ranks = []
    left = dict(low)
    for name in [n for n in low if n.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        a, b = left.pop(name), left.pop(f"{module}.lora_B.weight", None)
        if b is None or a.ndim != b.ndim or a.ndim not in (2, 4) or a.shape[0] != b.shape[1]:
            shape = tuple(b.shape) if b is not None else "missing"
            raise ValueError(f"lora_A of `{module}` is {tuple(a.shape)}, and lora_B is {shape}")
        rank = a.shape[0]
        bare = module.removeprefix(PREFIX)
        scale = _alpha(config, bare) / (rank**0.5 if config.get("use_rslora") else rank)
        # A convolution has A (r, C, P, P) and B (D, r, 1, 1).
        product = b.flatten(1).double() @ a.flatten(1).double()
        added[f"{bare}.weight"] = scale * product.reshape(b.shape[0], *a.shape[1:])
        if (bias := left.pop(f"{module}.lora_B.bias", None)) is not None:
            added[f"{bare}.bias"] = scale * bias.double()
        ranks.append(rank)
    if left or not added:
        shown = quoted(left, 3) or "no tensors of LoRA"
        raise VitcliError(
            f"`{folder}` is another kind of LoRA than `lora_A` and `lora_B` in linear layers and "
            f"convolutions: it holds {shown}",
            hint=MERGE_HINT,
        )
    return added, ranks


def _alpha(config: Mapping[str, Any], module: str) -> float:
    """The scaling `lora_alpha` of a module; PEFT matches the patterns at the end of its name."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(alpha)
    return float(config.get("lora_alpha", 8))


def merge_adapter(adapter: LoraAdapter, network: FoundNetwork, place: Callable[[str], Any]) -> None:
    """Add the adapter to the tensors of its base model, in place.

    Args:
        network: the base model.
        place: a name -> a value that is equal for the names of one tensor.

    Raises:
        VitcliError: the adapter does not fit the base model.
    """
    tensors = network.tensors
    names = {place(name): name for name in tensors}
    wrong = []
    for name, delta in adapter.added.items():
        own = names.get(place(name))
        if own is None or tensors[own].shape != delta.shape:
            wrong.append(name)
        else:  # in fp64, so that merging rounds once only
            tensors[own] = (tensors[own].double() + delta).float()
    if wrong:
        raise VitcliError(
            f"the adapter `{adapter.path.parent}` does not fit its base model, which lacks tensors "
            f"of these names and shapes: {quoted(wrong, 4)}",
            hint="set the model that it was trained on: `--set model.base_model=MODEL`",
        )
    for name, tensor in adapter.replaced.items():
        tensors[names.get(place(name), name)] = tensor
    count = len([name for name in adapter.added if name.endswith(".weight")])
    layers = counted(count, "layer", "layers")
    note = f"merged the LoRA adapter of {layers} (rank up to {adapter.rank})"
    if adapter.replaced:
        modules = dict.fromkeys(name.rpartition(".")[0] for name in adapter.replaced)
        note += f" and took {quoted(modules, 4)} from it"
    network.notes.append(note)
