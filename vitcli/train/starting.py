"""What a training command starts from: its recipe, and the model that the recipe names."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vitcli.config.recipe import check, lay_over, load_recipe, nest
from vitcli.config.schema import ModelSection, Recipe, Settings
from vitcli.data.image_set import Source
from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.progress import Watcher
from vitcli.run import RUNS, finished_runs
from vitcli.train.objectives import find_objective
from vitcli.vit import ResNet, VisionTransformer, create_network, from_config, parse_variant
from vitcli.vit.variants import is_resnet
from vitcli.weights.edit import prepare_finetune
from vitcli.weights.load import load_model, require_preprocess
from vitcli.weights.load_report import tell_load
from vitcli.weights.loaded import LoadedModel
from vitcli.weights.overrides import stated_preprocess

FORMULA, DIGITS = "builtin:formula", "builtin:digits"
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


def pretrain_recipe(
    data: str | None, recipe: str | None, settings: Settings | None, watch: Watcher
) -> tuple[str, Recipe]:
    """The name and the resolved recipe of a `pretrain` command line.

    Raises:
        VitcliError: no such recipe, or settings that are wrong.
    """
    name = "pretrain_formula" if data in (None, FORMULA) else "pretrain"
    name = name if recipe is None else recipe
    changes: Settings = {}
    if data is not None:
        lay_over(changes, nest("data.name", data))
    lay_over(changes, settings or {})
    resolved = for_resnet(load_recipe(name, changes, "pretrain"), changes, watch)
    if data is None and recipe is None:
        watch.note(f"no DATA given: recipe `{name}`, {resolved.data.name}")
    return name, resolved


def finetune_recipe(
    data: str | None,
    model: str | None,
    recipe: str | None,
    settings: Settings | None,
    watch: Watcher,
    resumed: Path | None = None,
) -> tuple[str, Recipe]:
    """The name and the resolved recipe of a `finetune` command line.

    Args:
        resumed: the run that is gone on with; its model is the default then.

    Raises:
        VitcliError: no such recipe, settings that are wrong, or no model to start from.
    """
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


def for_resnet(recipe: Recipe, changes: Settings, watch: Watcher) -> Recipe:
    """`recipe` without its settings of a ViT, where `changes` put a ResNet into its place."""
    said = changes.get("model", {})
    if not is_resnet(name := str(said.get("name"))):
        return recipe
    given = recipe.model.model_dump(exclude_none=True)
    if foreign := sorted(set(given) - {"name", "image_size", "num_channels", *said}):
        watch.note(f"`{name}` is a ResNet, so the recipe's {', '.join(foreign)} do not apply")
    model = check(ModelSection, {k: v for k, v in given.items() if k not in foreign}, name)
    return recipe.model_copy(update={"model": model})


def random_model(recipe: Recipe, source: Source, *, empty: bool = False) -> LoadedModel:
    """The recipe's variant with fresh weights, a head where the objective has classes, a transform.

    Args:
        empty: without weights, on the meta device: for counting.

    Raises:
        VitcliError: no such variant, or settings that contradict each other.
    """
    section = recipe.model
    supervised = find_objective(recipe.objective.name).supervised
    classes = len(source.classes) if supervised else 0
    settings = {"num_classes": classes, **section.architecture()}
    try:
        if empty:
            with torch.device("meta"):
                network = from_config(parse_variant(section.name or "", **settings))
        else:
            network = create_network(section.name or "", seed=recipe.train.seed, **settings)
    except ValueError as error:
        raise VitcliError(
            f"this model cannot be built: {error}",
            "`model.name` is for example `B/16`, `R50+B/16`, `Axial-B/32` or `R50x1`; the patch "
            "size divides `model.image_size`",
        ) from error
    size, channels = network.config.image_size, network.config.num_channels
    base = Preprocess(image_size=size, mean=(0.5,), std=(0.5,), num_channels=channels)
    given = recipe.preprocess.model_dump(exclude_none=True)
    return LoadedModel(
        network,
        labels=source.classes if supervised else None,
        preprocess=stated_preprocess(base, given, size, channels),
    )


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
) -> LoadedModel:
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


def regularised(model: LoadedModel, rates: dict[str, Any]) -> LoadedModel:
    """The same weights in a model with other dropout rates.

    Raises:
        VitcliError: a ResNet, which has none.
    """
    old = model.network
    if isinstance(old, ResNet):
        raise VitcliError(
            f"a ResNet has no dropout: model.{', model.'.join(rates)}", "leave it out"
        )
    network = VisionTransformer(replace(old.config, **rates), old.position_resize)
    network.load_state_dict(old.state_dict())
    return replace(model, network=network)
