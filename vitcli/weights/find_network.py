"""Find the network in the content of a file: its container, its prefix, its layout and its head.

Training programs store a state dict inside dictionaries and lists (containers such as `state_dict`
or `model_ema`), and wrappers put a prefix before each name (`module.` of DataParallel, `model.` of
Lightning). Both are one dotted path here. A network is found by the name of its patch projection,
so containers and prefixes may have any name. Only the choice between several networks asks names.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vitcli.errors import VitcliError
from vitcli.weights.find_head import HEAD_PARTS, find_head, fold_batch_norm
from vitcli.weights.huggingface.huggingface_names import MODEL_TYPES
from vitcli.weights.huggingface.read_huggingface import PATCHES as HUGGINGFACE_PATCHES
from vitcli.weights.timm.timm_names import BIT_ROOT, BIT_UNIT, PATCHES

Containers = Mapping[str, Mapping[str, Tensor]]  # path in the file -> name -> tensor


@dataclass(frozen=True)
class LayoutNames:
    """The names by which a layout is detected.

    Attributes:
        anchors: names of which a network of this layout has one; what precedes it is the prefix.
        heads: the layout's own heads. A head of another name gets the first of these names.
        also: further names that the network must have.
        width: a tensor whose first size is the width of the features; None for the anchor.
        own_prefixes: prefixes that belong to the layout, which its reader removes itself.
        poolings: tensors of an attention pool that the layout calls `head`; it is no classifier.
    """

    anchors: tuple[str, ...]
    heads: tuple[str, ...]
    also: tuple[str, ...] = ()
    width: str | None = None
    own_prefixes: tuple[str, ...] = ()
    poolings: tuple[str, ...] = ()


TYPES = MODEL_TYPES.values()
LAYOUTS = {
    "timm": LayoutNames((PATCHES,), ("head", "head_dist")),
    "bit": LayoutNames((BIT_ROOT,), ("head.fc", "head"), also=(BIT_UNIT,), width="norm.weight"),
    "huggingface": LayoutNames(
        HUGGINGFACE_PATCHES,
        tuple(dict.fromkeys(head for family in TYPES for head in family.heads)),
        own_prefixes=tuple(dict.fromkeys(family.prefix for family in TYPES if family.prefix)),
        poolings=("head.probe", "head.cls_token"),
    ),
    "open_clip": LayoutNames(
        ("conv1.weight",),
        ("head",),
        also=("class_embedding", "positional_embedding"),
        width="ln_post.weight",
    ),
    "torchvision": LayoutNames(
        ("conv_proj.weight",), ("heads.head",), also=("encoder.pos_embedding",)
    ),
    "vit_pytorch": LayoutNames(
        ("to_patch_embedding.2.weight", "to_patch_embedding.1.weight"),
        ("mlp_head", "linear_head", "mlp_head.1", "linear_head.1"),
        width="transformer.layers.0.0.norm.weight",
    ),
}
# Modules that torch.compile, FSDP and activation checkpointing insert anywhere in a name.
WRAPPERS = re.compile(
    r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
# Of several copies of one network, this part of the path is loaded, best first. Averaged weights
# are evaluated in timm, DINO and I-JEPA; MoCo evaluates the query encoder.
PREFERRED = (
    r"(\w+_)?ema(_\w+)?|averaged_\w+|swa_\w+",
    r"(\w+_)?teacher(_\w+)?",
    r"target_encoder",
    r"base_encoder|encoder_q",
)
BLOCKS = re.compile(r"\b(?:blocks|layers?|encoder_layer)[._]\d+")
NORMALISES = "normalises the images"
# Tensors that only training needs -> the reason for the load report.
TRAINING_ONLY = {
    r"(.*\.)?(predictor|projector|projection_head|(dino|ibot)_\w+)\..*": (
        "used only by self-supervised training"
    ),
    r"(.*\.)?\w*(loss|criterion)(_\w+)?(\..*)?": "belongs to the loss",
    r"(.*\.)?(normali[sz]e\w*|(pixel_|image_)?(mean|std))(\..*)?": NORMALISES,
    r"(train|val|valid|validation|test)_\w+\..*|(.*\.)?\w*metrics?\..*": "belongs to a metric",
    r"(optimizer|scheduler|teacher|student)\..*|n_averaged": "used only by training",
    r"(.*\.)?total_(ops|params)": "written by a profiler",
}


@dataclass
class FoundNetwork:
    """One network of a file, under the names of its layout.

    Attributes:
        layout: a key of `LAYOUTS`.
        tensors: the names of the layout -> tensors.
        full_names: the names of the layout -> the names in the file.
        shapes: names in the file -> shapes.
        dropped: names in the file that are no part of the network -> the reason.
        notes: the choices that were made, one line each.
    """

    layout: str
    tensors: dict[str, Tensor]
    full_names: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def find_network(
    containers: Containers,
    source: str,
    key: str | None = None,
    check: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> FoundNetwork | None:
    """Return the network in a file, or None if there is none in a supported layout.

    Args:
        containers: the content of the file.
        source: the name of the file in messages.
        key: the container or the prefix to load, `model.checkpoint_key`; None for the averaged one.
        check: checks the tensors of the network, before anything is computed with them.

    Raises:
        VitcliError: the file holds several networks and nothing says which one, or `key` fits none.
    """
    plain = {path: _without_wrappers(tensors, source) for path, tensors in containers.items()}
    places = {
        _joined(path, prefix): (path, prefix, layout)
        for path, tensors in plain.items()
        for layout in LAYOUTS
        for prefix in _prefixes(tensors, layout)
    }
    if not places:
        return None
    inside = {
        place: _inside(plain[path], prefix, [p for at, p, _ in places.values() if at == path])
        for place, (path, prefix, _) in places.items()
    }
    blocks = {
        place: {n.removeprefix(places[place][1]): s for n, s in of.items() if BLOCKS.search(n)}
        for place, of in inside.items()
    }
    chosen, notes = _choose(blocks, source, key)
    path, prefix, layout = places[chosen]
    shapes = {name: tuple(tensor.shape) for name, tensor in plain[path].items()}
    full_names = {name.removeprefix(prefix): name for name in inside[chosen]}
    tensors = {bare: plain[path][name] for bare, name in full_names.items()}
    found = FoundNetwork(layout, tensors, full_names, shapes, notes=notes)
    for name in plain[path]:
        if name not in inside[chosen]:
            where = f"outside `{prefix}`" if prefix else "belongs to another network"
            found.dropped[name] = training_only(name) or where
    everything = {_joined(at, n): t for at, of in plain.items() for n, t in of.items()}
    head = _take_head(found, everything, chosen, path, prefix)
    for bare in [n for n in found.tensors if training_only(n)]:
        del found.tensors[bare]
        found.dropped[found.full_names.pop(bare)] = training_only(bare) or ""
    _note_normalisation(found, plain[path])
    if check is not None:
        found.tensors = check(found.tensors)
    if head is not None:
        parts = {
            part: found.tensors.pop(f"{head}.{part}")
            for part in list(HEAD_PARTS)
            if f"{head}.{part}" in found.tensors
        }
        found.tensors[f"{head}.weight"], found.tensors[f"{head}.bias"] = fold_batch_norm(parts)
    return found


def _take_head(
    found: FoundNetwork, everything: Mapping[str, Tensor], chosen: str, path: str, prefix: str
) -> str | None:
    """Give a head of another name the layout's name, in place; return it, None if nothing is taken.

    Args:
        everything: path -> each tensor of the file.
        chosen, path, prefix: the place of the network, its container and its prefix.
    """
    names = LAYOUTS[found.layout]
    ends = names.anchors if names.width is None else (names.width,)
    shaped = (t for n, t in found.tensors.items() if n.endswith(ends) and t.ndim)
    width = next(shaped, None)
    if names.poolings and any(name.endswith(names.poolings) for name in found.tensors):
        return None
    if width is None or any(f"{head}.weight" in found.tensors for head in names.heads):
        return None
    head = find_head(everything, chosen, width.shape[0])
    if head is None:
        return None
    found.notes.append(head.note)
    for place in [*head.parts.values(), *head.refused]:
        name = place.removeprefix(f"{path}.") if path else place
        found.tensors.pop(name.removeprefix(prefix), None)
        found.full_names.pop(name.removeprefix(prefix), None)
        found.dropped[name] = "part of a head that is not supported"
    own = names.heads[0]
    for part, place in head.parts.items():
        name = place.removeprefix(f"{path}.") if path else place
        found.tensors[f"{own}.{part}"] = everything[place]
        if part in ("weight", "bias"):
            del found.dropped[name]
        else:
            found.dropped[name] = "folded into the head"
    return own if head.parts else None


def _note_normalisation(found: FoundNetwork, tensors: Mapping[str, Tensor]) -> None:
    """Say which values a module in front of the network would subtract and divide by."""
    values = []
    for name, reason in found.dropped.items():
        tensor = tensors.get(name)
        if reason != NORMALISES or tensor is None or tensor.is_meta:
            continue
        if (
            tensor.layout == torch.strided
            and tensor.is_floating_point()
            and tensor.numel() in (1, 3)
        ):
            numbers = ", ".join(f"{x:g}" for x in tensor.flatten().tolist())
            values.append(f"`{name}` [{numbers}]")
    if values:
        found.notes.append(
            f"left out {' and '.join(values)}, which normalise the images: set `preprocess.mean` "
            "and `preprocess.std` to these values"
        )


def training_only(name: str) -> str | None:
    """Return the reason why only training needs the tensor `name`; None for any other tensor."""
    matches = (why for pattern, why in TRAINING_ONLY.items() if re.fullmatch(pattern, name))
    return next(matches, None)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _without_wrappers(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    plain = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):
        twice = next(n for n in tensors if WRAPPERS.search(n) and WRAPPERS.sub("", n) in tensors)
        raise VitcliError(
            f"`{source}` has two tensors for `{WRAPPERS.sub('', twice)}`, one of them `{twice}`",
            hint="save the `state_dict()` of the model once, without the wrapper",
        )
    return plain


def _prefixes(tensors: Mapping[str, Tensor], layout: str) -> list[str]:
    """The prefixes of the networks in `layout` among the names of one container."""
    names = LAYOUTS[layout]
    found = []
    for name in tensors:
        anchor = next((a for a in names.anchors if f".{name}".endswith(f".{a}")), None)
        if anchor is None:
            continue
        prefix = name.removesuffix(anchor)
        # The ResNet in front of a hybrid is no network of its own.
        if prefix.endswith("patch_embed.backbone.") or any(
            prefix + n not in tensors for n in names.also
        ):
            continue
        for own in names.own_prefixes:
            if f".{prefix}".endswith(f".{own}"):
                prefix = prefix.removesuffix(own)
                break
        found.append(prefix)
    return list(dict.fromkeys(found))


def _inside(
    tensors: Mapping[str, Tensor], prefix: str, prefixes: list[str]
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors behind `prefix`, without those of networks inside it."""
    inner = tuple(p for p in prefixes if p != prefix and p.startswith(prefix))
    names = [n for n in tensors if n.startswith(prefix) and not (inner and n.startswith(inner))]
    return {name: tuple(tensors[name].shape) for name in names}


