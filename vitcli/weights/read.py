"""Find the weights of a MODEL, detect their layout and read them into a `Checkpoint`."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitcli.errors import VitcliError, quoted
from vitcli.files import is_url, read_json
from vitcli.hub.http import fetch_url
from vitcli.hub.models import INDEX, fetch_model
from vitcli.progress import Watcher
from vitcli.vit import ResNetConfig, ViTConfig
from vitcli.weights.find_network import Containers, FoundNetwork, find_network
from vitcli.weights.google.npz import read_npz
from vitcli.weights.google.read_google import read_google
from vitcli.weights.huggingface.huggingface_names import MODEL_TYPES
from vitcli.weights.huggingface.lone_weights import describe_weights
from vitcli.weights.huggingface.read_huggingface import place_of, read_huggingface
from vitcli.weights.imagenet import SETS, imagenet_names
from vitcli.weights.load_report import UNNAMED
from vitcli.weights.open_clip import OPEN_CLIP_CONFIG, is_open_clip, read_open_clip
from vitcli.weights.overrides import Overrides, override_preprocess, refuse_file_keys
from vitcli.weights.peft_adapter import (
    CONFIG,
    LoraAdapter,
    is_adapter,
    merge_adapter,
    read_adapter,
)
from vitcli.weights.pickles import PICKLE_SUFFIXES, is_pickle, load_pickle, own_tensors
from vitcli.weights.public import is_listed, resolve_name, similar_names
from vitcli.weights.read_torchvision import read_torchvision
from vitcli.weights.read_vit_pytorch import read_vit_pytorch
from vitcli.weights.store import (
    Checkpoint,
    load_sharded_weights,
    load_weights,
    read_header,
    read_split_record,
    read_vitcli,
)
from vitcli.weights.timm.read_timm import read_timm
from vitcli.weights.timm.timm_names import timm_name

UNDERSTOOD = (
    "a MODEL is a run directory, a .safetensors or .pth file of vitcli, timm, transformers, "
    "torchvision or vit-pytorch, a Hugging Face folder, an official Google .npz, a variant such as "
    "`B/16`, or a name that `vitcli models` lists"
)


def read_checkpoint(
    source: str, overrides: Overrides | None = None, watch: Watcher | None = None
) -> Checkpoint:
    """Read the checkpoint at `source`. A trained head of ImageNet's size gets ImageNet's names.

    Args:
        source: a path, a public name, `hf:NAME`, or the URL of a weights file.
        overrides: settings of the caller.
        watch: receives the progress of a download.

    Raises:
        VitcliError: the weights do not exist, or their format is not supported.
    """
    overrides = overrides or Overrides()
    checkpoint = _read(source, overrides, watch)
    config = checkpoint.config
    if overrides.stem_arithmetic is not None:
        if not isinstance(config, ViTConfig) or config.stem is None:
            raise VitcliError(
                "`model.stem_arithmetic` is set, but the model is not a hybrid",
                hint="remove `model.stem_arithmetic`",
            )
        checkpoint.config = replace(config, stem_arithmetic=overrides.stem_arithmetic)
    outputs = checkpoint.config.num_classes
    if checkpoint.labels is None and checkpoint.head_trained and outputs in SETS:
        checkpoint.labels = imagenet_names(outputs)
        checkpoint.notes.append(f"{outputs} {UNNAMED}: assumed the classes of {SETS[outputs][0]}")
    return checkpoint


def _read(
    source: str,
    overrides: Overrides,
    watch: Watcher | None,
    adapter: LoraAdapter | None = None,
) -> Checkpoint:
    path = Path(source)
    if not source:  # an empty path would be the current folder
        raise VitcliError("the MODEL is empty", hint=UNDERSTOOD)
    notes: list[str] = []
    if source.startswith("hf:") or is_url(source) or not path.exists():
        path, notes = fetch_public(source, watch)
    elif path.is_dir():
        folder, path = path, _weights_in(path)
        if path.parent != folder:
            notes = [f"`{source}` holds no weights: loaded its newest checkpoint, `{path.parent}`"]
    if is_adapter(path):
        checkpoint = _read_adapted(path, source, overrides, watch, adapter)
    else:
        checkpoint = _read_file(path, source, overrides, adapter)
    checkpoint.notes[:0] = notes
    if checkpoint.split_record is None:
        checkpoint.split_record = read_split_record(path)
    return checkpoint


def _read_adapted(
    path: Path,
    source: str,
    overrides: Overrides,
    watch: Watcher | None,
    outer: LoraAdapter | None,
) -> Checkpoint:
    """Read the base model of the adapter in the file `path`, merged with the adapter."""
    if outer is not None:
        raise VitcliError(
            f"the base model `{source}` of the adapter `{outer.path}` is an adapter itself",
            hint="merge it with PEFT: `model.merge_and_unload().save_pretrained(FOLDER)`",
        )
    adapter = read_adapter(path)
    base = overrides.base_model or adapter.base
    if base is None:
        raise VitcliError(
            f"`{source}` is a LoRA adapter, and its {CONFIG} does not name the base model",
            hint="name it: `--set model.base_model=MODEL`",
        )
    try:
        checkpoint = _read(base, replace(overrides, base_model=None), watch, adapter)
    except VitcliError as error:
        raise VitcliError(
            f"`{source}` is a LoRA adapter of `{base}`: {error.message}",
            hint=error.hint
            if overrides.base_model
            else f"{error.hint}; another base model: `--set model.base_model=MODEL`",
        ) from error
    checkpoint.notes.insert(0, f"`{source}` is a LoRA adapter: loaded its base model `{base}`")
    return checkpoint


def fetch_public(source: str, watch: Watcher | None = None) -> tuple[Path, list[str]]:
    """Download weights by their name, `hf:NAME` or URL -> (file in a cache, notes).

    Raises:
        VitcliError: the name is unknown, or the download fails.
    """
    model = resolve_name(source)
    try:
        return (fetch_url if is_url(model) else fetch_model)(model, watch)
    except VitcliError as error:
        if model == source or is_listed(source):
            raise
        # The name may also be a misspelling, or a path that does not exist.
        message = f"`{source}` is no path here, and {error.message}"
        raise VitcliError(message, "; ".join([*similar_names(source), error.hint or ""])) from error


def _read_file(
    path: Path, source: str, overrides: Overrides, adapter: LoraAdapter | None = None
) -> Checkpoint:
    """Read one file or its shards; `source` is the MODEL that the user named."""
    refuse_file_keys(f"`{source}` is no LoRA adapter", base_model=overrides.base_model)
    own = path.suffix == ".safetensors" and read_header(path) is not None
    if path.suffix == ".npz" or own:
        key = overrides.checkpoint_key
        refuse_file_keys(f"`{source}` holds one network", checkpoint_key=key)
        if adapter is not None:
            raise VitcliError(
                f"an adapter of PEFT cannot be merged into `{source}`",
                hint="use a base model in the layout of transformers or timm",
            )
    if path.suffix == ".npz":
        return read_google(read_npz(path), source, overrides)
    if path.name.endswith(INDEX):
        return _read_containers({"": load_sharded_weights(path)}, path, source, overrides, adapter)
    if path.suffix in (".npy", ".onnx", ".msgpack", ".toml", ".json"):
        raise VitcliError(f"`{source}` has an unsupported weights format", hint=UNDERSTOOD)
    if is_pickle(path) and path.suffix != ".safetensors":
        return _read_containers(load_pickle(path), path, source, overrides, adapter)
    if read_header(path) is not None:
        return _with_overrides(read_vitcli(path), overrides)
    return _read_containers({"": load_weights(path)}, path, source, overrides, adapter)


def _read_containers(
    containers: Containers,
    path: Path,
    source: str,
    overrides: Overrides,
    adapter: LoraAdapter | None = None,
) -> Checkpoint:
    """Find the network among the tensors of the file `path`, and convert it to a checkpoint."""
    pickled = is_pickle(path) and path.suffix != ".safetensors"
    network = find_network(
        containers,
        source,
        overrides.checkpoint_key,
        check=(lambda tensors: own_tensors(tensors, path)) if pickled else None,
    )
    described = _json(path.parent / "config.json") or {}
    if network is None:
        largest = max(containers.values(), key=len)
        if "model_type" in described:
            read_huggingface(largest, source, described, None, overrides)
        raise VitcliError(
            f"`{source}` does not hold a Vision Transformer in a supported layout; its "
            f"tensors are {quoted(largest, 4)}",
            hint=UNDERSTOOD,
        )
    if adapter is None:
        return read_network(network, path, source, overrides, described)
    family = MODEL_TYPES.get(str(described.get("model_type")))
    if network.layout == "huggingface" and family is not None:
        merge_adapter(adapter, network, lambda name: place_of(name, family) or name)
    else:
        merge_adapter(adapter, network, timm_name)
    beside = adapter.path  # a Trainer saves the image processor with the adapter
    processed = adapter.path.with_name("preprocessor_config.json").is_file()
    return read_network(network, beside if processed else path, source, overrides, described)


def read_network(
    network: FoundNetwork,
    path: Path,
    source: str,
    overrides: Overrides,
    described: Mapping[str, Any],
) -> Checkpoint:
    """Convert a network from the file `path` to a checkpoint; `described` is its config.json."""
    if network.layout == "huggingface":
        if "model_type" not in described:
            described = describe_weights(network, source, overrides)
        processor = _json(path.parent / "preprocessor_config.json")
        checkpoint = read_huggingface(network.tensors, source, described, processor, overrides)
    elif network.layout == "torchvision":
        checkpoint = read_torchvision(network, source, overrides)
    elif network.layout == "vit_pytorch":
        checkpoint = read_vit_pytorch(network, source, overrides)
    elif is_open_clip(network):
        clip = _json(path.parent / OPEN_CLIP_CONFIG)
        checkpoint = read_open_clip(network, source, clip, overrides)
    else:
        hub = described if {"architecture", "pretrained_cfg"} & set(described) else None
        checkpoint = read_timm(network, source, hub, overrides)
    names = network.full_names
    dropped = {names.get(name, name): reason for name, reason in checkpoint.dropped.items()}
    checkpoint.dropped = dropped | network.dropped
    checkpoint.dropped_shapes = {
        name: network.shapes[name] for name in checkpoint.dropped if name in network.shapes
    }
    checkpoint.notes[:0] = network.notes
    return checkpoint


def _with_overrides(checkpoint: Checkpoint, overrides: Overrides) -> Checkpoint:
    """Apply the caller's settings to a file of vitcli, which states all facts itself."""
    values: dict[str, Any] = {"num_heads": overrides.num_heads, "norm_eps": overrides.norm_eps}
    values["gelu"] = overrides.gelu
    given = {key: value for key, value in values.items() if value is not None}
    keys = ", ".join(f"`model.{key}`" for key in given)
    if given and isinstance(checkpoint.config, ResNetConfig):
        raise VitcliError(f"a ResNet has no {keys}", hint=f"remove {keys}")
    try:
        checkpoint.config = replace(checkpoint.config, **given)
    except ValueError as error:
        raise VitcliError(
            f"{keys} does not fit this model: {error}",
            hint=f"remove {keys}, or use another value",
        ) from error
    config = checkpoint.config
    checkpoint.preprocess = override_preprocess(
        checkpoint.preprocess, overrides.preprocess, config.image_size, config.num_channels
    )
    return checkpoint


