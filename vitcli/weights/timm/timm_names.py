"""timm's names of tensors and architectures, and the tensor names of code derived from timm.

Our tensors have timm's names already. DeiT, DINO, DINOv2, MAE and MoCo v3 started from timm's code;
their files add prefixes, training-only tensors and a few names of their own.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vitcli.errors import VitcliError, quoted
from vitcli.vit.config import ViTConfig
from vitcli.vit.position import BIAS_TABLE, BLOCK_BIAS, SHARED_BIAS
from vitcli.vit.resnet import ResNetConfig
from vitcli.weights.timm import eva

TensorShapes = Mapping[str, tuple[int, ...]]
CHECK_FILE = "check that the file holds a whole Vision Transformer or BiT ResNet"

# The names of a Vision Transformer in timm's layout, with all its options.
KNOWN = re.compile(
    r"(cls|dist|reg)_token|pos_embed|patch_embed\.backbone\..*|attn_pool\..*"
    r"|(norm|norm_pre|fc_norm|head|head_dist|patch_embed\.(proj|norm|norm_pixels)|pre_logits\.fc)"
    r"\.(weight|bias)"
    r"|blocks\.\d{1,6}\.(norm[12]|attn\.(qkv|proj|norm|[qk]_norm)|mlp\.(fc[12]|norm))"
    r"\.(weight|bias)"
    r"|projection\.weight|blocks\.\d{1,6}\.(ls[12]\.gamma|attn\.[qv]_bias)"
    rf"|(blocks\.\d{{1,6}}\.attn\.)?rel_pos_bias\.{BIAS_TABLE}"
)
# Names that only models with other blocks have.
OTHERS = re.compile(r"relative_position|rel_pos|rope|layers\.\d|stages\.|\bq_bias|network\.|window")
# The tensors whose sizes become settings -> their number of dimensions.
DIMENSIONS = {
    "pos_embed": 3,
    "cls_token": 3,
    "dist_token": 3,
    "reg_token": 3,
    "head.weight": 2,
    "projection.weight": 2,
    "pre_logits.fc.weight": 2,
    "patch_embed.proj.weight": 4,
    "patch_embed.backbone.stem.conv.weight": 4,
    "stem.conv.weight": 4,
    "blocks.0.mlp.fc1.weight": 2,
    "blocks.0.mlp.fc2.weight": 2,
    "blocks.0.attn.q_norm.weight": 1,
    f"blocks.0{BLOCK_BIAS}": 2,
    SHARED_BIAS: 2,
}

# The tensors that identify a ViT and a BiT ResNet.
PATCHES = "patch_embed.proj.weight"
BIT_ROOT, BIT_UNIT = "stem.conv.weight", "stages.0.blocks.0.conv1.weight"
# Tensors in code derived from timm that only training needs -> the reason for the load report.
UNUSED = {
    r"mask_token|(.*\.)?decoder[_.].*|cls_pt_layers\..*": "used only by masked-image training",
    r"head\.(mlp|last_layer|\d+)\b.*|fc\.\w+(\.\w+)?": "used only by self-supervised training",
    r"(.*\.)?relative_position_index": "only counts the offsets of BEiT",
}
RENAMED = {
    # DINOv2 for FSDP writes blocks.CHUNK.BLOCK, and BLOCK counts through all chunks.
    r"blocks\.\d+\.(\d+)\.": r"blocks.\1.",
    r"(blocks\.\d+\.)gamma_([12])": r"\1ls\2.gamma",  # DeiT III
    r"(blocks\.\d+\.mlp\.)w12\.": r"\1fc1.",  # DINOv2's SwiGLU, packed as ours
    r"(blocks\.\d+\.mlp\.)w3\.": r"\1fc2.",
    r"patch_embed\.backbone\.(conv|norm)\.": r"patch_embed.backbone.stem.\1.",  # R+Ti/16
    rf"(blocks\.\d+\.attn\.){BIAS_TABLE}": rf"\1rel_pos_bias.{BIAS_TABLE}",
    **eva.RENAMED,
}


def timm_name(name: str, renamed: Mapping[str, str] = RENAMED) -> str:
    """timm's name of a tensor of another library.

    Args:
        renamed: patterns at the start of a name -> their replacements; those of code derived from
            timm by default.
    """
    for pattern, replacement in renamed.items():
        name = re.sub(f"^{pattern}", replacement, name)
    return name


def timm_names(
    tensors: Mapping[str, Tensor], source: str
) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """Return the tensors under timm's names, the dropped ones with the reason, and notes.

    Raises:
        VitcliError: two tensors get the same name.
    """
    dropped: dict[str, str] = {}
    found: dict[str, Tensor] = {}
    notes: list[str] = []
    for full, tensor in tensors.items():
        if reason := next((why for p, why in UNUSED.items() if re.fullmatch(p, full)), None):
            dropped[full] = reason
            continue
        name = timm_name(full)
        if name in found:
            raise VitcliError(
                f"`{source}` has two tensors for `{name}`, one of them `{full}`", hint=CHECK_FILE
            )
        found[name] = tensor
    _pack_swiglu(found)
    if "register_tokens" in found:
        notes.append("added the class token's position to the class token (DINOv2 with registers)")
        _fold_position(found)
    return found, dropped, notes


def _pack_swiglu(found: dict[str, Tensor]) -> None:
    """Join gate and value of timm's unpacked SwiGLU into one `fc1`, gate first, in place."""
    for name in [n for n in found if ".mlp.fc1_g." in n]:
        value = name.replace("fc1_g", "fc1_x")
        if value in found and found[name].ndim > 0 and found[name].shape == found[value].shape:
            packed = torch.cat([found.pop(name), found.pop(value)])  # (2 h, D) or (2 h,)
            found[name.replace("fc1_g", "fc1")] = packed


