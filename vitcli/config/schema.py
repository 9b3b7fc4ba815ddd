"""Every setting of a recipe, declared once: type, bounds, default and one sentence of help.

The `--set` keys, the recipe files, the short flags, the settings reference and the provenance of a
run all derive from these classes. `help_of("optim.lr")` returns the sentence of a setting.
"""

import hashlib
import json
import math
import re
from typing import Annotated, Any, Literal, Self, get_args

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    field_validator,
    model_validator,
)

from vitcli.config.choices import (
    CropRounding,
    Gelu,
    Interpolation,
    MlpKind,
    NormKind,
    PatchInit,
    Pool,
    Position,
    PositionAt,
    PositionBias,
    Resize,
    ResizeMode,
    Rope,
    RopeDtype,
    RopePairs,
    StemArithmetic,
)

Settings = dict[str, Any]
DURATIONS = ("steps", "epochs", "images", "budget")
# Above any sensible value, and small enough that no product of two overflows.
Count = Annotated[int, Field(gt=0, le=10**9)]
Images = Annotated[int, Field(gt=0, le=10**12)]
CountOrZero = Annotated[int, Field(ge=0, le=10**9)]
ClassWeight = Annotated[float, Field(ge=0.0, le=1e6)]
Gamma = Annotated[float, Field(ge=0.0, le=20.0)]  # exponent of a focusing factor
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # of NumPy
Pixels = Annotated[int, Field(gt=0, le=8192)]
Width = Annotated[int, Field(gt=0, le=10**5)]
Depth = Annotated[int, Field(gt=0, le=1000)]
Size = Pixels | tuple[Pixels, Pixels]
CUDA_GRAPHS = "reduce-overhead"  # the mode of torch.compile that records them
LION_BETAS = (0.9, 0.99)  # of its authors (Chen et al., 2023, algorithm 2)


def setting(default: Any, help: str, **bounds: Any) -> Any:
    """A field with its default, its help and pydantic's bounds such as `gt=0.0`."""
    return Field(default=default, description=help, **bounds)


def parse_duration(text: str) -> float:
    """`90s`, `10m`, `3 min`, `1h30m` -> seconds.

    Raises:
        ValueError: the text has another form, or the duration is zero.
    """
    hours, minutes = r"(?:(\d{1,6})h(?:ours?)?)?", r"(?:(\d{1,6})m(?:in(?:utes?)?)?)?"
    seconds_ = r"(?:(\d{1,9})s(?:ec(?:onds?)?)?)?"
    found = re.fullmatch(hours + minutes + seconds_, text.replace(" ", "").lower())
    parts = [int(part or 0) for part in found.groups()] if found else []
    seconds = sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
    if not seconds:
        number = f"`{text.strip()}m` for minutes" if text.strip().isdigit() else "`90s`, `10m`"
        raise ValueError(f"is not a duration; write for example {number} or `1h30m`")
    return float(seconds)


def check_duration(text: str) -> str:
    """`text`, if `parse_duration` can read it."""
    parse_duration(text)
    return text


def check_freeze(text: str) -> str:
    """`text`, if it is a value of `train.freeze`."""
    if not re.fullmatch(r"none|backbone|blocks:[1-9][0-9]*", text):
        raise ValueError("must be `none`, `backbone` or `blocks:N`")
    return text