def vitcli_weights_file(source: str) -> Path | None:
    """Return the local weights file of a MODEL that vitcli wrote; None for any other MODEL."""
    path = Path(source)
    if source.startswith(("hf:", "https:", "http:", "gs:")) or not path.exists():
        return None
    file = _weights_in(path) if path.is_dir() else path
    if file.suffix != ".safetensors":
        return None
    return file if read_header(file) is not None else None


def _weights_in(folder: Path) -> Path:
    """Return the weights file of a run directory or model folder."""
    whole = folder / "model.safetensors"
    if whole.is_file():
        return whole
    if (folder / INDEX).is_file():
        return folder / INDEX
    files = sorted(p for p in folder.glob("*.safetensors") if p.is_file())
    if len(files) == 1:
        return files[0]
    if files:
        raise VitcliError(
            f"`{folder}` holds {len(files)} weights files: {quoted((p.name for p in files), 4)}",
            hint="name one of these files",
        )
    if (folder / "recipe.toml").is_file():
        raise VitcliError(
            f"the run `{folder}` has no model.safetensors: it did not finish",
            hint=f"resume it: repeat the command with `--out {folder} --resume`",
        )
    pickles = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICKLE_SUFFIXES)
    known = [p for p in pickles if p.stem in ("pytorch_model", "model", "adapter_model")]
    if len(known or pickles) == 1:
        return (known or pickles)[0]
    if pickles:
        raise VitcliError(
            f"`{folder}` holds {len(pickles)} weights files: "
            f"{quoted((p.name for p in pickles), 4)}",
            hint="name one of these files",
        )
    if newest := _newest_checkpoint(folder):
        return _weights_in(newest)
    raise VitcliError(f"`{folder}` holds no weights", hint=UNDERSTOOD)


def _newest_checkpoint(folder: Path) -> Path | None:
    """The last `checkpoint-STEP` of a folder that transformers' Trainer wrote."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdecimal()]
    found = [p for p in found if any(p.glob("*.safetensors")) or any(p.glob("*.bin"))]
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def _json(path: Path) -> dict[str, Any] | None:
    try:
        value = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise VitcliError(
            f"`{path}` cannot be read as JSON: {error}", hint="fix it or remove it"
        ) from error
    return value if isinstance(value, dict) else None
