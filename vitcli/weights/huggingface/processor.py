"""`preprocessor_config.json` and our `Preprocess`, both ways.

transformers' three processors that matter here differ in how they come to the model's size:

    ViTImageProcessor   resized to height and width            `squash`
    DeiTImageProcessor  the same, then the middle cut out      `squash`, resize_size
    BitImageProcessor   shorter side, then the middle cut out  `crop`, resize_size

Without torchvision transformers resizes with Pillow, as we do; with it, some pixels differ by a
grey level. Where the margin beside the middle is odd, transformers rounds it down and we round it
to even (torchvision and timm): there the two pictures may lie one pixel apart.
"""

from collections.abc import Mapping
from math import floor
from typing import Any

from vitcli.errors import VitcliError
from vitcli.preprocess import Interpolation, Preprocess
from vitcli.vit.config import ViTConfig
from vitcli.weights.huggingface.huggingface_names import FAMILIES
from vitcli.weights.overrides import Stated, are_pictures, as_size, per_channel, stated_preprocess

INTERPOLATIONS: dict[int, Interpolation] = {  # by Pillow's numbers
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
CROPPED = {"do_center_crop": True, "crop_size": 224, "resample": 3}
# What the classes take where the file does not say it.
DEFAULTS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": {"size": 224, "resample": 2},
    "DeiTImageProcessor": {"size": 256, **CROPPED},
    "BitImageProcessor": {"size": {"shortest_edge": 224}, **CROPPED, **CLIP},
}
# What the published weights of a type come with; assumed where there is no file.
PUBLISHED: dict[str, dict[str, Any]] = {
    "vit": {"resample": 2},
    "vit_mae": {"resample": 2, **IMAGENET},
    "deit": {"size": 256, **CROPPED, **IMAGENET},
    "dinov2": {"size": {"shortest_edge": 256}, **CROPPED, **IMAGENET},
    "dinov2_with_registers": {"size": {"shortest_edge": 256}, **CROPPED, **IMAGENET},
}


def read_processor(
    config: ViTConfig,
    model_type: str,
    processor: Mapping[str, Any] | None,
    source: str,
    stated: Stated,
    notes: list[str],
) -> Preprocess | None:
    """A `preprocessor_config.json` (None: there is none) -> the evaluation transform.

    None for channels that are not those of pictures.

    Args:
        config: of the model; its image size is what the pictures are brought to.
        model_type: of the model's config.json.
        processor: the file's content.
        source: how messages call the folder.
        stated: what the caller says; it goes before the file.
        notes: what is assumed is added here.

    Raises:
        VitcliError: a filter or a way of cropping that we do not have.
    """
    if not are_pictures(config.num_channels, notes):
        return None
    if processor is None:
        said = _assumed(config, model_type, stated, notes)
    else:
        kind = _kind(model_type, processor, notes)
        said = {**DEFAULTS[kind], **processor}
        if kind == "BitImageProcessor" and isinstance(said["size"], int):
            said["size"] = {"shortest_edge": said["size"]}
    interpolation = INTERPOLATIONS.get(said.get("resample", 2))
    if interpolation is None:
        raise VitcliError(
            f"`{source}` resizes with a filter that is not understood: {said['resample']}",
            hint="`resample` is 0 (nearest), 1 (lanczos), 2 (bilinear) or 3 (bicubic)",
        )
    mean, std = _mean_std(said, config.num_channels)
    base = Preprocess(
        **_geometry(config, said, source, notes),
        interpolation=interpolation,
        mean=mean,
        std=std,
        num_channels=config.num_channels,
        antialias=bool(said.get("antialias", True)),
    )
    if base.image_size != config.image_size:
        base = _fitted(base, config, model_type, notes)
    return stated_preprocess(base, stated.preprocess, base.image_size, config.num_channels)


def write_processor(preprocess: Preprocess) -> dict[str, Any]:
    """The evaluation transform -> the content of `preprocessor_config.json`.

    Raises:
        VitcliError: no processor of transformers comes to the model's size in this way.
    """
    p = preprocess
    rows, cols = p.image_size
    target = (floor(rows / p.crop_fraction), floor(cols / p.crop_fraction))
    if p.resize_size is not None:
        target = (p.resize_size, p.resize_size)
    common: dict[str, Any] = {
        "do_resize": True,
        "resample": next(n for n, name in INTERPOLATIONS.items() if name == p.interpolation),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(p.mean),
        "image_std": list(p.std),
    }
    if p.num_channels == 3:
        common["do_convert_rgb"] = True
    if not p.antialias:
        common["antialias"] = False  # for us; transformers smooths
    size = {"height": target[0], "width": target[1]}
    if p.resize_mode == "squash" and target == p.image_size:
        return {"image_processor_type": "ViTImageProcessor", "size": size, **common}
    common |= {"do_center_crop": True, "crop_size": {"height": rows, "width": cols}}
    if p.resize_size is None and p.crop_fraction != 1:
        common["crop_pct"] = p.crop_fraction  # for us; transformers reads the sizes
    common["crop_rounding"] = p.crop_rounding  # for us; transformers rounds down
    if p.resize_mode == "squash":
        return {"image_processor_type": "DeiTImageProcessor", "size": size, **common}
    if p.resize_mode == "crop" and target[0] == target[1]:
        size = {"shortest_edge": target[0]}
        return {"image_processor_type": "BitImageProcessor", "size": size, **common}
    shape = f"`preprocess.resize_mode` = `{p.resize_mode}`"
    if p.resize_mode == "crop":
        shape += f" to a picture of {rows}x{cols}"
    raise VitcliError(
        f"no image processor of transformers does {shape}",
        hint="`--set preprocess.resize_mode=squash` if stretched pictures will do, or `--to onnx`",
    )


