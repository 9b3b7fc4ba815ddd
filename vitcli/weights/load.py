"""From what a user writes after `--model` to a model that can be used."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from vitcli.config.schema import ModelSection, PreprocessSection
from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.progress import Watcher
from vitcli.run import RUNS, finished_runs
from vitcli.vit.hybrid import StemArithmetic
from vitcli.vit.position import Resize
from vitcli.vit.variants import is_variant
from vitcli.weights.edit import build, change_patch_size, change_pool, replace_head
from vitcli.weights.load_report import LoadReport
from vitcli.weights.loaded import LoadedModel, create_model
from vitcli.weights.overrides import MODEL_KEYS, PICTURES, Stated, as_size, stated_preprocess
from vitcli.weights.read import read_checkpoint
from vitcli.weights.store import read_header
from vitcli.weights.timm.read_timm import missing_settings

VARIANT_HINT = (
    "`B/16`, `R50+B/16`, `Axial-B/32` and `R50x1` are variants, with random weights; weights are a "
    "path that exists, or `hf:NAME`"
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
    num_classes: int | None = None,
    seed: int = 0,
    watch: Watcher | None = None,
) -> LoadedModel:
    """Any MODEL -> a model in eval mode, with `labels`, `preprocess`, `load_report`.

    Args:
        MODEL: a run directory, a weights file or folder, `hf:NAME` on the Hub, the address of a
            weights file, or a variant (random weights).
        image_size: pixels, an int or (Y, X); another size than the file's resamples the positions.
        num_heads: for a file that does not say it.
        pool: `token`, `mean`, `quadrants`, `map`, `token_mean`, `distilled` or an alias; where the
            file says another, its head is dropped.
        position_resize: `bilinear` (corners aligned, the paper's code; the default for Google
            files), `bicubic` (antialiased, timm's; the default for the rest), `bicubic_plain`
            (not antialiased: transformers' for ViT, DeiT and DINOv2) or `bilinear_antialiased`.
        labels: class names, or a text file with one a line.
        preprocess: settings laid over those of the file, or a whole Preprocess.
        norm_eps, gelu: for a file that does not say them.
        stem_arithmetic: `google` or `timm`, for a hybrid: whose of the two the ResNet follows.
        patch_size: pixels; another than the file's resamples the patch projection (FlexiViT's
            pseudo-inverse) and the positions.
        num_classes: a new zero head with so many outputs, or 0 for no head.
        seed: of a variant's random weights.
        watch: told of a download.

    Raises:
        VitcliError: it cannot be found, understood or read; what it does not say is named.
    """
    source = os.fspath(MODEL)
    whole = preprocess if isinstance(preprocess, Preprocess) else None
    if isinstance(preprocess, Preprocess):
        # Enough that nothing is assumed; the whole takes its place below.
        said: dict[str, Any] = {"mean": preprocess.mean, "std": preprocess.std}
    else:
        said = dict(preprocess or {})
    size = _one_size(
        as_size(image_size), as_size(said.pop("image_size", None), "preprocess.image_size")
    )
    if position_resize not in (None, *get_args(Resize)):
        raise VitcliError(
            f"`model.position_resize` is `{position_resize}`",
            hint=", ".join(f"`{method}`" for method in get_args(Resize)),
        )
    stated = Stated(
        image_size=size,
        num_heads=num_heads,
        norm_eps=norm_eps,
        gelu=gelu,
        stem_arithmetic=stem_arithmetic,
        pool=pool,
        labels=read_labels(labels),
        preprocess=said,
    )
    if is_variant(source) and not Path(source).exists():
        model = _variant(source, stated, seed, patch_size)
    else:
        checkpoint = read_checkpoint(source, stated, watch)
        default: Resize = "bilinear" if checkpoint.layout == "google" else "bicubic"
        method: Resize = position_resize or default  # type: ignore[assignment]  # checked above
        at = stated.image_size if patch_size is None else None
        model = build(checkpoint, source, image_size=at, position_resize=method)
        if patch_size is not None:
            change_patch_size(model, patch_size, stated.image_size)
    if pool is not None:
        change_pool(model, pool)
    if whole is not None:
        model.preprocess = whole
    if num_classes is not None and num_classes < 0:
        raise VitcliError(f"`num_classes` is {num_classes}", hint="a number from 0 on")
    if num_classes is not None and num_classes != model.config.num_classes:
        replace_head(model, [str(i) for i in range(num_classes)])
        model.labels = None
    if stated.labels is not None:
        _name_classes(model, stated.labels)
    return model


def _one_size(
    model: tuple[int, int] | None, preprocess: tuple[int, int] | None
) -> tuple[int, int] | None:
    """The image size, which may be stated in either section."""
    if model is not None and preprocess is not None and model != preprocess:
        raise VitcliError(
            f"`model.image_size` is {model}, `preprocess.image_size` {preprocess}",
            hint="say it once",
        )
    return model or preprocess


def require_preprocess(model: LoadedModel) -> Preprocess:
    """The model's evaluation transform.

    Raises:
        VitcliError: its file does not say mean and std, and nobody else did; or its channels are
            not those of pictures.
    """
    if model.preprocess is None:
        report: LoadReport | None = model.load_report
        source = report.source if report else "the model"
        if model.config.num_channels not in PICTURES:
            raise VitcliError(
                f"`{source}` reads {model.config.num_channels} channels, which are not pictures",
                hint="from Python: `vitcli.load_model(…)` gives a model that takes tensors",
            )
        raise missing_settings(source, ["preprocess.mean", "preprocess.std"])
    preprocess: Preprocess = model.preprocess
    return preprocess


def read_labels(labels: Sequence[str] | str | os.PathLike[str] | None) -> tuple[str, ...] | None:
    """Class names as they are, or from a text file with one a line.

    Raises:
        VitcliError: no such file, or two equal names.
    """
    if labels is None:
        return None
    if isinstance(labels, (str, os.PathLike)):
        try:
            text = Path(labels).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise VitcliError(
                f"cannot read the class names in `{os.fspath(labels)}`: {error}",
                hint="`--labels` takes a text file with one class name a line",
            ) from error
        labels = [line.strip() for line in text.splitlines() if line.strip()]
    names = tuple(str(name) for name in labels)
    if twice := sorted({name for name in names if names.count(name) > 1})[:3]:
        raise VitcliError(
            f"two classes have the same name: {', '.join(twice)}", hint="give each its own name"
        )
    return names


def _name_classes(model: LoadedModel, labels: tuple[str, ...]) -> None:
    if len(labels) != model.config.num_classes:
        raise VitcliError(
            f"{len(labels)} class names for a head with {model.config.num_classes} outputs",
            hint="`--labels` takes one name a line, in the order of the outputs",
        )
    model.labels = labels


def _variant(name: str, stated: Stated, seed: int, patch_size: int | None) -> LoadedModel:
    settings: dict[str, Any] = {
        "patch_size": patch_size,
        "image_size": stated.image_size or (224, 224),
        "num_heads": stated.num_heads,
        "norm_eps": stated.norm_eps,
        "gelu": stated.gelu,
        "stem_arithmetic": stated.stem_arithmetic,
        "pool": stated.pool,
        "num_classes": len(stated.labels) if stated.labels else None,
    }
    try:
        model = create_model(
            name, seed=seed, **{k: v for k, v in settings.items() if v is not None}
        )
    except ValueError as error:
        hint = VARIANT_HINT if "no model variant" in str(error) else "another `--set model.…`"
        raise VitcliError(str(error), hint=hint) from error
    size = model.config.image_size
    base = Preprocess(image_size=size, mean=(0.5,) * 3, std=(0.5,) * 3)
    model.preprocess = stated_preprocess(base, stated.preprocess, size, 3)
    model.load_report = LoadReport(name, "variant", notes=[f"`{name}`: random weights"])
    model.load_report.fates = dict.fromkeys(model.state_dict(), ("new", "random"))
    return model


def load_settings(model: ModelSection, preprocess: PreprocessSection) -> dict[str, Any]:
    """What `--set model.…` and `--set preprocess.…` say -> arguments of `load_model`.

    Raises:
        VitcliError: a setting that the weights decide, named.
    """
    arguments = model.model_dump(exclude_none=True, exclude={"name"})
    if fixed := sorted(set(arguments) - set(MODEL_KEYS)):
        raise VitcliError(
            f"a model that is loaded decides {', '.join(f'`model.{k}`' for k in fixed)} itself",
            hint=f"what can be said: {', '.join(f'`model.{k}`' for k in MODEL_KEYS)}",
        )
    if said := preprocess.model_dump(exclude_none=True):
        arguments["preprocess"] = said
    return arguments


def newest_run(*, classifier: bool, runs: Path = RUNS) -> str:
    """The newest finished run that fits: one that trained, or one that `predict` can use.

    Args:
        classifier: a run whose head is trained, `fewshot` runs included; else any run but these.
        runs: the folder of runs.

    Raises:
        VitcliError: there is none, with both ways out.
    """
    for run in finished_runs(runs):
        try:
            header = read_header(run.weights_file) or {}
            command = run.result().get("command")
        except VitcliError:
            continue
        if header.get("head_trained") if classifier else header and command != "fewshot":
            return str(run.path)
    if classifier:
        raise VitcliError(
            f"there is no run with a trained head under `{runs}/`",
            hint="`vitcli finetune` or `vitcli fewshot` makes one; `--model` names other weights",
        )
    raise VitcliError(
        f"there is no finished run under `{runs}/`",
        hint="`vitcli pretrain` makes one (a few minutes); `--model` names other weights",
    )
