"""The Vision Transformers of transformers: model types, and the names of their tensors.

Files have the classic names (`encoder.layer.0.intermediate.dense`), which transformers writes by
default, or the names that version 5 uses in memory (`layers.0.mlp.fc1`). We read both and write the
classic names.
"""

from dataclasses import dataclass
from typing import Any

from vitcli.config.choices import Gelu
from vitcli.vit.config import ViTConfig
from vitcli.weights.loaded import HeadActivation


@dataclass(frozen=True)
class HuggingFaceType:
    """One `model_type` of transformers.

    Attributes:
        prefix: the prefix of the encoder's names in a file that also has a head or decoder.
        backbone, classifier: the classes without and with a head; None if there is none.
        processor: the image processor that transformers uses if the folder names none.
        patch_size, norm_eps: the values if config.json does not have them.
        dino: True for names and blocks of DINOv2 (LayerScale, `norm1`).
    """

    prefix: str
    backbone: str
    classifier: str | None
    processor: str
    patch_size: int = 16
    norm_eps: float = 1e-12
    dino: bool = False


MODEL_TYPES = {
    "vit": HuggingFaceType("vit.", "ViTModel", "ViTForImageClassification", "ViTImageProcessor"),
    "deit": HuggingFaceType(
        "deit.", "DeiTModel", "DeiTForImageClassification", "DeiTImageProcessor"
    ),
    "dinov2": HuggingFaceType(
        "dinov2.",
        "Dinov2Model",
        "Dinov2ForImageClassification",
        "BitImageProcessor",
        patch_size=14,
        norm_eps=1e-6,
        dino=True,
    ),
    "dinov2_with_registers": HuggingFaceType(
        "dinov2_with_registers.",
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersForImageClassification",
        "BitImageProcessor",
        norm_eps=1e-6,
        dino=True,
    ),
    "vit_mae": HuggingFaceType("vit.", "ViTMAEModel", None, "ViTImageProcessor"),
}
# DeiT with a head for each of its two tokens; the logits are the mean of both.
TEACHER = "DeiTForImageClassificationWithTeacher"

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

# Theirs -> ours, without the prefix, outside the blocks.
ENCODER = {
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "pooler.dense": "pre_logits.fc",
}
# Heads never have the prefix.
HEADS = {
    "classifier": "head",
    "cls_classifier": "head",
    "distillation_classifier": "head_dist",
}
# Ours -> theirs within a block, in classic names.
VIT_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
DINO_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}
SWIGLU_BLOCK = {**DINO_BLOCK, "mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"}
# transformers' `problem_type` -> the activation of the head; without it, softmax.
PROBLEM_TYPES: dict[Any, HeadActivation] = {
    "multi_label_classification": "sigmoid",
    "regression": "identity",
}
QKV = ("attention.attention.query", "attention.attention.key", "attention.attention.value")

# Theirs -> ours within a block, classic and new names.
BLOCK = {theirs: ours for t in (VIT_BLOCK, DINO_BLOCK, SWIGLU_BLOCK) for ours, theirs in t.items()}
BLOCK |= {"attention.o_proj": "attn.proj", "mlp.down_proj": "mlp.fc2"}
# Several tensors of theirs that we stack into one, in this order.
STACKED = {
    "attn.qkv": (QKV, ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
    "mlp.fc1": (("mlp.gate_proj", "mlp.up_proj"),),
}


def closest_type(config: ViTConfig) -> str:
    """Return the `model_type` that comes closest to `config`."""
    if config.distillation_token:
        return "deit"
    if config.num_registers:
        return "dinov2_with_registers"
    dino = config.layer_scale is not None or config.mlp == "swiglu" or config.pool == "token_mean"
    return "dinov2" if dino else "vit"


def swiglu_width(embed_dim: int, ratio: int) -> int:
    """Return the hidden width of DINOv2's SwiGLU: 2/3 of `ratio` widths, in steps of 8."""
    return (int(embed_dim * ratio * 2 / 3) + 7) // 8 * 8


def dino_mlp_ratio(config: ViTConfig) -> int | None:
    """Return the whole `mlp_ratio` from which DINOv2 derives this hidden width, None if none."""
    width, hidden = config.embed_dim, config.mlp_dim
    if config.mlp == "gelu":
        return None if hidden % width else hidden // width
    near = round(hidden * 1.5 / width)
    return next((r for r in (near, near - 1, near + 1) if swiglu_width(width, r) == hidden), None)
