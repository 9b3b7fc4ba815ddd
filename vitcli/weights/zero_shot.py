"""Zero-shot heads: text embeddings of the class names are the rows of the head.

The head of CLIP (Radford et al., 2021) and SigLIP (Zhai et al., 2023) is scale * cosine + bias, of
the image embedding and each text embedding. vitcli has no text towers: the embeddings come from a
file that transformers or open_clip made.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vitcli.errors import VitcliError, quoted
from vitcli.files import parse_json
from vitcli.vit import VisionTransformer
from vitcli.weights.load_report import LoadReport
from vitcli.weights.loaded import LoadedModel
from vitcli.weights.store import load_weights, read_metadata, readable_values

EMBEDDINGS, SCALE, BIAS = "text_embeddings", "logit_scale", "logit_bias"
CONTENT = (
    f"save a tensor `{EMBEDDINGS}` of (classes, width), optionally `{SCALE}` and `{BIAS}`, and the "
    "class names as a JSON list in the metadata `labels`; see docs/how-to/weights.md"
)
CLIP_SCALE = 100.0  # the limit of CLIP's training, which its published models reach
SMALLEST_SCALE = 10.0  # a smaller number is probably the logarithm, as the models store it


def set_zero_shot_head(
    model: LoadedModel, path: str | Path, labels: tuple[str, ...] | None = None
) -> None:
    """Give `model` a zero-shot head in place, from the text embeddings in the file `path`.

    Args:
        path: a safetensors file with `text_embeddings` (K, E), and perhaps the numbers
            `logit_scale` (a factor) and `logit_bias`, which makes the head a sigmoid (SigLIP).
        labels: class names; None takes them from the metadata `labels` of the file.

    Raises:
        VitcliError: the file cannot be read, or it does not fit the model.
    """
    network = model.network
    report = model.load_report or LoadReport(str(path), "vitcli")
    tensors = load_weights(path)
    rows = _embeddings(tensors, path)
    width = network.config.head_dim if isinstance(network, VisionTransformer) else None
    if not isinstance(network, VisionTransformer) or rows.shape[1] != width:
        raise VitcliError(
            f"the text embeddings in `{path}` have the width {rows.shape[1]}, and the image "
            f"embeddings of `{report.source}` {width or network.config.feature_dim}",
            hint="make them with the text tower of this model",
        )
    scale, bias = _number(tensors, SCALE, path), _number(tensors, BIAS, path)
    if scale is None:
        report.notes.append(f"no `{SCALE}` in `{path}`: assumed {CLIP_SCALE:g}, as in CLIP")
        scale = CLIP_SCALE
    elif scale < SMALLEST_SCALE:
        report.notes.append(
            f"`{SCALE}` is {scale:.4g}: a factor is expected, `model.logit_scale.exp()`"
        )
    names = labels or _labels(path)
    if len(names) != len(rows):
        raise VitcliError(
            f"`{path}` has {len(rows)} text embeddings, and there are {len(names)} class names",
            hint="give one name per row: `labels` in the metadata of the file, or `--labels FILE`",
        )
    network.config = replace(
        network.config, num_classes=len(rows), head_norm=True, distillation_head=False
    )
    network.head, network.head_dist = nn.Linear(rows.shape[1], len(rows)), None
    with torch.no_grad():
        network.head.weight.copy_(scale * rows)
        network.head.bias.fill_(bias or 0.0)
    for name in ("head.weight", "head.bias"):
        report.status[name] = ("new", f"zero-shot, {len(rows)} classes")
    report.notes.append(f"zero-shot head for {len(rows)} classes from `{path}`")
    model.labels, model.head_trained = names, True
    model.head_activation = "softmax" if bias is None else "sigmoid"
    model.temperature, model.thresholds = 1.0, None


def _embeddings(tensors: dict[str, Tensor], path: str | Path) -> Tensor:
    """(K, E) float32 rows of length 1."""
    rows = tensors.get(EMBEDDINGS)
    if rows is None or rows.ndim != 2 or not rows.numel() or not rows.is_floating_point():
        shown = quoted((f"{name} {tuple(t.shape)}" for name, t in tensors.items()), 4)
        raise VitcliError(f"`{path}` holds no text embeddings, but {shown}", hint=CONTENT)
    rows = rows.float()
    lengths = rows.norm(dim=1, keepdim=True)  # (K, 1)
    if not (rows.isfinite().all() and lengths.all()):
        raise VitcliError(f"text embeddings in `{path}` are zero or not finite", hint=CONTENT)
    return rows / lengths


def _number(tensors: dict[str, Tensor], name: str, path: str | Path) -> float | None:
    """The number `name` in the file; None if it has none."""
    if (value := tensors.get(name)) is None:
        return None
    if value.numel() != 1 or not value.isfinite().all():
        raise VitcliError(f"`{name}` in `{path}` is not one finite number", hint=CONTENT)
    return float(value)


def _labels(path: str | Path) -> tuple[str, ...]:
    """The class names in the metadata of the file."""
    if (text := read_metadata(path).get("labels")) is None:
        raise VitcliError(
            f"`{path}` has no class names", hint=f"add `--labels FILE`, or: {CONTENT}"
        )
    with readable_values("list of class names", path, CONTENT):
        names = parse_json(text)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("it is no JSON list of names")
    return tuple(names)