def _fold_position(found: dict[str, Tensor]) -> None:
    """Rename DINOv2's registers to our name, in place.

    DINOv2 inserts them after it adds the positions, so only the class token has a position.
    """
    found["reg_token"] = found.pop("register_tokens")
    token, table = found.get("cls_token"), found.get("pos_embed")
    if token is None or table is None:
        return
    # The shape check reports other shapes.
    if table.ndim == 3 and token.shape == (1, 1, table.shape[2]):
        table = table.float()
        found["cls_token"] = token.float() + table[:, :1]  # (1, 1, D)
        found["pos_embed"] = table[:, 1:].contiguous()  # (1, N, D)


def check_timm_names(shape: TensorShapes, source: str) -> None:
    """Raise an error that names the tensors that no Vision Transformer of timm has."""
    if "blocks.0.mlp.fc1.weight" not in shape:
        return  # a ResNet, or a file for which the error about missing tensors is clearer
    if foreign := [name for name in shape if not KNOWN.fullmatch(name)]:
        raise VitcliError(
            f"`{source}` does not fit a plain Vision Transformer; not part of the model: "
            f"{quoted(foreign, 6)}",
            hint=CHECK_FILE,
        )


def check_timm_shapes(shape: TensorShapes, source: str) -> None:
    """Raise an error that names the tensors that no setting can be read from."""
    wrong = [
        f"{name} has the shape {shape[name]} instead of {count} sizes above 0"
        for name, count in DIMENSIONS.items()
        if name in shape and (len(shape[name]) != count or 0 in shape[name])
    ]
    if wrong:
        raise VitcliError(
            f"`{source}` holds tensors of the wrong shape: {', '.join(wrong)}", hint=CHECK_FILE
        )


def not_plain(source: str, shape: TensorShapes, kind: str, missing: list[str]) -> VitcliError:
    """Return the error for another architecture, with the missing and the unexpected tensors."""
    others = [name for name in shape if OTHERS.search(name)]
    shown = f"; it has {quoted(others, 3)}" if others else ""
    names = ", ".join(f"`{name}`" for name in missing)
    return VitcliError(f"`{source}` is not a plain {kind}: no {names}{shown}", hint=CHECK_FILE)


