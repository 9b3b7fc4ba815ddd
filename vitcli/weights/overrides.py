"""The caller's settings that replace or complete those of a weights file."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, get_args

from vitcli.config.choices import Gelu, StemArithmetic
from vitcli.errors import VitcliError, unknown
from vitcli.preprocess import Preprocess
from vitcli.vit.variants import VARIANTS

PREPROCESS_KEYS = (
    "resize_mode",
    "resize_size",
    "crop_fraction",
    "crop_rounding",
    "interpolation",
    "antialias",
    "border",
    "mean",
    "std",
    "window",
)
PICTURES = (1, 3)  # numbers of channels that an image file can give: grey and RGB
MODEL_KEYS = (
    "image_size",
    "patch_size",
    "num_heads",
    "norm_eps",
    "gelu",
    "pool",
    "position_resize",
    "stem_arithmetic",
    "checkpoint_key",
    "base_model",
    "text_embeddings",
)


@dataclass(frozen=True)
class Overrides:
    """Settings from `--set model.…`, `--set preprocess.…` and `--labels`; None if not set."""

    image_size: tuple[int, int] | None = None
    num_heads: int | None = None
    norm_eps: float | None = None
    gelu: str | None = None
    stem_arithmetic: StemArithmetic | None = None
    pool: str | None = None
    labels: tuple[str, ...] | None = None
    checkpoint_key: str | None = None
    base_model: str | None = None
    preprocess: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.gelu is not None and self.gelu not in get_args(Gelu):
            known = ", ".join(f"`{kind}`" for kind in get_args(Gelu))
            raise VitcliError(f"`model.gelu` is `{self.gelu}`", hint=f"use one of {known}")
        if self.stem_arithmetic not in (None, *get_args(StemArithmetic)):
            raise VitcliError(
                f"`model.stem_arithmetic` is `{self.stem_arithmetic}`",
                hint="use `google` or `timm`",
            )
        if self.num_heads is not None:
            if not _is_count(self.num_heads):
                raise VitcliError(
                    f"`model.num_heads` is {self.num_heads}", hint="use an integer from 1 on"
                )
            object.__setattr__(self, "num_heads", int(self.num_heads))  # JSON has no numpy
        if self.norm_eps is not None and not 0 < self.norm_eps < 1:
            raise VitcliError(
                f"`model.norm_eps` is {self.norm_eps}",
                hint="use a number in (0, 1), e.g. 1e-6",
            )
        for key in self.preprocess:
            if key not in PREPROCESS_KEYS:
                raise unknown("setting", key, PREPROCESS_KEYS, prefix="preprocess.")


def refuse_file_keys(reason: str, **given: str | None) -> None:
    """Raise a VitcliError if one of the settings about the parts of a file is given."""
    for key, value in given.items():
        if value is not None:
            raise VitcliError(f"`model.{key}` is set, but {reason}", hint=f"remove `model.{key}`")


def as_size(value: Any, key: str = "model.image_size") -> tuple[int, int] | None:
    """(Y, X) from an int or a pair; None stays None. Other values raise a VitcliError."""
    if value is None:
        return None
    sides = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(sides) != 2 or not all(_is_count(side) for side in sides):
        raise VitcliError(f"`{key}` is `{value}`", hint="use a number of pixels or [Y, X]")
    return int(sides[0]), int(sides[1])


def one_image_size(model: Any, preprocess: Any) -> tuple[int, int] | None:
    """The image size that `[model]` or `[preprocess]` sets.

    Raises:
        VitcliError: they contradict each other.
    """
    one, two = as_size(model), as_size(preprocess, "preprocess.image_size")
    if one is not None and two is not None and one != two:
        raise VitcliError(
            f"`model.image_size` is {one}, but `preprocess.image_size` is {two}",
            hint="set one of the two",
        )
    return one or two


def _is_count(value: Any) -> bool:
    """Return True if `value` is an integer from 1 on."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def are_pictures(channels: int, notes: list[str]) -> bool:
    """Return True if images can have this number of channels; otherwise add a note."""
    if channels not in PICTURES:
        notes.append(
            f"image files have 1 or 3 channels, the model {channels}: no preprocessing is known"
        )
    return channels in PICTURES


def per_channel(value: Any, channels: int, key: str) -> tuple[float, ...]:
    """Return one number per channel, from a number or a list; other values raise a VitcliError."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    try:
        numbers = tuple(float(v) for v in values)
    except (TypeError, ValueError) as error:
        raise VitcliError(f"`{key}` is `{value}`", hint="use a number or a list") from error
    if len(numbers) not in (1, channels):
        raise VitcliError(
            f"`{key}` has {len(numbers)} values, the model {channels} channels",
            hint="use one number, or a list with one number per channel",
        )
    return numbers * channels if len(numbers) == 1 else numbers


def override_preprocess(
    base: Preprocess | None,
    overrides: Mapping[str, Any],
    image_size: tuple[int, int],
    channels: int,
) -> Preprocess | None:
    """Return `base` with the settings in `overrides` replaced.

    Returns None if mean or std is unknown, or if the channels are not grey or RGB. Raises a
    VitcliError for an invalid value.
    """
    values = dict(overrides)
    for key in ("mean", "std"):
        if key in values:
            values[key] = per_channel(values[key], channels, f"preprocess.{key}")
    if "image_size" in values:
        values["image_size"] = as_size(values["image_size"], "preprocess.image_size")
    if base is None:
        if "mean" not in values or "std" not in values or channels not in PICTURES:
            return None
        values = {"image_size": image_size, "num_channels": channels, **values}
    try:
        return Preprocess(**values) if base is None else replace(base, **values)
    except (TypeError, ValueError) as error:
        raise VitcliError(
            f"these preprocessing settings do not fit: {error}",
            hint="change `--set preprocess.…`",
        ) from error


def missing_settings(source: str, keys: list[str]) -> VitcliError:
    """Return the error for a file that lacks the settings `keys` and matches no variant."""
    example = {"model.num_heads": "4", "model.image_size": "224"}
    settings = " ".join(f"--set {key}={example.get(key, '0.5')}" for key in keys)
    return VitcliError(
        f"`{source}` does not contain {', '.join(f'`{key}`' for key in keys)}, there is no "
        "config.json in its folder, and its shapes match no variant",
        hint=f"add for example `{settings}`",
    )


def matching_variant(embed_dim: int, depth: int, mlp_dim: int) -> str | None:
    """Return the published variant of these sizes. Files of our own sizes have a header."""
    for name, v in VARIANTS.items():
        sizes = v.embed_dim, v.depth, v.mlp_dim
        if sizes == (embed_dim, depth, mlp_dim) and name not in ("Pico", "Nano", "mu"):
            return name
    return None