class Section(BaseModel):
    """One table of a recipe. Unknown keys and wrong types are errors; a section is immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


# Keys of `[model]` that belong to the first weights, loaded or random, not to the architecture.
FIRST_WEIGHTS = ("position_resize", "checkpoint_key", "base_model", "patch_init")


class ModelSection(Section):
    """The model. A key that is not given keeps the value of the variant `name`.

    A ResNet (`name = "R50x1"`) has the settings `image_size`, `num_channels`, `layers` and `width`.
    """

    name: str | None = setting(None, "Variant such as `B/16`, or the MODEL to fine-tune.")
    image_size: Size | None = setting(
        None, "Image side in px (rectangular: `--set model.image_size=[Y,X]`)."
    )
    patch_size: Pixels | None = setting(None, "Patch side in px.")
    num_channels: Literal[1, 3] | None = setting(None, "Image channels: 1 (grey) or 3 (RGB).")
    embed_dim: Width | None = setting(None, "Width of the tokens.")
    depth: Depth | None = setting(None, "Number of encoder blocks.")
    num_heads: Count | None = setting(None, "Attention heads per block.")
    mlp_dim: Width | None = setting(None, "Hidden width of the MLP.")
    pool: str | None = setting(None, f"Pooling: {', '.join(get_args(Pool))}.")
    class_token: bool | None = setting(None, "Prepend a class token.")
    distillation_token: bool | None = setting(None, "Prepend a distillation token (DeiT).")
    distillation_head: bool | None = setting(None, "Add a head on the distillation token (DeiT).")
    num_registers: NonNegativeInt | None = setting(None, "Number of register tokens.", le=1000)
    position: Position | None = setting(None, "Kind of position embedding.")
    position_at: PositionAt | None = setting(
        None,
        "Where positions are added: `stem` (before the encoder), `every` (a table per block) or "
        "`shared` (one table for all blocks).",
    )
    position_bias: PositionBias | None = setting(
        None,
        "Learned bias of the attention by 2-D offset (BEiT): `none`, `every` (a table per block) "
        "or `shared` (one table).",
    )
    position_covers_prefix: bool | None = setting(
        None, "Give the prefix tokens position embeddings too."
    )
    pool_blocks: Count | None = setting(None, "Number of last blocks that pooling reads.")
    position_resize: Resize | None = setting(
        None, "Interpolation of position embeddings for another image size."
    )
    representation_size: Width | None = setting(None, "Width of the pre-logits layer.")
    qkv_bias: bool | None = setting(None, "Add a bias to query, key and value.")
    qk_norm: bool | None = setting(None, "Normalise queries and keys.")
    layer_scale: float | None = setting(None, "Initial value of LayerScale.")
    mlp: MlpKind | None = setting(None, "Kind of MLP.")
    gelu: Gelu | None = setting(None, "Form of GELU.")
    norm: NormKind | None = setting(None, "Kind of norm.")
    norm_eps: PositiveFloat | None = setting(None, "Epsilon of the norms.")
    norm_before_blocks: bool | None = setting(None, "Add a layer norm before the first block.")
    norm_after_pool: bool | None = setting(None, "Normalise after pooling instead of before.")
    final_norm: bool | None = setting(None, "Add a norm after the last block.")
    patch_bias: bool | None = setting(None, "Add a bias to the patch embedding.")
    pixel_norm: bool | None = setting(
        None, "Normalise the pixels of a patch (Dual PatchNorm, with `patch_norm`)."
    )
    patch_norm: bool | None = setting(None, "Normalise the patch embeddings.")
    projection_size: Width | None = setting(
        None, "Width of a projection without bias between features and head, as in CLIP."
    )
    head_norm: bool | None = setting(
        None, "Divide the input of the head by its L2 norm, as zero-shot heads do."
    )
    crop_to_patches: bool | None = setting(
        None, "Cut off the rest of images that whole patches do not cover, as a convolution does."
    )
    text_embeddings: str | None = setting(
        None, "File with text embeddings of the classes: a zero-shot head on CLIP or SigLIP."
    )
    axial: bool | None = setting(
        None, "Use axial attention, within rows and within columns; also in a ResNet."
    )
    stem: tuple[Count, ...] | None = setting(None, "Units per stage of the hybrid's ResNet stem.")
    stem_width: PositiveFloat | None = setting(None, "Width factor of the hybrid's ResNet stem.")
    stem_arithmetic: StemArithmetic | None = setting(
        None, "Padding and normalisation of the stem: Google's or timm's."
    )
    checkpoint_key: str | None = setting(
        None,
        "Key or prefix of the network to load from a file with several, e.g. `student`. "
        "Default: the averaged weights.",
    )
    base_model: str | None = setting(
        None, "MODEL that a LoRA adapter of PEFT was trained on. Default: the one in its config."
    )
    conv_stem: tuple[Width, ...] | None = setting(
        None,
        "Feature maps per stage of a convolutional stem; each stage halves the image.",
    )
    patch_init: PatchInit | None = setting(
        None,
        "First weights of the patch projection: `random`, or `whitening` for filters that "
        "decorrelate the pixels of photographs. Default: random.",
    )
    layers: tuple[Count, ...] | None = setting(None, "Units per stage of a ResNet.")
    width: PositiveFloat | None = setting(None, "Width factor of a ResNet.")
    dropout_rate: float | None = setting(None, "Dropout rate.", ge=0.0, lt=1.0)
    drop_path_rate: float | None = setting(
        None, "Stochastic depth rate of the last block.", ge=0.0, lt=1.0
    )
    key_bias: bool | None = setting(None, "With `qkv_bias`, add a bias to the keys too.")
    attention_norm: bool | None = setting(None, "Normalise before the attention's projection.")
    mlp_norm: bool | None = setting(None, "Normalise before the last layer of the MLP.")
    rope: Rope | None = setting(
        None,
        "Rotate queries and keys by position (RoPE): coordinates from -1 to 1 (`centred`, DINOv3) "
        "or numbers of patches (`index`, EVA-02).",
    )
    rope_theta: float | None = setting(None, "Longest RoPE period over the shortest.", ge=1.0)
    rope_pairs: RopePairs | None = setting(
        None, "Channels that RoPE rotates together: the `halves` of a head, or `neighbours`."
    )
    rope_grid: tuple[Count, Count] | None = setting(
        None, "Rows and columns to which RoPE scales the numbers of the patches."
    )
    rope_dtype: RopeDtype | None = setting(None, "Dtype to which the RoPE periods are rounded.")
    rope_shift: NonNegativeFloat | None = setting(
        None, "Largest random shift of the RoPE coordinates in training."
    )
    rope_jitter: float | None = setting(
        None, "Largest random factor per axis of the RoPE coordinates in training.", ge=1.0
    )
    rope_rescale: float | None = setting(
        None, "Largest random factor of both RoPE coordinates in training.", ge=1.0
    )

    def architecture(self) -> Settings:
        """The given keys that belong to the model's configuration; image sizes as (Y, X)."""
        given = self.model_dump(exclude_none=True, exclude={"name", *FIRST_WEIGHTS})
        if isinstance(given.get("image_size"), int):
            given["image_size"] = (given["image_size"], given["image_size"])
        return given


