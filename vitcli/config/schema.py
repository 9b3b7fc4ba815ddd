"""The sections of a recipe: every setting there is, with its type, bounds and default."""

import hashlib
import json
import math
import re
from typing import Any, Literal, Self

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

Settings = dict[str, Any]
DURATIONS = ("steps", "epochs", "images", "budget")


def parse_duration(text: str) -> float:
    """`90s`, `10m`, `1h30m` -> seconds.

    Raises:
        ValueError: not of that form, or nothing at all.
    """
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip())
    parts = [int(part or 0) for part in found.groups()] if found else []
    seconds = sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
    if not seconds:
        raise ValueError(f"`{text}` is no time such as `90s`, `10m` or `1h30m`")
    return float(seconds)


class Section(BaseModel):
    """One table of a recipe: unknown keys and wrong types are errors, nothing changes later."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelSection(Section):
    """Which model; a key left out keeps what `name` says.

    `layers` and `width` are those of a ResNet (`name = "R50x1"`), which besides has image size and
    channels only.
    """

    name: str | None = None
    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None
    patch_size: PositiveInt | None = None
    num_channels: Literal[1, 3] | None = None
    embed_dim: PositiveInt | None = None
    depth: PositiveInt | None = None
    num_heads: PositiveInt | None = None
    mlp_dim: PositiveInt | None = None
    pool: str | None = None
    class_token: bool | None = None
    distillation_token: bool | None = None
    distillation_head: bool | None = None
    num_registers: NonNegativeInt | None = None
    position: Literal["learned", "learned2d", "relative", "sincos2d", "none"] | None = None
    position_at: Literal["stem", "every", "shared"] | None = None
    position_covers_prefix: bool | None = None
    pool_blocks: PositiveInt | None = None
    position_resize: (
        Literal["bilinear", "bilinear_antialiased", "bicubic", "bicubic_plain"] | None
    ) = None
    representation_size: PositiveInt | None = None
    qkv_bias: bool | None = None
    qk_norm: bool | None = None
    layer_scale: float | None = None
    mlp: Literal["gelu", "swiglu"] | None = None
    gelu: Literal["exact", "tanh"] | None = None
    norm_eps: PositiveFloat | None = None
    norm_before_blocks: bool | None = None
    norm_after_pool: bool | None = None
    patch_bias: bool | None = None
    axial: bool | None = None
    stem: tuple[PositiveInt, ...] | None = None
    stem_width: PositiveFloat | None = None
    stem_arithmetic: Literal["google", "timm"] | None = None
    layers: tuple[PositiveInt, ...] | None = None
    width: PositiveFloat | None = None
    dropout_rate: float | None = Field(default=None, ge=0.0, lt=1.0)
    drop_path_rate: float | None = Field(default=None, ge=0.0, lt=1.0)

    def architecture(self) -> Settings:
        """The keys that were given and belong to the configuration; image sizes as (Y, X)."""
        given = self.model_dump(exclude_none=True, exclude={"name", "position_resize"})
        if isinstance(given.get("image_size"), int):
            given["image_size"] = (given["image_size"], given["image_size"])
        return given


class PreprocessSection(Section):
    """The evaluation transform; a key left out keeps what travels with the weights."""

    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None
    resize_mode: Literal["crop", "squash", "pad"] | None = None
    resize_size: PositiveInt | None = None
    crop_fraction: float | None = Field(default=None, gt=0.0, le=1.0)
    crop_rounding: Literal["even", "down"] | None = None
    interpolation: Literal["bilinear", "bicubic", "nearest", "lanczos"] | None = None
    antialias: bool | None = None
    mean: float | tuple[float, ...] | None = None
    std: PositiveFloat | tuple[PositiveFloat, ...] | None = None


class DataSection(Section):
    """Which images, and how a split is made where the data has none.

    `multi_label`: an image has any number of labels (cells `a;b`, lists); None goes by the data.
    `train_split` and `test_split` are splits of the data or slices of one, such as `train[:98%]`.
    `folds` hold the `fold`th of so many parts of the training images out; `validation_fraction`
    a share of them. Whatever is cut keeps each class in its share and follows `split_seed`.
    `streaming` reads training images shard by shard and keeps none; `shuffle_buffer` of them are
    mixed at a time, and `classes` is a file of class names where the data does not say them.
    """

    name: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    multi_label: bool | None = None
    train_split: str | None = None
    test_split: str | None = None
    test_fraction: float = Field(default=0.2, gt=0.0, lt=1.0)
    validation_fraction: float | None = Field(default=None, gt=0.0, lt=1.0)
    folds: int | None = Field(default=None, ge=2)
    fold: NonNegativeInt = 0
    split_seed: NonNegativeInt = 0
    workers: NonNegativeInt | None = None
    strict: bool = False
    streaming: bool = False
    shuffle_buffer: PositiveInt = 2048
    classes: str | None = None

    @model_validator(mode="after")
    def _fold_exists(self) -> Self:
        if self.classes is not None and not self.streaming:
            raise ValueError("`classes` names those of a stream: `streaming` is not set")
        if self.fold and self.folds is None:
            raise ValueError("`fold` is one of `folds`: say how many there are")
        if self.folds is not None and self.fold >= self.folds:
            raise ValueError(f"`fold` is 0 to {self.folds - 1} where there are {self.folds} folds")
        if self.folds is not None and self.validation_fraction is not None:
            raise ValueError("give `folds` or `validation_fraction`, not both")
        return self


class AugmentSection(Section):
    """What training does to a picture before the model sees it, in this order.

    `crop`, flip, `policy`, colour jitter (brightness, contrast, saturation, hue), grey, erasing;
    then mixup or cutmix of two pictures of the batch. `preset` names values for all keys that are
    left out here (`vitcli/data/augment/presets.py`); without one, what is left out does nothing.
    `magnitude` is RandAugment's, on AugReg's scale where 10 is strong. `mix_rate` is the share of
    pairs that are mixed, `cutmix_rate` the share of those cut rather than blended when both alphas
    are given. `repeats` shows each image of a batch so many times (Hoffer et al. 2020).
    """

    crop: Literal["inception", "pad", "none"] = "inception"
    min_area: float = Field(default=0.05, gt=0.0, le=1.0)
    crop_padding: NonNegativeInt = 4
    flip_rate: float = Field(default=0.5, ge=0.0, le=1.0)
    preset: (
        Literal["none", "light1", "light2", "medium1", "medium2", "strong1", "strong2", "3-augment"]
        | None
    ) = None
    policy: Literal["none", "randaugment", "trivial", "3-augment"] | None = None
    num_ops: PositiveInt | None = None
    magnitude: float | None = Field(default=None, ge=0.0, le=30.0)
    brightness: NonNegativeFloat | None = None
    contrast: NonNegativeFloat | None = None
    saturation: NonNegativeFloat | None = None
    hue: float | None = Field(default=None, ge=0.0, le=0.5)
    grey_rate: float | None = Field(default=None, ge=0.0, le=1.0)
    erase_rate: float | None = Field(default=None, ge=0.0, le=1.0)
    mixup_alpha: NonNegativeFloat | None = None
    cutmix_alpha: NonNegativeFloat | None = None
    mix_rate: float | None = Field(default=None, ge=0.0, le=1.0)
    cutmix_rate: float | None = Field(default=None, ge=0.0, le=1.0)
    repeats: PositiveInt = 1


class ObjectiveSection(Section):
    """What training minimises; see `vitcli/train/objectives/`.

    `auto` is `softmax`, and `sigmoid` for images with several labels. `head_bias` is what the
    biases of a new head start from under `sigmoid`: -10 for ImageNet-21k, -6.9 for ImageNet-1k.

    `masked_patch` and `mae` corrupt or hide `mask_rate` of the patches, by default 0.5 and 0.75.
    `target` is what a corrupted patch is to tell: its mean colour, those of 4x4 parts of it, or
    its pixels. `decoder_depth`, `_dim` and `_heads` shape the decoder of `mae`, whose targets are
    standardised in each patch under `norm_pixels`.

    `distill` learns from the MODEL `teacher`: its class (`hard`) or its probabilities at
    `temperature` (`soft`), with `distillation_weight` of the loss, the labels with the rest.
    """

    name: str = "auto"
    head_bias: float | None = None
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    descriptor_weight: NonNegativeFloat = 1.0
    target: Literal["mean_color", "small_patch", "pixels"] = "mean_color"
    mask_rate: float | None = Field(default=None, gt=0.0, lt=1.0)
    decoder_depth: PositiveInt = 2
    decoder_dim: PositiveInt = 128
    decoder_heads: PositiveInt = 4
    norm_pixels: bool = True
    teacher: str | None = None
    distillation: Literal["hard", "soft"] = "hard"
    distillation_weight: float = Field(default=0.5, gt=0.0, le=1.0)
    temperature: PositiveFloat = 1.0


class OptimSection(Section):
    """The optimizer. `matrix_lr` is Muon's rate for the hidden matrices; `lr` serves the rest.

    `lr_batch_size` is the batch that the rates are meant for: with another one they are multiplied
    by the ratio (`lr_scaling = "linear"`) or its root. `layer_decay` multiplies the rate once more
    for every layer further from the head: the last block has it once, the embedding depth + 1
    times. `momentum_dtype = "bf16"` keeps the momentum of `sgd` in half the memory, as the paper's
    fine-tuning code does. `betas` are those of `adamw`, `lamb` and `lion`; `adafactor` takes
    `momentum`, and its second moments as big_vision has them.
    """

    name: Literal["adamw", "sgd", "muon", "lion", "lamb", "adafactor"] = "adamw"
    lr: PositiveFloat = 1e-3
    matrix_lr: PositiveFloat = 0.02
    lr_batch_size: PositiveInt | None = None
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    layer_decay: float = Field(default=1.0, gt=0.0, le=1.0)
    weight_decay: NonNegativeFloat = 0.0
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    momentum_dtype: Literal["fp32", "bf16"] = "fp32"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    grad_clip: PositiveFloat | None = None

    @model_validator(mode="after")
    def _half_momentum(self) -> Self:
        if self.momentum_dtype == "bf16" and self.name != "sgd":
            raise ValueError("`momentum_dtype` is for `sgd`; `adafactor` keeps bf16 by itself")
        return self

    def rate_factor(self, batch_size: int) -> float:
        """What the rates are multiplied by for steps of `batch_size` images."""
        ratio = batch_size / (self.lr_batch_size or batch_size)
        return ratio if self.lr_scaling == "linear" else ratio**0.5


class ScheduleSection(Section):
    """How the rate moves: warm-up from 0, then the named curve down to `final_lr_fraction`.

    `decay_fraction` is the last part of `wsd`; `timescale` and `cooldown_steps` belong to `rsqrt`,
    which ends at 0 where there is a cool-down.
    """

    name: Literal["linear", "cosine", "wsd", "constant", "rsqrt"] = "cosine"
    warmup_steps: NonNegativeInt | None = None
    warmup_fraction: float | None = Field(default=None, ge=0.0, lt=1.0)
    decay_fraction: float = Field(default=0.2, gt=0.0, le=1.0)
    final_lr_fraction: float = Field(default=0.0, ge=0.0, le=1.0)
    timescale: PositiveInt = 10_000
    cooldown_steps: NonNegativeInt = 0

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_steps is not None and self.warmup_fraction is not None:
            raise ValueError("give `warmup_steps` or `warmup_fraction`, not both")
        return self


class LoraSection(Section):
    """Low-rank adapters in `finetune` (Hu et al., 2021): they and the head learn, nothing else.

    `rank` is their width, None for none; their output counts `alpha` / `rank` times, `alpha` being
    2 * `rank` where it is left out. `targets` are the layers of each block that get one: `qkv`,
    `proj` and `mlp` (both of its layers). They become part of the weights at the end of the run.
    """

    rank: PositiveInt | None = None
    alpha: PositiveFloat | None = None
    targets: tuple[Literal["qkv", "proj", "mlp"], ...] = ("qkv", "proj")

    @property
    def scale(self) -> float:
        """The factor on what an adapter adds."""
        return 2.0 if self.alpha is None or self.rank is None else self.alpha / self.rank

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.rank is None and self.alpha is not None:
            raise ValueError("`alpha` scales adapters of a `rank`, which is not given")
        if not self.targets:
            raise ValueError("`targets` are some of `qkv`, `proj` and `mlp`")
        return self


class TrainSection(Section):
    """How long, how many at once, and what is kept.

    `batch_size` is the images per optimizer step over all processes; `micro_batch_size` those of
    one forward pass on one process. `eval_steps` and `checkpoint_steps` are intervals; None takes
    a fifth of the run for the first and about a minute for the second. `smaller_sizes` are pairs
    (side in pixels, share of the run until which images are shrunk to it). `patch_drop_rate` of
    each image's patches are left out in training, until `patch_drop_until` of the run is over.
    `freeze` keeps weights as they are in `finetune`: `backbone` all but the head, `blocks:6` the
    embeddings and the first six blocks, of which nothing is then kept for a backward pass.
    `activation_checkpointing` keeps the input of each block only and computes the rest again in the
    backward pass: less memory, more time, the same gradients. `compile` has torch compile the
    forward and backward pass, `tf32` lets a GPU round the factors of fp32 products to 10 bits.
    `fully_shard` shares weights, gradients and optimizer states out among the processes (FSDP2).
    `on_nan`: when the loss is not finite, `stop`, or `rewind` to the last checkpoint and go on with
    half the rate, three times at most.
    """

    steps: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    images: PositiveInt | None = None
    budget: str | None = None
    batch_size: PositiveInt = 128
    micro_batch_size: PositiveInt | None = None
    seed: NonNegativeInt = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    freeze: str = Field(default="none", pattern=r"^(none|backbone|blocks:[1-9][0-9]*)$")
    activation_checkpointing: bool = False
    patch_drop_rate: float = Field(default=0.0, ge=0.0, lt=1.0)
    patch_drop_until: float = Field(default=1.0, gt=0.0, le=1.0)
    smaller_sizes: tuple[tuple[PositiveInt, float], ...] = ()
    ema_decay: float | None = Field(default=None, gt=0.0, lt=1.0)
    checkpoint_steps: PositiveInt | None = None
    keep_checkpoints: PositiveInt = 2
    eval_steps: PositiveInt | None = None
    log_steps: PositiveInt = 20
    compile: bool = False
    tf32: bool = False
    fully_shard: bool = False
    on_nan: Literal["stop", "rewind"] = "stop"

    @model_validator(mode="after")
    def _one_duration(self) -> Self:
        given = [name for name in DURATIONS if getattr(self, name) is not None]
        if len(given) != 1:
            named = " and ".join(f"`{name}`" for name in given) or "none"
            options = ", ".join(f"`{name}`" for name in DURATIONS)
            raise ValueError(f"give exactly one of {options}; here: {named}")
        if self.budget is not None:
            parse_duration(self.budget)
        return self

    def side_at(self, step: float, total_steps: int) -> int | None:
        """The side that images are shrunk to at `step`, or None for their own size."""
        for side, until in self.smaller_sizes:
            if step < until * total_steps:
                return side
        return None

    def patch_drop_at(self, step: float, total_steps: int) -> float:
        """The share of the patches that are left out at `step`."""
        return self.patch_drop_rate if step < self.patch_drop_until * total_steps else 0.0

    def total_steps(self, num_images: int) -> int | None:
        """Optimizer steps over a set of `num_images`; None where only the time is given."""
        if self.budget is not None:
            return None
        if self.steps is not None:
            return self.steps
        images = self.images if self.images is not None else (self.epochs or 0.0) * num_images
        return max(1, math.ceil(images / self.batch_size))


class FewshotSection(Section):
    """A classifier on frozen features; left as it is, the few-shot protocol of big_vision.

    `shots` are images a class, or `all`; `seeds` so many draws of them. `l2` is the strength of the
    penalty of `ridge` (1024 if left out) and `logistic` (1): a number; `auto`, chosen on the drawn
    images; `path`, the same with the accuracies of all strengths. `neighbors` and `temperature` are
    those of `knn`. `representation` is what of the model is read: `pre-logits` (what its head
    reads), `cls`, `mean`, `quadrants`, `token_mean`, `layer:N`, `concat:N`.
    """

    method: Literal["ridge", "knn", "logistic", "mean"] = "ridge"
    shots: tuple[PositiveInt | Literal["all"], ...] = Field(default=(5,), min_length=1)
    seeds: PositiveInt = 3
    l2: PositiveFloat | Literal["auto", "path"] | None = None
    neighbors: PositiveInt = 20
    temperature: PositiveFloat = 0.07
    representation: str = "pre-logits"

    @model_validator(mode="after")
    def _penalised(self) -> Self:
        if self.l2 is not None and self.method in ("knn", "mean"):
            raise ValueError(f"`l2` is for `ridge` and `logistic`; `{self.method}` has no penalty")
        return self


class Inference(Section):
    """The settings of commands that use a model and do not train it."""

    model: ModelSection = ModelSection()
    preprocess: PreprocessSection = PreprocessSection()
    data: DataSection = DataSection()
    fewshot: FewshotSection = FewshotSection()


class Recipe(Section):
    """A training run, whole: what decides its result and nothing else."""

    command: Literal["pretrain", "finetune"]
    description: str = ""
    model: ModelSection = ModelSection()
    preprocess: PreprocessSection = PreprocessSection()
    data: DataSection = DataSection()
    augment: AugmentSection = AugmentSection()
    objective: ObjectiveSection = ObjectiveSection()
    optim: OptimSection = OptimSection()
    lora: LoraSection = LoraSection()
    schedule: ScheduleSection = ScheduleSection()
    train: TrainSection

    @model_validator(mode="after")
    def _something_pretrained(self) -> Self:
        if self.command == "pretrain" and self.lora.rank is not None:
            raise ValueError("`lora.rank` adapts pretrained weights: it is for `vitcli finetune`")
        if self.command == "pretrain" and self.train.freeze != "none":
            raise ValueError("`train.freeze` keeps pretrained weights: it is for `vitcli finetune`")
        return self

    def to_toml(self) -> str:
        """The recipe written out in full; reading it back gives an equal one."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    def fingerprint(self) -> str:
        """A short hash of every setting."""
        values = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(values.encode()).hexdigest()[:16]
