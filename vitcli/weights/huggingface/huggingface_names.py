"""The model types of transformers that we read: the registry.

To add a family, write a `HuggingFaceType` (see `huggingface_type.py`) in a module `NAME_types.py`
and put its dict into `MODEL_TYPES`; `vit_types.py` is an example. The entry has the names of its
tensors, the translation of its config.json, its image processor and that of its published weights.
The reader has no `if` for a model type. A setting that a family needs is a field of `ViTConfig`.

Then give `FAMILIES` in `tests/support/families.py` the small random models of the type, with every
option that its public configs use. `tests/weights/test_families.py` fails until this is done: it
compares tokens, features and logits with transformers for every type in `MODEL_TYPES`, at the
native and at other image sizes, and it checks that no option of the type's config is forgotten.
"""

from typing import Any

from vitcli.vit.config import ViTConfig
from vitcli.weights.huggingface.beit_types import BEIT_TYPES
from vitcli.weights.huggingface.clip_types import CLIP_TYPES
from vitcli.weights.huggingface.dinov3_types import DINOV3_TYPES
from vitcli.weights.huggingface.vit_types import VIT_TYPES
from vitcli.weights.loaded import HeadActivation

MODEL_TYPES = {**VIT_TYPES, **DINOV3_TYPES, **BEIT_TYPES, **CLIP_TYPES}
# Types of transformers that we do not read -> the nearest thing that works. None has a plain ViT
# as its encoder, or few people fine-tune it; `docs/how-to/families.md` has the table behind this.
_PLAIN = "use a plain Vision Transformer of about its size, e.g. `vit-s16-augreg`"
_RESNET = "use a ResNet of BiT, e.g. `bit-r50x1`, or a Vision Transformer, e.g. `vit-s16-augreg`"
_TOWER = "use the vision tower of CLIP or SigLIP, e.g. `clip-b16`"
NOT_READ = {
    **dict.fromkeys(
        (
            "cvt",
            "dinat",
            "donut-swin",
            "focalnet",
            "hiera",
            "levit",
            "mobilevit",
            "mobilevitv2",
            "poolformer",
            "pvt",
            "pvt_v2",
            "segformer",
            "swiftformer",
            "swin",
            "swinv2",
            "imagegpt",
            "perceiver",
        ),
        _PLAIN,
    ),
    **dict.fromkeys(
        (
            "bit",
            "convnext",
            "convnextv2",
            "efficientnet",
            "hgnet_v2",
            "mobilenet_v1",
            "mobilenet_v2",
            "pp_lcnet",
            "regnet",
            "resnet",
            "textnet",
        ),
        _RESNET,
    ),
    "dinov3_convnext": "use the Vision Transformer of DINOv3, e.g. `dinov3-s16`",
    **dict.fromkeys(
        (
            "altclip",
            "chinese_clip",
            "chinese_clip_vision_model",
            "clipseg",
            "groupvit",
            "metaclip_2",
            "owlvit",
            "shieldgemma2",
            "xclip",
        ),
        _TOWER,
    ),
    **dict.fromkeys(
        ("grounding-dino", "mm-grounding-dino", "sam3_vit_model", "vitdet", "vitmatte", "vitpose"),
        "it is made for detection or segmentation: use a backbone, e.g. `dinov2-s14`",
    ),
    **dict.fromkeys(
        ("videomae", "vivit", "vjepa2"), "it reads videos: use a model for images, e.g. `mae-b16`"
    ),
    "timm_wrapper": "name the repository of timm itself, e.g. `hf:timm/NAME`",
}
# DeiT with a head for each of its two tokens; the logits are the mean of both.
TEACHER = "DeiTForImageClassificationWithTeacher"
# transformers' `problem_type` -> the activation of the head; without it, softmax.
PROBLEM_TYPES: dict[Any, HeadActivation] = {
    "multi_label_classification": "sigmoid",
    "regression": "identity",
}


def closest_type(config: ViTConfig) -> str:
    """Return the `model_type` that comes closest to `config`, of those that we write."""
    if config.rope is not None:
        return "dinov3_vit"
    if not config.class_token:
        return "siglip" if config.num_classes else "siglip_vision_model"
    if config.distillation_token:
        return "deit"
    if config.num_registers:
        return "dinov2_with_registers"
    dino = config.layer_scale is not None or config.mlp == "swiglu" or config.pool == "token_mean"
    return "dinov2" if dino else "vit"