class PreprocessSection(Section):
    """The evaluation transform. A key that is not given keeps the value in the weights file."""

    image_size: Size | None = setting(None, "Image side in px that the model receives.")
    resize_mode: ResizeMode | None = setting(
        None, "Resize and centre crop, squash to the size, or pad to a square."
    )
    resize_size: Pixels | None = setting(None, "Shorter side in px before the centre crop.")
    crop_fraction: float | None = setting(
        None, "Central fraction of the resized image that is kept.", gt=0.0, le=1.0
    )
    crop_rounding: CropRounding | None = setting(None, "Rounding of the size before the crop.")
    interpolation: Interpolation | None = setting(None, "Interpolation of the resize.")
    antialias: bool | None = setting(None, "Antialias when the image is shrunk.")
    border: Annotated[int, Field(ge=0, le=8192)] | None = setting(
        None, "Pixels that are cut off each side of an image first, e.g. 2 for ObjectNet."
    )
    mean: float | tuple[float, ...] | None = setting(
        None, "Mean per channel that is subtracted, pixels in 0 to 1."
    )
    std: PositiveFloat | tuple[PositiveFloat, ...] | None = setting(
        None, "Standard deviation per channel, pixels in 0 to 1."
    )
    window: tuple[float, float] | None = setting(
        None,
        "Black and white level of images of 16 bits, 32 bits or floats, e.g. `[-160, 240]` for CT. "
        "Default: that of the weights, else from the training images.",
    )

    @model_validator(mode="after")
    def _check_window(self) -> Self:
        if self.window is not None and not -math.inf < self.window[0] < self.window[1] < math.inf:
            raise ValueError("`window` must be two finite numbers, the lower one first")
        return self


