"""A model without numbers yet, to be given those of a file."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from vitcli.vit import Config, Network, from_config


class _WithoutInit(TorchFunctionMode):
    """Leaves out what `torch.nn.init` does: on the meta device it costs time and does nothing."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def unfilled(config: Config) -> Network:
    """The model of `config` on the meta device: no memory and no random numbers for its weights."""
    with torch.device("meta"), _WithoutInit():
        return from_config(config)
