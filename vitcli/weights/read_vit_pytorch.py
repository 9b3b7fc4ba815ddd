"""Read `ViT` and `SimpleViT` of lucidrains' vit-pytorch, and SimpleViT with register tokens.

Versions differ: in 0.35 the patch projection has no LayerNorms; up to 1.2 the
blocks have wrappers (`fn.`) and the final norm belongs to the head. All are read. Source:
vit-pytorch 0.35.8, 1.2.0 and 1.26.14, vit.py and simple_vit.py.
"""

import math
import re
from dataclasses import replace

import torch
from torch import Tensor

from vitcli.errors import VitcliError, quoted
from vitcli.vit.config import ViTConfig
from vitcli.vit.position import fixed_table
from vitcli.weights.find_network import FoundNetwork
from vitcli.weights.overrides import Overrides
from vitcli.weights.store import Checkpoint
from vitcli.weights.timm.read_timm import read_timm
from vitcli.weights.timm.timm_names import KNOWN, timm_name

HEAD_WIDTH = 64  # the default of `dim_head`, which no tensor shows
NAMES = {  # theirs -> ours
    r"to_patch_embedding\.": "patch_embed.",
    "pos_embedding": "pos_embed",
    "register_tokens": "reg_token",
    r"transformer\.norm\.": "norm.",
    r"mlp_head\.0\.": "norm.",  # the norm of one token is the same before and after pooling
    r"linear_head\.0\.": "fc_norm.",
    r"(mlp|linear)_head\.(1\.)?(?=weight|bias)": "head.",
    r"transformer\.layers\.(\d+)\.0\.(fn\.)?to_qkv\.": r"blocks.\1.attn.qkv.",
    r"transformer\.layers\.(\d+)\.0\.(fn\.)?to_out\.(0\.)?(?=weight|bias)": r"blocks.\1.attn.proj.",
    r"transformer\.layers\.(\d+)\.0\.norm\.": r"blocks.\1.norm1.",
    r"transformer\.layers\.(\d+)\.1\.(norm|net\.0)\.": r"blocks.\1.norm2.",
    r"transformer\.layers\.(\d+)\.1\.(fn\.net\.0|net\.1)\.": r"blocks.\1.mlp.fc1.",
    r"transformer\.layers\.(\d+)\.1\.(fn\.net\.3|net\.[34])\.": r"blocks.\1.mlp.fc2.",
}
WORKING = "`ViT`, `SimpleViT` and `simple_vit_with_register_tokens` of vit-pytorch are supported"


def read_vit_pytorch(network: FoundNetwork, source: str, overrides: Overrides) -> Checkpoint:
    """Convert a network in the layout of vit-pytorch to a checkpoint.

    Raises:
        VitcliError: the file holds another architecture of vit-pytorch, or as `read_timm`.
    """
    found: dict[str, Tensor] = {}
    foreign = []
    for theirs, tensor in network.tensors.items():
        name = timm_name(theirs, NAMES)
        if name in found or not (KNOWN.fullmatch(name) or re.match(r"patch_embed\.[123]\.", name)):
            foreign.append(theirs)
        found[name] = tensor
    if foreign:
        raise VitcliError(
            f"`{source}` is another architecture of vit-pytorch; not part of its `ViT` and "
            f"`SimpleViT`: {quoted(foreign, 6)}",
            hint=WORKING,
        )
    _rename_patches(found, source)
    _shape_tokens(found)
    notes: list[str] = []
    heads, norm_eps = overrides.num_heads, overrides.norm_eps or 1e-5  # torch's default
    heads = heads or _assumed_heads(found, source, notes)
    if "cls_token" in found and overrides.pool not in (None, "token", "cls", "tok"):
        notes.append("vit-pytorch's pool `mean` averages the class token too, this one does not")
    settings = replace(overrides, num_heads=heads, norm_eps=norm_eps)
    checkpoint = read_timm(replace(network, layout="timm", tensors=found), source, None, settings)
    config = checkpoint.config
    if isinstance(config, ViTConfig) and config.position == "none":  # SimpleViT
        config = replace(config, position="sincos2d", position_covers_prefix=False)
        checkpoint.config = config
        checkpoint.tensors["pos_embed"] = fixed_table(config)
        checkpoint.position_resize = "computed"
    checkpoint.layout = "vit_pytorch"
    checkpoint.notes[:0] = notes
    return checkpoint


def _rename_patches(found: dict[str, Tensor], source: str) -> None:
    """Give the patch projection and its norms our names and shapes, in place."""
    place = "patch_embed.2." if "patch_embed.2.weight" in found else "patch_embed.1."
    kernel = found.pop(f"{place}weight")  # (D, P*P*C)
    values = kernel.shape[1] if kernel.ndim == 2 else 0
    # Squares times 3 are no squares, so at most one number of channels fits.
    channels = next((c for c in (3, 1) if values and math.isqrt(values // c) ** 2 * c == values), 0)
    if not channels:
        raise VitcliError(
            f"`{source}` has patches of {values} values, which are no square of 1 or 3 channels",
            hint="use a model with square patches of grey or RGB images",
        )
    side = math.isqrt(values // channels)
    kernel = kernel.reshape(-1, side, side, channels).permute(0, 3, 1, 2)  # (D, C, P, P)
    found["patch_embed.proj.weight"] = kernel.contiguous()
    ours = {place: "patch_embed.proj."}
    if place == "patch_embed.2.":
        ours |= {
            "patch_embed.1.": "patch_embed.norm_pixels.",
            "patch_embed.3.": "patch_embed.norm.",
        }
    for theirs, name in ours.items():
        for end in ("weight", "bias"):
            if theirs + end in found:
                found[name + end] = found.pop(theirs + end)


def _shape_tokens(found: dict[str, Tensor]) -> None:
    """Give tokens and positions a batch of one, and the output projections a bias, in place."""
    if "cls_token" in found and not found["cls_token"].numel():  # pool `mean` has no class token
        del found["cls_token"]
    for name in ("cls_token", "pos_embed", "reg_token"):
        if name in found and found[name].ndim == 2:
            found[name] = found[name][None]
    for name in [n for n in found if n.endswith("attn.qkv.weight")]:
        place = name.removesuffix("qkv.weight") + "proj."
        width = found[name].shape[-1]
        # One head of the full width has no output projection.
        found.setdefault(f"{place}weight", torch.eye(width))
        found.setdefault(f"{place}bias", torch.zeros(width))


def _assumed_heads(found: dict[str, Tensor], source: str, notes: list[str]) -> int | None:
    """Return the number of heads of the default width, or one head without an output projection."""
    qkv = found.get("blocks.0.attn.qkv.weight")
    if qkv is None or qkv.ndim != 2:
        return None  # the comparison of names reports it
    inner, width = qkv.shape[0] // 3, qkv.shape[1]
    if inner != width:
        raise VitcliError(
            f"`{source}` has attention of width {inner} in tokens of width {width}, which is not "
            "supported",
            hint="use a model with `heads` x `dim_head` = `dim`",
        )
    if inner % HEAD_WIDTH:
        return None  # `read_timm` looks for a variant, then asks for the setting
    notes.append(
        f"assumed {inner // HEAD_WIDTH} heads of width {HEAD_WIDTH}, vit-pytorch's default (change "
        "with `--set model.num_heads=…`)"
    )
    return inner // HEAD_WIDTH