class DataSection(Section):
    """The dataset, and how to split it where it has no splits. Each cut is stratified by class."""

    name: str | None = setting(None, "DATA: a folder, a table, parquet, shards, `hf:NAME` …")
    image_column: str | None = setting(None, "Column that holds the images or their paths.")
    label_column: str | None = setting(None, "Column that holds the labels.")
    image_root: str | None = setting(
        None, "Folder that the paths of a table start from. Default: the folder of the table."
    )
    image_suffix: str | None = setting(
        None, "Suffix that completes the image names of a table, e.g. `.jpg`."
    )
    multi_label: bool | None = setting(
        None, "Treat each image as having any number of labels. Default: detect it."
    )
    label_separator: str | None = setting(
        None, "Text between the labels of a cell, e.g. `|`. Default: detect it.", min_length=1
    )
    split_column: str | None = setting(
        None, "Column that names the split of each row; `none` ignores such columns."
    )
    test_fold: CountOrZero | str | None = setting(
        None, "Fold of the split column that is held out as the test split."
    )
    group_column: str | None = setting(
        None, "Column such as `patient`; images with the same value stay in one split."
    )
    class_level: Literal["auto", "top", "leaf", "path"] = setting(
        "auto",
        "Folders that are classes where folders are nested: `top` folders, innermost folders "
        "(`leaf`), or innermost folders named by their `path`.",
    )
    train_split: str | None = setting(None, "Training split or slice, e.g. `train[:98%]`.")
    test_split: str | None = setting(None, "Test split or slice.")
    test_fraction: float = setting(
        0.2,
        "Fraction of the images held out for testing if the data has no test split.",
        gt=0.0,
        lt=1.0,
    )
    validation_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] | Literal["auto"] | None = setting(
        None,
        "Fraction of the training images held out for validation; 0 for none, `auto` for a tenth "
        "where the data has no validation split and enough images.",
    )
    folds: int | None = setting(None, "Number of cross-validation folds.", ge=2)
    fold: CountOrZero = setting(0, "Index of the fold that is held out, from 0.")
    split_seed: Seed = setting(0, "Random seed of the splits.")
    sampler: Literal["shuffle", "class_balanced", "square_root"] = setting(
        "shuffle",
        "Training images of an epoch: each once (`shuffle`), every class equally often "
        "(`class_balanced`), or in proportion to the square root of its size (`square_root`).",
    )
    workers: Annotated[int, Field(ge=0, le=256)] | None = setting(
        None, "Threads that decode images. Default: by the number of CPU cores."
    )
    strict: bool = setting(
        False, "Stop at an unreadable image. Default: use another image of its class."
    )
    streaming: bool = setting(
        False, "Read training images shard by shard without storing them; a resume is approximate."
    )
    shuffle_buffer: Count = setting(2048, "Images in the shuffle buffer of a stream.")
    classes: str | None = setting(None, "File with the class names of a stream, one per line.")

    @model_validator(mode="after")
    def _check_splits(self) -> Self:
        if self.classes is not None and not self.streaming:
            raise ValueError("`classes` names the classes of a stream; set `streaming` too")
        if self.streaming and self.sampler != "shuffle":
            raise ValueError(
                f'a stream is read in its own order, which `sampler = "{self.sampler}"` cannot '
                "choose; weigh the classes with `objective.class_weights`, or do not stream"
            )
        if self.fold and self.folds is None:
            raise ValueError("`fold` needs `folds`, the number of folds")
        if self.folds is not None and self.fold >= self.folds:
            raise ValueError(f"`fold` must be 0 to {self.folds - 1} with {self.folds} folds")
        if self.folds is not None and self.validation_fraction not in (None, 0.0, "auto"):
            raise ValueError("give `folds` or `validation_fraction`, not both")
        if self.label_separator is not None and self.multi_label is False:
            raise ValueError("`label_separator` divides cells; remove `multi_label = false`")
        return self


class AugmentSection(Section):
    """Training augmentation, in this order.

    Crop, flip, policy, colour jitter, grey, erasing, then mixup or cutmix of pairs in the batch.
    A key that is not given takes the value of `preset`; without a preset it does nothing.
    """

    # The names of crops, presets and policies are listed in `vitcli/data/augment/` only;
    # `resolve_augment` checks them.
    crop: str = setting("inception", "Kind of random crop.")
    min_area: float = setting(
        0.05,
        "Smallest area of an inception crop, as a fraction of the image.",
        gt=0.0,
        le=1.0,
    )
    crop_padding: Annotated[int, Field(ge=0, le=8192)] = setting(4, "Padding of a pad crop in px.")
    crop_fill: Literal["black", "reflect"] = setting(
        "black", "Padding of a pad crop: `black`, or the mirrored border (`reflect`)."
    )
    resize_size: Pixels | None = setting(
        None, "Side in px from which a resize crop cuts. Default: 7/6 of the image size."
    )
    flip_rate: float = setting(0.5, "Probability of a horizontal flip.", ge=0.0, le=1.0)
    preset: str | None = setting(None, "Preset of AugReg or DeiT III; it sets the keys below.")
    policy: str | None = setting(None, "Augmentation policy.")
    num_ops: Count | None = setting(None, "Operations per image of RandAugment.")
    magnitude: float | None = setting(
        None, "Magnitude of RandAugment on AugReg's scale; 10 is strong.", ge=0.0, le=30.0
    )
    brightness: NonNegativeFloat | None = setting(None, "Brightness range of the colour jitter.")
    contrast: NonNegativeFloat | None = setting(None, "Contrast range of the colour jitter.")
    saturation: NonNegativeFloat | None = setting(None, "Saturation range of the colour jitter.")
    hue: float | None = setting(None, "Hue range of the colour jitter.", ge=0.0, le=0.5)
    grey_rate: float | None = setting(None, "Probability of a grey image.", ge=0.0, le=1.0)
    erase_rate: float | None = setting(None, "Probability of random erasing.", ge=0.0, le=1.0)
    mixup_alpha: NonNegativeFloat | None = setting(None, "Alpha of mixup.")
    cutmix_alpha: NonNegativeFloat | None = setting(None, "Alpha of cutmix.")
    mix_rate: float | None = setting(
        None, "Fraction of the pairs that mixup or cutmix mixes.", ge=0.0, le=1.0
    )
    cutmix_rate: float | None = setting(
        None,
        "Fraction of the mixed pairs that cutmix mixes if both alphas are set.",
        ge=0.0,
        le=1.0,
    )
    repeats: Count = setting(
        1, "Views of each image per batch (repeated augmentation, Hoffer et al., 2020)."
    )


