"""Small random models of transformers for every model type that vitcli reads, and the differences.

`FAMILIES` has an entry per type in `MODEL_TYPES`. Its models have every option that the public
configs of the type use; `UNUSED` lists, for each option that no model changes, the reason. The test
`test_families.py` checks that neither a type nor an option is forgotten, and writes the measured
differences into `docs/how-to/families.md`.
"""

import inspect
from collections.abc import Callable, Mapping
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
BEIT = {**VIT, **CLASSES, "use_relative_position_bias": True}
SHARED = {"use_shared_relative_position_bias": True}
# With a norm after the last block: tokens without LayerScale and without a norm are large.
UNSCALED = {"use_mean_pooling": False, "layer_scale_init_value": 0.0}
DECODER = {
    "decoder_num_hidden_layers": 1,
    "decoder_hidden_size": 32,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 48,
}
TRAINING = "only training uses it"
SEGMENTATION = "only segmentation uses it"
BACKBONE = "only the backbone classes use it, which return feature maps"
# Options that no model needs to change -> the reason.
UNUSED = {
    "initializer_range": "the weights come from the file",
    "initializer_factor": "the weights come from the file",
    "projection_dim": "the shape of the projection shows it",
    "logit_scale_init_value": "belongs to the text tower",
    "max_logit_scale": "belongs to the text tower",
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
    **dict.fromkeys(
        (
            "add_fpn",
            "auxiliary_channels",
            "auxiliary_concat_input",
            "auxiliary_loss_weight",
            "auxiliary_num_convs",
            "out_indices",
            "pool_scales",
            "semantic_loss_ignore_index",
            "use_auxiliary_head",
        ),
        SEGMENTATION,
    ),
    "num_channels": "the shape of the patch projection shows it",
    "pooler_act": "`test_huggingface.py` has another activation of the pooler",
    "proj_bias": "every public model has it; without it the file is refused",
    "mlp_bias": "every public model has it; without it the file is refused",
}


OTHER_SIZES = ((48, 48), (24, 40))
AS_MANY = (16, 64)  # as many patches as 32x32, in another shape


@dataclass(frozen=True)
class Family:
    """The models of one type.

    Attributes:
        config: the class of the configuration in transformers.
        sizes: the public sizes, for the table in the docs.
        models: (class, settings); a class followed by ` without pooler` gets no pooling layer.
        unused: as `UNUSED`, for this type.
        other_sizes: image sizes that are not those of the configuration, and that transformers
            supports.
        call: images, model -> final tokens (or None), and features or logits.
    """

    config: str
    sizes: str
    models: list[tuple[str, dict[str, Any]]]
    unused: Mapping[str, str] = field(default_factory=dict)
    other_sizes: tuple[tuple[int, int], ...] = OTHER_SIZES
    call: Callable[[Any, Tensor], tuple[Tensor | None, Tensor]] = field(
        default=lambda model, images: outputs(model, images)
    )


def outputs(model: Any, images: Tensor, **extra: Any) -> tuple[Tensor, Tensor]:
    """Final tokens of the encoder; and the logits, else `pooler_output`, else the class token."""
    encoder = model if type(model).__name__.endswith("Model") else model.base_model
    native = tuple(images.shape[2:]) == native_size(vars(encoder.config))
    if "interpolate_pos_encoding" in inspect.signature(encoder.forward).parameters:
        extra["interpolate_pos_encoding"] = not native  # it takes the stored grid as square
    out = encoder(images, **extra)
    if hasattr(model, "classifier") or hasattr(model, "cls_classifier"):
        known = inspect.signature(model.forward).parameters
        whole = model(images, **{key: value for key, value in extra.items() if key in known})
        return out.last_hidden_state, whole.logits
    pooled = getattr(out, "pooler_output", None)
    return out.last_hidden_state, out.last_hidden_state[:, 0] if pooled is None else pooled


