"""What the layouts of timm, Hugging Face and Google can hold of a model.

`EXPRESSIBLE` is the only list of these limits: the writers ask it, and the errors and notes of
`vitcli export` come from it. If a layout has no entry for a property, it holds every value of the
property, and reading the file back gives the same value.

The temperature has no entry, because `vitcli export` divides the head by it before it writes. The
thresholds of the classes have none, because no layout holds them: `vitcli export` says so.
"""

from typing import Literal

from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.vit import ViTConfig
from vitcli.weights.huggingface.huggingface_names import closest_type
from vitcli.weights.huggingface.processor import resized_size
from vitcli.weights.huggingface.vit_types import dino_mlp_ratio
from vitcli.weights.limit import Lost, Refused, owner_and_value
from vitcli.weights.loaded import LoadedModel
from vitcli.weights.timm.timm_names import BIT_LAYERS, EPS, POOLS, STEMS

Layout = Literal["timm", "huggingface", "google"]


def _is_dino(c: ViTConfig) -> bool:
    return closest_type(c).startswith("dinov2")


def _is_dinov3(c: ViTConfig) -> bool:
    return closest_type(c) == "dinov3_vit"


def _is_siglip(c: ViTConfig) -> bool:
    return closest_type(c).startswith("siglip")


def _is_plain(c: ViTConfig) -> bool:
    return closest_type(c) in ("vit", "deit")


def _is_basic(c: ViTConfig) -> bool:
    return _is_plain(c) or _is_siglip(c)


def _has_stem(c: ViTConfig) -> bool:
    return c.stem is not None


def _has_head(c: ViTConfig) -> bool:
    return c.num_classes > 0


def _distilled(c: ViTConfig) -> bool:
    return c.distillation_token


def _special(c: ViTConfig) -> bool:
    return c.mlp == "swiglu" or c.distillation_token or c.stem is not None


def _one_head_for_two_tokens(c: ViTConfig) -> bool:
    return c.pool == "distilled" and c.num_classes > 0 and not c.distillation_head


def _resize_that_timm_lacks(p: Preprocess) -> bool:
    if p.resize_size is None or p.resize_mode == "pad":
        return False
    return p.image_size[0] != p.image_size[1] or p.resize_size < p.image_size[0]


def _untrained_head(model: LoadedModel) -> bool:
    return model.config.num_classes > 0 and not model.head_trained


EVA = "timm has it in its class Eva, which vitcli reads and does not write"
# fmt: off
# Limits of several layouts.
NO_WINDOW = Lost("preprocess.window", "the window of 16-bit, 32-bit and float images, which is {}, "
                 "is not stored: map such images to 8 bits with it first", (None,))
NO_PROJECTION = Lost("model.projection_size", "the projection to text embeddings is not stored",
                     (None,))