class ObjectiveSection(Section):
    """The training objective, and the settings that one or a few objectives have."""

    name: str = setting(
        "auto",
        "Objective. `auto`: softmax, or sigmoid for multi-label data. `mse` predicts a number.",
    )
    head_bias: float | None = setting(
        None, "Initial bias of a new sigmoid head: -10 for ImageNet-21k, -6.9 for ImageNet-1k."
    )
    label_smoothing: float = setting(0.0, "Label smoothing.", ge=0.0, lt=1.0)
    class_weights: Literal["balanced", "effective"] | tuple[ClassWeight, ...] | None = setting(
        None,
        "Weights of the classes in the loss: `balanced` (n / (K n_c) as in scikit-learn), "
        "`effective` (class-balanced loss, Cui et al., 2019), or a list in the order of classes.",
    )
    class_weights_beta: float | None = setting(
        None, "Beta of `effective` class weights. Default: 0.999.", ge=0.0, lt=1.0
    )
    focal_gamma: float | None = setting(
        None, "Gamma of the focal loss (Lin et al., 2017), e.g. 2.", gt=0.0, le=20.0
    )
    asymmetric_gammas: tuple[Gamma, Gamma] | None = setting(
        None,
        "Gammas of the asymmetric loss for present and absent labels (Ridnik et al., 2021), e.g. "
        "`[0, 4]`; for `sigmoid`.",
    )
    asymmetric_clip: float | None = setting(
        None,
        "Probability below which the asymmetric loss ignores an absent label. Default: 0.05.",
        ge=0.0,
        lt=1.0,
    )
    logit_adjustment: float | None = setting(
        None,
        "Tau of logit adjustment (Menon et al., 2021), e.g. 1: training adds tau times the "
        "logarithm of the class frequencies to the logits.",
        gt=0.0,
        le=20.0,
    )
    descriptor_weight: NonNegativeFloat = setting(1.0, "Weight of the descriptor loss in `guided`.")
    target: Literal["mean_color", "small_patch", "pixels"] = setting(
        "mean_color",
        "Target of `masked_patch`: `mean_color`, `small_patch` (4x4 mean colours) or `pixels`.",
    )
    mask_rate: float | None = setting(
        None,
        "Fraction of patches that is masked. Default: 0.5 for masked_patch, 0.75 for mae.",
        gt=0.0,
        lt=1.0,
    )
    decoder_depth: Depth = setting(2, "Blocks of the `mae` decoder.")
    decoder_dim: Width = setting(128, "Width of the `mae` decoder.", le=10**5)
    decoder_heads: Count = setting(4, "Attention heads of the `mae` decoder.")
    norm_pixels: bool = setting(True, "Standardise the `mae` targets in each patch.")
    teacher: str | None = setting(None, "MODEL that teaches in `distill`.")
    distillation: Literal["hard", "soft", "features"] = setting(
        "hard",
        "Learn the teacher's class (hard), its probabilities (soft) or the direction of its "
        "features (features), for which it needs no head.",
    )
    teacher_cache: bool = setting(
        False,
        "Compute the teacher once per image, without augmentation, and keep its features on the "
        "disk.",
    )
    distillation_weight: float = setting(
        0.5, "Weight of the teacher in the loss of `distill`.", gt=0.0, le=1.0
    )
    temperature: PositiveFloat = setting(1.0, "Temperature of soft distillation.")

    @property
    def uses_class_counts(self) -> bool:
        """True if the loss depends on the number of training images per class."""
        return isinstance(self.class_weights, str) or self.logit_adjustment is not None

    @model_validator(mode="after")
    def _check_class_losses(self) -> Self:
        if isinstance(self.class_weights, tuple) and not any(self.class_weights):
            raise ValueError("`class_weights` must have a weight above 0")
        if self.class_weights_beta is not None and self.class_weights != "effective":
            raise ValueError('`class_weights_beta` needs `class_weights = "effective"`')
        if self.asymmetric_clip is not None and self.asymmetric_gammas is None:
            raise ValueError("`asymmetric_clip` needs `asymmetric_gammas`, for example `[0, 4]`")
        if self.focal_gamma is not None and self.asymmetric_gammas is not None:
            raise ValueError("give `focal_gamma` or `asymmetric_gammas`, not both")
        if isinstance(self.class_weights, str) and self.logit_adjustment is not None:
            raise ValueError(
                f'give `class_weights = "{self.class_weights}"` or `logit_adjustment`, not both: '
                "each corrects the class sizes alone"
            )
        return self


