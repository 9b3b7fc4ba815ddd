"""`vitcli finetune`: pretrained weights -> a run directory with a head for the data's classes."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitcli.config import Recipe, Settings, lay_over, load_recipe, nest
from vitcli.data.sources import Source
from vitcli.errors import VitcliError
from vitcli.run import RUNS, check_free, finished_runs, new_path, place_of
from vitcli.train.find_lr import FoundRate, find_rate
from vitcli.train.session import Trained, train
from vitcli.vit import Model, ResNet, VisionTransformer
from vitcli.watch import Quiet, Watcher
from vitcli.weights.fates import tell_load
from vitcli.weights.load import load_model, require_preprocess
from vitcli.weights.surgery import prepare_finetune

DIGITS = "builtin:digits"
FROM_FILE = (
    "image_size",
    "patch_size",
    "pool",
    "num_heads",
    "norm_eps",
    "gelu",
    "position_resize",
)
REGULARISERS = ("dropout_rate", "drop_path_rate")


def run(
    data: str | None = None,
    *,
    model: str | None = None,
    recipe: str | None = None,
    settings: Settings | None = None,
    out: Path | None = None,
    resume: bool = False,
    track: str | None = None,
    verbose: bool = False,
    watch: Watcher | None = None,
) -> Trained:
    """Fine-tune a model on labelled images (section 3.2 of the paper).

    Args:
        data: DATA; None takes the recipe's, `builtin:digits` in the default one.
        model: MODEL; None takes the newest finished `pretrain` run.
        recipe: a recipe's name or file; None takes `finetune_digits` for the built-in digits and
            `finetune` for anybody's own images.
        settings: nested settings laid over the recipe.
        out: the run directory; None makes `runs/RECIPE`, numbered when that is taken.
        resume: go on with the run at `out`.
        track: `tensorboard`, `wandb` or `trackio`, given every record.
        verbose: tell what became of every tensor of the weights.

    Raises:
        VitcliError: bad input; nothing is left half-written.
    """
    watch = watch or Quiet()
    name, resolved = resolve(data, model, recipe, settings, out if resume else None, watch)
    return train(
        resolved,
        lambda source: pretrained_model(resolved, source, watch, verbose=verbose),
        out=place_of(out, Path(name).stem, resume),
        resume=resume,
        watch=watch,
        track=track,
    )


def find_lr(
    data: str | None = None,
    *,
    model: str | None = None,
    recipe: str | None = None,
    settings: Settings | None = None,
    out: Path | None = None,
    watch: Watcher | None = None,
) -> FoundRate:
    """A range test of the learning rate for the run that `run` would make of the same arguments.

    Args:
        out: a new folder for its curve; None makes `runs/RECIPE-lr`.
    """
    watch = watch or Quiet()
    name, resolved = resolve(data, model, recipe, settings, None, watch)
    out = out or new_path(f"{Path(name).stem}-lr")
    check_free(out)
    return find_rate(resolved, lambda s: pretrained_model(resolved, s, watch), out=out, watch=watch)


def resolve(
    data: str | None,
    model: str | None,
    recipe: str | None,
    settings: Settings | None,
    resumed: Path | None,
    watch: Watcher,
) -> tuple[str, Recipe]:
    """(a recipe's name or file, the recipe that comes of the arguments of `run`)."""
    name = "finetune_digits" if data in (None, DIGITS) else "finetune"
    name = name if recipe is None else recipe
    changes: Settings = {}
    if data is not None:
        lay_over(changes, nest("data.name", data))
    if model is not None:
        lay_over(changes, nest("model.name", model))
    lay_over(changes, settings or {})
    resolved = load_recipe(name, changes, "finetune")
    if resolved.model.name is None:
        chosen = newest_pretrained(resumed)
        watch.note(f"no `--model` given: {chosen}")
        lay_over(changes, nest("model.name", chosen))
        resolved = load_recipe(name, changes, "finetune")
    if data is None and recipe is None:
        watch.note(f"no DATA given: {resolved.data.name}")
    return name, resolved


def newest_pretrained(resumed: Path | None = None) -> str:
    """The newest finished run of `pretrain`; for a resumed run, the model that it started from.

    Raises:
        VitcliError: there is none.
    """
    if resumed is not None and (resumed / "recipe.toml").is_file():
        from vitcli.run import Run

        return str(Run(resumed).recipe().model.name)
    for candidate in finished_runs():
        with suppress(VitcliError):  # a damaged result.json
            if candidate.result().get("command") == "pretrain":
                return str(candidate.path)
    raise VitcliError(
        f"there is no finished `pretrain` run under `{RUNS}/`",
        "run `vitcli pretrain` first (a few minutes, no download), or name weights with `--model`",
    )


def pretrained_model(
    recipe: Recipe, source: Source, watch: Watcher, *, verbose: bool = False
) -> Model:
    """The recipe's MODEL with a zero head for the classes of `source`.

    Raises:
        VitcliError: it cannot be loaded, or a setting does not fit it.
    """
    section = recipe.model
    given = section.model_dump(exclude_none=True, exclude={"name"})
    if foreign := sorted(set(given) - {*FROM_FILE, *REGULARISERS}):
        raise VitcliError(
            f"these belong to the weights and cannot be changed: model.{', model.'.join(foreign)}",
            f"`finetune` takes {', '.join('model.' + k for k in (*FROM_FILE, *REGULARISERS))}",
        )
    loading = {key: given[key] for key in FROM_FILE if key in given}
    model = load_model(
        section.name or "",
        preprocess=recipe.preprocess.model_dump(exclude_none=True),
        seed=recipe.train.seed,
        watch=watch,
        **loading,
    )
    require_preprocess(model)
    model = prepare_finetune(model, source.classes)
    tell_load(model, watch, verbose=verbose)
    changes: dict[str, Any] = {key: given[key] for key in REGULARISERS if key in given}
    return regularised(model, changes) if changes else model


def regularised(model: Model, rates: dict[str, Any]) -> Model:
    """The same weights in a model with other dropout rates.

    Raises:
        VitcliError: a ResNet, which has none.
    """
    if isinstance(model, ResNet):
        raise VitcliError(
            f"a ResNet has no dropout: model.{', model.'.join(rates)}", "leave it out"
        )
    new = VisionTransformer(replace(model.config, **rates))
    new.load_state_dict(model.state_dict())
    new.labels, new.preprocess = model.labels, model.preprocess
    new.head_activation = model.head_activation
    new.head_trained, new.load_report = model.head_trained, model.load_report
    return new
