"""One value that a layout of weights cannot hold; `expressible.py` lists them."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from vitcli.vit import ViTConfig
from vitcli.weights.loaded import LoadedModel


def _always(_: Any) -> bool:
    return True


@dataclass(frozen=True)
class Limit:
    """A value that a layout cannot hold.

    Attributes:
        key: the property: `model.`, `resnet.` or `preprocess.` and a field of ViTConfig,
            ResNetConfig or Preprocess; else an attribute of the model.
        text: for an error, the reason; for a note, the whole sentence.
        only: the values that the layout holds; with () the limit applies to every value.
        when: restricts the limit to some owners of the property.
        remedy: the option that gives a model which the layout can hold.
        effect: the effect of `remedy`.
    """

    key: str
    text: str
    only: Collection[Any] = ()
    when: Callable[[Any], bool] = _always
    remedy: str = ""
    effect: str = "changes the logits slightly"

    def applies(self, model: LoadedModel) -> bool:
        """Return True if `model` has the property, with a value that the layout cannot hold."""
        owner, value = owner_and_value(model, self.key)
        return owner is not None and value not in self.only and self.when(owner)


class Refused(Limit):
    """A limit that makes writing the model an error."""


class Lost(Limit):
    """A limit that the user gets a note about: the model is written without this value."""


def owner_and_value(model: LoadedModel, key: str) -> tuple[Any, Any]:
    """Return the object that has the property `key` (None if the model has none), and its value."""
    part, _, field = key.partition(".")
    owner: Any = model
    if part in ("model", "resnet"):
        owner = model.config if isinstance(model.config, ViTConfig) == (part == "model") else None
    elif field:
        owner = model.preprocess
    return owner, getattr(owner, field or part, None)
