"""The `.npz` files of google-research/vision_transformer and big_vision: plain ViTs.

Both numberings of the layers (released files and what current flax writes), with or without a
`params/` prefix; kernels are stored transposed, heads as an axis of their own. The arithmetic is
flax's: tanh GELU, LayerNorm epsilon 1e-6. Its "gap" averages every token, but a file with that
pooling has no class token, so ours is the same.
"""

import math
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitcli.data.transforms import Preprocess
from vitcli.errors import VitcliError
from vitcli.vit.position import sincos2d
from vitcli.vit.variants import ViTConfig
from vitcli.weights.stated import Stated, stated_preprocess
from vitcli.weights.store import Checkpoint

Arrays = Mapping[str, NDArray[Any]]
# Ours -> theirs, released files first, flax's own numbering second.
NAMES = {
    "norm1": ("LayerNorm_0", "LayerNorm_0"),
    "norm2": ("LayerNorm_2", "LayerNorm_1"),
    "attn": ("MultiHeadDotProductAttention_1", "MultiHeadDotProductAttention_0"),
    "mlp": ("MlpBlock_3", "MlpBlock_0"),
}


def load_npz(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """The arrays of an `.npz`, nothing unpickled.

    Raises:
        VitcliError: no such file, truncated, or with pickled objects in it.
    """
    try:
        # Opened here, because numpy leaves the file open when it is no archive.
        with Path(path).open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise VitcliError(f"no such weights file: `{path}`", hint="check the path") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, TypeError) as error:
        raise VitcliError(
            f"`{path}` cannot be read as numpy arrays: {error}", hint="copy or download it again"
        ) from error


def read_google(arrays: Arrays, source: str, stated: Stated) -> Checkpoint:
    """Arrays of an official checkpoint -> a checkpoint.

    Raises:
        VitcliError: a hybrid or another model; an image size that the file does not say.
    """
    found = _parameters(arrays)
    if "conv_root/kernel" in found:
        raise VitcliError(
            f"`{source}` is a hybrid with a ResNet stem, which is not understood yet",
            hint="plain ViTs are: B_16, L_32, Ti_16 …",
        )
    used: set[str] = set()

    def take(name: str) -> Tensor:
        if name not in found:
            raise VitcliError(
                f"`{source}` is not an official ViT checkpoint: `{name}` is missing",
                hint="is this the file of another architecture, or a part of one?",
            )
        used.add(name)
        return torch.from_numpy(np.ascontiguousarray(found[name], dtype=np.float32))

    tensors, config = _convert(found, take, source, stated)
    if foreign := [name for name in found if name not in used]:
        raise VitcliError(
            f"`{source}` does not fit a plain ViT; not part of the model: {', '.join(foreign[:6])}",
            hint="is this the file of another architecture?",
        )
    notes = []
    if not {"mean", "std"} <= set(stated.preprocess):
        notes.append(
            "mean and std 0.5, squashed bilinearly to the image size: assumed, as the official "
            "evaluation does"
        )
    base = Preprocess(
        image_size=config.image_size,
        resize_mode="squash",
        interpolation="bilinear",
        mean=(0.5,) * config.num_channels,
        std=(0.5,) * config.num_channels,
        num_channels=config.num_channels,
    )
    preprocess = stated_preprocess(base, stated.preprocess, config.image_size, config.num_channels)
    trained = config.num_classes > 0 and bool(tensors["head.weight"].abs().max() > 0)
    return Checkpoint(
        config, tensors, "google", stated.labels, preprocess, trained, None, {}, notes
    )


def _parameters(arrays: Arrays) -> dict[str, NDArray[Any]]:
    """Without optimizer state and prefix; the blocks of a scanned encoder taken apart."""
    found = {n: a for n, a in arrays.items() if not n.startswith(("opt/", "opt_state/"))}
    for prefix in ("params/", "target/", "img/"):
        if any(n.startswith(prefix) for n in found):
            found = {n.removeprefix(prefix): a for n, a in found.items() if n.startswith(prefix)}
    stacked = "Transformer/encoderblock/"
    for name in [n for n in found if n.startswith(stacked)]:
        for i, layer in enumerate(found.pop(name)):
            found[f"Transformer/encoderblock_{i}/{name.removeprefix(stacked)}"] = layer
    return found