class OptimSection(Section):
    """The optimizer and its learning rates."""

    name: str = setting("adamw", "Optimizer.")
    lr: PositiveFloat = setting(1e-3, "Peak learning rate.")
    matrix_lr: PositiveFloat = setting(
        0.02, "Peak learning rate of Muon, which trains the matrices in the blocks."
    )
    lr_batch_size: Count | None = setting(
        None, "Batch size that `lr` is meant for; another batch size scales the rate."
    )
    lr_scaling: Literal["linear", "sqrt"] = setting(
        "linear", "How the learning rate scales with the batch size."
    )
    layer_decay: float = setting(
        1.0, "Learning rate factor per layer, counted from the head.", gt=0.0, le=1.0
    )
    weight_decay: NonNegativeFloat = setting(
        0.0, "Weight decay of kernels; biases, norms, tokens and positions have none."
    )
    momentum: float = setting(0.9, "Momentum of sgd, muon and adafactor.", ge=0.0, lt=1.0)
    momentum_dtype: Literal["fp32", "bf16"] = setting("fp32", "Storage type of sgd's momentum.")
    betas: tuple[float, float] = setting(
        (0.9, 0.999), "Betas of adamw, lamb, lion and muon. Default of lion: 0.9 and 0.99."
    )
    eps: PositiveFloat = setting(1e-8, "Epsilon of adamw, lamb and muon.")
    grad_clip: PositiveFloat | None = setting(
        None, "Maximum global norm of the gradients; `none` turns clipping off."
    )

    @field_validator("grad_clip", mode="before")
    @classmethod
    def _read_grad_clip(cls, value: Any) -> Any:
        if isinstance(value, int | float) and value <= 0:
            raise ValueError("must be greater than 0; `none` turns clipping off")
        return None if value == "none" else value

    @model_validator(mode="after")
    def _fill_betas(self) -> Self:
        # Filled here and not in the optimizer, so that the recipe of a run states what it used.
        if self.name == "lion" and "betas" not in self.model_fields_set:
            self.__dict__["betas"] = LION_BETAS  # the section is frozen for everyone else
        return self

    def rate_factor(self, batch_size: int) -> float:
        """The factor on the learning rates for a batch of `batch_size` images."""
        ratio = batch_size / (self.lr_batch_size or batch_size)
        return ratio if self.lr_scaling == "linear" else ratio**0.5


class ScheduleSection(Section):
    """The learning-rate schedule: warm-up from 0, then the named curve."""

    name: str = setting("cosine", "Learning-rate schedule.")
    warmup_steps: CountOrZero | None = setting(None, "Warm-up in steps.")
    warmup_fraction: float | None = setting(
        None, "Warm-up as a fraction of the run.", ge=0.0, lt=1.0
    )
    decay_fraction: float = setting(
        0.2, "Last fraction of the run in which `wsd` decays.", gt=0.0, le=1.0
    )
    final_lr_fraction: float = setting(
        0.0, "Learning rate at the end, as a fraction of the peak.", ge=0.0, le=1.0
    )
    power: PositiveFloat = setting(1.0, "Power of `polynomial`; 1 gives a line, 2 a parabola.")
    stair_steps: tuple[Count, ...] = setting(
        (), "Steps from which `stair` has another factor, counted from the start of the run."
    )
    stair_factors: tuple[NonNegativeFloat, ...] = setting(
        (), "Factors on the peak rate from those steps on, e.g. `[0.1, 0.01]`."
    )
    timescale: Count = setting(10_000, "Timescale of `rsqrt` in steps.")
    shift: CountOrZero = setting(0, "Steps that `rsqrt` starts ahead of its curve.")
    cooldown_steps: CountOrZero = setting(
        0, "Steps of the linear cool-down to 0 at the end of `rsqrt`."
    )
    extension: Literal["continue", "restart"] = setting(
        "continue",
        "Schedule of a resume with more `--epochs` or `--steps`: `continue` takes the curve of the "
        "new length, `restart` warms up and decays again.",
    )

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        if self.warmup_steps is not None and self.warmup_fraction is not None:
            raise ValueError("give `warmup_steps` or `warmup_fraction`, not both")
        return self

    @model_validator(mode="after")
    def _check_stair(self) -> Self:
        if len(self.stair_steps) != len(self.stair_factors):
            raise ValueError("`stair_steps` and `stair_factors` need as many values")
        if list(self.stair_steps) != sorted(set(self.stair_steps)):
            raise ValueError("`stair_steps` must increase")
        if self.name == "stair" and not self.stair_steps:
            raise ValueError("`stair` needs `stair_steps` and `stair_factors`")
        return self