def _kind(model_type: str, processor: Mapping[str, Any], notes: list[str]) -> str:
    """Which class of transformers the file means, in today's spelling."""
    usual = FAMILIES[model_type].processor
    named = processor.get("image_processor_type") or processor.get("feature_extractor_type")
    if not named:
        return usual
    kind = str(named).replace("FeatureExtractor", "ImageProcessor")
    kind = kind.removesuffix("Fast").removesuffix("Pil")
    if kind == "CLIPImageProcessor":  # the same steps and defaults
        return "BitImageProcessor"
    if kind not in DEFAULTS:
        notes.append(f"its image processor `{named}` is read as a `{usual}`")
        return usual
    return kind


def _assumed(
    config: ViTConfig, model_type: str, stated: Stated, notes: list[str]
) -> dict[str, Any]:
    """What the published weights have, at this model's size."""
    said = dict(PUBLISHED[model_type])
    rows, cols = config.image_size
    cropped = rows == cols and "crop_size" in said
    if cropped:  # the same share of the picture
        edge = floor(rows * 256 / 224)
        said["size"] = edge if model_type == "deit" else {"shortest_edge": edge}
        said["crop_size"] = rows
    else:
        said |= {"size": {"height": rows, "width": cols}, "do_center_crop": False}
    if config.num_channels != 3:
        said = {key: value for key, value in said.items() if key not in IMAGENET}
    if not {"mean", "std"} <= set(stated.preprocess):
        mean = "of ImageNet" if "image_mean" in said else "0.5"
        how = "the middle cut out" if cropped else "squashed to the image size"
        notes.append(
            f"no preprocessor_config.json: mean and std {mean}, {how}, as it is with the "
            f"published `{model_type}` weights"
        )
    return said


def _mean_std(
    said: Mapping[str, Any], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean = per_channel(said.get("image_mean", 0.5), channels, "image_mean")
    std = per_channel(said.get("image_std", 0.5), channels, "image_std")
    if not said.get("do_normalize", True):
        mean, std = (0.0,) * channels, (1.0,) * channels
    # Ours divides by 255 first; another factor is a change of mean and std.
    factor = said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) else 1.0
    if abs(factor * 255 - 1) > 1e-6:
        mean = tuple(m / (255 * factor) for m in mean)
        std = tuple(s / (255 * factor) for s in std)
    return mean, std


def _geometry(
    config: ViTConfig, said: Mapping[str, Any], source: str, notes: list[str]
) -> dict[str, Any]:
    """How the processor comes to its size, as settings of a Preprocess."""
    if not said.get("do_resize", True):
        notes.append("its processor does not resize; pictures of another size are squashed")
        return {"image_size": config.image_size, "resize_mode": "squash"}
    size = said["size"]
    sides = size if isinstance(size, Mapping) else {"height": size, "width": size}
    edge = sides.get("shortest_edge")
    target = (edge, edge) if edge is not None else (sides.get("height"), sides.get("width"))
    crop = said["crop_size"] if said.get("do_center_crop") else None
    if crop is not None:
        image = pixels((crop["height"], crop["width"]) if isinstance(crop, Mapping) else crop)
    else:  # the shorter side alone leads to no fixed size: the model's is cut out
        image = config.image_size if edge is not None else pixels(target)
    rows, cols = image
    target = pixels(target)
    settings = {"image_size": image, "resize_mode": "squash" if edge is None else "crop"}
    if target == image and crop is None:
        return settings
    if crop is not None:
        settings["crop_rounding"] = said.get("crop_rounding", "down")
    if target == image:
        return settings
    fraction = said.get("crop_pct") or 0.0
    if fraction and target == (floor(rows / fraction), floor(cols / fraction)):
        return {**settings, "crop_fraction": fraction}
    if target[0] == target[1]:
        return {**settings, "resize_size": target[0]}
    raise VitcliError(
        f"`{source}` squashes to {target[0]}x{target[1]} pixels and cuts out {rows}x{cols}",
        hint="`--set preprocess.resize_mode=…` and the like cannot say that; change its "
        "preprocessor_config.json",
    )


def pixels(value: Any, key: str = "size") -> tuple[int, int]:
    """A number of pixels or a pair -> (Y, X).

    Raises:
        ValueError: neither of these.
    """
    try:
        size = as_size(value)
    except VitcliError as error:
        raise ValueError(f"`{key}` is {value}") from error
    if size is None:
        raise ValueError(f"`{key}` is null")
    return size


def _fitted(base: Preprocess, config: ViTConfig, model_type: str, notes: list[str]) -> Preprocess:
    """The transform where the processor's size is not that of the model's config.json."""
    made, read = (f"{y}x{x}" for y, x in (base.image_size, config.image_size))
    divided = all(side % config.patch_size == 0 for side in base.image_size)
    if FAMILIES[model_type].dino and divided:  # these take any size; Meta's: 518 and 224
        notes.append(
            f"pictures are {made}, as its processor makes them; the positions, made for {read}, "
            "are resampled to that"
        )
        return base
    notes.append(f"its processor makes pictures of {made}, the model reads {read}: made so")
    return base.resized_to(config.image_size)