TIMM = (
    Refused("model.pool", "timm has no such pooling", POOLS),
    Refused("model.pool", "DeiT with a distillation token reads both tokens", ("distilled",),
            _distilled),
    Refused("model.pool", "timm has a head for each of the two tokens, not one for both", (),
            _one_head_for_two_tokens),
    Refused("model.pool", "timm's attention pool has no SwiGLU", ("token", "mean", "distilled"),
            lambda c: c.mlp == "swiglu"),
    Refused("model.pool_blocks", "timm's heads read the last block only", (1,)),
    Refused("model.num_registers", "DeiT with a distillation token has no registers", (0,),
            _distilled),
    Refused("model.position", "timm adds one position table to the tokens",
            ("learned", "sincos2d", "none")),
    Refused("model.position", "DeiT with a distillation token has positions",
            ("learned", "sincos2d"), _distilled),
    Lost("model.position", "the fixed sin-cos positions become a table, which timm would train",
         ("learned", "none")),
    Refused("model.position_at", "timm adds positions before the first block only", ("stem",)),
    Refused("model.position_bias", "timm's plain ViTs have none", ("none",)),
    Refused("model.position_covers_prefix", "DeiT adds positions to both of its tokens", (True,),
            _distilled),
    Refused("model.representation_size", "timm has no layer between pooling and head", (None,)),
    Refused("model.mlp", "timm has SwiGLU without distillation token and ResNet stem only",
            ("gelu",), lambda c: c.distillation_token or c.stem is not None),
    Refused("model.norm_eps", "timm has 1e-6 and 1e-5", EPS, remedy="--set model.norm_eps=1e-6"),
    Refused("model.norm_eps", "timm has it without SwiGLU, distillation token and stem only",
            (1e-6,), _special, "--set model.norm_eps=1e-6"),
    Refused("model.norm_after_pool", "DeiT with a distillation token has its norm before pooling",
            (False,), _distilled),
    Refused("model.patch_bias", "timm's models with a norm before the blocks have none", (False,),
            lambda c: c.norm_before_blocks),
    Lost("model.patch_bias", "timm's patch projection has a bias: the file holds zeros for it",
         (True,), lambda c: not c.norm_before_blocks),
    Refused("model.pixel_norm", "timm does not normalise the pixels of a patch", (False,)),
    Refused("model.norm", "its plain models have LayerNorm", ("layer",)),
    Refused("model.patch_norm", "its plain models have no norm of the patches", (False,)),
    Refused("model.projection_size", "timm's heads read the features", (None,), _has_head),
    NO_PROJECTION,
    Refused("model.head_norm", "timm's heads do not normalise the features", (False,)),
    Refused("model.crop_to_patches", "its images have whole patches", (False,)),
    Refused("model.axial", "timm has no axial blocks", (False,)),
    Refused("model.key_bias", EVA, (True,)),
    Refused("model.attention_norm", EVA, (False,)),
    Refused("model.mlp_norm", EVA, (False,)),
    Refused("model.rope", EVA, (None,)),
    Refused("model.stem", f"timm has the stages {', '.join(str(list(s)) for s in STEMS)} only",
            (None, *STEMS)),
    Refused("model.stem", "timm has hybrids without a distillation token only", (None,),
            _distilled),
    Refused("model.stem_width", "timm's hybrids have width 1", (1.0,), _has_stem),
    Refused("model.stem_arithmetic", "timm's ResNets have other epsilons", ("timm",), _has_stem,
            "--set model.stem_arithmetic=timm"),
    Refused("model.conv_stem", "timm has no such stem", (None,)),
    Refused("resnet.layers", "timm has the units of BiT's R50, R101 and R152 only", BIT_LAYERS),
    Refused("resnet.axial", "timm has no AxialResNet", (False,)),
    Refused("resnet.arithmetic", "timm has another epsilon and max-pool border", ("timm",)),
    Lost("preprocess", "mean and std are not known and not written: timm assumes ImageNet's", (),
         lambda model: model.preprocess is None),
    Lost("preprocess.crop_rounding",
         "timm rounds an odd crop margin to even: some crops move by 1 px", ("even",)),
    Lost("preprocess.antialias", "timm smooths images that it shrinks, this model does not",
         (True,)),
    NO_WINDOW,
    Lost("preprocess.border", "timm does not cut a border off its images", (0,)),
    Refused("preprocess.resize_size", "timm stores it as a fraction of a square crop", (),
            _resize_that_timm_lacks, "--set preprocess.crop_fraction=…", "replaces the resize"),
    Lost("preprocess.resize_size", "`preprocess.resize_size` = {} becomes a crop fraction",
         (None,)),
    Lost("head_activation", "the head needs a sigmoid, which timm leaves to the caller",
         ("softmax", "identity")),
    Lost("head_trained", "the head is not trained, which timm's layout cannot store", (),
         _untrained_head),
)
HUGGINGFACE = (
    Refused("model.image_size", "DINOv2 and SigLIP in transformers have a square grid of positions",
            (), lambda c: (_is_dino(c) or _is_siglip(c)) and len(set(c.image_size)) > 1),
    Refused("model.mlp_dim", "DINOv2 in transformers derives it from a whole `mlp_ratio`", (),
            lambda c: _is_dino(c) and dino_mlp_ratio(c) is None),
    Refused("model.pool", "DINOv2 with a head reads `token_mean`", ("token_mean",),
            lambda c: _is_dino(c) and c.num_classes > 0),
    Refused("model.pool", "DINOv2 without a head gives the class token", ("token",),
            lambda c: _is_dino(c) and not c.num_classes),
    Refused("model.num_classes", "DINOv3 in transformers has no head", (0,), _is_dinov3),
    Refused("model.pool", "DINOv3 gives the class token", ("token",), _is_dinov3),
    Refused("model.distillation_token", "DINOv3 has none", (False,), _is_dinov3),
    Refused("model.pool", "ViT and DeiT read the class token", ("token", "distilled"), _is_plain),
    Refused("model.pool", "DeiT has a head for each of the two tokens, not one for both", (),
            lambda c: c.pool == "distilled" and not c.distillation_head),
    Refused("model.pool", "SigLIP with a head reads the mean of the patches", ("mean",),
            lambda c: _is_siglip(c) and c.num_classes > 0),
    Refused("model.pool", "SigLIP pools by attention or takes the mean", ("map", "mean"),
            _is_siglip),
    Lost("model.pool", "transformers gives no `pooler_output` for this model: take the mean of its "
         "`last_hidden_state`", ("map",), lambda c: _is_siglip(c) and not c.num_classes),
    Refused("model.qkv_bias", "SigLIP's projections have a bias", (True,), _is_siglip),
    Refused("model.pool_blocks", "its heads read the last block only", (1,)),
    Refused("model.class_token", "DINOv3 has a class token", (True,), _is_dinov3),
    Refused("model.num_registers", "ViT, DeiT and SigLIP have no registers", (0,), _is_basic),
    Refused("model.position", "it adds one position table to the tokens", ("learned", "sincos2d"),
            lambda c: not _is_dinov3(c)),
    Refused("model.position", "DINOv3 has rotary positions only", ("none",), _is_dinov3),
    Refused("model.position_at", "it adds positions before the first block only", ("stem",)),
    Refused("model.position_bias", "its models have none", ("none",)),
    Refused("model.position_covers_prefix", "DINOv2 adds registers after the positions", (False,),
            lambda c: closest_type(c) == "dinov2_with_registers"),
    Refused("model.representation_size", "DINO and SigLIP have no layer between pooling and head",
            (None,), lambda c: not _is_plain(c)),
    Refused("model.representation_size", "its classifiers have no layer before the head", (None,),
            lambda c: c.num_classes > 0),
    Refused("model.qk_norm", "its models do not normalise queries and keys", (False,)),
    Refused("model.layer_scale", "ViT, DeiT and SigLIP have no LayerScale", (None,), _is_basic),
    Refused("model.layer_scale", "DINO has LayerScale", (),
            lambda c: not _is_basic(c) and c.layer_scale is None),
    Refused("model.mlp", "ViT, DeiT and SigLIP have no SwiGLU", ("gelu",), _is_basic),
    Refused("model.norm_before_blocks", "its models have no norm before the blocks", (False,)),
    Refused("model.norm_after_pool", "its models have the norm before pooling", (False,)),
    Refused("model.patch_bias", "its patch projection has a bias", (True,)),
    Refused("model.pixel_norm", "it does not normalise the pixels of a patch", (False,)),
    Refused("model.norm", "its models have LayerNorm", ("layer",)),
    Refused("model.patch_norm", "its models have no norm of the patches", (False,)),
    Refused("model.projection_size", "its heads read the features", (None,), _has_head),
    NO_PROJECTION,
    Refused("model.head_norm", "its heads do not normalise the features", (False,)),
    Refused("model.final_norm", "its models have a norm after the last block", (True,)),
    Refused("model.key_bias", "its keys have a bias if the queries have one",
            (True,), lambda c: not _is_dinov3(c)),
    Refused("model.attention_norm", "its models do not normalise there", (False,)),
    Refused("model.mlp_norm", "its models do not normalise there", (False,)),
    Refused("model.rope", "DINOv3 has centred coordinates", (None, "centred")),
    Refused("model.rope_pairs", "DINOv3 pairs the halves of a head", ("halves",)),
    Refused("model.rope_dtype", "DINOv3 in transformers has fp32 periods", ("fp32",)),
    Refused("model.crop_to_patches", "its images have whole patches", (False,),
            lambda c: not _is_siglip(c)),
    Lost("model.crop_to_patches", "the images have whole patches: `model.crop_to_patches` is not "
         "stored", (False,), lambda c: not any(y % c.patch_size for y in c.image_size)),
    Refused("model.axial", "it has no axial blocks", (False,)),
    Refused("model.stem", "its models have no ResNet stem", (None,)),
    Refused("model.conv_stem", "its models have no convolutional stem", (None,)),
    Refused("resnet", "this layout is for Vision Transformers"),
    Refused("preprocess.resize_mode", "no image processor of transformers pads",
            ("crop", "squash"), remedy="--set preprocess.resize_mode=squash",
            effect="distorts the images"),
    Refused("preprocess.resize_mode", "no image processor of transformers cuts out an oblong",
            ("squash",), lambda p: len(set(resized_size(p))) > 1,
            "--set preprocess.resize_mode=squash", "distorts the images"),
    Lost("labels", "no class names are known: transformers shows `LABEL_0`, `LABEL_1` …", (),
         lambda model: model.config.num_classes > 0 and model.labels is None),
    Lost("head_trained", "the head is not trained, which Hugging Face's layout cannot store", (),
         _untrained_head),
    Lost("model.num_classes", "transformers adds a random pooler to a backbone unless you load it "
         "with `add_pooling_layer=False`", (),
         lambda c: _is_plain(c) and not c.num_classes and not c.representation_size),
    Lost("model.position", "the fixed positions become a table, which transformers would train",
         ("learned",), _is_siglip),
    Lost("model.position_covers_prefix", "SigLIP has no class token: "
         "`model.position_covers_prefix` is not stored", (True,), _is_siglip),
    Lost("model.position_covers_prefix", "the fixed positions are read back with a row of zeros "
         "for the class token", (True,),
         lambda c: c.position == "sincos2d" and not c.num_registers),
    Lost("model.drop_path_rate", "`drop_path_rate`, which only training uses, is not stored",
         (0.0,), lambda c: not _is_dinov3(c)),
    Lost("model.dropout_rate", "`dropout_rate`, which only training uses, is not stored",
         (0.0,), lambda c: _is_dinov3(c) or _is_siglip(c)),
    Lost("model.gelu", "a gated MLP has no GELU: `model.gelu` is not stored", ("exact",),
         lambda c: _is_dinov3(c) and c.mlp == "swiglu"),
    Lost("model.position_covers_prefix", "DINOv3 has no position table: "
         "`model.position_covers_prefix` is not stored", (True,), _is_dinov3),
    Lost("model.num_channels", "`pipeline` opens images in colour: give this model grey arrays "
         "instead", (), lambda c: c.num_channels == 1),
    Lost("preprocess", "no preprocessing is known, so none is written: `pipeline` needs it", (),
         lambda model: model.preprocess is None),
    NO_WINDOW,
    Lost("preprocess.crop_rounding", "transformers rounds an odd crop margin down: some crops move "
         "by 1 px (avoid it with `--set preprocess.crop_rounding=down`)", ("down",),
         lambda p: p.resize_mode != "squash" or resized_size(p) != p.image_size),
    Lost("preprocess.antialias", "transformers smooths images that it shrinks, this model does not",
         (True,)),
    Lost("preprocess.border", "transformers does not cut a border off its images", (0,)),
)
HEADLESS = "the model has no head: big_vision loads it, `load_pretrained` of vit_jax does not"
GOOGLE = (
    Refused("model.pool", "the official code pools by class token, mean or attention",
            ("token", "mean", "map")),
    Refused("model.pool", "the official hybrids pool by class token or mean", ("token", "mean"),
            _has_stem),
    Refused("model.pool_blocks", "its heads read the last block only", (1,)),
    Refused("model.class_token", "the official code has it with pool `token` only", (False,),
            lambda c: c.pool in ("mean", "map")),
    Refused("model.distillation_token", "the official code has none", (False,)),
    Refused("model.num_registers", "the official code has no registers", (0,)),
    Refused("model.position", "the official code has learned and sin-cos positions",
            ("learned", "sincos2d")),
    Refused("model.position", "the official hybrids have learned positions", ("learned",),
            _has_stem),
    Refused("model.position_at", "the official code adds positions before the first block only",
            ("stem",)),
    Refused("model.position_bias", "the official code has none", ("none",)),
    Refused("model.position_covers_prefix", "the official hybrids give the class token a position",
            (True,), lambda c: _has_stem(c) and c.class_token),
    Refused("model.qkv_bias", "its query, key and value projections have a bias", (True,)),
    Refused("model.qk_norm", "the official code does not normalise queries and keys", (False,)),
    Refused("model.layer_scale", "the official code has no LayerScale", (None,)),
    Refused("model.mlp", "the official code has no SwiGLU", ("gelu",)),
    Refused("model.gelu", "the official code approximates GELU with tanh", ("tanh",),
            remedy="--set model.gelu=tanh"),
    Refused("model.norm_eps", "the official code has 1e-6", (1e-6,),
            remedy="--set model.norm_eps=1e-6"),
    Refused("model.norm_before_blocks", "the official code has no norm there", (False,)),
    Refused("model.norm_after_pool", "the official code has the norm before pooling", (False,)),
    Refused("model.patch_bias", "its patch projection has a bias", (True,)),
    Refused("model.pixel_norm", "it does not normalise the pixels of a patch", (False,)),
    Refused("model.norm", "its models have LayerNorm", ("layer",)),
    Refused("model.patch_norm", "its models have no norm of the patches", (False,)),
    Refused("model.projection_size", "its heads read the features", (None,), _has_head),
    NO_PROJECTION,
    Refused("model.head_norm", "its heads do not normalise the features", (False,)),
    Refused("model.final_norm", "the official code has a norm after the last block", (True,)),
    Refused("model.key_bias", "its keys have a bias", (True,)),
    Refused("model.attention_norm", "the official code has no norm there", (False,)),
    Refused("model.mlp_norm", "the official code has no norm there", (False,)),
    Refused("model.rope", "the official code has no rotary positions", (None,)),
    Refused("model.crop_to_patches", "its images have whole patches", (False,)),
    Refused("model.axial", "the official checkpoints have no axial blocks", (False,)),
    Refused("model.stem_arithmetic", "Google's hybrids have other epsilons", ("google",), _has_stem,
            "--set model.stem_arithmetic=google"),
    Refused("model.conv_stem", "the official code has no such stem", (None,)),
    Lost("model.num_classes", HEADLESS, (), lambda c: not c.num_classes),
    Refused("resnet.axial", "the official checkpoints have no AxialResNet", (False,)),
    Lost("resnet.num_classes", HEADLESS, (), lambda c: not c.num_classes),
    Lost("resnet.arithmetic",
         "Google's code adds 1e-10 to the variance of a kernel, this model adds 1e-8",
         ("google",)),
)
# fmt: on
EXPRESSIBLE: dict[Layout, tuple[Refused | Lost, ...]] = {
    "timm": TIMM,
    "huggingface": HUGGINGFACE,
    "google": GOOGLE,
}


