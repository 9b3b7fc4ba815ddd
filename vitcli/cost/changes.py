"""What would make a run cheaper: a smaller model, a larger patch, fewer steps, fewer pixels."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vitcli.config.recipe import check, lay_over, nest
from vitcli.config.schema import Recipe, Settings
from vitcli.errors import VitcliError
from vitcli.vit import VARIANTS, ResNetConfig, ViTConfig

SMALLER_SIDE = 0.72  # of the present one: half of the pixels
TOO_SMALL = {"mu"}  # one layer: a test of code more than a model
KEPT = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_dim")


@dataclass(frozen=True)
class Change:
    """One change of a recipe.

    Attributes:
        name: of the kind: `model`, `patch`, `resolution`, `steps`.
        text: the setting that makes it.
        recipe: with it.
    """

    name: str
    text: str
    recipe: Recipe


def changes_of(recipe: Recipe, config: ViTConfig | ResNetConfig) -> Iterator[Change]:
    """Changes that this recipe allows; weights that are there already keep their shape."""
    fresh = recipe.command == "pretrain"
    if isinstance(config, ResNetConfig):
        return
    side, patch = min(config.image_size), config.pixels_per_patch
    if fresh and (name := smaller_variant(recipe)):
        yield from _changed(recipe, "model", f"model.name={name}", {"model.name": name})
    if fresh and config.stem is None and side % (2 * patch) == 0:
        yield from _changed(
            recipe,
            "patch",
            f"model.patch_size={2 * patch}",
            {"model.patch_size": 2 * patch},
        )
    smaller = int(side * SMALLER_SIDE) // patch * patch
    if 2 * patch <= smaller < side and config.image_size[0] == config.image_size[1]:
        yield from _changed(
            recipe, "resolution", f"model.image_size={smaller}", {"model.image_size": smaller}
        )


def smaller_variant(recipe: Recipe) -> str | None:
    """The next smaller size with the same patch; None where the recipe shapes its model itself."""
    section = recipe.model
    name = section.name or ""
    if any(getattr(section, key) is not None for key in KEPT[1:]) or "/" not in name:
        return None
    head, _, patch = name.rpartition("/")
    stem, plus, size = head.rpartition("+")
    if size not in VARIANTS or size in TOO_SMALL:
        return None
    order = sorted(set(VARIANTS) - TOO_SMALL, key=lambda key: _weight(VARIANTS[key]))
    place = order.index(size)
    return f"{stem}{plus}{order[place - 1]}/{patch}" if place else None


def _weight(size: Any) -> int:
    return int(size.depth * size.embed_dim * (4 * size.embed_dim + 2 * size.mlp_dim))


def _changed(recipe: Recipe, name: str, text: str, keys: dict[str, Any]) -> Iterator[Change]:
    """The change, where the recipe stays one that can be checked."""
    settings: Settings = recipe.model_dump(mode="json", exclude_none=True)
    for key, value in keys.items():
        lay_over(settings, nest(key, value))
    if "model" in keys and name == "resolution":
        settings.pop("preprocess", None)
    try:
        yield Change(name, text, check(Recipe, settings, text))
    except VitcliError:
        return
