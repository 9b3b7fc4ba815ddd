"""What timm's architectures and their JSON arguments cannot express of a model of ours.

Writing timm's layout: a folder that `timm.create_model("local-dir:DIR", pretrained=True)` takes.

A Hub `config.json` names one of timm's architectures and the arguments that differ. Every argument
that decides the computation is written, so the architecture only has to bring what JSON cannot
say: a class (SwiGLU, the two heads of DeiT, the ResNet of a hybrid) or an epsilon.
"""

import json
from math import floor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vitcli.errors import VitcliError
from vitcli.files import replacing
from vitcli.preprocess import Preprocess
from vitcli.vit.config import ViTConfig
from vitcli.vit.resnet import ResNetConfig
from vitcli.weights.loaded import LoadedModel
from vitcli.weights.timm.bit import bit_architecture
from vitcli.weights.timm.timm_config import CROP_MODES

STEMS = {
    (): "vit_tiny_r_s16_p8_224",
    (2, 2, 2, 2): "vit_small_r26_s32_224",
    (3, 4, 9): "vit_base_r50_s16_224",
    (3, 4, 6, 3): "vit_large_r50_s32_224",
}
POOLS = {"token": "token", "mean": "avg", "map": "map", "distilled": "token"}
# All that JSON can say of the epsilon is an architecture that has another.
EPS = {1e-6: "", 1e-5: "vit_base_patch16_clip_224"}


def refuse(config: ViTConfig) -> None:
    """Raises a VitcliError that names every setting which timm cannot express, else nothing."""
    special = [
        name
        for name, there in (
            ("a distillation token", config.distillation_token),
            ("`swiglu`", config.mlp == "swiglu"),
            ("a ResNet stem", config.stem is not None),
        )
        if there
    ]
    wrong = []
    if config.axial:
        wrong.append("`model.axial` = true")
    if config.position in ("learned2d", "relative"):
        wrong.append(f"`model.position` = {config.position}")
    if config.position_at != "stem":
        wrong.append(f"`model.position_at` = {config.position_at}")
    if config.pool not in POOLS or (config.pool == "distilled" and not _two_heads(config)):
        wrong.append(f"`model.pool` = {config.pool}")
    if config.pool_blocks > 1:
        wrong.append(f"`model.pool_blocks` = {config.pool_blocks}")
    if config.representation_size:
        wrong.append(f"`model.representation_size` = {config.representation_size}")
    if config.norm_before_blocks and config.patch_bias:
        wrong.append("`model.norm_before_blocks` with `model.patch_bias`")
    if config.pool == "map" and config.mlp == "swiglu":
        wrong.append("`model.pool` = map with `model.mlp` = swiglu")
    if config.distillation_token:
        wrong += _against_deit(config)
    if config.stem is not None:
        wrong += _against_stem(config)
    if len(special) > 1:
        wrong.append(f"{' and '.join(special)} in one model")
    tolerable = config.norm_eps not in EPS or bool(EPS[config.norm_eps] and special)
    if tolerable:
        beside = f" with {special[0]}" if config.norm_eps in EPS else ""
        wrong.append(f"`model.norm_eps` = {config.norm_eps:g}{beside}")
    if wrong:
        raise VitcliError(
            f"timm cannot express {', '.join(wrong)}",
            hint=f"`--to onnx` takes every model{_near(config, eps=tolerable)}",
        )


def _near(config: ViTConfig, *, eps: bool) -> str:
    """What to set where a difference of about 1e-4 of the logits is no matter."""
    settings = ["`--set model.norm_eps=1e-6`"] if eps else []
    if config.stem is not None and config.stem_arithmetic != "timm":
        settings.append("`--set model.stem_arithmetic=timm`")
    if not settings:
        return ""
    return f"; {' '.join(settings)} where the small difference is acceptable"


def _two_heads(config: ViTConfig) -> bool:
    return config.distillation_head or not config.num_classes


