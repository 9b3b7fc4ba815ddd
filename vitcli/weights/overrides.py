"""What the caller says about a weights file that does not say it itself, or says it otherwise."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, get_args

from vitcli.errors import VitcliError, nearest
from vitcli.preprocess import Preprocess
from vitcli.vit.config import Gelu
from vitcli.vit.hybrid import StemArithmetic

PREPROCESS_KEYS = (
    "resize_mode",
    "resize_size",
    "crop_fraction",
    "crop_rounding",
    "interpolation",
    "antialias",
    "mean",
    "std",
)
PICTURES = (1, 3)  # channels of what can be read as pictures: grey and RGB
MODEL_KEYS = (
    "image_size",
    "patch_size",
    "num_heads",
    "norm_eps",
    "gelu",
    "pool",
    "position_resize",
    "stem_arithmetic",
)


@dataclass(frozen=True)
class Stated:
    """Settings from `--set model.…`, `--set preprocess.…`, `--labels`; None: nothing was said."""

    image_size: tuple[int, int] | None = None
    num_heads: int | None = None
    norm_eps: float | None = None
    gelu: str | None = None
    stem_arithmetic: StemArithmetic | None = None
    pool: str | None = None
    labels: tuple[str, ...] | None = None
    preprocess: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.gelu is not None and self.gelu not in get_args(Gelu):
            raise VitcliError(f"`model.gelu` is `{self.gelu}`", hint="`exact` or `tanh`")
        if self.stem_arithmetic not in (None, *get_args(StemArithmetic)):
            raise VitcliError(
                f"`model.stem_arithmetic` is `{self.stem_arithmetic}`", hint="`google` or `timm`"
            )
        if self.num_heads is not None:
            if not _is_count(self.num_heads):
                raise VitcliError(
                    f"`model.num_heads` is {self.num_heads}", hint="a number from 1 on"
                )
            object.__setattr__(self, "num_heads", int(self.num_heads))  # numpy's is no JSON
        if self.norm_eps is not None and not 0 < self.norm_eps < 1:
            raise VitcliError(
                f"`model.norm_eps` is {self.norm_eps}", hint="a small number above 0, such as 1e-6"
            )
        for key in self.preprocess:
            if key not in PREPROCESS_KEYS:
                near = nearest(key, PREPROCESS_KEYS)
                meant = f"`preprocess.{near}` may be meant" if near else None
                known = ", ".join(f"`preprocess.{k}`" for k in PREPROCESS_KEYS)
                raise VitcliError(f"no setting `preprocess.{key}`", hint=meant or known)


def as_size(value: Any, key: str = "model.image_size") -> tuple[int, int] | None:
    """An int or a pair (Y, X) -> (Y, X); None stays None.

    Raises:
        VitcliError: neither of these.
    """
    if value is None:
        return None
    sides = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(sides) != 2 or not all(_is_count(side) for side in sides):
        raise VitcliError(f"`{key}` is `{value}`", hint="a number of pixels, or [rows, columns]")
    return int(sides[0]), int(sides[1])


def _is_count(value: Any) -> bool:
    """Whether `value` is a whole number from 1 on."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def are_pictures(channels: int, notes: list[str]) -> bool:
    """Whether a model of so many channels reads pictures; a note where it does not."""
    if channels not in PICTURES:
        notes.append(f"{channels} channels: not pictures, so there is no preprocessing")
    return channels in PICTURES


def per_channel(value: Any, channels: int, key: str) -> tuple[float, ...]:
    """A number or a list of them -> one per channel.

    Raises:
        VitcliError: another count than 1 or the number of channels.
    """
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    try:
        numbers = tuple(float(v) for v in values)
    except (TypeError, ValueError) as error:
        raise VitcliError(f"`{key}` is `{value}`", hint="a number, or a list of them") from error
    if len(numbers) not in (1, channels):
        raise VitcliError(
            f"`{key}` has {len(numbers)} values, the model {channels} channels",
            hint="one number for all, or a list with one for each channel",
        )
    return numbers * channels if len(numbers) == 1 else numbers


def stated_preprocess(
    base: Preprocess | None, stated: Mapping[str, Any], image_size: tuple[int, int], channels: int
) -> Preprocess | None:
    """`base` with what was stated laid over it.

    None while mean or std are not known, and for channels that no picture has.

    Raises:
        VitcliError: a value that is none.
    """
    values = dict(stated)
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
            f"these preprocessing settings do not fit: {error}", hint="change `--set preprocess.…`"
        ) from error
