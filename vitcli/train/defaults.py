"""Default settings of a run without a recipe, from the data, the machine and what the user fixed.

Everything here is pure. The values come from recipes/LOG.md and recipes/RESULTS.md: small images,
16 to 144 tokens and a small model on a CPU, and images of the usual size on a GPU.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vitcli.config.recipe import lay_over, nest
from vitcli.config.schema import DURATIONS, Settings, parse_duration
from vitcli.data.facts import DataFacts
from vitcli.vit import Config, ViTConfig
from vitcli.vit.macs import BACKWARD, macs

# (largest shorter side in px, patch side): above the last one the patch has USUAL_PATCH pixels.
PATCHES = ((20, 2), (48, 4), (128, 8))
USUAL_PATCH, USUAL_SIZE = 16, 224
CPU_PATCH, CPU_SIZE = 8, 64  # of larger images on a CPU: 64 tokens
# A stem makes 4x4 tokens of small images enough. They cost less than 8x8, so a run sees more
# images. At 64 px 8x8 tokens were better (recipes/LOG.md, 2026-11-28).
STEM_GRID, STEM_STRIDE = 4, 8
MIN_GRID = 6  # patches per side from which a run may begin with smaller images
LONG_BUDGET = 3600.0  # core-seconds of a CPU that a model wider than Pico can use
LONG_HYBRID_BUDGET = 1000.0  # the same for a hybrid: recipes/LOG.md, 2026-11-28
# Images below which random weights rarely do well: in all, and per class.
FEW_IMAGES, FEW_PER_CLASS = 1000, 100
SGD_IMAGES = 2000  # fewer images are fine-tuned by SGD, as in the paper
# Small images are fine-tuned at a smaller size if a CPU has no time for this many epochs at the
# size of the weights: recipes/LOG.md, 2026-11-28.
ENOUGH_EPOCHS, SMALLEST_GRID = 3, 4
CORE_MACS = 24e9  # multiply-adds that a core trains per second, forward and backward together
TRAINING_FRACTION = 0.5  # of a budget, at least; the start and the evaluations take the rest
PATIENCE = 1200.0  # seconds that a run without a budget may train
# Settings of the user that leave the choice of the pooling open. A chosen model keeps mean pooling,
# which every export has; objective `guided` needs four pooled quadrants.
PLAIN_MODEL = {"image_size", "num_channels", "dropout_rate", "drop_path_rate"}
# Objectives that hide patches: the convolutions of a stem would show a part of each hidden one.
MASKING = {"masked_patch", "mae"}
PLAIN_OBJECTIVE = {"label_smoothing", "descriptor_weight"}


@dataclass(frozen=True)
class MachineFacts:
    """The device (`cpu`, `cuda` or `mps`), the CPU cores of this program, and its processes."""

    device: str = "cpu"
    cores: int = 1
    processes: int = 1

    @property
    def is_slow(self) -> bool:
        """True without a GPU."""
        return self.device == "cpu"


@dataclass(frozen=True)
class Defaults:
    """The settings that were chosen, and why.

    Attributes:
        data, machine: the facts that decided.
        summary: one sentence for the user.
        epochs: the length of the run if the user gives none.
    """

    settings: Settings
    data: DataFacts
    machine: MachineFacts
    summary: str
    epochs: float

    def to_json(self) -> dict[str, Any]:
        """Plain values for provenance.json."""
        return {
            "because": self.summary,
            "data": asdict(self.data),
            "machine": asdict(self.machine),
            "settings": self.settings,
        }


def choose_defaults(
    command: str,
    data: DataFacts,
    machine: MachineFacts,
    given: Mapping[str, Any],
    *,
    own_weights: bool = False,
    weights: Config | None = None,
) -> Defaults:
    """The settings of `pretrain` or `finetune` for some data; those in `given` stay as they are.

    Args:
        given: the settings of the user by their dotted names.
        own_weights: fine-tune a run of `pretrain` that Muon trained.
        weights: the model that `finetune` starts from.
    """
    given = {key: value for key, value in given.items() if value is not None}
    if command == "pretrain":
        wanted = _pretrain(data, machine, given)
    else:
        wanted = _finetune(data, machine, given, own_weights)
        if size := _smaller_size(data, machine, given, weights):
            wanted["model.image_size"] = size
    wanted["augment.flip_rate"] = 0.5 if _may_flip(data) else 0.0
    epochs = wanted["train.epochs"]
    if any(f"train.{name}" in given for name in DURATIONS) or data.images is None:
        wanted.pop("train.epochs")
    chosen = {key: value for key, value in wanted.items() if key not in given}
    settings: Settings = {}
    for key, value in chosen.items():
        lay_over(settings, nest(key, value))
    summary = _summary(data, {**chosen, **given})
    if command == "finetune" and weights is not None and "model.image_size" in chosen:
        summary += (
            f" (smaller than the {weights.image_size[0]} px of the weights, at which this CPU has "
            f"no time for {ENOUGH_EPOCHS} epochs)"
        )
    return Defaults(settings, data, machine, summary, epochs)


def is_scarce(data: DataFacts) -> bool:
    """True if random weights rarely learn enough from so few images."""
    if data.images is None:
        return False
    return data.images < FEW_IMAGES or data.images < FEW_PER_CLASS * data.classes


def propose_model(images: int | None, machine: MachineFacts) -> str:
    """The public weights to fine-tune on so many images: as large as the machine can train."""
    if machine.is_slow:
        return "vit-ti16-augreg"
    return "vit-s16-augreg" if images is not None and images < FEW_IMAGES else "vit-b16-augreg"


# Of numbers, of several labels per image, of one label: `train.best_metric` if none is given.
DEFAULT_METRICS = ("rmse", "map", "accuracy")
# Validation images below which the loss chooses: one standard error of the accuracy is then more
# than 1.3 points at 90 %, and a single image decides (recipes/LOG.md, 2026-11-28).
FEW_VALIDATION_IMAGES = 500


def best_metric(data: DataFacts, validation_images: int | None) -> str:
    """The metric of the validation images that chooses the weights; None if not counted."""
    if data.numeric or data.multi_label:
        return DEFAULT_METRICS[0 if data.numeric else 1]
    if validation_images is not None and validation_images < FEW_VALIDATION_IMAGES:
        return "loss"
    return DEFAULT_METRICS[2]


def _may_flip(data: DataFacts) -> bool:
    # A number such as an angle or a position may change its sign in the mirror.
    return data.may_flip and not data.numeric


def _pretrain(data: DataFacts, machine: MachineFacts, given: Mapping[str, Any]) -> dict[str, Any]:
    name, size, patch = _shape(data, machine, given)
    images = data.images or 10**6
    wanted: dict[str, Any] = {"model.name": name, "model.image_size": size}
    wanted["train.batch_size"] = _batch_size(images, machine, given)
    # On a CPU about 100,000 images, some minutes; on a GPU as many epochs as DeiT for small sets.
    seen, fewest = (100_000, 10) if machine.is_slow else (5_000_000, 60)
    wanted["train.epochs"] = float(min(300, max(fewest, round(seen / images))))
    side = _shorter(size)
    grid = side // patch
    if data.numeric:  # a crop changes positions, sizes and counts
        wanted["augment.crop"] = "none"
    elif side <= PATCHES[1][0] or not data.may_flip:
        wanted |= {"augment.crop": "pad", "augment.crop_padding": max(1, side // 16)}
    else:
        wanted |= {"augment.crop": "inception", "augment.min_area": 0.4}
    if _suits_guided(data, given, side, grid, images):
        wanted |= {"model.pool": "quadrants", "objective.name": "guided"}
    if machine.is_slow and grid >= MIN_GRID and size == side and _is_plain(name):
        sizes = [patch * -(-grid // 2), patch * round(0.75 * grid)]
        if all(small % 4 == 0 for small in sizes):
            wanted["train.smaller_sizes"] = [[sizes[0], 0.4], [sizes[1], 0.7]]
    return wanted


def _finetune(
    data: DataFacts, machine: MachineFacts, given: Mapping[str, Any], own_weights: bool
) -> dict[str, Any]:
    images = data.images or 10**6
    wanted: dict[str, Any] = {"train.batch_size": _batch_size(images, machine, given)}
    seen, longest, shortest = 10_000, *((10, 3) if machine.is_slow else (30, 5))
    is_free = not any(key.startswith(("optim.", "lora.", "schedule.")) for key in given)
    if own_weights and is_free:  # a small model that has seen few images: recipes/bench_start.py
        wanted |= {"optim.name": "muon", "optim.matrix_lr": 0.01, "optim.momentum": 0.95}
        wanted |= {"optim.lr": 1e-3, "schedule.name": "linear"}
        seen, longest = 4 * seen, 40
    elif images < SGD_IMAGES and is_free:  # recipes/LOG.md, 2026-11-24: photographs
        wanted |= {"optim.name": "sgd", "optim.lr": 0.01, "optim.momentum": 0.9}
    if "optim.name" in wanted:
        wanted["optim.weight_decay"] = 0.0
    wanted["train.epochs"] = float(min(longest, max(shortest, round(seen / images))))
    if data.numeric:
        wanted["augment.crop"] = "none"
    elif not data.may_flip:  # characters: a small part of one may be another
        wanted |= {"augment.crop": "pad", "augment.crop_padding": 4}
    return wanted


def _smaller_size(
    data: DataFacts, machine: MachineFacts, given: Mapping[str, Any], weights: Config | None
) -> int | None:
    """The largest image side in px that has time for ENOUGH_EPOCHS; None keeps that of the weights.

    Images are never made smaller than they are, nor than SMALLEST_GRID patches.
    """
    if not isinstance(weights, ViTConfig) or data.size is None:
        return None
    (full, other), patch = weights.image_size, weights.pixels_per_patch
    smallest = patch * max(SMALLEST_GRID, -(-min(data.size) // patch))
    if full != other or smallest >= full or not may_shrink(data, machine, given):
        return None
    budget = given.get("train.budget")
    seconds = TRAINING_FRACTION * parse_duration(str(budget)) if budget else PATIENCE
    work = BACKWARD * macs(weights) * (data.images or 10**6)  # of an epoch
    epochs = seconds * machine.cores * CORE_MACS / work
    # The work per image grows with its area.
    sizes = [s for s in range(full, smallest, -patch) if epochs * (full / s) ** 2 >= ENOUGH_EPOCHS]
    size = max(sizes, default=smallest)
    return size if size < full else None


def may_shrink(data: DataFacts, machine: MachineFacts, given: Mapping[str, Any]) -> bool:
    """True if `finetune` may train at a smaller size than that of the weights."""
    fixed = given.keys() & {"model.image_size", "preprocess.image_size", "model.patch_size"}
    small = data.size is not None and min(data.size) < USUAL_SIZE
    return small and machine.is_slow and not fixed


def _shape(
    data: DataFacts, machine: MachineFacts, given: Mapping[str, Any]
) -> tuple[str, Any, int]:
    """(variant, image size, patch side in px)."""
    fixed = given.get("model.image_size") or given.get("preprocess.image_size")
    natural = min(data.size) if data.size else USUAL_SIZE
    side = natural if fixed is None else _shorter(fixed)
    name = given.get("model.name")
    if name is not None:
        patch = given.get("model.patch_size") or _stride(str(name))
        return str(name), fixed or _round_to(_largest(natural, patch, machine), patch), patch
    patch = _usual_patch(side)
    if machine.is_slow and side > PATCHES[1][0]:
        patch = CPU_PATCH
    patch = given.get("model.patch_size") or patch
    if fixed is not None:
        sides = fixed if isinstance(fixed, list) else [fixed]
        if "model.patch_size" not in given and any(s % patch for s in sides):
            fits = [p for p in range(2, min(sides) + 1) if not any(s % p for s in sides)]
            patch = min(fits, key=lambda p: abs(p - patch), default=1)
    size = fixed or _round_to(_largest(natural, patch, machine), patch)
    hybrid = _suits_hybrid(machine, given, patch)
    if hybrid and patch == PATCHES[1][1] and -(-_shorter(size) // STEM_STRIDE) >= STEM_GRID:
        patch = STEM_STRIDE
    name = f"{_variant(data, machine, given, hybrid)}/{patch}"
    return f"Conv+{name}" if hybrid else name, size, patch


def _shorter(size: Any) -> int:
    """The shorter side of a size in the form of the schema: one number, or [Y, X]."""
    side: int = min(size) if isinstance(size, list) else size
    return side


def _suits_hybrid(machine: MachineFacts, given: Mapping[str, Any], patch: int) -> bool:
    """True if a convolutional stem suits: it learns more in the minutes that a CPU has."""
    chosen = {key.partition(".")[2] for key in given if key.startswith("model.")}
    masks = given.get("objective.name") in MASKING
    return machine.is_slow and chosen <= PLAIN_MODEL and not masks and patch in (2, 4, 8, 16)


def default_size(data: DataFacts, machine: MachineFacts) -> tuple[int, int]:
    """(image size, patch size) in px that `pretrain` takes if the user gives none."""
    _, size, patch = _shape(data, machine, {})
    return size, patch


def _usual_patch(side: int) -> int:
    """The patch side in px that suits images of this shorter side: 50 to 250 tokens."""
    # Small patches for small images: training on little data fails without them.
    return next((patch for most, patch in PATCHES if side <= most), USUAL_PATCH)


def _largest(side: int, patch: int, machine: MachineFacts) -> int:
    """The image side that the machine can afford; at least a grid of four patches."""
    limit = max(CPU_SIZE, 8 * patch) if machine.is_slow else USUAL_SIZE
    return max(4 * patch, min(side, limit))


def _round_to(side: int, patch: int) -> int:
    """The multiple of `patch`, and of 4 for objective `guided`, that is nearest to `side`."""
    unit = patch if patch % 4 == 0 else 2 * patch if patch % 2 == 0 else 4 * patch
    return max(unit, round(side / unit) * unit)


def _variant(data: DataFacts, machine: MachineFacts, given: Mapping[str, Any], hybrid: bool) -> str:
    if machine.is_slow:
        budget = parse_duration(str(given.get("train.budget", "1s"))) * machine.cores
        return "Nano" if budget > (LONG_HYBRID_BUDGET if hybrid else LONG_BUDGET) else "Pico"
    images = data.images or 10**6
    return "Ti" if images < 20_000 else "S" if images < 200_000 else "B"


def _stride(name: str) -> int:
    """The pixels per patch of a variant such as `Ti/16`; that of a whole ResNet for `R50x1`."""
    found = re.search(r"/(\d{1,4})$", name)
    return 32 if found is None or name.startswith("R+") else max(1, int(found[1]))


def _is_plain(name: str) -> bool:
    return re.fullmatch(r"(ViT-)?[A-Za-z0-9]+/\d+", name) is not None


def _batch_size(images: int, machine: MachineFacts, given: Mapping[str, Any]) -> int:
    """Few images get small batches, because a run needs enough steps."""
    size = 32 if images < 2000 else 64 if images < 10_000 else 128
    if not machine.is_slow:
        size = 64 if images < 2000 else 128 if images < 50_000 else 256
    unit = machine.processes * int(given.get("augment.repeats", 1))
    unit *= 2 if size % (2 * unit) else 1  # pairs for mixup
    return -(-size // unit) * unit


def _suits_guided(
    data: DataFacts, given: Mapping[str, Any], side: int, grid: int, images: int
) -> bool:
    """True if objective `guided` can train this model: it is worth points where images are few."""
    names = {section: {k.partition(".")[2] for k in given if k.startswith(f"{section}.")}
             for section in ("model", "objective")}  # fmt: skip
    sizes = [small for small, _ in given.get("train.smaller_sizes", ())]
    return (
        not (data.multi_label or data.numeric)
        and images < 100_000
        and names["model"] <= PLAIN_MODEL
        and names["objective"] <= PLAIN_OBJECTIVE
        and not given.get("train.patch_drop_rate")
        and grid >= 2
        and not any(s % 4 for s in (side, *sizes))
        and not isinstance(given.get("model.image_size"), list)
    )


def _summary(data: DataFacts, values: Mapping[str, Any]) -> str:
    """`300 images of about 100x100 px, 6 classes: Pico/8 at 64 px, batch 32, 300 epochs`."""
    facts = "a stream" if data.images is None else f"{data.images:,} training images"
    if data.size is not None:
        facts += f" of about {data.size[1]}x{data.size[0]} px"
    kind = "numbers" if data.numeric else f"{data.classes:,} classes"
    model = [str(values["model.name"])] if "model.name" in values else []
    if "model.image_size" in values:
        size = values["model.image_size"]
        shown = "x".join(map(str, size[::-1])) if isinstance(size, list) else size
        model.append(f"at {shown} px")
    parts = [" ".join(model)] if model else []
    parts.append(f"batch {values['train.batch_size']}")
    for name in DURATIONS:
        if (value := values.get(f"train.{name}")) is not None:
            unit = name.removesuffix("s") if value == 1 else name
            parts.append(f"budget {value}" if name == "budget" else f"{value:,.10g} {unit}")
    return f"{facts}, {kind}: {', '.join(parts)}"