def _against_deit(config: ViTConfig) -> list[str]:
    """timm's distilled DeiT is a class of its own, with fewer choices than the rest."""
    wrong = [f"`model.pool` = {config.pool}"] if config.pool in ("token", "mean", "map") else []
    if config.num_registers:
        wrong.append(f"`model.num_registers` = {config.num_registers}")
    if config.position == "none" or not config.position_covers_prefix:
        wrong.append("class and distillation token without positions")
    if config.norm_after_pool:
        wrong.append("`model.norm_after_pool` = true")
    return [f"{said} with a distillation token" for said in wrong]


def _against_stem(config: ViTConfig) -> list[str]:
    wrong = []
    if config.stem not in STEMS:
        wrong.append(f"`model.stem` = {list(config.stem or ())}")
    if config.stem_width != 1.0:
        wrong.append(f"`model.stem_width` = {config.stem_width:g}")
    if config.stem_arithmetic != "timm":
        wrong.append(f"`model.stem_arithmetic` = {config.stem_arithmetic}")
    return wrong


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
# timm's plain ViTs; another size is written as the base model with other arguments.
PLAIN = {
    "tiny": ("patch16_224", "patch16_384"),
    "small": ("patch16_224", "patch16_384", "patch32_224", "patch32_384", "patch8_224"),
    "base": ("patch16_224", "patch16_384", "patch32_224", "patch32_384", "patch8_224"),
    "large": ("patch16_224", "patch16_384", "patch32_224", "patch32_384", "patch14_224"),
    "huge": ("patch14_224",),
    "giant": ("patch14_224",),
    "gigantic": ("patch14_224",),
}


def write_timm(model: LoadedModel, out: Path) -> list[str]:
    """Write `model` into the new folder `out`, whole or not at all.

    Returns:
        What the folder cannot say, one line each.

    Raises:
        VitcliError: timm has no such model, with the settings that contradict it; `out` is not
            empty, or cannot be written.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise VitcliError(f"`{out}` is there already", hint="another `--out`, or remove it first")
    notes: list[str] = []
    config = model.config
    if isinstance(config, ResNetConfig):
        architecture, arguments = bit_architecture(config)
        input_conv, heads, width = "stem.conv", ["head.fc"], config.feature_dim
    else:
        refuse(config)
        architecture, arguments = _architecture(config), _arguments(config)
        input_conv, heads, width = _first_conv(config), ["head"], config.embed_dim
        heads += ["head_dist"] if config.distillation_token else []
    size, channels, classes = config.image_size, config.num_channels, config.num_classes
    described: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": classes,
        "num_features": width,
        "global_pool": arguments["global_pool"],
        "model_args": {**arguments, "num_classes": classes, "in_chans": channels},
        "activation": model.head_activation,  # for us; timm gives logits
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [channels, *size],
            "fixed_input_size": not isinstance(config, ResNetConfig),
            **_transform(model.preprocess, notes),
            "num_classes": classes,
            "pool_size": None,
            "first_conv": input_conv,
            "classifier": heads if len(heads) > 1 else heads[0],
        },
    }
    if model.labels is not None and classes:
        described["label_names"] = list(model.labels)
    notes += _notes(model)
    tensors = {n: t.detach().cpu().contiguous() for n, t in _named(model).items()}
    with replacing(out) as temporary:
        temporary.mkdir()
        text = json.dumps(described, indent=2, ensure_ascii=False) + "\n"
        (temporary / "config.json").write_text(text, encoding="utf-8")
        try:
            save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, in safetensors' own words
            raise OSError(str(error)) from error
    return notes


def _architecture(config: ViTConfig) -> str:
    """A name of timm's whose function, given `_arguments`, builds this model."""
    sizes = config.embed_dim, config.depth, config.mlp_dim, config.num_heads
    size = SIZES.get(sizes, "base")
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


