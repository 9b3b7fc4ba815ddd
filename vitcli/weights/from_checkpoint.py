"""Build a `LoadedModel` from the tensors and facts of a weights file."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vitcli.config.choices import Resize
from vitcli.errors import VitcliError, quoted
from vitcli.vit import Config, Network, ResNetConfig, VisionTransformer, ViTConfig, from_config
from vitcli.vit.position import DEFAULT_RESIZE
from vitcli.weights.edit import resize, set_position_resize
from vitcli.weights.load_report import LoadReport
from vitcli.weights.loaded import LoadedModel
from vitcli.weights.store import Checkpoint

Shapes = dict[str, tuple[int, ...]]
NUM_SHOWN = 6  # tensors of each kind that an error names


def build_model(
    checkpoint: Checkpoint,
    source: str,
    *,
    image_size: tuple[int, int] | None = None,
    position_resize: Resize = DEFAULT_RESIZE,
) -> LoadedModel:
    """Build the model of `checkpoint` in evaluation mode, resized to `image_size` if it is given.

    Raises:
        VitcliError: tensors are missing, unknown or of another shape; the error names them.
    """
    config = checkpoint.config
    report = LoadReport(source, checkpoint.layout, notes=list(checkpoint.notes))
    activation = checkpoint.activation
    if config.num_classes == 1 and activation == "softmax" and checkpoint.head_trained:
        # The softmax of one number is 1. A head of one output is trained with a sigmoid.
        activation = "sigmoid"
        report.notes.append("one output: its probability is the sigmoid of the logit")
    shapes = {name: tuple(t.shape) for name, t in checkpoint.tensors.items()}
    report.shapes = checkpoint.dropped_shapes | shapes
    check_depth(config, len(shapes), source)
    network = empty_network(config)
    if isinstance(network, VisionTransformer):
        set_position_resize(network, position_resize)
    tensors = _as_float32(checkpoint.tensors, source)
    expected = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    check_shapes({name: tuple(t.shape) for name, t in tensors.items()}, expected, source)
    # `assign` takes the tensors of the file as they are, memory-mapped: nothing is copied.
    network.load_state_dict(tensors, assign=True)
    network.requires_grad_(True)
    for name in expected:
        dtype = checkpoint.tensors[name].dtype
        report.status[name] = ("loaded", "" if dtype == torch.float32 else f"from {dtype}")
    for name, reason in checkpoint.dropped.items():
        report.status[name] = ("dropped", reason)
    model = LoadedModel(
        network,
        labels=checkpoint.labels,
        preprocess=checkpoint.preprocess,
        head_activation=activation,
        temperature=checkpoint.temperature,
        thresholds=checkpoint.thresholds,
        head_trained=checkpoint.head_trained and config.num_classes > 0,
        load_report=report,
        split_record=checkpoint.split_record,
        target_scale=checkpoint.target_scale,
        decoder=checkpoint.decoder,
    )
    if image_size is not None:
        resize(model, image_size)
    return model.eval()


class _SkipInit(TorchFunctionMode):
    """Skip `torch.nn.init`, which has no effect on the meta device but takes time."""

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


def empty_network(config: Config) -> Network:
    """Build the network of `config` on the meta device, without memory and random numbers."""
    with torch.device("meta"), _SkipInit():
        return from_config(config)


def check_depth(config: Config, num_tensors: int, source: str) -> None:
    """Raise a VitcliError if a damaged file claims more blocks than it has tensors."""
    stem = config.layers if isinstance(config, ResNetConfig) else config.stem or ()
    blocks = sum(stem) + (config.depth if isinstance(config, ViTConfig) else 0)
    if blocks > num_tensors:
        raise VitcliError(
            f"`{source}` claims to have {blocks} blocks, but it holds {num_tensors} tensors",
            hint="the file is damaged: copy or download it again",
        )


def check_shapes(
    found: Shapes, expected: Shapes, source: str, what: str = "a plain Vision Transformer"
) -> None:
    """Raise one VitcliError that names every tensor which does not fit the network."""
    groups = {
        "missing": [n for n in expected if n not in found],
        "not part of the model": [n for n in found if n not in expected],
        "of another shape": [
            f"{n} is {found[n]}, not {expected[n]}"
            for n in expected
            if n in found and found[n] != expected[n]
        ],
    }
    problems = [f"{kind}: {quoted(names, NUM_SHOWN)}" for kind, names in groups.items() if names]
    if problems:
        raise VitcliError(
            f"`{source}` does not fit {what}; {'; '.join(problems)}",
            hint="check that the file has this architecture and is complete",
        )


def _as_float32(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    if wrong := [f"{n} ({t.dtype})" for n, t in tensors.items() if not t.is_floating_point()]:
        raise VitcliError(
            f"`{source}` holds tensors that are not floating-point: {quoted(wrong, 5)}",
            hint="quantised weights are not supported: use the float32 file",
        )
    return {name: tensor.float() for name, tensor in tensors.items()}
