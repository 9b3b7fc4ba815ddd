"""Describe weights of transformers without a `config.json` by their names and shapes."""

import math
import re
from typing import Any

from vitcli.errors import VitcliError
from vitcli.vit.variants import VARIANTS
from vitcli.weights.find_network import FoundNetwork
from vitcli.weights.overrides import Overrides, matching_variant, missing_settings

# A name that only one model type has, the rarest first. Other types need their config.json.
SIGNS = {
    r"embeddings\.distillation_token": "deit",
    r"embeddings\.register_tokens": "dinov2_with_registers",
    r".*layer_scale1\.lambda1": "dinov2",
    r"decoder\..*": "vit_mae",
    r".*(layernorm_before|norm1)\.weight": "vit",
}
PREFIX = r"^(vit|deit|dinov2|dinov2_with_registers)\."
MLP = r".*(intermediate\.dense|mlp\.fc1|mlp\.weights_in|mlp\.gate_proj)\.weight"


def describe_weights(network: FoundNetwork, source: str, overrides: Overrides) -> dict[str, Any]:
    """Return the content of the missing `config.json`; the network gets a note about it.

    Args:
        source: the name of the file in messages.
        overrides: the caller's settings.

    Raises:
        VitcliError: the model type cannot be told from the names, or the number of heads or the
            image size is missing.
    """
    tensors, dropped, notes = network.tensors, network.dropped, network.notes
    names = {re.sub(PREFIX, "", n): t for n, t in tensors.items()}
    kind = next(
        (k for sign, k in SIGNS.items() if any(re.fullmatch(sign, n) for n in [*names, *dropped])),
        None,
    )
    patches = names.get("embeddings.patch_embeddings.projection.weight")
    table = names.get("embeddings.position_embeddings")
    mlp = next((t for n, t in names.items() if re.fullmatch(MLP, n)), None)
    if (
        kind is None
        or "embeddings.cls_token" not in names  # I-JEPA has none
        or patches is None
        or table is None
        or mlp is None
        or (patches.ndim, table.ndim, mlp.ndim) != (4, 3, 2)
    ):
        raise VitcliError(
            f"`{source}` has tensor names of transformers that do not determine the model, and "
            "there is no config.json next to it",
            hint="put the config.json of the model into its folder",
        )
    layers = [int(m[1]) for n in names if (m := re.search(r"\blayers?\.(\d{1,6})\.", n))]
    width, channels, patch = patches.shape[:3]
    depth, hidden = 1 + max(layers, default=-1), mlp.shape[0]
    gated = any("mlp.weights_in" in n or "mlp.gate_proj" in n for n in names)
    if heads := overrides.num_heads:
        origin = ""
    elif name := matching_variant(width, depth, hidden):
        heads, origin = VARIANTS[name].num_heads, f" with {VARIANTS[name].num_heads} heads"
    elif (width, depth) == (1536, 40):
        heads, origin = 24, " with 24 heads"
    else:
        raise missing_settings(source, ["model.num_heads"])
    count = table.shape[1] - 1 - (kind == "deit")
    registers = names.get("embeddings.register_tokens")
    notes.append(f"there is no config.json: assumed a `{kind}` model{origin} and its usual epsilon")
    return {
        "model_type": kind,
        "image_size": _image_size(count, patch, source, overrides),
        "patch_size": patch,
        "num_channels": channels,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": hidden,
        "mlp_ratio": 4 if gated else hidden / width,
        "use_swiglu_ffn": gated,
        "num_register_tokens": registers.shape[1] if registers is not None else 0,
        "qkv_bias": any(n.endswith(("query.bias", "q_proj.bias")) for n in names),
    }


def _image_size(count: int, patch: int, source: str, overrides: Overrides) -> tuple[int, int]:
    """The (Y, X) of `count` patches: the caller's if it fits, else a square."""
    if (size := overrides.image_size) and (size[0] // patch) * (size[1] // patch) == count:
        return size[0] // patch * patch, size[1] // patch * patch
    side = math.isqrt(max(count, 0))
    if side == 0 or side * side != count:
        raise VitcliError(
            f"`{source}` has positions for {count} patches, which do not form a square grid",
            hint=f"set `--set model.image_size=[Y,X]` in px; a patch is {patch}x{patch} px",
        )
    return side * patch, side * patch