def _arguments(config: ViTConfig) -> dict[str, Any]:
    """Arguments of timm's VisionTransformer; null where an architecture's own has to go."""
    hidden = config.mlp_dim * (2 if config.mlp == "swiglu" else 1)
    ratio = hidden / config.embed_dim
    if int(config.embed_dim * ratio) != hidden:  # timm rounds down
        ratio = (hidden + 0.5) / config.embed_dim
    act = {"exact": "gelu", "tanh": "gelu_tanh"}[config.gelu]
    arguments = {
        "img_size": list(config.image_size),
        "patch_size": config.patch_size,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": ratio,
        "qkv_bias": config.qkv_bias,
        "qk_norm": config.qk_norm,
        "init_values": None if config.layer_scale is None else config.layer_scale or 1e-5,
        "class_token": config.class_token,
        "no_embed_class": not config.position_covers_prefix,
        "reg_tokens": config.num_registers,
        "pre_norm": config.norm_before_blocks,
        "fc_norm": config.norm_after_pool,
        "global_pool": POOLS[config.pool],
        "act_layer": "silu" if config.mlp == "swiglu" else act,
    }
    if config.position == "none":
        arguments["pos_embed"] = "none"
    if config.dropout_rate:
        arguments |= {"pos_drop_rate": config.dropout_rate, "proj_drop_rate": config.dropout_rate}
    if config.drop_path_rate:
        arguments["drop_path_rate"] = config.drop_path_rate
    return arguments


def _first_conv(config: ViTConfig) -> str:
    if config.stem is None:
        return "patch_embed.proj"
    return f"patch_embed.backbone.{'stem.' if config.stem else ''}conv"


def _transform(preprocess: Preprocess | None, notes: list[str]) -> dict[str, Any]:
    """The evaluation transform as `pretrained_cfg` says it.

    Raises:
        VitcliError: a resize to fewer pixels than the crop, or to one side for an oblong crop.
    """
    if preprocess is None:
        notes.append("mean and std are not known, so none are written: timm will take ImageNet's")
        return {}
    modes = {ours: theirs for theirs, ours in CROP_MODES.items()}
    return {
        "interpolation": preprocess.interpolation,
        "crop_pct": _crop_pct(preprocess),
        "crop_mode": modes[preprocess.resize_mode],
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
    }


def _crop_pct(preprocess: Preprocess) -> float:
    """The share p with floor(side / p) = the side that we resize to."""
    rows, cols = preprocess.image_size
    side = preprocess.resize_size
    if preprocess.resize_mode == "pad":
        return 1.0
    if side is None:
        return preprocess.crop_fraction
    if rows != cols or side < rows:
        raise VitcliError(
            f"timm cannot express `preprocess.resize_size` = {side} for images of {rows}x{cols}",
            hint="`--set preprocess.crop_fraction=…` says the resize as a share of the picture",
        )
    share = rows / side
    return share if floor(rows / share) == side else rows / (side + 0.5)


def _notes(model: LoadedModel) -> list[str]:
    config, notes = model.config, []
    if isinstance(config, ViTConfig):
        if config.position == "sincos2d":
            notes.append("the sin-cos positions become a table, which timm would train")
        if not config.patch_bias and not config.norm_before_blocks:
            notes.append("timm's patch projection has a bias: zeros are written")
    preprocess = model.preprocess
    if preprocess is not None and preprocess.crop_rounding == "down":
        notes.append("timm rounds an odd margin of the crop to even: some are cut a pixel apart")
    if preprocess is not None and not preprocess.antialias:
        notes.append("timm smooths pictures that it shrinks, this model does not")
    if preprocess is not None and preprocess.resize_size is not None:
        notes.append(f"`preprocess.resize_size` = {preprocess.resize_size} becomes a crop fraction")
    if model.head_activation == "sigmoid":
        notes.append("the head gives probabilities by a sigmoid, which timm leaves to the caller")
    if config.num_classes and not model.head_trained:
        notes.append("the head was never trained, which timm cannot say")
    return notes


def _named(model: LoadedModel) -> dict[str, Tensor]:
    """The state dict with timm's names and shapes."""
    tensors, config = model.state_dict(), model.config
    if isinstance(config, ResNetConfig):
        if "head.weight" in tensors:
            tensors["head.fc.weight"] = tensors.pop("head.weight")[:, :, None, None]  # (K, F, 1, 1)
            tensors["head.fc.bias"] = tensors.pop("head.bias")
        return tensors
    if not config.patch_bias and not config.norm_before_blocks:
        weight = tensors["patch_embed.proj.weight"]
        tensors["patch_embed.proj.bias"] = weight.new_zeros(weight.shape[0])
    if config.stem == ():
        root = "patch_embed.backbone.stem."
        return {n.replace(root, "patch_embed.backbone."): t for n, t in tensors.items()}
    return tensors
