"""Small random models of transformers for every model type that vitcli reads, and the differences.

`FAMILIES` has an entry per type in `MODEL_TYPES`. Its models have every option that the public
configs of the type use; `UNUSED` lists, for each option that no model changes, the reason. The test
`test_families.py` checks that neither a type nor an option is forgotten, and writes the measured
differences into `docs/how-to/families.md`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vitcli.weights.load import load_model

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
}
VIT = {**SIZES, "intermediate_size": 80}
CLASSES = {"num_labels": 5}
DINO = {**SIZES, "mlp_ratio": 2, "layerscale_value": 0.5}
DINOV3 = {
    **SIZES,
    "intermediate_size": 80,
    "num_register_tokens": 4,
    "layerscale_value": 0.5,
}
GATED = {"use_gated_mlp": True, "hidden_act": "silu"}
DECODER = {
    "decoder_num_hidden_layers": 1,
    "decoder_hidden_size": 32,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 48,
}
TRAINING = "only training uses it"
BACKBONE = "only the backbone classes use it, which return feature maps"
# Options that no model needs to change -> the reason.
UNUSED = {
    "initializer_range": "the weights come from the file",
    "hidden_dropout_prob": TRAINING,
    "attention_probs_dropout_prob": TRAINING,
    "attention_dropout": TRAINING,
    "drop_path_rate": TRAINING,
    "pos_embed_shift": TRAINING,
    "pos_embed_jitter": TRAINING,
    "pos_embed_rescale": TRAINING,
    "encoder_stride": "only the decoder of masked training uses it",
    "norm_pix_loss": TRAINING,
    "mask_ratio": "0 shows the whole image to the encoder",
    "apply_layernorm": BACKBONE,
    "reshape_hidden_states": BACKBONE,
    "_out_features": BACKBONE,
    "_out_indices": BACKBONE,
    "num_channels": "the shape of the patch projection shows it",
    "pooler_act": "`test_huggingface.py` has another activation of the pooler",
    "proj_bias": "every public model has it; without it the file is refused",
    "mlp_bias": "every public model has it; without it the file is refused",
}


@dataclass(frozen=True)
class Family:
    """The models of one type.

    Attributes:
        config: the class of the configuration in transformers.
        sizes: the public sizes, for the table in the docs.
        models: (class, settings); a class followed by ` without pooler` gets no pooling layer.
        other_sizes: image sizes that are not those of the configuration, and that transformers
            supports.
        call: images, model -> final tokens (or None), and features or logits.
    """

    config: str
    sizes: str
    models: list[tuple[str, dict[str, Any]]]
    other_sizes: tuple[tuple[int, int], ...] = ((48, 48), (24, 40))
    call: Callable[[Any, Tensor], tuple[Tensor | None, Tensor]] = field(
        default=lambda model, images: outputs(model, images)
    )


def outputs(model: Any, images: Tensor, **extra: Any) -> tuple[Tensor, Tensor]:
    """Final tokens of the encoder; and the logits, else `pooler_output`, else the class token."""
    encoder = model if type(model).__name__.endswith("Model") else model.base_model
    if "interpolate_pos_encoding" in inspect.signature(encoder.forward).parameters:
        extra["interpolate_pos_encoding"] = True
    out = encoder(images, **extra)
    if hasattr(model, "classifier") or hasattr(model, "cls_classifier"):
        known = inspect.signature(model.forward).parameters
        whole = model(images, **{key: value for key, value in extra.items() if key in known})
        return out.last_hidden_state, whole.logits
    pooled = getattr(out, "pooler_output", None)
    return out.last_hidden_state, out.last_hidden_state[:, 0] if pooled is None else pooled


def unshuffled(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """ViT-MAE shuffles the patches by `noise`."""
    patch = model.config.patch_size
    n = (images.shape[2] // patch) * (images.shape[3] // patch)
    return outputs(model, images, noise=torch.arange(n)[None].repeat(len(images), 1).float())


FAMILIES = {
    "vit": Family(
        "ViTConfig",
        "Ti, S, B, L, H",
        [
            ("ViTForImageClassification", {**VIT, **CLASSES}),
            (
                "ViTForImageClassification",
                {**VIT, **CLASSES, "qkv_bias": False, "image_size": [16, 24]},
            ),
            ("ViTModel", {**VIT, "hidden_act": "gelu_new", "pooler_output_size": 16}),
            ("ViTModel", {**VIT, "hidden_act": "gelu_accurate"}),
            ("ViTModel without pooler", {**VIT, "layer_norm_eps": 1e-3}),
            ("ViTModel without pooler", {**VIT, "hidden_act": "gelu_python_tanh"}),
            ("ViTForMaskedImageModeling", {**VIT, "encoder_stride": 8}),
        ],
    ),
    "deit": Family(
        "DeiTConfig",
        "Ti, S, B",
        [
            ("DeiTModel", {**VIT, "pooler_output_size": 16, "layer_norm_eps": 1e-3}),
            ("DeiTModel without pooler", {**VIT, "qkv_bias": False, "hidden_act": "gelu_new"}),
            ("DeiTForImageClassification", {**VIT, **CLASSES}),
            ("DeiTForImageClassificationWithTeacher", {**VIT, **CLASSES}),
            ("DeiTForMaskedImageModeling", {**VIT, "encoder_stride": 8}),
        ],
    ),
    "vit_mae": Family(
        "ViTMAEConfig",
        "B, L, H",
        [
            ("ViTMAEModel", {**VIT, "mask_ratio": 0.0, "qkv_bias": False}),
            ("ViTMAEModel", {**VIT, "mask_ratio": 0.0, "hidden_act": "gelu_new"}),
            (
                "ViTMAEForPreTraining",
                {**VIT, **DECODER, "mask_ratio": 0.0, "layer_norm_eps": 1e-3},
            ),
        ],
        call=unshuffled,
    ),
    "dinov2": Family(
        "Dinov2Config",
        "S, B, L, g",
        [
            ("Dinov2Model", {**DINO, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3}),
            ("Dinov2Model", {**DINO, "use_mask_token": False, "qkv_bias": False}),
            ("Dinov2ForImageClassification", {**DINO, **CLASSES}),
            ("Dinov2ForImageClassification", {**DINO, **CLASSES, "use_swiglu_ffn": True}),
        ],
    ),
    "dinov2_with_registers": Family(
        "Dinov2WithRegistersConfig",
        "S, B, L, g",
        [
            ("Dinov2WithRegistersModel", {**DINO, "use_swiglu_ffn": True, "qkv_bias": False}),
            ("Dinov2WithRegistersModel", {**DINO, "num_register_tokens": 0}),
            (
                "Dinov2WithRegistersForImageClassification",
                {**DINO, **CLASSES, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
            ),
        ],
    ),
    "dinov3_vit": Family(
        "DINOv3ViTConfig",
        "S, S+, B, L, H+, 7B",
        [
            ("DINOv3ViTModel", DINOV3),
            ("DINOv3ViTModel", {**DINOV3, **GATED, "image_size": [16, 24]}),  # S+, H+
            (  # 7B
                "DINOv3ViTModel",
                {**DINOV3, **GATED, "query_bias": False, "value_bias": False},
            ),
            ("DINOv3ViTModel", {**DINOV3, "key_bias": True, "rope_theta": 50.0}),
            ("DINOv3ViTModel", {**DINOV3, "num_register_tokens": 0, "layer_norm_eps": 1e-3}),
            ("DINOv3ViTModel", {**DINOV3, "hidden_act": "gelu_pytorch_tanh"}),
        ],
    ),
}


# Public sizes that are too large for random weights here: compared by their shapes.
LARGE = {
    "dinov3_vit": [
        {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
        {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, **GATED},
        {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
        {
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
        },
        {
            "hidden_size": 1280,
            "num_attention_heads": 20,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            **GATED,
        },
        {
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "intermediate_size": 8192,
            "num_hidden_layers": 40,
            "query_bias": False,
            "value_bias": False,
            **GATED,
        },
    ],
}


def random_model(cls: str, config: str, settings: dict[str, Any], seed: int = 0) -> Any:
    """A model of transformers whose every tensor is random and counts."""
    import transformers

    name, _, bare = cls.partition(" ")
    described = getattr(transformers, config)(**settings, attn_implementation="eager")
    extra = {"add_pooling_layer": False} if bare else {}
    model = getattr(transformers, name)(described, **extra)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "position_embeddings" in key and "ViTMAE" in name:
                continue  # fixed
            drawn = torch.randn(parameter.shape, generator=generator) * 0.3
            is_norm = parameter.ndim == 1 and "norm" in key and key.endswith("weight")
            parameter.copy_(drawn + (1.0 if is_norm else 0.0))
    return model.eval()


def native_size(settings: dict[str, Any]) -> tuple[int, int]:
    """The (Y, X) of the configuration."""
    size = settings.get("image_size", 32)
    return (size[0], size[1]) if isinstance(size, list) else (size, size)


def differences(
    folder: Any, family: Family, theirs: Any, size: tuple[int, int], native: bool
) -> dict[str, float]:
    """The largest differences to transformers at one image size, of the model in `folder`.

    Returns:
        `tokens`, and `features` or `logits`.
    """
    ours = load_model(folder, image_size=None if native else size)
    channels = ours.config.num_channels
    images = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens, expected = family.call(theirs, images)
        kind = "logits" if ours.config.num_classes else "features"
        found = {kind: (ours(images) - expected).abs().max()}
        if tokens is not None:
            found["tokens"] = (ours.network.tokens(images) - tokens).abs().max()
    return {key: float(value) for key, value in found.items()}
