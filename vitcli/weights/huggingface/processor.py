"""Convert `preprocessor_config.json` to our `Preprocess`, and back.

Three image processors of transformers matter here. They reach the model's size in different ways:

    ViTImageProcessor   resizes to height and width            `squash`
    DeiTImageProcessor  the same, then crops the centre        `squash`, resize_size
    BitImageProcessor   resizes the shorter side, then crops   `crop`, resize_size

Without torchvision, transformers resizes with Pillow, as we do. With torchvision, some pixels
differ by one grey level. If the margin of the centre crop is odd, transformers rounds its half down
and we round it to even (as torchvision and timm do), so the two crops can differ by 1 px.
"""

from collections.abc import Mapping
from math import floor
from typing import Any

from vitcli.config.choices import Interpolation
from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.vit.config import ViTConfig
from vitcli.weights.huggingface.huggingface_names import MODEL_TYPES
from vitcli.weights.huggingface.huggingface_type import (
    CLIP_PROCESSOR,
    CROPPED,
    IMAGENET,
    read_size,
)
from vitcli.weights.overrides import (
    Overrides,
    are_pictures,
    override_preprocess,
    per_channel,
)

INTERPOLATIONS: dict[int, Interpolation] = {  # Pillow's number -> name
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
}
# The values that the classes use if the file does not have them.
DEFAULTS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": {"size": 224, "resample": 2},
    "BeitImageProcessor": {"size": 224, "resample": 3, "crop_size": 224},
    "DeiTImageProcessor": {"size": 256, **CROPPED},
    "BitImageProcessor": CLIP_PROCESSOR,
    "CLIPImageProcessor": CLIP_PROCESSOR,
    "SiglipImageProcessor": {"size": 224, "resample": 3},
    "Siglip2ImageProcessor": {"size": 256, "resample": 2},  # which keeps the shape of the image
    # It scales to 0 … 1 before it resizes, so its pixels are not rounded to grey levels between.
    "DINOv3ViTImageProcessor": {"size": 224, "resample": 2, **IMAGENET},
}


def read_processor(
    config: ViTConfig,
    model_type: str,
    processor: Mapping[str, Any] | None,
    source: str,
    overrides: Overrides,
    notes: list[str],
) -> Preprocess | None:
    """Convert the content of `preprocessor_config.json` to the evaluation transform.

    Args:
        config: the configuration of the model, whose image size the transform returns.
        model_type: the entry in the model's config.json.
        processor: the content of the file; None if there is none.
        source: the name of the folder in messages.
        overrides: the caller's settings, which override the file.
        notes: gets a line for each assumption.

    Returns:
        The transform, or None if the model's channels are not those of images.

    Raises:
        VitcliError: the file has a filter or a crop that is not supported.
    """
    if not are_pictures(config.num_channels, notes):
        return None
    if processor is None:
        values = _published(config, model_type, overrides, notes)
    else:
        kind = _processor_class(model_type, processor, notes)
        values = {**DEFAULTS[kind], **processor}
        if DEFAULTS[kind] is CLIP_PROCESSOR and isinstance(values["size"], int):
            values["size"] = {"shortest_edge": values["size"]}
    interpolation = INTERPOLATIONS.get(values.get("resample", 2))
    if interpolation is None:
        raise VitcliError(
            f"`{source}` resizes with the unsupported filter {values['resample']}",
            hint="set `resample` to 0 (nearest), 1 (lanczos), 2 (bilinear) or 3 (bicubic)",
        )
    mean, std = _mean_std(values, config.num_channels)
    base = Preprocess(
        **_geometry(config, values, source, notes),
        interpolation=interpolation,
        mean=mean,
        std=std,
        num_channels=config.num_channels,
        antialias=bool(values.get("antialias", True)),
    )
    if base.image_size != config.image_size:
        base = _match_model(base, config, model_type, notes)
    return override_preprocess(base, overrides.preprocess, base.image_size, config.num_channels)


def write_processor(p: Preprocess) -> dict[str, Any]:
    """Convert the evaluation transform to the content of `preprocessor_config.json`.

    `check_expressible` must accept the transform `p`. transformers ignores the keys that are marked
    "for us"; reading the file back needs them.
    """
    target = resized_size(p)
    values: dict[str, Any] = {
        "do_resize": True,
        "resample": next(n for n, name in INTERPOLATIONS.items() if name == p.interpolation),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(p.mean),
        "image_std": list(p.std),
    }
    if p.num_channels == 3:
        values["do_convert_rgb"] = True
    if not p.antialias:
        values["antialias"] = False  # for us
    size = {"height": target[0], "width": target[1]}
    if p.resize_mode == "squash" and target == p.image_size:
        return {"image_processor_type": "ViTImageProcessor", "size": size, **values}
    crop = dict(zip(("height", "width"), p.image_size, strict=True))
    values |= {"do_center_crop": True, "crop_size": crop}
    if p.resize_size is None and p.crop_fraction != 1:
        values["crop_pct"] = p.crop_fraction  # for us
    values["crop_rounding"] = p.crop_rounding  # for us
    if p.resize_mode == "squash":
        return {"image_processor_type": "DeiTImageProcessor", "size": size, **values}
    size = {"shortest_edge": target[0]}
    return {"image_processor_type": "BitImageProcessor", "size": size, **values}


