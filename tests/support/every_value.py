"""Every value of every setting in the recipe schema, and rows of settings that cover them.

`levels` derives the values from the schema and the registries. It fails for a new setting whose
type gives no value, until `VALUES` has an entry.
"""

import itertools
import random
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from vitcli.config.choices import Pool
from vitcli.config.schema import Recipe, Section
from vitcli.train.build import registered_names

# Values that the type does not give. Names of data and models are keys of the folder of a test.
VALUES: dict[str, list[Any]] = {
    "command": ["pretrain", "finetune"],
    "description": ["text"],
    "model.name": ["mu/8", "Axial-mu/4", "R26x1", "R26+mu/16", "R+mu/16"],
    "model.image_size": [8, [16, 24]],
    "model.embed_dim": [64],
    "model.projection_size": [32],
    "model.text_embeddings": ["text.safetensors"],
    "model.pool": list(get_args(Pool)),
    "model.layer_scale": [1e-4],
    "model.norm_eps": [1e-5],
    "model.stem": [[], [1], [1, 1]],
    "model.stem_width": [0.5],
    "model.layers": [[1, 1]],
    "model.rope_theta": [100.0],
    "model.rope_grid": [[2, 3]],
    "model.rope_shift": [0.5],
    "model.rope_jitter": [1.5],
    "model.rope_rescale": [2.0],
    "model.width": [0.5],
    "preprocess.image_size": [8, [16, 24]],
    "preprocess.resize_size": [24],
    "preprocess.mean": [0.4, [0.4, 0.5, 0.6]],
    "preprocess.std": [0.3, [0.2, 0.3, 0.4]],
    "preprocess.window": [[0.0, 4095.0]],
    "data.name": ["table.csv", "folder"],
    "data.image_column": ["file"],
    "data.label_column": ["kind"],
    "data.image_root": ["folder"],
    "data.image_suffix": [".png"],
    "data.label_separator": ["|"],
    "data.split_column": ["split"],
    "data.test_fold": [1],
    "data.group_column": ["patient"],
    "data.train_split": ["train[:75%]"],
    "data.test_split": ["test[:50%]"],
    "data.folds": [3],
    "data.fold": [1],
    "data.classes": ["classes.txt"],
    "augment.resize_size": [24],
    "augment.magnitude": [5.0],
    "augment.mixup_alpha": [0.3],
    "augment.cutmix_alpha": [1.0],
    "objective.head_bias": [-2.0],
    "objective.class_weights": ["balanced", "effective", [1.0, 3.0]],
    "objective.asymmetric_gammas": [[0.0, 4.0]],
    "objective.decoder_dim": [16],
    "objective.teacher": ["weights.safetensors"],
    "optim.lr": [1e-3],
    "optim.betas": [[0.8, 0.9]],
    "schedule.stair_steps": [[1]],
    "schedule.stair_factors": [[0.5]],
    "train.steps": [2],
    "train.epochs": [0.5],
    "train.images": [16],
    "train.freeze": ["none", "backbone", "blocks:1"],
    "train.smaller_sizes": [[[8, 0.5]]],
    "train.batch_size": [4],
}
# What a value needs beside it.
FINETUNE = {"command": "finetune"}
LORA = {**FINETUNE, "lora.rank": 2}
TABLE = {"data.name": "table.csv", "data.label_column": "kind"}
NAMES = {"data.name": "names.csv", "data.image_root": "folder", "data.image_suffix": ".png"}
GROUPS = {"data.name": "groups.csv"}
STREAM = {"data.name": "shards", "data.streaming": True, "data.classes": "classes.txt"}
STAIR = {"schedule.stair_steps": [1], "schedule.stair_factors": [0.5]}
FORMULA = {"data.name": "builtin:formula", "model.pool": "quadrants"}
RESNET = {"model.name": "R26x1", "model.layers": [1, 1], "model.width": 0.5}
STEM = {"model.stem": [1], "model.patch_size": 1}
TOKENS = {"model.class_token": True, "model.distillation_token": True, "model.pool": "distilled"}
DISTILL = {"objective.name": "distill", "objective.teacher": "weights.safetensors"}
ASYMMETRIC = {"objective.name": "sigmoid"}
NEEDS: dict[str, dict[str, Any]] = {
    "model.name=R26x1": RESNET,
    "model.layers": RESNET,
    "model.width": RESNET,
    "model.name=Axial-mu/4": {"model.pool": "mean"},
    "model.axial=True": {"model.class_token": False, "model.pool": "mean"},
    "model.name=R26+mu/16": STEM,
    "model.projection_size": {"model.distillation_head": False},
    "model.head_norm=True": {"model.distillation_head": False},
    "model.final_norm=False": {"model.norm_after_pool": False},
    "model.text_embeddings": FINETUNE,
    "model.patch_norm=True": {"model.name": "mu/8"},
    "model.crop_to_patches=True": {"model.name": "mu/8"},
    "model.name=R+mu/16": {"model.patch_size": 2, "model.stem": []},
    "model.stem": STEM,
    "model.stem_width": STEM,
    "model.stem_arithmetic": STEM,
    "model.class_token=False": {"model.pool": "mean"},
    "model.distillation_token=True": {"model.class_token": True},
    "model.distillation_head=True": TOKENS,
    "model.pool=distilled": TOKENS,
    "model.pool=map": {"model.class_token": False},
    "model.position_resize=computed": {"model.position": "sincos2d"},
    "model.position_at=every": {"model.position": "learned"},
    "model.position_at=shared": {"model.position": "learned"},
    "model.key_bias=False": {"model.qkv_bias": True},
    "model.rope_theta": {"model.rope": "centred"},
    "model.rope_pairs": {"model.rope": "index"},
    "model.rope_grid": {"model.rope": "index"},
    "model.rope_dtype": {"model.rope": "centred"},
    "model.rope_shift": {"model.rope": "centred"},
    "model.rope_jitter": {"model.rope": "centred"},
    "model.rope_rescale": {"model.rope": "centred"},
    "model.pool_blocks": {"model.pool": "mean", "model.depth": 2},
    "data.name=table.csv": TABLE,
    "data.image_column": TABLE,
    "data.label_column": TABLE,
    "data.image_root": NAMES,
    "data.image_suffix": NAMES,
    "data.label_separator": {"data.name": "labels.csv"},
    "data.split_column": TABLE,
    "data.test_fold": {**GROUPS, "data.split_column": "fold"},
    "data.group_column": {**GROUPS, "data.split_column": "none"},
    "data.fold": {"data.folds": 3},
    "data.streaming=True": STREAM,
    "data.classes": STREAM,
    "data.shuffle_buffer": STREAM,
    "data.multi_label=True": {"data.name": "labels.csv"},
    "objective.name=distill": DISTILL,
    "objective.teacher": DISTILL,
    "objective.teacher_cache=True": DISTILL,
    "objective.distillation=features": DISTILL,
    "objective.head_bias": {"objective.name": "sigmoid"},
    "objective.class_weights_beta": {"objective.class_weights": "effective"},
    "objective.asymmetric_gammas": ASYMMETRIC,
    "objective.asymmetric_clip": {**ASYMMETRIC, "objective.asymmetric_gammas": [0.0, 4.0]},
    "objective.name=mse": {"data.name": "numbers.csv"},
    "objective.name=descriptors": FORMULA,
    "objective.name=guided": FORMULA,
    "optim.momentum_dtype=bf16": {"optim.name": "sgd"},
    "schedule.name=stair": STAIR,
    "schedule.stair_steps": STAIR,
    "schedule.stair_factors": STAIR,
    "augment.resize_size": {"model.image_size": 16},
    "train.freeze=backbone": FINETUNE,
    "train.freeze=blocks:1": FINETUNE,
    "train.keep_head=True": FINETUNE,
    "lora.rank": FINETUNE,
    "lora.alpha": LORA,
    "lora.targets": LORA,
    "train.smaller_sizes": {"model.image_size": 16},
}
# Too slow for rows, or not for one process: the file that trains with the value.
ELSEWHERE = {
    "train.budget": "tests/train/test_budget.py",
    "train.compile": "tests/train/test_compile_stages.py",
    "train.precision=fp16": "tests/test_devices.py",  # needs a GPU
    "train.fully_shard=True": "tests/train/test_fsdp.py",
    "train.best_metric": "tests/train/test_best_weights.py",  # needs validation images
    "train.patience": "tests/train/test_best_weights.py",
    "model.checkpoint_key": "tests/weights/test_find_network.py",  # needs a file of two networks
    "model.base_model": "tests/weights/test_peft_adapter.py",  # needs an adapter
}
RIVALS = [
    {"train.steps", "train.epochs", "train.images"},
    {"schedule.warmup_steps", "schedule.warmup_fraction"},
]