class LoraSection(Section):
    """Low-rank adapters for `finetune` (Hu et al., 2021); they are merged at the end of the run."""

    rank: Count | None = setting(
        None, "Rank of LoRA adapters; trains only the adapters and the head (finetune)."
    )
    alpha: PositiveFloat | None = setting(
        None, "The adapters are scaled by alpha / rank. Default: 2 * rank."
    )
    targets: tuple[Literal["qkv", "proj", "mlp"], ...] = setting(
        ("qkv", "proj"), "Layers of each block that get an adapter: qkv, proj, mlp."
    )

    @property
    def scale(self) -> float:
        """The factor on the output of an adapter."""
        return 2.0 if self.alpha is None or self.rank is None else self.alpha / self.rank

    @model_validator(mode="after")
    def _check_adapters(self) -> Self:
        if self.rank is None and self.alpha is not None:
            raise ValueError("`alpha` needs `rank`, the rank of the adapters")
        if not self.targets:
            raise ValueError("`targets` must name at least one of `qkv`, `proj` and `mlp`")
        return self


class TrainSection(Section):
    """The length of a run, its batches, and what it stores."""

    steps: Count | None = setting(None, "Number of optimizer steps.")
    epochs: PositiveFloat | None = setting(
        None, "Number of passes over the training images.", le=1e6
    )
    images: Images | None = setting(None, "Number of training images seen.")
    budget: Annotated[str, AfterValidator(check_duration)] | None = setting(
        None, "Time limit of the whole command, e.g. `90s`, `10m`, `1h30m`."
    )
    batch_size: Annotated[int, Field(gt=0, le=10**7)] = setting(
        128, "Images per optimizer step, summed over all processes."
    )
    micro_batch_size: Count | None = setting(
        None, "Images per forward pass and process. Default: all that fit."
    )
    seed: Seed = setting(0, "Random seed for weight initialisation, shuffling and augmentation.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", "Precision: auto, fp32, bf16 or fp16."
    )
    freeze: Annotated[str, AfterValidator(check_freeze)] = setting(
        "none",
        "Freeze `backbone` (all but the head) or `blocks:N` (embeddings and N blocks) in finetune.",
    )
    keep_head: bool = setting(
        False,
        "Start from the trained head of the model, for data with the same classes in any order "
        "(finetune).",
    )
    activation_checkpointing: bool = setting(
        False, "Recompute activations in the backward pass: less memory, more time."
    )
    patch_drop_rate: float = setting(
        0.0, "Fraction of the patches that are dropped per training image.", ge=0.0, lt=1.0
    )
    patch_drop_until: float = setting(
        1.0, "Fraction of the run during which patches are dropped.", gt=0.0, le=1.0
    )
    smaller_sizes: tuple[tuple[Pixels, float], ...] = setting(
        (),
        "Progressive resizing: pairs `[side in px, fraction of the run at which this size ends]`.",
    )
    ema_decay: float | None = setting(
        None, "Decay of the exponential moving average of the weights.", gt=0.0, lt=1.0
    )
    ema_warmup: bool = setting(
        True, "Start the average with the decay (1 + step) / (10 + step) while that is smaller."
    )
    checkpoint_steps: Count | None = setting(
        None, "Steps between checkpoints. Default: a checkpoint about every minute."
    )
    keep_checkpoints: Count = setting(2, "Number of checkpoints that are kept.")
    eval_steps: Count | None = setting(
        None, "Steps between evaluations. Default: a fifth of the run."
    )
    fewshot_shots: Count | None = setting(
        None,
        "Measure the few-shot accuracy too in each evaluation, with this many training images per "
        "class; the result has the best one (Figure 4).",
    )
    best_metric: str | None = setting(
        None,
        "Export the weights with the best (latest of equal) value of this metric on validation "
        "images: accuracy, balanced_accuracy, macro_f1, loss, map, micro_f1, fewshot_accuracy, "
        "mae, rmse or r2.",
    )
    patience: Count | None = setting(
        None,
        "Stop after this many evaluations in turn without a better `best_metric` (default: "
        "accuracy, map for several labels, rmse for numbers). Extending a run restarts the count.",
    )
    log_steps: Count = setting(20, "Steps between records in metrics.jsonl.")
    compile: bool | Literal["reduce-overhead"] = setting(
        False,
        "Compile the forward and backward pass with torch.compile. `reduce-overhead` also records "
        "CUDA graphs: for small models on a GPU, whose kernels take less time than their launch.",
    )
    tf32: bool = setting(False, "Let a GPU use TF32 for fp32 matrix products.")
    deterministic: bool = setting(
        False, "Use only kernels that compute the same bits each time; slower on a GPU."
    )
    fully_shard: bool = setting(
        False, "Shard weights, gradients and optimizer states over the processes (FSDP2)."
    )
    on_nan: Literal["stop", "rewind"] = setting(
        "stop",
        "Reaction to a loss that is NaN or infinite: `stop` the run, or `rewind` it to the last "
        "checkpoint and halve the learning rate, at most three times.",
    )

    @model_validator(mode="after")
    def _check_duration(self) -> Self:
        given = [name for name in DURATIONS if getattr(self, name) is not None]
        if len(given) != 1:
            named = " and ".join(f"`{name}`" for name in given) or "none"
            options = ", ".join(f"`{name}`" for name in DURATIONS)
            raise ValueError(f"give exactly one of {options}; given: {named}")
        if self.compile == CUDA_GRAPHS and self.micro_batch_size is not None:
            # torch cannot yet: https://github.com/pytorch/pytorch/issues/169545
            raise ValueError('`compile = "reduce-overhead"` cannot have a `micro_batch_size`')
        return self

    def side_at(self, step: float, total_steps: int) -> int | None:
        """The image side in px at `step` under `smaller_sizes`; None for the full size."""
        for side, until in self.smaller_sizes:
            if step < until * total_steps:
                return side
        return None

    def patch_drop_at(self, step: float, total_steps: int) -> float:
        """The fraction of patches that is dropped at `step`."""
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
    """A classifier on frozen features. The defaults are big_vision's few-shot protocol."""

    method: str = setting("ridge", "Classifier on the features.")
    shots: tuple[Count | Literal["all"], ...] = setting(
        (5,),
        "Training images per class, or `all`; comma-separated for several: `1,5,10`.",
        min_length=1,
    )
    seeds: Count = setting(3, "Number of random draws of the shots.", le=10_000)
    l2: PositiveFloat | Literal["auto", "path"] | None = setting(
        None,
        "L2 regularisation: a number, `auto` (chosen on the training images) or `path` (auto, and "
        "the accuracy of every value). Default: 1024 for ridge, 1 for logistic.",
    )
    neighbors: Count = setting(20, "Number of neighbours of knn.")
    temperature: PositiveFloat = setting(0.07, "Temperature of the knn votes.")
    representation: str = setting(
        "pre-logits",
        "Features: pre-logits (the input of the head), cls, mean, quadrants, token_mean, `layer:N` "
        "or `concat:N` (the last N blocks).",
    )


