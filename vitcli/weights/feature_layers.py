"""Which of a model's inner values are its features: the class token, a mean, an earlier block."""

import re
from dataclasses import replace

from torch import nn

from vitcli.errors import VitcliError
from vitcli.vit import ResNet, VisionTransformer
from vitcli.weights.edit import change_pool
from vitcli.weights.load_report import LoadReport
from vitcli.weights.loaded import LoadedModel

DEFAULT = "pre-logits"
POOLS = ("cls", "mean", "quadrants", "token_mean")
FORMS = (
    "`pre-logits` (what the head reads), `cls`, `mean`, `quadrants`, `token_mean`, `layer:N` (the "
    "output of block N), `concat:N` (those of the last N blocks)"
)


def represent(model: LoadedModel, name: str) -> None:
    """Let `features` be the representation `name`, in place; the head goes, unless it is the same.

    A classifier on any of these is an ordinary model. Of `layer:N` it has the first N blocks, and
    costs so much less; `concat:N` is `pool_blocks = N`. Both are pooled as the model pools (with
    attention or two tokens: the class token if there is one, else the mean), through the final
    LayerNorm and without pre-logits, which belong to the last block.

    Args:
        name: `pre-logits` (what the head reads), `cls`, `mean`, `quadrants`, `token_mean`,
            `layer:N` or `concat:N`.

    Raises:
        VitcliError: no such representation, or this model does not have it.
    """
    if name == DEFAULT:
        return
    found = re.fullmatch(r"(layer|concat):([1-9]\d{0,3})", name)
    if found is None and name not in POOLS:
        raise VitcliError(f"no representation `{name}`", hint=f"there are {FORMS}")
    network = model.network
    if isinstance(network, ResNet):
        raise VitcliError(
            f"a ResNet has no representation `{name}`", hint="`pre-logits` is what its head reads"
        )
    if found is None:
        _drop_pre_logits(model, network)
        change_pool(model, name)
        return
    count, depth = int(found[2]), network.config.depth
    if count > depth:
        raise VitcliError(
            f"representation `{name}`: the model has {depth} blocks",
            hint=f"`{found[1]}:1` to `{found[1]}:{depth}`",
        )
    _drop_pre_logits(model, network)
    if network.config.pool in ("map", "distilled"):
        change_pool(model, "token" if network.config.class_token else "mean")
    if found[1] == "concat":
        network.config = replace(network.config, num_classes=0, pool_blocks=count)
    else:
        _cut(network, count, model.load_report)


def _drop_pre_logits(model: LoadedModel, network: VisionTransformer) -> None:
    """Without the head and the hidden layer before it, which belong to another representation."""
    network.config = replace(
        network.config, num_classes=0, representation_size=None, distillation_head=False
    )
    fates = model.load_report.fates if model.load_report else {}
    going = ("head.", "head_dist.", "pre_logits.")
    for name in [n for n in model.state_dict() if n.startswith(going)]:
        fates[name] = ("dropped", "belongs to another representation")
    network.head, network.head_dist, network.pre_logits = nn.Identity(), None, nn.Identity()
    model.labels, model.head_trained = None, False


def _cut(network: VisionTransformer, depth: int, report: LoadReport | None) -> None:
    """Keep the first `depth` blocks."""
    fates = report.fates if report else {}
    gone = [f"blocks.{i}." for i in range(depth, network.config.depth)]
    for name in [n for n in network.state_dict() if n.startswith(tuple(gone))]:
        fates[name] = ("dropped", f"behind block {depth}")
    network.blocks = network.blocks[:depth]
    network.config = replace(network.config, depth=depth, pool_blocks=1)
    for name, table in list(network.state_dict(keep_vars=True).items()):
        if not re.fullmatch(r"block_pos_embed(_[xy])?", name):
            continue
        if depth == 1:
            delattr(network, name)
        else:
            setattr(network, name, nn.Parameter(table.detach()[: depth - 1]))
