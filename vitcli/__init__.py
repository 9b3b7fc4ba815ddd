"""Train, evaluate and use Vision Transformers.

The public names are imported when they are first used, so that `import vitcli` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from vitcli.commands.predict import predict
    from vitcli.errors import VitcliError
    from vitcli.evals.fewshot.protocol import fewshot
    from vitcli.vit.config import ViTConfig
    from vitcli.vit.model import VisionTransformer
    from vitcli.weights.load import load_model
    from vitcli.weights.loaded import LoadedModel, create_model

_HOMES = {
    "LoadedModel": "vitcli.weights.loaded",
    "VisionTransformer": "vitcli.vit.model",
    "ViTConfig": "vitcli.vit.config",
    "VitcliError": "vitcli.errors",
    "create_model": "vitcli.weights.loaded",
    "fewshot": "vitcli.evals.fewshot.protocol",
    "load_model": "vitcli.weights.load",
    "predict": "vitcli.commands.predict",
}

__all__ = [
    "LoadedModel",
    "ViTConfig",
    "VisionTransformer",
    "VitcliError",
    "create_model",
    "fewshot",
    "load_model",
    "predict",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module `vitcli` has no attribute `{name}`")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