Row = dict[str, Any]
Level = tuple[str, str]  # key and value as text, because some values are lists
Pair = tuple[Level, Level]


def fields() -> dict[str, Any]:
    """Dotted key -> pydantic field of every setting of a recipe."""
    found: dict[str, Any] = {}
    for name, field in Recipe.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            found |= {f"{name}.{key}": inner for key, inner in kind.model_fields.items()}
        else:
            found[name] = field
    return found


def levels() -> dict[str, list[Any]]:
    """Every setting of a recipe with the values to train, without those of `ELSEWHERE`."""
    names, found = registered_names(), {}
    for key, field in fields().items():
        if key in ELSEWHERE:
            continue
        values = VALUES.get(key) or names.get(key) or _values_of(field.annotation, field.metadata)
        assert values, f"add values of the new setting `{key}` to `VALUES`"
        left = [v for v in values if not {key, f"{key}={v}"} & set(ELSEWHERE)]
        if left:
            found[key] = left
    return found


def _values_of(kind: Any, bounds: Any) -> list[Any]:
    """Values that a type and its bounds give: all of a choice, two for a number, else none."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return [v for part in parts if part is not type(None) for v in _values_of(part, bounds)]
    if origin is Annotated:
        return _values_of(parts[0], [*parts[1:], *bounds])
    if origin is Literal:
        return list(parts)
    if origin is tuple:
        return [[v] for v in _values_of(parts[0], [])]
    limits = {k: getattr(b, k) for b in bounds for k in ("ge", "gt", "le", "lt") if hasattr(b, k)}
    if kind is bool:
        return [False, True]
    if kind is int:
        return [2]
    if kind is float:
        upper = limits.get("le", limits.get("lt"))
        return [upper / 2 if upper is not None else 0.5]
    return []


def level(key: str, value: Any) -> Level:
    return key, repr(value)


def needs_of(key: str, value: Any) -> Row:
    """The settings that a value needs, itself last."""
    return {**NEEDS.get(key, {}), **NEEDS.get(f"{key}={value}", {}), key: value}


def add(row: Row, new: Row) -> Row:
    """`row` with `new` settings; of settings that exclude each other the new one stays."""
    rivals = [group for group in RIVALS if group & set(new)]
    return {k: v for k, v in row.items() if not any(k in group for group in rivals)} | new


def grown(row: Row, more: list[Row], accepts: Any) -> Row:
    """`row` with as many of `more` as the product accepts together, halving what it refuses."""
    more = [new for new in more if all(row.get(k, v) == v for k, v in new.items())]
    both = row
    for new in more:
        both = add(both, new) if all(both.get(k, v) == v for k, v in new.items()) else both
    if both == row or accepts(both):
        return both
    if len(more) == 1:
        return row
    middle = len(more) // 2
    return grown(grown(row, more[:middle], accepts), more[middle:], accepts)


def pairs(row: Row) -> set[Pair]:
    """The pairs of values that a row contains."""
    return set(itertools.combinations(sorted(level(k, v) for k, v in row.items()), 2))


def all_pairs() -> dict[Pair, Row]:
    """Every pair of values of two settings -> what both need, where the needs agree."""
    values = [(k, v) for k, known in levels().items() for v in known]
    found = {}
    for (key, value), (other, second) in itertools.combinations(values, 2):
        one, two = needs_of(key, value), needs_of(other, second)
        excluded = any({key, other} <= group for group in RIVALS)
        if key != other and not excluded and all(one.get(k, v) == v for k, v in two.items()):
            found[tuple(sorted((level(key, value), level(other, second))))] = {**one, **two}
    return found


def random_needs(rng: random.Random) -> list[Row]:
    """A random value of every setting with its needs, in a random order."""
    chosen = [needs_of(key, rng.choice(values)) for key, values in levels().items()]
    rng.shuffle(chosen)
    return chosen
