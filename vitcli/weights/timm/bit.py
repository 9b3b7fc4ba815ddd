"""BiT ResNets in timm's layout: reading them, and timm's names for them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.vit.resnet import ResNetConfig
from vitcli.weights.overrides import Stated, stated_preprocess
from vitcli.weights.store import Checkpoint
from vitcli.weights.timm.read_timm import ANOTHER, another, check_dimensions, stages
from vitcli.weights.timm.timm_config import hub_says, read_hub
from vitcli.weights.timm.timm_names import timm_names


def read_bit(
    tensors: Mapping[str, Tensor], source: str, hub: Mapping[str, Any] | None, stated: Stated
) -> Checkpoint:
    """Tensors of a BiT ResNet in timm's layout -> a checkpoint; arguments as of `read_timm`.

    Raises:
        VitcliError: another kind of ResNet.
    """
    found, dropped, notes = timm_names(tensors, source)
    beside = read_hub(hub, source)
    for kind in ("weight", "bias"):
        if f"head.fc.{kind}" in found:  # (K, F, 1, 1) or (K,): a convolution on the pooled map
            head = found.pop(f"head.fc.{kind}")
            found[f"head.{kind}"] = head.flatten(1) if head.ndim == 4 else head
    shape = {name: tuple(tensor.shape) for name, tensor in found.items()}
    check_dimensions(shape, source)
    root, unit = shape["stem.conv.weight"], "stages.0.blocks.0.norm1.weight"
    if root[2:] != (7, 7) or unit not in shape or "stem.norm.weight" in shape:
        raise another(source, shape, "pre-activation ResNet (BiT)", [unit])
    size = stated.image_size or beside.image_size
    if size is None:
        size = (224, 224)
        notes.append("images of 224x224 pixels: assumed; `--set model.image_size=…` changes it")
    try:
        config = ResNetConfig(
            image_size=size,
            num_channels=root[1],
            layers=stages(shape, ""),
            width=root[0] / 64,
            num_classes=shape["head.weight"][0] if "head.weight" in shape else 0,
            arithmetic="timm",
        )
    except ValueError as error:
        raise VitcliError(
            f"`{source}` cannot be understood as a ResNet: {error}", hint=ANOTHER
        ) from error
    base, named = hub_says(beside, config, source, notes)
    if base is None and root[1] in (1, 3):
        base = Preprocess(size, interpolation="bilinear", num_channels=root[1])
        notes.append("mean and std 0.5, resize bilinear, crop 1.0: assumed, as timm has them")
    preprocess = stated_preprocess(base, stated.preprocess, size, root[1])
    labels = stated.labels or named
    trained = config.num_classes > 0
    return Checkpoint(config, found, "timm", labels, preprocess, trained, None, dropped, notes)


# Units of each stage -> timm's BiT ResNets with these; the width stands after the `x`.
LAYERS: dict[tuple[int, ...], tuple[str, str]] = {
    (3, 4, 6, 3): ("resnetv2_50x1_bit", "resnetv2_50x3_bit"),
    (3, 4, 23, 3): ("resnetv2_101x1_bit", "resnetv2_101x3_bit"),
    (3, 8, 36, 3): ("resnetv2_152x2_bit", "resnetv2_152x4_bit"),
}


def bit_architecture(config: ResNetConfig) -> tuple[str, dict[str, Any]]:
    """timm's name for a ResNet, and the arguments that differ from it.

    The widths of an architecture can be given other values, its numbers of units cannot.

    Raises:
        VitcliError: timm has none with these units or this arithmetic, all of it named.
    """
    wrong = []
    if config.layers not in LAYERS:
        wrong.append(f"a ResNet with {list(config.layers)} units")
    if config.arithmetic != "timm":
        wrong.append(f"the arithmetic of `{config.arithmetic}`")
    if wrong:
        raise VitcliError(
            f"timm cannot express {' and '.join(wrong)}", hint="`--to onnx` takes every model"
        )
    arguments: dict[str, Any] = {"global_pool": "avg"}
    for name in LAYERS[config.layers]:
        factor = int(name.partition("x")[2][0])
        if config.width == factor:
            return name, arguments
    name = LAYERS[config.layers][0]
    factor = int(name.partition("x")[2][0])
    root = int(64 * config.width) // factor  # timm multiplies by the factor of the name
    if root * factor != int(64 * config.width) or root % 8:
        raise VitcliError(
            f"timm cannot express a ResNet of width {config.width:g} with {list(config.layers)} "
            "units",
            hint="`--to onnx` takes every model",
        )
    return name, {**arguments, "stem_chs": root, "channels": [4 * root * 2**i for i in range(4)]}
