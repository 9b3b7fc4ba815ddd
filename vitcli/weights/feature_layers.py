"""Select the representation that few-shot reads: a pooling, or the output of earlier blocks."""

import re
from dataclasses import replace

from torch import nn

from vitcli.errors import VitcliError
from vitcli.vit import ResNet, VisionTransformer
from vitcli.weights.edit import change_pool, drop_projection
from vitcli.weights.load_report import LoadReport
from vitcli.weights.loaded import LoadedModel

DEFAULT = "pre-logits"
POOLS = ("cls", "mean", "quadrants", "token_mean")
FORMS = (
    "`pre-logits` (the input of the head), `cls`, `mean`, `quadrants`, `token_mean`, `layer:N` "
    "(output of block N), `concat:N` (outputs of the last N blocks)"
)


def set_representation(model: LoadedModel, name: str) -> None:
    """Make `features` the representation `name`, in place; all but `pre-logits` drop the head.

    The result is an ordinary model: `layer:N` keeps the first N blocks, and `concat:N` sets
    `pool_blocks = N`. Both use the model's pooling (class token or mean instead of `map` and
    `distilled`) after the final LayerNorm. They have no pre-logits, which belong to the last block.

    Args:
        name: `pre-logits` (the input of the head), `cls`, `mean`, `quadrants`, `token_mean`,
            `layer:N` or `concat:N`.

    Raises:
        VitcliError: the representation does not exist, or this model does not have it.
    """
    if name == DEFAULT:
        return
    found = re.fullmatch(r"(layer|concat):([1-9]\d{0,3})", name)
    if found is None and name not in POOLS:
        raise VitcliError(f"unknown representation `{name}`", hint=f"use one of {FORMS}")
    network = model.network
    if isinstance(network, ResNet):
        raise VitcliError(f"a ResNet has no representation `{name}`", hint="use `pre-logits`")
    if found is None:
        _drop_pre_logits(model, network)
        change_pool(model, name)
        return
    count, depth = int(found[2]), network.config.depth
    if count > depth:
        raise VitcliError(
            f"representation `{name}`: the model has {depth} blocks",
            hint=f"use `{found[1]}:1` to `{found[1]}:{depth}`",
        )
    _drop_pre_logits(model, network)
    if network.config.pool in ("map", "distilled"):
        change_pool(model, "token" if network.config.class_token else "mean")
    if found[1] == "concat":
        network.config = replace(network.config, num_classes=0, pool_blocks=count)
    else:
        _cut(network, count, model.load_report)


def _drop_pre_logits(model: LoadedModel, network: VisionTransformer) -> None:
    """Drop the head and the hidden layer before it."""
    network.config = replace(
        network.config, num_classes=0, representation_size=None, distillation_head=False
    )
    status = model.load_report.status if model.load_report else {}
    going = ("head.", "head_dist.", "pre_logits.")
    for name in [n for n in model.state_dict() if n.startswith(going)]:
        status[name] = ("dropped", "belongs to another representation")
    network.head, network.head_dist, network.pre_logits = nn.Identity(), None, nn.Identity()
    drop_projection(network, status)
    model.labels, model.head_trained = None, False


def _cut(network: VisionTransformer, depth: int, report: LoadReport | None) -> None:
    """Keep the first `depth` blocks."""
    status = report.status if report else {}
    gone = [f"blocks.{i}." for i in range(depth, network.config.depth)]
    for name in [n for n in network.state_dict() if n.startswith(tuple(gone))]:
        status[name] = ("dropped", f"after block {depth}")
    network.blocks = network.blocks[:depth]
    network.config = replace(network.config, depth=depth, pool_blocks=1)
    for name, table in list(network.state_dict(keep_vars=True).items()):
        if not re.fullmatch(r"block_pos_embed(_[xy])?", name):
            continue
        if depth == 1:
            delattr(network, name)
        else:
            setattr(network, name, nn.Parameter(table.detach()[: depth - 1]))