def beit_outputs(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """The head of a masked-image model reads tokens after a norm, which is our final norm.

    A model without pooler and head has no features of its own; ours pool as its config says.
    """
    tokens, out = outputs(model, images)
    masked = hasattr(model, "lm_head")
    tokens = model.layernorm(tokens) if masked else tokens
    bare = not hasattr(model, "classifier") and model.base_model.pooler is None
    return tokens, tokens[:, 1:].mean(dim=1) if bare and model.config.use_mean_pooling else out


def averaged(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """I-JEPA has no class token: its features are the mean of the patches."""
    tokens, out = outputs(model, images)
    return tokens, out if hasattr(model, "classifier") else tokens.mean(dim=1)


def unshuffled(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """ViT-MAE shuffles the patches by `noise`."""
    patch = model.config.patch_size
    n = (images.shape[2] // patch) * (images.shape[3] // patch)
    return outputs(model, images, noise=torch.arange(n)[None].repeat(len(images), 1).float())


def tower_outputs(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """As `outputs` for the towers of CLIP and its kin; without pooling, the mean of the patches."""
    tower = getattr(model, "vision_model", model)
    given: dict[str, Any] = {"pixel_values": images}
    if "spatial_shapes" in inspect.signature(tower.forward).parameters:
        given = as_naflex(images, tower.config.patch_size)
    if "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters:
        given["interpolate_pos_encoding"] = True
    out = tower(**given)
    if hasattr(model, "classifier"):
        return out.last_hidden_state, model(**given).logits
    tokens = out.last_hidden_state
    # CLIP normalises the class token only, we all tokens.
    tokens = tower.post_layernorm(tokens) if hasattr(tower, "pre_layrnorm") else tokens
    return tokens, tokens.mean(dim=1) if out.pooler_output is None else out.pooler_output


def as_naflex(images: Tensor, patch: int) -> dict[str, Any]:
    """(B, C, Y, X) -> the arguments of SigLIP 2, whose images are lists of flat patches."""
    rows, cols = (side // patch for side in images.shape[2:])
    patches = images.unflatten(3, (cols, patch)).unflatten(2, (rows, patch))
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, N, P * P * C)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.long),
        "spatial_shapes": torch.tensor([[rows, cols]] * len(images)),
    }


# The text tower of a model with two towers, which vitcli leaves out.
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 30,
    "max_position_embeddings": 6,
    "eos_token_id": 29,
}
FLEX = {key: value for key, value in VIT.items() if key != "image_size"} | {"num_patches": 16}
NORM = {"hidden_act": "gelu", "layer_norm_eps": 1e-3}


def both(vision: dict[str, Any], projection: int | None = None) -> dict[str, Any]:
    """The settings of a model with two towers, whose embeddings have the width `projection`."""
    shared = {} if projection is None else {"projection_dim": projection}
    text = TEXT if projection else {**TEXT, "projection_size": vision["hidden_size"]}
    return {"vision_config": vision, "text_config": text, **shared}


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
        other_sizes=(*OTHER_SIZES, AS_MANY),
    ),
    "vit_msn": Family(
        "ViTMSNConfig",
        "S, B, L",
        [
            ("ViTMSNForImageClassification", {**VIT, **CLASSES}),
            ("ViTMSNModel", {**VIT, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3}),
            ("ViTMSNModel", {**VIT, "qkv_bias": False}),
        ],
    ),
    "ijepa": Family(
        "IJepaConfig",
        "H, g",
        [
            ("IJepaForImageClassification", {**VIT, **CLASSES, "layer_norm_eps": 1e-3}),
            ("IJepaModel", {**VIT, "qkv_bias": False, "hidden_act": "gelu_new"}),
            ("IJepaModel", {**VIT, "pooler_output_size": 16}),
        ],
        call=averaged,
    ),
    "beit": Family(
        "BeitConfig",
        "B, L",
        [
            ("BeitForImageClassification", BEIT),
            ("BeitForImageClassification", {**BEIT, **SHARED, "layer_norm_eps": 1e-3}),
            (
                "BeitForImageClassification",
                {**BEIT, **UNSCALED},
            ),
            ("BeitModel", {**VIT, "use_absolute_position_embeddings": True}),
            ("BeitModel", {**VIT, **SHARED, "hidden_act": "gelu_new", "use_mask_token": True}),
            ("BeitModel without pooler", {**VIT, **SHARED, "use_mean_pooling": False}),
            ("BeitForMaskedImageModeling", {**VIT, **SHARED, "vocab_size": 20}),
        ],
        other_sizes=(*OTHER_SIZES, AS_MANY),
        call=beit_outputs,
    ),
    "data2vec-vision": Family(
        "Data2VecVisionConfig",
        "B, L",
        [
            ("Data2VecVisionForImageClassification", BEIT),
            (
                "Data2VecVisionForImageClassification",
                {**BEIT, **SHARED, **UNSCALED, "layer_norm_eps": 1e-3},
            ),
            (
                "Data2VecVisionModel",
                {**VIT, **SHARED, "use_mean_pooling": False, "use_mask_token": True},
            ),
            (
                "Data2VecVisionModel",
                {**VIT, "use_absolute_position_embeddings": True, "hidden_act": "gelu_new"},
            ),
        ],
        call=beit_outputs,
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
    "clip_vision_model": Family(
        "CLIPVisionConfig",
        "B, L, H, g, bigG",
        [
            ("CLIPVisionModel", VIT),
            ("CLIPVisionModel", {**VIT, **NORM}),
            ("CLIPVisionModelWithProjection", {**VIT, "projection_dim": 20}),
        ],
        call=tower_outputs,
    ),
    "clip": Family(
        "CLIPConfig",
        "B, L, H, g, bigG",
        [
            ("CLIPModel", both(VIT, 20)),
            ("CLIPForImageClassification", {**both(VIT, 20), **CLASSES}),
        ],
        call=tower_outputs,
    ),
    "siglip_vision_model": Family(
        "SiglipVisionConfig",
        "B, L, So400m, g-opt",
        [
            ("SiglipVisionModel", VIT),
            ("SiglipVisionModel", {**VIT, "image_size": 37}),  # cut to 32 px, as So400m/14 at 384
            ("SiglipVisionModel", {**VIT, **NORM, "vision_use_head": False}),
        ],
        call=tower_outputs,
    ),
    "siglip": Family(
        "SiglipConfig",
        "B, L, So400m, g-opt; SigLIP 2 of a fixed size too",
        [("SiglipModel", both(VIT)), ("SiglipForImageClassification", {**both(VIT), **CLASSES})],
        call=tower_outputs,
    ),
    "siglip2_vision_model": Family(
        "Siglip2VisionConfig",
        "B, So400m (NaFlex)",
        [
            ("Siglip2VisionModel", FLEX),
            ("Siglip2VisionModel", {**FLEX, **NORM, "vision_use_head": False}),
        ],
        call=tower_outputs,
    ),
    "siglip2": Family(
        "Siglip2Config",
        "B, So400m (NaFlex)",
        [
            ("Siglip2Model", both(FLEX)),
            ("Siglip2ForImageClassification", {**both(FLEX), **CLASSES}),
        ],
        call=tower_outputs,
    ),
    "aimv2_vision_model": Family(
        "Aimv2VisionConfig",
        "L, H, 1B, 3B",
        [
            ("Aimv2VisionModel", VIT),
            ("Aimv2VisionModel", {**VIT, "qkv_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3}),
            ("Aimv2VisionModel", {**VIT, "use_head": False, "is_native": True}),
        ],
        {"hidden_act": "every public model has SiLU; with another one the file is refused"},
        other_sizes=(),  # transformers resamples none
        call=tower_outputs,
    ),
    "aimv2": Family(
        "Aimv2Config",
        "L",
        [("Aimv2Model", both(VIT, 20))],
        other_sizes=(),
        call=tower_outputs,
    ),
}


def sized(width: int, depth: int, heads: int, hidden: int, **more: Any) -> dict[str, Any]:
    """The settings of a public size."""
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": hidden,
        **more,
    }


# Public sizes that are too large for random weights here: compared by their shapes.
_TUNED = {"use_relative_position_bias": True}
LARGE = {
    "beit": [
        sized(768, 12, 12, 3072, **_TUNED),
        sized(768, 12, 12, 3072, **_TUNED, image_size=384),
        sized(1024, 24, 16, 4096, **_TUNED, image_size=512),
        sized(1024, 24, 16, 4096, **SHARED, use_mask_token=True),
    ],
    "data2vec-vision": [
        sized(768, 12, 12, 3072, **SHARED, use_mean_pooling=False),
        sized(1024, 24, 16, 4096, **SHARED, use_mean_pooling=False),
    ],
    "ijepa": [
        sized(1280, 32, 16, 5120, patch_size=14),
        sized(1280, 32, 16, 5120, image_size=448),
        sized(1408, 40, 16, 6144),
    ],
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
    "clip_vision_model": [
        sized(768, 12, 12, 3072, patch_size=16, image_size=224),
        sized(1024, 24, 16, 4096, patch_size=14, image_size=336),
        sized(1280, 32, 16, 5120, patch_size=14, image_size=224),
        sized(1408, 40, 16, 6144, patch_size=14, image_size=224),
        sized(1664, 48, 16, 8192, patch_size=14, image_size=224),
    ],
    "siglip_vision_model": [
        sized(1024, 24, 16, 4096, patch_size=16, image_size=256),
        sized(1152, 27, 16, 4304, patch_size=14, image_size=384),
        sized(1536, 40, 16, 6144, patch_size=16, image_size=256),
    ],
    "aimv2_vision_model": [
        sized(1024, 24, 8, 2816, image_size=224),
        sized(1536, 24, 12, 4096, image_size=336),
        sized(2048, 24, 16, 5632, image_size=448),
        sized(3072, 24, 24, 8448, image_size=224),
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
    size = settings.get("vision_config", settings).get("image_size", 32)
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
