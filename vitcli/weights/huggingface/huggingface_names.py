"""transformers' Vision Transformers: the model types, and what they call our tensors.

Shared by reading and writing. A file has the classic names (`encoder.layer.0.intermediate.dense`),
which transformers still writes by default, or those that version 5 holds in memory
(`layers.0.mlp.fc1`); both are read, the classic ones are written.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from vitcli.vit.config import Gelu


@dataclass(frozen=True)
class Family:
    """One `model_type` of transformers.

    Attributes:
        prefix: of the encoder's names where a head or decoder stands beside it.
        backbone, classifier: the classes without and with a head; None where there is none.
        patch_size, norm_eps: what its config.json leaves unsaid at times.
        dino: names and blocks of DINOv2 (LayerScale, `norm1`) instead of ViT's.
        processor: the image processor that transformers takes where none is named.
    """

    prefix: str
    backbone: str
    classifier: str | None
    processor: str
    patch_size: int = 16
    norm_eps: float = 1e-12
    dino: bool = False


FAMILIES = {
    "vit": Family("vit.", "ViTModel", "ViTForImageClassification", "ViTImageProcessor"),
    "deit": Family("deit.", "DeiTModel", "DeiTForImageClassification", "DeiTImageProcessor"),
    "dinov2": Family(
        "dinov2.",
        "Dinov2Model",
        "Dinov2ForImageClassification",
        "BitImageProcessor",
        patch_size=14,
        norm_eps=1e-6,
        dino=True,
    ),
    "dinov2_with_registers": Family(
        "dinov2_with_registers.",
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersForImageClassification",
        "BitImageProcessor",
        norm_eps=1e-6,
        dino=True,
    ),
    "vit_mae": Family("vit.", "ViTMAEModel", None, "ViTImageProcessor"),
}
# The class of DeiT with a head for each of its two tokens; the logits are their mean.
TEACHER = "DeiTForImageClassificationWithTeacher"

GELUS: dict[str, Gelu] = {
    "gelu": "exact",
    "gelu_pytorch_tanh": "tanh",
    "gelu_python": "exact",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_accurate": "tanh",
    "gelu_python_tanh": "tanh",
}
GELU_WRITTEN: dict[Gelu, str] = {"exact": "gelu", "tanh": "gelu_pytorch_tanh"}

# Theirs -> ours, without the prefix.
STEM = {
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
    "pooler.dense.weight": "pre_logits.fc.weight",
    "pooler.dense.bias": "pre_logits.fc.bias",
}
# These never carry the prefix.
HEADS = {
    "classifier.weight": "head.weight",
    "classifier.bias": "head.bias",
    "cls_classifier.weight": "head.weight",
    "cls_classifier.bias": "head.bias",
    "distillation_classifier.weight": "head_dist.weight",
    "distillation_classifier.bias": "head_dist.bias",
}
# Ours -> theirs within a block, the classic names.
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
QKV = ("attention.attention.query", "attention.attention.key", "attention.attention.value")

# Theirs -> ours within a block, every style.
BLOCK = {theirs: ours for t in (VIT_BLOCK, DINO_BLOCK, SWIGLU_BLOCK) for ours, theirs in t.items()}
BLOCK |= {"attention.o_proj": "attn.proj", "mlp.down_proj": "mlp.fc2"}
# Several of theirs that are one of ours, stacked in this order.
JOINED = {
    "attn.qkv": (QKV, ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
    "mlp.fc1": (("mlp.gate_proj", "mlp.up_proj"),),
}


def block_names(*, dino: bool, swiglu: bool) -> Mapping[str, str]:
    """Ours -> theirs within a block, of the tensors that are one in both."""
    if not dino:
        return VIT_BLOCK
    return SWIGLU_BLOCK if swiglu else DINO_BLOCK


def swiglu_width(embed_dim: int, ratio: int) -> int:
    """The hidden width of DINOv2's SwiGLU: two thirds of `ratio` widths, in steps of 8."""
    return (int(embed_dim * ratio * 2 / 3) + 7) // 8 * 8