# Architectures for writing. `model_args` in JSON can change every size. JSON cannot express a class
# (SwiGLU, DeiT's two heads, a ResNet) or an epsilon, so the architecture must have these.

# (width, depth, MLP, heads) -> the size in timm's names.
SIZES = {
    (192, 12, 768, 3): "tiny",
    (384, 12, 1536, 6): "small",
    (768, 12, 3072, 12): "base",
    (1024, 24, 4096, 16): "large",
    (1280, 32, 5120, 16): "huge",
    (1408, 40, 6144, 16): "giant",
    (1664, 48, 8192, 16): "gigantic",
}
# timm's plain ViTs. Another size is written as the base model with other arguments.
PLAIN = {
    "tiny": ("patch16_224", "patch16_384"),
    "small": ("patch16_224", "patch16_384", "patch32_224", "patch32_384", "patch8_224"),
    "base": ("patch16_224", "patch16_384", "patch32_224", "patch32_384", "patch8_224"),
    "large": ("patch16_224", "patch16_384", "patch32_224", "patch32_384", "patch14_224"),
    "huge": ("patch14_224",),
    "giant": ("patch14_224",),
    "gigantic": ("patch14_224",),
}
STEMS = {
    (): "vit_tiny_r_s16_p8_224",
    (2, 2, 2, 2): "vit_small_r26_s32_224",
    (3, 4, 9): "vit_base_r50_s16_224",
    (3, 4, 6, 3): "vit_large_r50_s32_224",
}
# JSON cannot set the epsilon, so 1e-5 needs an architecture that has it.
EPS = {1e-6: "", 1e-5: "vit_base_patch16_clip_224"}
POOLS = {"token": "token", "mean": "avg", "map": "map", "distilled": "token"}
# Units per stage -> timm's BiT ResNets; the number after the `x` is the width.
BIT_LAYERS: dict[tuple[int, ...], tuple[str, str]] = {
    (3, 4, 6, 3): ("resnetv2_50x1_bit", "resnetv2_50x3_bit"),
    (3, 4, 23, 3): ("resnetv2_101x1_bit", "resnetv2_101x3_bit"),
    (3, 8, 36, 3): ("resnetv2_152x2_bit", "resnetv2_152x4_bit"),
}


def vit_architecture(config: ViTConfig) -> str:
    """Return the timm architecture that builds this model, given the arguments of `write_timm`."""
    size = SIZES.get((config.embed_dim, config.depth, config.mlp_dim, config.num_heads), "base")
    if config.stem is not None:
        return STEMS[config.stem]
    if config.distillation_token:
        return f"deit_{size if size in ('tiny', 'small') else 'base'}_distilled_patch16_224"
    if config.mlp == "swiglu":
        return "vit_giant_patch14_dinov2"
    if EPS[config.norm_eps]:
        return EPS[config.norm_eps]
    name = f"patch{config.patch_size}_{config.image_size[0]}"
    return f"vit_{size}_{name if name in PLAIN[size] else PLAIN[size][0]}"


def bit_architecture(config: ResNetConfig) -> tuple[str, dict[str, Any]]:
    """Return timm's name of a ResNet, and the arguments that change its widths.

    Arguments cannot change the number of units, so `config.layers` must be in `BIT_LAYERS`.
    """
    names = BIT_LAYERS[config.layers]
    factors = [int(name.partition("x")[2][0]) for name in names]
    for name, factor in zip(names, factors, strict=True):
        if config.width == factor:
            return name, {}
    root = int(64 * config.width) // factors[0]  # timm multiplies by the factor in the name
    return names[0], {"stem_chs": root, "channels": [4 * root * 2**i for i in range(4)]}