def find_limits(model: LoadedModel, layout: Layout) -> dict[str, Refused | Lost]:
    """Return property -> the first limit of `layout` that `model` exceeds."""
    found: dict[str, Refused | Lost] = {}
    for limit in EXPRESSIBLE[layout]:
        if limit.key not in found and limit.applies(model):
            found[limit.key] = limit
    return found


def check_expressible(model: LoadedModel, layout: Layout) -> list[str]:
    """Return a note on each property of `model` that `layout` does not store.

    Raises:
        VitcliError: the layout cannot hold the model; the error names every property and reason.
    """
    found = find_limits(model, layout).values()
    refused = [limit for limit in found if isinstance(limit, Refused)]
    if not refused:
        return [limit.text.format(owner_and_value(model, limit.key)[1]) for limit in found]
    name = {"timm": "timm", "huggingface": "Hugging Face", "google": "Google's code"}[layout]
    if layout == "huggingface" and isinstance(model.config, ViTConfig):
        name = f"Hugging Face's `{closest_type(model.config)}`"
    hint = "`--to onnx` takes every model"
    if all(limit.remedy for limit in refused):
        effects = " and ".join(dict.fromkeys(limit.effect for limit in refused))
        hint = f"`{' '.join(limit.remedy for limit in refused)}` {effects}; {hint}"
    shown = ", ".join(f"{_show(model, limit.key)} ({limit.text})" for limit in refused)
    raise VitcliError(f"{name} cannot express {shown}", hint=hint)


def _show(model: LoadedModel, key: str) -> str:
    """Format a property for an error: `model.pool` = mean."""
    if key == "resnet":
        return "a ResNet"
    value = owner_and_value(model, key)[1]
    if isinstance(value, float):
        value = f"{value:g}"
    elif isinstance(value, tuple):
        value = list(value)
    elif value is None or isinstance(value, bool):
        value = str(value).lower()
    if key.startswith("resnet."):
        return f"a ResNet with `{key.removeprefix('resnet.')}` = {value}"
    return f"`{key}` = {value}"
