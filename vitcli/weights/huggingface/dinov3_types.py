"""DINOv3's Vision Transformers in transformers (Siméoni et al., 2025)."""

import torch
from torch import Tensor

from vitcli.errors import VitcliError
from vitcli.vit.config import ViTConfig
from vitcli.weights.huggingface.huggingface_type import (
    IMAGENET,
    MASKED_TRAINING,
    NEW_QKV,
    STACKED,
    HuggingFaceType,
    ModelFiles,
    Settings,
    WrittenType,
    described_act,
    described_sizes,
    encoder_settings,
)

GATED = ("mlp.gate_proj", "mlp.up_proj")
BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.o_proj": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.up_proj": "mlp.fc1",  # without a gate; with one it is half of `mlp.fc1`
    "mlp.down_proj": "mlp.fc2",
}
# In training, the random change of the coordinates; null in config.json is none.
AUGMENTED = {
    "pos_embed_shift": "rope_shift",
    "pos_embed_jitter": "rope_jitter",
    "pos_embed_rescale": "rope_rescale",
}


def _settings(files: ModelFiles) -> Settings:
    described, gated = files.described, files.flag("use_gated_mlp", default=False)
    act = described.get("hidden_act", "gelu")
    if gated and act not in ("silu", "swish"):
        raise VitcliError(
            f"`{files.source}` has a gated MLP with the unsupported activation `{act}`",
            hint="supported with `use_gated_mlp`: `silu`",
        )
    values = encoder_settings(files, norm_eps=1e-5, act="gelu" if gated else act)
    for key in ("proj_bias", "mlp_bias"):
        if not files.flag(key, default=True):
            raise ValueError(f"`{key}` is false, which no public model has")
    files.drop_empty_registers()
    augmented = {ours: described.get(theirs) for theirs, ours in AUGMENTED.items()}
    if "pos_embed_rescale" not in described:
        augmented["rope_rescale"] = 2.0
    return {
        **values,
        **augmented,
        **_biases(files),
        "embed_dim": files.count("hidden_size", 384),
        "num_heads": files.overrides.num_heads or files.count("num_attention_heads", 6),
        "mlp_dim": files.count("intermediate_size", 1536),
        "mlp": "swiglu" if gated else "gelu",
        "num_registers": files.count("num_register_tokens", 0),
        "layer_scale": float(described.get("layerscale_value", 1.0)),
        "drop_path_rate": files.fraction("drop_path_rate", 0.0),
        "position": "none",
        "rope": "centred",
        "rope_theta": float(described.get("rope_theta", 100.0)),
    }


def _biases(files: ModelFiles) -> Settings:
    """Return the biases of query, key and value; 7B has none, the other sizes have no key bias."""
    query, key, value = (
        files.flag(f"{name}_bias", default=name != "key") for name in ("query", "key", "value")
    )
    if query != value or (key and not query):
        raise ValueError(
            "query and value have a bias, or neither has one; the keys may have one then"
        )
    return {"qkv_bias": query, "key_bias": key or not query}


def _described(config: ViTConfig) -> Settings:
    gated = config.mlp == "swiglu"
    return {
        **described_sizes(config),
        "hidden_act": "silu" if gated else described_act(config),
        "intermediate_size": config.mlp_dim,
        "use_gated_mlp": gated,
        "num_register_tokens": config.num_registers,
        "layerscale_value": config.layer_scale,
        "drop_path_rate": config.drop_path_rate,
        "rope_theta": config.rope_theta,
        "query_bias": config.qkv_bias,
        "key_bias": config.qkv_bias and config.key_bias,
        "value_bias": config.qkv_bias,
        "proj_bias": True,
        "mlp_bias": True,
        **{theirs: getattr(config, ours) for theirs, ours in AUGMENTED.items()},
    }


def _written_block(config: ViTConfig) -> dict[str, str | tuple[str, ...]]:
    """Ours -> theirs; a tuple for the parts of a stacked tensor."""
    names: dict[str, str | tuple[str, ...]] = {ours: theirs for theirs, ours in BLOCK.items()}
    names["attn.qkv"] = NEW_QKV
    if config.mlp == "swiglu":
        names["mlp.fc1"] = GATED
    return names


def _empty(token: Tensor, config: ViTConfig) -> dict[str, Tensor]:
    """Tensors of the class in transformers that do not change the features."""
    tensors = {"embeddings.mask_token": torch.zeros_like(token)}
    if not config.num_registers:
        tensors["embeddings.register_tokens"] = token[:, :0]
    return tensors


DINOV3_TYPES = {
    "dinov3_vit": HuggingFaceType(
        prefix="model.",
        backbone="DINOv3ViTModel",
        classifier=None,
        settings=_settings,
        encoder={
            "embeddings.cls_token": "cls_token",
            "embeddings.register_tokens": "reg_token",
            "embeddings.patch_embeddings": "patch_embed.proj",
            "norm": "norm",
        },
        block=BLOCK,
        stacked={**STACKED, "mlp.fc1": (GATED,)},
        unused={
            r"embeddings\.mask_token": MASKED_TRAINING,
            r"rope_embeddings\..*": "computed from config.json",
        },
        processor="DINOv3ViTImageProcessor",
        published={"resample": 2, **IMAGENET},
        any_size=True,  # rotary positions fit every grid
        written=WrittenType(
            described=_described,
            block=_written_block,
            layer="layer.",
            empty=_empty,
        ),
    )
}
