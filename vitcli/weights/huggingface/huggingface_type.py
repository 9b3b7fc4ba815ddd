"""One model type of transformers: its tensor names, settings and image processor.

The entries are in `vit_types.py` and the other `*_types.py`. `MODEL_TYPES` lists them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vitcli.config.choices import Gelu, Resize
from vitcli.errors import VitcliError
from vitcli.vit.config import ViTConfig
from vitcli.weights.overrides import Overrides, as_size

Settings = dict[str, Any]  # fields of ViTConfig

# The first name of each value is the one that we write.
GELUS: dict[str, Gelu] = {
    "gelu": "exact",
    "gelu_pytorch_tanh": "tanh",
    "quick_gelu": "quick",
    "gelu_python": "exact",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_accurate": "tanh",
    "gelu_python_tanh": "tanh",
}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
MASKED_TRAINING = "used only by masked-image training"
# The head of a classifier, which never has the prefix of the encoder: theirs -> ours.
HEADS = {"classifier": "head"}
# Names of a block's attention, theirs -> ours; classic and new names, as files have either.
ATTENTION = {"attention.output.dense": "attn.proj", "attention.o_proj": "attn.proj"}
# Ours -> the tensors of theirs that we stack into one, in this order; classic and new names.
QKV = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
NEW_QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
STACKED: dict[str, tuple[tuple[str, ...], ...]] = {"attn.qkv": (QKV, NEW_QKV)}
# Of image processors: a crop of the centre, and what those of CLIP have by default.
CROPPED = {"do_center_crop": True, "crop_size": 224, "resample": 3}
CLIP_PROCESSOR: dict[str, Any] = {
    "size": {"shortest_edge": 224},
    **CROPPED,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


@dataclass
class ModelFiles:
    """The files of a folder, from which a model type takes its settings.

    Attributes:
        model_type: the `model_type` in config.json.
        described: config.json, or its section about the vision tower.
        tensors: the weights under our names. A model type may change them in place.
        source: the name of the folder in messages.
        overrides: the caller's settings, which override the files.
        notes: gets a line for each assumption.
        dropped: gets the reason for each tensor that is not used.
    """

    model_type: str
    described: Mapping[str, Any]
    tensors: dict[str, Tensor]
    source: str
    overrides: Overrides
    notes: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)

    def count(self, key: str, default: int) -> int:
        """The integer `key` of config.json; a ValueError if it is too large or below 0."""
        value = int(self.described.get(key, default))
        if not 0 <= value <= 10**6:  # larger than any model; torch counts bytes with 64 bits
            raise ValueError(f"`{key}` is {value}")
        return value

    def fraction(self, key: str, default: float) -> float:
        """The number `key` of config.json, from 0 on and below 1; else a ValueError."""
        value = float(self.described.get(key, default))
        if not 0 <= value < 1:
            raise ValueError(f"`{key}` is {value}")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        """True if `key` of config.json is set."""
        return bool(self.described.get(key, default))

    def drop(self, name: str, reason: str) -> None:
        """Remove the tensor `name`, if it exists; the load report gives the reason."""
        if self.tensors.pop(name, None) is not None:
            self.dropped[name] = reason

    def drop_empty_registers(self) -> None:
        """Remove a tensor of no register tokens, which transformers writes."""
        stored = self.tensors.get("reg_token")
        if stored is not None and not stored.numel():
            self.drop("reg_token", "holds no registers")


@dataclass(frozen=True, kw_only=True)
class WrittenType:
    """How `write_huggingface` writes a model type.

    Attributes:
        described: gives config.json, without the labels, the class and the type.
        block: gives the names inside a block, ours -> theirs; a tuple for stacked tensors.
        layer: the name of the list of blocks.
        tensors: gives our tensors in the shapes of the type.
        empty: gives the tensors of the class that our model lacks, for the class token.
        always_prefixed: a file without a head also has the prefix of the encoder's names.
    """

    described: Callable[[ViTConfig], Settings]
    block: Callable[[ViTConfig], Mapping[str, str | tuple[str, ...]]]
    layer: str = "encoder.layer."
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda tensors: tensors
    empty: Callable[[Tensor, ViTConfig], dict[str, Tensor]] = lambda token, config: {}
    always_prefixed: bool = False


@dataclass(frozen=True, kw_only=True)
class HuggingFaceType:
    """One `model_type` of transformers.

    Attributes:
        prefix: the prefix of the encoder's names in a file that also has a head or decoder.
        backbone, classifier: the classes without and with a head; None if there is none.
        settings: gives the fields of ViTConfig for the files; it raises a ValueError or a
            VitcliError for what we do not compute. `encoder_settings` gives those that all share.
        section: the key of config.json that describes the vision tower; None for the whole file.
        encoder: names outside of the blocks, theirs -> ours, both without `.weight` and `.bias`.
        block: names inside a block, theirs -> ours.
        stacked: ours -> the tensors that we stack into one, for each style of names.
        heads: names of the heads, theirs -> ours.
        unused: pattern of whole names, without the prefix -> the reason why we drop the tensor.
        processor: the image processor that transformers uses if the folder names none.
        published: the image processor of the published weights, assumed if the folder has none.
        any_size: the image size of the processor may differ from that of config.json.
        position_resize: transformers' arithmetic for positions of another image size.
        decoder: names of a decoder for pixels, theirs -> ours outside of its blocks.
        written: how the type is written; None for a type that is only read.
    """

    backbone: str
    classifier: str | None
    settings: Callable[[ModelFiles], Settings]
    prefix: str
    section: str | None = None
    encoder: Mapping[str, str]
    block: Mapping[str, str]
    stacked: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=lambda: STACKED)
    heads: Mapping[str, str] = field(default_factory=lambda: HEADS)
    unused: Mapping[str, str] = field(default_factory=dict)
    processor: str
    published: Mapping[str, Any]
    any_size: bool = False
    position_resize: Resize = "bicubic_plain"
    decoder: Mapping[str, str] | None = None
    written: WrittenType | None = None


def encoder_settings(
    files: ModelFiles, *, patch_size: int = 16, norm_eps: float = 1e-12, act: str | None = None
) -> Settings:
    """Return the fields of ViTConfig that the model types share; pool `token`.

    Args:
        files: the folder; its tensors have our names.
        patch_size, norm_eps: transformers' values if config.json does not have them.
        act: the activation, if it is not the `hidden_act` of config.json.

    Raises:
        VitcliError: the activation or the form of the patches is not supported.
        ValueError: config.json contradicts the tensors, or a value is invalid.
    """
    described, tensors, overrides = files.described, files.tensors, files.overrides
    act = act or described.get("hidden_act", "gelu")
    if act not in GELUS and overrides.gelu is None:
        raise VitcliError(
            f"`{files.source}` has the unsupported activation `{act}`",
            hint=f"supported: {', '.join(f'`{a}`' for a in GELUS)}",
        )
    patch = read_size(described.get("patch_size", patch_size), "patch_size")
    if patch[0] != patch[1]:
        raise VitcliError(
            f"`{files.source}` has patches of {patch[0]}x{patch[1]} pixels, which are not square",
            hint="use a model with square patches",
        )
    _check_counts(files)
    head = tensors.get("head.weight")
    return {
        "image_size": read_size(described.get("image_size", 224), "image_size"),
        "patch_size": patch[0],
        "num_channels": tensors["patch_embed.proj.weight"].shape[1],
        "embed_dim": files.count("hidden_size", 768),
        "depth": files.count("num_hidden_layers", 12),
        "num_heads": overrides.num_heads or files.count("num_attention_heads", 12),
        "mlp_dim": files.count("intermediate_size", 3072),
        "num_classes": head.shape[0] if head is not None else 0,
        "pool": "token",
        "qkv_bias": files.flag("qkv_bias", default=True),
        "gelu": overrides.gelu or GELUS[act],
        "norm_eps": overrides.norm_eps or files.fraction("layer_norm_eps", norm_eps),
        "dropout_rate": files.fraction("hidden_dropout_prob", 0.0),
    }


def _check_counts(files: ModelFiles) -> None:
    """Raise a ValueError if config.json has another depth or number of channels than the tensors.

    A damaged config.json must not create a model of 10^6 blocks.
    """
    numbers = [n.split(".")[1] for n in files.tensors if n.startswith("blocks.")]
    depth = 1 + max((int(n) for n in numbers if n.isdecimal()), default=-1)
    channels = files.tensors["patch_embed.proj.weight"].shape[1]
    for key, default, found in (("num_hidden_layers", 12, depth), ("num_channels", 3, channels)):
        if (value := files.count(key, default)) != found:
            raise ValueError(f"`{key}` is {value}, the weights have {found}")


def described_sizes(config: ViTConfig) -> Settings:
    """Return the entries of config.json that all types share."""
    rows, cols = config.image_size
    return {
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "layer_norm_eps": config.norm_eps,
        "image_size": rows if rows == cols else [rows, cols],
        "patch_size": config.patch_size,
        "num_channels": config.num_channels,
    }


def described_act(config: ViTConfig) -> str:
    """Return transformers' name of the activation."""
    return next(name for name, gelu in GELUS.items() if gelu == config.gelu)


def read_size(value: Any, key: str = "size") -> tuple[int, int]:
    """Convert a number of pixels or a pair to (Y, X); anything else is a ValueError."""
    try:
        size = as_size(value)
    except VitcliError as error:
        raise ValueError(f"`{key}` is {value}") from error
    if size is None:
        raise ValueError(f"`{key}` is null")
    return size
