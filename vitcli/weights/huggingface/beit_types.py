"""BEiT, BEiT v2 and Data2Vec-vision of transformers.

Their attention has a learned bias by 2-D offset (`vit.position.OffsetBias`), and the keys have no
bias. BEiT v2 has the model type `beit` too.
"""

from dataclasses import replace

from vitcli.errors import VitcliError
from vitcli.vit.position import BIAS_TABLE, BLOCK_BIAS, SHARED_BIAS, fold_shared_bias
from vitcli.weights.huggingface.huggingface_type import (
    HuggingFaceType,
    ModelFiles,
    Settings,
    encoder_settings,
)
from vitcli.weights.huggingface.vit_types import BLOCK, ENCODER, UNUSED

OWN = BLOCK_BIAS.removeprefix(".")
# Classic names, and those of version 5 in memory.
BEIT_ENCODER = {
    **ENCODER,
    "pooler.layernorm": "fc_norm",
    f"encoder.relative_position_bias.{BIAS_TABLE}": SHARED_BIAS,
    f"shared_position_bias.{BIAS_TABLE}": SHARED_BIAS,
}
BEIT_BLOCK = {
    **BLOCK,
    "lambda_1": "ls1.gamma",
    "lambda_2": "ls2.gamma",
    f"attention.attention.relative_position_bias.{BIAS_TABLE}": OWN,
    f"relative_position_bias.{BIAS_TABLE}": OWN,
}
BEIT_UNUSED = {
    **UNUSED,
    r"lm_head\..*": "used only by masked-image training",
    r"(decode_head|auxiliary_head|fpn\d?)\..*": "used only by segmentation",
    r".*relative_position_index": "only counts the offsets",
}


def _beit_settings(files: ModelFiles) -> Settings:
    values = encoder_settings(files)
    rows, cols = values["image_size"]
    if rows != cols:
        raise VitcliError(
            f"`{files.source}` has a `{files.model_type}` model for images of {rows}x{cols} px, "
            "whose offsets transformers 4 and 5 read in different orders",
            hint="use a model for square images; `--set model.image_size=[Y,X]` resamples it",
        )
    tensors = files.tensors
    pooled = files.flag("use_mean_pooling", default=True)
    scale = float(files.described.get("layer_scale_init_value", 0.1))
    return values | {
        "key_bias": False,
        "qkv_bias": True,
        "layer_scale": scale if scale > 0 else None,
        "position": "learned" if "pos_embed" in tensors else "none",
        "position_bias": _position_bias(files),
        "pool": "mean" if pooled else "token",
        # The norm of mean pooling belongs to the pooler. A masked-image model has no pooler: its
        # head reads tokens after a norm, which is the norm before our pooling.
        "norm_after_pool": "fc_norm.weight" in tensors,
        "final_norm": "fc_norm.weight" in tensors or "norm.weight" in tensors,
    }


def _position_bias(files: ModelFiles) -> str:
    """Return ViTConfig's `position_bias`. A shared table is added to those of the blocks."""
    if fold_shared_bias(files.tensors):
        files.notes.append("added the shared attention bias to the bias of each block")
    if files.flag("use_relative_position_bias", default=False):
        return "every"
    shared = files.flag("use_shared_relative_position_bias", default=False)
    return "shared" if shared else "none"


_BEIT = HuggingFaceType(
    prefix="beit.",
    backbone="BeitModel",
    classifier="BeitForImageClassification",
    settings=_beit_settings,
    encoder=BEIT_ENCODER,
    block=BEIT_BLOCK,
    unused=BEIT_UNUSED,
    processor="BeitImageProcessor",
    published={"resample": 2},
)
BEIT_TYPES = {
    "beit": _BEIT,
    "data2vec-vision": replace(
        _BEIT,
        prefix="data2vec_vision.",
        backbone="Data2VecVisionModel",
        classifier="Data2VecVisionForImageClassification",
        published={"resample": 3},
    ),
}
