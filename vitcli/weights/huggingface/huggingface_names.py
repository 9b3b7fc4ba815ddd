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
from vitcli.weights.huggingface.vit_types import VIT_TYPES
from vitcli.weights.loaded import HeadActivation

MODEL_TYPES = {**VIT_TYPES}
# DeiT with a head for each of its two tokens; the logits are the mean of both.
TEACHER = "DeiTForImageClassificationWithTeacher"
# transformers' `problem_type` -> the activation of the head; without it, softmax.
PROBLEM_TYPES: dict[Any, HeadActivation] = {
    "multi_label_classification": "sigmoid",
    "regression": "identity",
}


def closest_type(config: ViTConfig) -> str:
    """Return the `model_type` that comes closest to `config`."""
    if config.distillation_token:
        return "deit"
    if config.num_registers:
        return "dinov2_with_registers"
    dino = config.layer_scale is not None or config.mlp == "swiglu" or config.pool == "token_mean"
    return "dinov2" if dino else "vit"