def _convert(
    found: Arrays, take: Any, source: str, stated: Stated
) -> tuple[dict[str, Tensor], ViTConfig]:
    tensors: dict[str, Tensor] = {}

    def dense(ours: str, theirs: str) -> None:
        tensors[f"{ours}.weight"] = take(f"{theirs}/kernel").T.contiguous()
        tensors[f"{ours}.bias"] = take(f"{theirs}/bias")

    def norm(ours: str, theirs: str) -> None:
        tensors[f"{ours}.weight"] = take(f"{theirs}/scale").flatten()
        tensors[f"{ours}.bias"] = take(f"{theirs}/bias").flatten()

    def heads(ours: str, theirs: str, *parts: str) -> None:
        """Projections (D, H, E) -> one Linear weight (n H E, D)."""
        kernels = [take(f"{theirs}/{p}/kernel").flatten(1).T for p in parts]
        tensors[f"{ours}.weight"] = torch.cat(kernels).contiguous()
        tensors[f"{ours}.bias"] = torch.cat([take(f"{theirs}/{p}/bias").flatten() for p in parts])

    def out(ours: str, theirs: str) -> None:
        tensors[f"{ours}.weight"] = take(f"{theirs}/out/kernel").flatten(0, 1).T.contiguous()
        tensors[f"{ours}.bias"] = take(f"{theirs}/out/bias")

    kernel = take("embedding/kernel")  # (P, P, C, D)
    tensors["patch_embed.proj.weight"] = kernel.permute(3, 2, 0, 1).contiguous()
    tensors["patch_embed.proj.bias"] = take("embedding/bias")
    depth = len({n.split("/")[1] for n in found if n.startswith("Transformer/encoderblock_")})
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}/"
        released = int(f"{block}MlpBlock_3/Dense_0/kernel" not in found)
        theirs = {ours: block + both[released] for ours, both in NAMES.items()}
        norm(f"blocks.{i}.norm1", theirs["norm1"])
        norm(f"blocks.{i}.norm2", theirs["norm2"])
        heads(f"blocks.{i}.attn.qkv", theirs["attn"], "query", "key", "value")
        out(f"blocks.{i}.attn.proj", theirs["attn"])
        dense(f"blocks.{i}.mlp.fc1", theirs["mlp"] + "/Dense_0")
        dense(f"blocks.{i}.mlp.fc2", theirs["mlp"] + "/Dense_1")
    norm("norm", "Transformer/encoder_norm")
    if "MAPHead_0/probe" in found:
        attention = "MAPHead_0/MultiHeadDotProductAttention_0"
        tensors["attn_pool.latent"] = take("MAPHead_0/probe")
        heads("attn_pool.q", attention, "query")
        heads("attn_pool.kv", attention, "key", "value")
        out("attn_pool.proj", attention)
        norm("attn_pool.norm", "MAPHead_0/LayerNorm_0")
        dense("attn_pool.mlp.fc1", "MAPHead_0/MlpBlock_0/Dense_0")
        dense("attn_pool.mlp.fc2", "MAPHead_0/MlpBlock_0/Dense_1")
    if "pre_logits/kernel" in found:
        dense("pre_logits.fc", "pre_logits")
    if "head/kernel" in found:
        dense("head", "head")
    if "cls" in found:
        tensors["cls_token"] = take("cls")
    return tensors, _config(found, take, tensors, depth, source, stated)


def _config(
    found: Arrays, take: Any, tensors: dict[str, Tensor], depth: int, source: str, stated: Stated
) -> ViTConfig:
    """The configuration; also adds the positions, whose grid it finds out."""
    patch, patch_x, channels, width = found["embedding/kernel"].shape
    first = next((n for n in found if n.endswith("query/kernel")), None)
    if first is None or patch != patch_x:
        raise VitcliError(
            f"`{source}` is not an official checkpoint of a ViT with square patches",
            hint="hybrids and other architectures are not read",
        )
    class_token = "cls" in found
    # vit_jax adds positions to the class token too; big_vision keeps them apart, without.
    covered = "Transformer/posembed_input/pos_embedding"
    name = covered if covered in found else "pos_embedding"
    learned = name in found
    if learned:
        tensors["pos_embed"] = take(name)
        count = tensors["pos_embed"].shape[1] - int(class_token and name == covered)
        size = _size_of(count, patch, source, stated)
    else:
        size = stated.image_size or (224, 224)
        tensors["pos_embed"] = sincos2d((size[0] // patch, size[1] // patch), width)
    pool = "map" if "MAPHead_0/probe" in found else "token" if class_token else "mean"
    head = tensors.get("head.weight")
    hidden = tensors.get("pre_logits.fc.weight")
    try:
        return ViTConfig(
            image_size=size,
            patch_size=patch,
            num_channels=channels,
            embed_dim=width,
            depth=depth,
            num_heads=stated.num_heads or found[first].shape[1],
            mlp_dim=tensors["blocks.0.mlp.fc1.weight"].shape[0],
            num_classes=head.shape[0] if head is not None else 0,
            pool=pool,  # type: ignore[arg-type]  # one of three literals
            class_token=class_token,
            position="learned" if learned else "sincos2d",
            position_covers_prefix=name == covered,
            representation_size=hidden.shape[0] if hidden is not None else None,
            gelu=stated.gelu or "tanh",  # type: ignore[arg-type]  # checked by Stated
            norm_eps=stated.norm_eps or 1e-6,
        )
    except ValueError as error:
        raise VitcliError(
            f"`{source}` does not fit together: {error}",
            hint="it is damaged, or a `--set model.…` does not fit it",
        ) from error


def _size_of(count: int, patch: int, source: str, stated: Stated) -> tuple[int, int]:
    size = stated.image_size
    if size and (size[0] // patch) * (size[1] // patch) == count:
        return size[0] // patch * patch, size[1] // patch * patch
    side = math.isqrt(count)
    if side * side != count:
        raise VitcliError(
            f"`{source}` has {count} positions, no square grid, and does not say which one",
            hint=f"`--set model.image_size=[Y,X]` in pixels, the patch size is {patch}",
        )
    return side * patch, side * patch