class Inference(Section):
    """The settings of commands that use a model and do not train it."""

    model: ModelSection = ModelSection()
    preprocess: PreprocessSection = PreprocessSection()
    data: DataSection = DataSection()
    fewshot: FewshotSection = FewshotSection()


class DataCheck(Inference):
    """The settings of `check`, which reads the labels as training with this objective does."""

    objective: ObjectiveSection = ObjectiveSection()


class Recipe(Section):
    """A complete training run: every setting that decides its result."""

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
    def _check_command(self) -> Self:
        if self.command == "pretrain" and self.lora.rank is not None:
            raise ValueError("`lora.rank` needs pretrained weights; use `vitcli finetune`")
        if self.command == "pretrain" and self.train.freeze != "none":
            raise ValueError("`train.freeze` needs pretrained weights; use `vitcli finetune`")
        if self.command == "pretrain" and self.train.keep_head:
            raise ValueError("`train.keep_head` needs pretrained weights; use `vitcli finetune`")
        return self

    @model_validator(mode="after")
    def _check_class_sizes(self) -> Self:
        if self.data.sampler != "shuffle" and self.objective.uses_class_counts:
            key = "logit_adjustment" if self.objective.logit_adjustment else "class_weights"
            raise ValueError(
                f'give `data.sampler = "{self.data.sampler}"` or `objective.{key}`, not both: each '
                "corrects the class sizes alone"
            )
        return self

    def to_toml(self) -> str:
        """The complete recipe as TOML; reading it back gives an equal recipe."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    def fingerprint(self) -> str:
        """A short hash of every setting."""
        values = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(values.encode()).hexdigest()[:16]


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for kind in (Recipe, Inference)
    for name, field in kind.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


def help_of(key: str) -> str:
    """The help sentence of a setting such as `optim.lr`."""
    section, _, name = key.partition(".")
    return SECTIONS[section].model_fields[name].description or ""
