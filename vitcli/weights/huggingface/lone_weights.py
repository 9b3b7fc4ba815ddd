"""Describe weights of transformers without a `config.json` by their names and shapes."""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitcli.errors import VitcliError
from vitcli.vit.variants import VARIANTS
from vitcli.weights.overrides import Overrides
from vitcli.weights.timm.read_timm import matching_variant, missing_settings

# A name that only one model type has, the rarest first. Other types need their config.json.
SIGNS = {
    r"embeddings\.distillation_token": "deit",
    r"embeddings\.register_tokens": "dinov2_with_registers",
    r".*layer_scale1\.lambda1": "dinov2",
    r"decoder\..*": "vit_mae",
    r".*(layernorm_before|norm1)\.weight": "vit",
}
MLP = r".*(intermediate\.dense|mlp\.fc1|mlp\.weights_in|mlp\.gate_proj)\.weight"


def describe_weights(
    tensors: Mapping[str, Tensor],
    dropped: Mapping[str, str],
    source: str,
    overrides: Overrides,
    notes: list[str],
) -> dict[str, Any]:
    """Return the content of the missing `config.json`; `notes` gets what was assumed.

    Args:
        tensors: names of transformers -> tensors, with the prefix of the model or without it.
        dropped: the other names of the file.
        source: the name of the file in messages.
        overrides: the caller's settings.

    Raises:
        VitcliError: the model type cannot be told from the names, or the number of heads or the
            image size is missing.
    """
    names = {re.sub(r"^(vit|deit|dinov2|dinov2_with_registers)\.", "", n): t for n, t in tensors.items()}
    kind = next(
        (k for sign, k in SIGNS.items() if any(re.fullmatch(sign, n) for n in [*names, *dropped])), None
    )
    patches = names.get("embeddings.patch_embeddings.projection.weight")
    table = names.get("embeddings.position_embeddings")
    mlp = next((t for n, t in names.items() if re.fullmatch(MLP, n)), None)
    if (
        kind is None
        or patches is None or table is None or mlp is None
        or (patches.ndim, table.ndim, mlp.ndim) != (4, 3, 2)
    ):
        raise VitcliError(
            f"`{source}` has the tensor names of transformers, but they do not determine the model, "
            "and there is no config.json next to it",
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
    notes.append(f"there is no config.json: assumed a `{kind}` model{origin} and its usual epsilon")
    return {
        "model_type": kind,
        "image_size": _image_size(table.shape[1] - 1 - (kind == "deit"), patch, source, overrides),
        "patch_size": patch,
        "num_channels": channels,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": hidden,
        "mlp_ratio": 4 if gated else hidden / width,
        "use_swiglu_ffn": gated,
        "num_register_tokens": names["embeddings.register_tokens"].shape[1]
        if "embeddings.register_tokens" in names
        else 0,
        "qkv_bias": any(n.endswith(("query.bias", "q_proj.bias")) for n in names),
    }