def resized_size(p: Preprocess) -> tuple[int, int]:
    """Return the (Y, X) after the resize; for mode `crop`, the one of a square image."""
    if p.resize_size is not None:
        return p.resize_size, p.resize_size
    rows, cols = p.image_size
    return floor(rows / p.crop_fraction), floor(cols / p.crop_fraction)


def _processor_class(model_type: str, processor: Mapping[str, Any], notes: list[str]) -> str:
    """Return today's name of the image processor that the file names."""
    default = MODEL_TYPES[model_type].processor
    named = processor.get("image_processor_type") or processor.get("feature_extractor_type")
    if not named:
        return default
    kind = str(named).replace("FeatureExtractor", "ImageProcessor")
    kind = kind.removesuffix("Fast").removesuffix("Pil")
    if kind not in DEFAULTS:
        notes.append(f"unknown image processor `{named}`: assumed to be a `{default}`")
        return default
    return kind


def _published(
    config: ViTConfig, model_type: str, overrides: Overrides, notes: list[str]
) -> dict[str, Any]:
    """Return the processor of the published weights, for this model's image size."""
    values = dict(MODEL_TYPES[model_type].published)
    rows, cols = config.image_size
    cropped = rows == cols and "crop_size" in values
    if cropped:  # the same fraction of the image
        size = values["size"]
        by_edge = isinstance(size, Mapping)
        edge = floor(rows * (size["shortest_edge"] if by_edge else size) / values["crop_size"])
        values["size"] = {"shortest_edge": edge} if by_edge else edge
        values["crop_size"] = rows
    else:
        values |= {"size": {"height": rows, "width": cols}, "do_center_crop": False}
    if config.num_channels != 3:
        values = {key: value for key, value in values.items() if key not in IMAGENET}
    known = {
        tuple(IMAGENET["image_mean"]): "ImageNet's",
        tuple(CLIP_PROCESSOR["image_mean"]): "CLIP's",
    }
    if not {"mean", "std"} <= set(overrides.preprocess):
        whose = known.get(tuple(values.get("image_mean", ())))
        mean = f"{whose} mean and std" if whose else "mean and std 0.5"
        how = "centre crop" if cropped else "resize to the image size"
        notes.append(
            f"no preprocessor_config.json: assumed {mean} and {how}, as in the published "
            f"`{model_type}` weights"
        )
    return values


def _mean_std(
    values: Mapping[str, Any], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean = per_channel(values.get("image_mean", 0.5), channels, "image_mean")
    std = per_channel(values.get("image_std", 0.5), channels, "image_std")
    if not values.get("do_normalize", True):
        mean, std = (0.0,) * channels, (1.0,) * channels
    # We divide by 255 first. Another factor changes mean and std.
    factor = values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1.0
    if abs(factor * 255 - 1) > 1e-6:
        mean = tuple(m / (255 * factor) for m in mean)
        std = tuple(s / (255 * factor) for s in std)
    return mean, std


def _geometry(
    config: ViTConfig, values: Mapping[str, Any], source: str, notes: list[str]
) -> dict[str, Any]:
    """Return the settings of a Preprocess for the processor's resize and crop."""
    if not values.get("do_resize", True):
        notes.append("the image processor does not resize: images of another size are squashed")
        return {"image_size": config.image_size, "resize_mode": "squash"}
    size = values["size"]
    sides = size if isinstance(size, Mapping) else {"height": size, "width": size}
    edge = sides.get("shortest_edge")
    target = (edge, edge) if edge is not None else (sides.get("height"), sides.get("width"))
    crop = values["crop_size"] if values.get("do_center_crop") else None
    if crop is not None:
        image = read_size((crop["height"], crop["width"]) if isinstance(crop, Mapping) else crop)
    else:  # resizing the shorter side gives no fixed size, so we crop to the model's size
        image = config.image_size if edge is not None else read_size(target)
    rows, cols = image
    target = read_size(target)
    settings = {"image_size": image, "resize_mode": "squash" if edge is None else "crop"}
    if target == image and crop is None:
        return settings
    if crop is not None:
        settings["crop_rounding"] = values.get("crop_rounding", "down")
    if target == image:
        return settings
    fraction = values.get("crop_pct") or 0.0
    if fraction and target == (floor(rows / fraction), floor(cols / fraction)):
        return {**settings, "crop_fraction": fraction}
    if target[0] == target[1]:
        return {**settings, "resize_size": target[0]}
    raise VitcliError(
        f"`{source}` resizes to {target[0]}x{target[1]} px and crops to {rows}x{cols} px, which is "
        "not supported",
        hint="change `size` or `crop_size` in its preprocessor_config.json",
    )


def _match_model(
    base: Preprocess, config: ViTConfig, model_type: str, notes: list[str]
) -> Preprocess:
    """Return the transform for a processor with another size than the model's config.json."""
    made, read = (f"{y}x{x}" for y, x in (base.image_size, config.image_size))
    divided = all(side % config.patch_size == 0 for side in base.image_size)
    if MODEL_TYPES[model_type].any_size and divided:
        resampled = "; its positions are resampled" if config.position == "learned" else ""
        notes.append(
            f"images are {made} px, as in its preprocessor_config.json, not {read} px{resampled}"
        )
        return base
    notes.append(
        f"its preprocessor_config.json makes images of {made} px, and the model reads {read} px: "
        "images are resized to the size of the model"
    )
    return base.resized_to(config.image_size)
