"""Load a model from everything that `--model` accepts."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast, get_args

from vitcli.config.choices import Resize, StemArithmetic
from vitcli.config.schema import ModelSection, PreprocessSection
from vitcli.errors import VitcliError, quoted
from vitcli.files import is_url
from vitcli.preprocess import Preprocess
from vitcli.progress import Watcher
from vitcli.run import RUNS, finished_runs
from vitcli.vit import VisionTransformer
from vitcli.vit.position import DEFAULT_RESIZE
from vitcli.vit.variants import is_variant
from vitcli.weights.edit import (
    change_patch_size,
    change_pool,
    match_classes,
    replace_head,
    set_position_resize,
)
from vitcli.weights.from_checkpoint import build_model
from vitcli.weights.load_report import LoadReport
from vitcli.weights.loaded import LoadedModel, create_model
from vitcli.weights.overrides import (
    MODEL_KEYS,
    PICTURES,
    Overrides,
    as_size,
    missing_settings,
    one_image_size,
    override_preprocess,
    refuse_file_keys,
)
from vitcli.weights.public import is_listed
from vitcli.weights.read import read_checkpoint
from vitcli.weights.store import read_header
from vitcli.weights.zero_shot import set_zero_shot_head

VARIANT_HINT = (
    "use a variant such as `B/16`, `R50+B/16`, `Axial-B/32` or `R50x1` for random weights, or an "
    "existing path, a name of `vitcli models` or `hf:NAME` for trained weights"
)


def load_model(
    MODEL: str | os.PathLike[str],
    image_size: int | Sequence[int] | None = None,
    num_heads: int | None = None,
    pool: str | None = None,
    position_resize: str | None = None,
    labels: Sequence[str] | str | os.PathLike[str] | None = None,
    preprocess: Mapping[str, Any] | Preprocess | None = None,
    *,
    norm_eps: float | None = None,
    gelu: str | None = None,
    stem_arithmetic: StemArithmetic | None = None,
    patch_size: int | None = None,
    checkpoint_key: str | None = None,
    base_model: str | None = None,
    text_embeddings: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    seed: int = 0,
    watch: Watcher | None = None,
) -> LoadedModel:
    """Load any MODEL in evaluation mode, with its labels, preprocessing and load report.

    Args:
        MODEL: a run directory, a weights file or folder, a name that `vitcli models` lists,
            `hf:NAME` on the Hub, the URL of a weights file, or a variant (random weights).
        image_size: pixels, an int or (Y, X). A size that is not the file's resamples the positions.
        pool: a pooling of `ViTConfig` or an alias. One that is not the file's drops the head.
        position_resize: a method of `vit.position.resample`. Default: that of the layout's library.
        labels: class names, or a text file with one name per line.
        preprocess: settings that replace those of the file, or a whole Preprocess.
        num_heads, norm_eps, gelu: settings that the tensors of a file do not show.
        stem_arithmetic: `google` or `timm`, for the ResNet of a hybrid.
        patch_size: pixels; another than the file's resamples projection (FlexiViT) and positions.
        checkpoint_key: path or prefix of the network in a file with several, e.g. `student`.
        base_model: the MODEL that a LoRA adapter of PEFT was trained on.
        text_embeddings: a file with text embeddings of the classes, which become the head of a
            vision tower; see `weights.zero_shot`.
        num_classes: add a new zero head with this many outputs; 0 removes the head.
        seed, watch: random seed of a variant's weights; receives the progress of a download.

    Raises:
        VitcliError: the model cannot be found or read, or a setting is missing.
    """
    source = os.fspath(MODEL)
    method = _resize_method(position_resize)
    if (num_classes or 0) < 0:
        raise VitcliError(f"`num_classes` is {num_classes}", hint="use an integer from 0 on")
    size, settings = _preprocess_settings(image_size, preprocess)
    overrides = Overrides(
        image_size=size,
        num_heads=num_heads,
        norm_eps=norm_eps,
        gelu=gelu,
        stem_arithmetic=stem_arithmetic,
        pool=pool,
        labels=read_labels(labels),
        checkpoint_key=checkpoint_key,
        base_model=base_model,
        preprocess=settings,
    )
    if is_variant(source) and not Path(source).exists():
        reason = f"`{source}` has random weights"
        refuse_file_keys(reason, checkpoint_key=checkpoint_key, base_model=base_model)
        model = _variant(source, overrides, seed, patch_size)
        if method is not None and isinstance(model.network, VisionTransformer):
            set_position_resize(model.network, method)
    else:
        model = _stored(source, overrides, method, patch_size, watch)
    if pool is not None:
        change_pool(model, pool)
    if isinstance(preprocess, Preprocess):
        model.preprocess = preprocess
    if text_embeddings is not None:
        set_zero_shot_head(model, os.fspath(text_embeddings), overrides.labels)
    if num_classes is not None and num_classes != model.config.num_classes:
        replace_head(model, [str(i) for i in range(num_classes)])
        model.labels = None
    if overrides.labels is not None:
        _set_labels(model, overrides.labels)
    return model


def _resize_method(name: str | None) -> Resize | None:
    """The checked `model.position_resize`."""
    if name not in (None, *get_args(Resize)):
        raise VitcliError(
            f"`model.position_resize` is `{name}`",
            hint=f"use one of {', '.join(f'`{method}`' for method in get_args(Resize))}",
        )
    return cast(Resize | None, name)


def _stored(
    source: str,
    overrides: Overrides,
    method: Resize | None,
    patch_size: int | None,
    watch: Watcher | None,
) -> LoadedModel:
    """A model from a file, a folder or the network."""
    checkpoint = read_checkpoint(source, overrides, watch)
    # The weights of a run remember the method that they were trained with.
    method = method or checkpoint.position_resize or DEFAULT_RESIZE
    # A new patch size changes the grid too, so the positions are resampled once, with it.
    size = overrides.image_size if patch_size is None else None
    model = build_model(checkpoint, source, image_size=size, position_resize=method)
    if patch_size is not None:
        change_patch_size(model, patch_size, overrides.image_size)
    return model


def _preprocess_settings(
    image_size: Any, preprocess: Mapping[str, Any] | Preprocess | None
) -> tuple[tuple[int, int] | None, dict[str, Any]]:
    """Return the image size, which either section may set, and the other preprocessing settings."""
    if isinstance(preprocess, Preprocess):  # mean and std, so that no reader asks for them
        return as_size(image_size), {"mean": preprocess.mean, "std": preprocess.std}
    settings = dict(preprocess or {})
    return one_image_size(image_size, settings.pop("image_size", None)), settings


def require_preprocess(model: LoadedModel) -> Preprocess:
    """Return the evaluation transform of the model.

    Raises:
        VitcliError: mean and std are not known, or the model does not read grey or RGB images.
    """
    if model.preprocess is None:
        report: LoadReport | None = model.load_report
        source = report.source if report else "the model"
        if model.config.num_channels not in PICTURES:
            raise VitcliError(
                f"`{source}` reads {model.config.num_channels} channels, not grey or RGB images",
                hint="use it from Python: the model that `vitcli.load_model` returns takes tensors",
            )
        raise missing_settings(source, ["preprocess.mean", "preprocess.std"])
    preprocess: Preprocess = model.preprocess
    return preprocess


def require_one_number(model: LoadedModel, name: str) -> None:
    """Raise a VitcliError if the regression `model` predicts several numbers per image."""
    if (count := model.config.num_classes) > 1:
        raise VitcliError(
            f"`{name}` predicts {count} numbers per image, and one is supported",
            hint="use it from Python: the model that `vitcli.load_model` returns gives all of them",
        )


def read_labels(labels: Sequence[str] | str | os.PathLike[str] | None) -> tuple[str, ...] | None:
    """Read class names from a sequence, or from a text file with one name per line.

    Raises:
        VitcliError: the file cannot be read, or two names are equal.
    """
    if labels is None:
        return None
    if isinstance(labels, (str, os.PathLike)):
        try:
            text = Path(labels).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise VitcliError(
                f"cannot read the class names in `{os.fspath(labels)}`: {error}",
                hint="`--labels` takes a text file with one class name per line",
            ) from error
        labels = [line.strip() for line in text.splitlines() if line.strip()]
    names = tuple(str(name) for name in labels)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise VitcliError(
            f"two classes have the same name: {quoted(twice, 3)}",
            hint="give each class a different name",
        )
    return names


def _set_labels(model: LoadedModel, labels: tuple[str, ...]) -> None:
    if len(labels) != model.config.num_classes:
        raise VitcliError(
            f"{len(labels)} class names for a head with {model.config.num_classes} outputs",
            hint="`--labels` takes one name per line, in the order of the outputs",
        )
    model.labels = labels


def _variant(name: str, overrides: Overrides, seed: int, patch_size: int | None) -> LoadedModel:
    settings: dict[str, Any] = {
        "patch_size": patch_size,
        "image_size": overrides.image_size or (224, 224),
        "num_heads": overrides.num_heads,
        "norm_eps": overrides.norm_eps,
        "gelu": overrides.gelu,
        "stem_arithmetic": overrides.stem_arithmetic,
        "pool": overrides.pool,
        "num_classes": len(overrides.labels) if overrides.labels else None,
    }
    try:
        model = create_model(
            name, seed=seed, **{k: v for k, v in settings.items() if v is not None}
        )
    except ValueError as error:
        hint = (
            VARIANT_HINT
            if "no model variant" in str(error)
            else "change the `--set model.…` settings"
        )
        raise VitcliError(str(error), hint=hint) from error
    size = model.config.image_size
    base = Preprocess(image_size=size, mean=(0.5,) * 3, std=(0.5,) * 3)
    model.preprocess = override_preprocess(base, overrides.preprocess, size, 3)
    model.load_report = LoadReport(name, "variant", notes=[f"`{name}`: random weights"])
    model.load_report.status = dict.fromkeys(model.state_dict(), ("new", "random"))
    return model


def load_settings(model: ModelSection, preprocess: PreprocessSection) -> dict[str, Any]:
    """Return the arguments of `load_model` from `--set model.…` and `--set preprocess.…`.

    Raises:
        VitcliError: a setting is fixed by the weights.
    """
    arguments = model.model_dump(exclude_none=True, exclude={"name"})
    if fixed := sorted(set(arguments) - set(MODEL_KEYS)):
        raise VitcliError(
            f"the weights determine {', '.join(f'`model.{k}`' for k in fixed)}",
            hint=f"you can set {', '.join(f'`model.{k}`' for k in MODEL_KEYS)}",
        )
    if settings := preprocess.model_dump(exclude_none=True):
        arguments["preprocess"] = settings
    return arguments


def names_weights(name: str) -> bool:
    """True if the MODEL `name` is weights that exist or are public, and not a variant."""
    if is_variant(name) and not Path(name).exists():
        return False
    return name.startswith("hf:") or is_url(name) or is_listed(name) or Path(name).exists()


def newest_run(
    *,
    classifier: bool,
    classes: Callable[[], Sequence[str]] | None = None,
    runs: Path = RUNS,
) -> str:
    """Return the path of the newest finished run of a kind.

    Args:
        classifier: True for a run with a trained head, including `fewshot` runs; False for a
            training run.
        classes: returns class names. It is called if there are several runs, and the newest one
            that knows all of these classes is preferred.
        runs: the folder of runs.

    Raises:
        VitcliError: there is no such run.
    """
    found = _runs_of_kind(classifier, runs)
    newest = next(found, None)
    if newest is not None:
        others = [] if classes is None else list(found)
        if classes is None or not others:
            return newest[0]
        wanted: Sequence[str] = ()
        with suppress(VitcliError):  # loading the data reports it
            wanted = classes()
        fitting = (path for path, labels in [newest, *others] if match_classes(wanted, labels))
        return next(fitting, newest[0])
    if classifier:
        raise VitcliError(
            f"there is no run with a trained head under `{runs}/`",
            hint="run `vitcli finetune` or `vitcli fewshot`, or name weights with `--model`",
        )
    raise VitcliError(
        f"there is no finished run under `{runs}/`",
        hint="run `vitcli pretrain` (a few minutes), or name weights with `--model`",
    )


def _runs_of_kind(classifier: bool, runs: Path) -> Iterator[tuple[str, Sequence[str]]]:
    """(path, class names) of the finished runs of a kind, newest first."""
    for run in finished_runs(runs):
        try:
            header = read_header(run.weights_file) or {}
            command = run.result().get("command")
        except VitcliError:
            continue
        is_classifier = bool(header.get("head_trained"))
        is_training_run = bool(header) and command != "fewshot"
        if is_classifier if classifier else is_training_run:
            yield str(run.path), header.get("labels") or ()
