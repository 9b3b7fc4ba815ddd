"""What timm's architectures and their JSON arguments cannot express of a model of ours."""

from vitcli.errors import VitcliError
from vitcli.vit.config import ViTConfig

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