def _choose(
    sizes: Mapping[str, Mapping[str, tuple[int, ...]]], source: str, key: str | None
) -> tuple[str, list[str]]:
    """Choose one of several networks, by the user's key or by `PREFERRED`; also return notes.

    Args:
        sizes: path and prefix of each network -> the shapes of its blocks.
    """
    setting = "--set model.checkpoint_key"
    example = next((place.strip(".") for place in sizes if place), "")
    hint = f"choose one, for example with `{setting}={example}`"
    shown = " and ".join(f"`{place}`" if place else "no prefix" for place in sizes)
    if key is not None:
        inner = key.strip(".")
        exact = [place for place in sizes if place.strip(".") == inner]
        fits = exact or [p for p in sizes if inner and f".{inner}." in f".{p}"]
        if len(fits) == 1:
            return fits[0], []
        count = "several networks fit" if fits else "no network fits"
        one = len(sizes) == 1 and not next(iter(sizes))
        raise VitcliError(
            f"`model.checkpoint_key` is `{key}`, and {count}: `{source}` has "
            + ("one network without a prefix" if one else f"networks under {shown}"),
            hint="remove `model.checkpoint_key`" if one else "use one of these paths as the key",
        )
    if len(sizes) == 1:
        return next(iter(sizes)), []
    if any(shapes != next(iter(sizes.values())) for shapes in sizes.values()):
        raise VitcliError(f"`{source}` holds networks of different sizes, under {shown}", hint=hint)
    for pattern in PREFERRED:
        wanted = [p for p in sizes if any(re.fullmatch(pattern, part) for part in p.split("."))]
        if len(wanted) == 1:
            others = " and ".join(f"`{p}`" if p else "no prefix" for p in sizes if p != wanted[0])
            return wanted[0], [
                f"loaded the weights under `{wanted[0]}`, not those under {others} (change with "
                f"`{setting}=…`)"
            ]
    raise VitcliError(f"`{source}` holds {len(sizes)} networks, under {shown}", hint=hint)
