"""From a command line to the recipe, and to the model that the run starts from."""

import math
import shlex
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vitcli import distributed
from vitcli.config.recipe import check, flat_keys, lay_over, load_recipe, nest
from vitcli.config.schema import ModelSection, Recipe, Settings
from vitcli.data.facts import measure_data
from vitcli.data.image_set import ImageSet
from vitcli.data.prefetch import default_workers
from vitcli.data.source import Source, open_data
from vitcli.data.splits import with_auto_validation
from vitcli.devices import pick_device
from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.progress import Quiet, Watcher
from vitcli.run import RUNS, Run, finished_runs
from vitcli.train.compatibility import check_kept_head
from vitcli.train.defaults import (
    Defaults,
    MachineFacts,
    best_metric,
    choose_defaults,
    is_scarce,
    may_shrink,
    propose_model,
)
from vitcli.train.objectives import objective_class, resolve_objective
from vitcli.train.resuming import is_run, resumed_recipe
from vitcli.vit import ResNet, VisionTransformer, create_network, from_config, parse_variant
from vitcli.vit.variants import is_resnet, is_variant
from vitcli.vit.whitening import whiten_patches
from vitcli.weights.edit import prepare_finetune, set_position_resize
from vitcli.weights.load import load_model, names_weights, require_preprocess
from vitcli.weights.load_report import note_load_report
from vitcli.weights.loaded import LoadedModel, TargetScale
from vitcli.weights.overrides import (
    MODEL_KEYS,
    one_image_size,
    override_preprocess,
    refuse_file_keys,
)
from vitcli.weights.public import resolve_name

FORMULA, DIGITS = "builtin:formula", "builtin:digits"
TINY_SPREAD = 1e-14  # of the mean: less is rounding
DROPOUT = ("dropout_rate", "drop_path_rate")


@dataclass(frozen=True)
class ResolvedRun:
    """What a training command runs.

    Attributes:
        name: of the recipe.
        recipe: with all settings.
        defaults: how the settings were chosen, if the user gave DATA and no recipe.
        source: the data, if they were opened to choose the settings.
    """

    name: str
    recipe: Recipe
    defaults: Defaults | None = None
    source: Source | None = None


def pretrain_recipe(
    data: str | None,
    recipe: str | None,
    settings: Settings | None,
    watch: Watcher,
    resumed: Path | None = None,
) -> ResolvedRun:
    """The recipe of a `pretrain` command with all settings.

    Args:
        resumed: the run to resume, whose recipe is the default.
    """
    name = "pretrain_formula" if data in (None, FORMULA) else "pretrain"
    name = name if recipe is None else recipe
    changes: Settings = {}
    lay_over(changes, settings or {})
    if data is not None:  # an argument wins over `--set`, as flags do
        lay_over(changes, nest("data.name", data))
    if recipe is None and resumed is not None and is_run(resumed):
        return ResolvedRun(resumed.name, resumed_recipe(Run(resumed), changes, "pretrain"))
    resolved = _without_vit_settings(load_recipe(name, changes, "pretrain"), changes, watch)
    if recipe is None and name == "pretrain":  # the formula images have a recipe of their own
        return _adapted(name, resolved, changes, watch)
    if data is None and recipe is None:
        watch.note(f"no DATA given: using recipe `{name}` with {resolved.data.name}")
    return ResolvedRun(name, resolved)


def finetune_recipe(
    data: str | None,
    model: str | None,
    recipe: str | None,
    settings: Settings | None,
    watch: Watcher,
    resumed: Path | None = None,
) -> ResolvedRun:
    """The recipe of a `finetune` command with all settings.

    Args:
        resumed: the run to resume, whose recipe or model is the default.
    """
    name = "finetune_digits" if data in (None, DIGITS) else "finetune"
    name = name if recipe is None else recipe
    changes: Settings = {}
    lay_over(changes, settings or {})
    if data is not None:  # an argument wins over `--set`, as flags do
        lay_over(changes, nest("data.name", data))
    if model is not None:
        lay_over(changes, nest("model.name", model))
    if recipe is None and resumed is not None and is_run(resumed):
        return ResolvedRun(resumed.name, resumed_recipe(Run(resumed), changes, "finetune"))
    resolved = load_recipe(name, changes, "finetune")
    # Loaded twice if needed: the default model must appear in the recipe that the run stores.
    if resolved.model.name is None:
        default = _default_model(resolved, resumed, data, watch)
        watch.note(f"no `--model` given: using {default}")
        lay_over(changes, nest("model.name", default))
        resolved = load_recipe(name, changes, "finetune")
    elif not is_variant(resolved.model.name):
        resolve_name(resolved.model.name)  # a wrong name is reported before the data are read
    if recipe is None and data not in (None, FORMULA, DIGITS):
        return _adapted(name, resolved, changes, watch)
    if data is None and recipe is None:
        watch.note(f"no DATA given: using {resolved.data.name}")
    return ResolvedRun(name, resolved)


def _default_model(recipe: Recipe, resumed: Path | None, data: str | None, watch: Watcher) -> str:
    """The newest pretrained run; without one, the error proposes public weights for DATA."""
    try:
        return newest_pretrained(resumed)
    except VitcliError as error:
        if data in (None, DIGITS, FORMULA):
            raise
        train = open_data(recipe.data, watch=watch, streams=True).splits.get("train")
        model = propose_model(_count(train), this_machine())
        raise VitcliError(
            error.message, f"`vitcli finetune {shlex.quote(str(data))} --model {model}`"
        ) from None


def _adapted(name: str, recipe: Recipe, changes: Settings, watch: Watcher) -> ResolvedRun:
    """The recipe with the settings that suit the data and this machine; `changes` stay."""
    given = flat_keys(changes)
    section = recipe.data
    if objective_class(recipe.objective.name).supervised:
        section = with_auto_validation(section)
    numeric = objective_class(recipe.objective.name).regression
    source = open_data(section, watch=watch, streams=True, numeric=numeric)
    if "train" not in source.splits:
        return ResolvedRun(name, recipe, source=source)  # the error follows where it trains
    own = recipe.command == "finetune" and _is_muon_run(Path(str(recipe.model.name)))
    facts, machine, weights = measure_data(source), this_machine(), None
    if recipe.command == "finetune" and may_shrink(facts, machine, given):
        weights = stored_model(recipe, watch).config
    chosen = choose_defaults(
        recipe.command, facts, machine, given, own_weights=own, weights=weights
    )
    settings = chosen.settings
    if section is not recipe.data:
        fraction = source.splitting.get("validation_fraction", 0.0)
        lay_over(settings, nest("data.validation_fraction", fraction))
    # The accuracy of a fold must not choose its own weights.
    chooses = "validation" in source.splits and section.folds is None
    if chooses and "train.best_metric" not in given:
        metric = best_metric(chosen.data, _count(source.splits["validation"]))
        lay_over(settings, nest("train.best_metric", metric))
    lay_over(settings, changes)
    kept = settings if recipe.command == "finetune" else changes
    adapted = _without_vit_settings(load_recipe(name, settings, recipe.command), kept, Quiet())
    fixed = " (Ti/16 at 224 px)" if recipe.command == "pretrain" else ""
    watch.note(f"defaults for {chosen.summary}; `--recipe {name}` takes fixed settings{fixed}")
    if recipe.command == "pretrain" and is_scarce(chosen.data):
        typed = shlex.quote(str(recipe.data.name))
        watch.warn(
            f"{chosen.data.images:,} images of {chosen.data.classes:,} classes are few for random "
            "weights; for photographs, pretrained weights usually do better: `vitcli finetune "
            f"{typed} --model {propose_model(chosen.data.images, chosen.machine)}`"
        )
    return ResolvedRun(name, adapted, chosen, source)


def _count(images: object) -> int | None:
    return len(images) if isinstance(images, ImageSet) else None  # a stream is not counted


def _is_muon_run(path: Path) -> bool:
    if not is_run(path):
        return False
    with suppress(VitcliError):  # its weights may load all the same
        return Run(path).recipe().optim.name == "muon"
    return False


def this_machine() -> MachineFacts:
    """The facts about this machine that the defaults depend on; equal in all processes."""
    return MachineFacts(pick_device().type, default_workers() + 1, distributed.world_size())


def _without_vit_settings(recipe: Recipe, changes: Settings, watch: Watcher) -> Recipe:
    """Remove the ViT settings of a recipe if `changes` replace its model by a ResNet or weights."""
    given = changes.get("model", {})
    name = str(given.get("name"))
    resnet = is_resnet(name)
    if not resnet and not names_weights(name):
        return recipe
    values, kept = recipe.model.model_dump(exclude_none=True), {"name", *given}
    kept |= {"image_size", "num_channels"} if resnet else set()
    if foreign := sorted(set(values) - kept):
        what = "a ResNet" if resnet else "trained weights"
        watch.note(f"`{name}` is {what}: the recipe's {', '.join(foreign)} do not apply")
    model = check(ModelSection, {k: v for k, v in values.items() if k not in foreign}, name)
    return recipe.model_copy(update={"model": model})


def newest_pretrained(resumed: Path | None = None) -> str:
    """The newest finished run of `pretrain`, or the model that the run `resumed` started from."""
    if resumed is not None and (resumed / "recipe.toml").is_file():
        return str(Run(resumed).recipe().model.name)
    for candidate in finished_runs():
        with suppress(VitcliError):  # a damaged result.json
            if candidate.result().get("command") == "pretrain":
                return str(candidate.path)
    raise VitcliError(
        f"there is no finished `pretrain` run under `{RUNS}/`",
        "run `vitcli pretrain` first (a few minutes, no download), or give weights with `--model`",
    )


def random_model(recipe: Recipe, source: Source, *, empty: bool = False) -> LoadedModel:
    """The variant of a recipe with random weights, and a head if the objective is supervised.

    Args:
        empty: on the meta device, without weights: enough to count parameters and operations.

    Raises:
        VitcliError: no such variant, or settings that contradict each other.
    """
    section = recipe.model
    supervised = objective_class(recipe.objective.name).supervised
    labels, scale = head_of(recipe, source)
    num_classes = len(labels) if supervised else 0
    settings = {"num_classes": num_classes, **section.architecture()}
    keys = {"checkpoint_key": section.checkpoint_key, "base_model": section.base_model}
    refuse_file_keys("this run starts from random weights", **keys)
    if size := one_image_size(section.image_size, recipe.preprocess.image_size):
        settings["image_size"] = size
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
            "size must divide `model.image_size`",
        ) from error
    if section.patch_init == "whitening":
        try:
            whiten_patches(network)
        except ValueError as error:
            raise VitcliError(
                str(error),
                "remove `model.patch_init`, or use a plain model such as `--set model.name=Pico/4`",
            ) from error
    if section.position_resize is not None:
        if isinstance(network, ResNet):
            raise VitcliError(
                "a ResNet has no positions to resample", "remove `model.position_resize`"
            )
        set_position_resize(network, section.position_resize)
    size, channels = network.config.image_size, network.config.num_channels
    # Mean and standard deviation 0.5 give inputs in -1 to 1, as in the paper's code.
    base = Preprocess(image_size=size, mean=(0.5,), std=(0.5,), num_channels=channels)
    given = recipe.preprocess.model_dump(exclude_none=True)
    return LoadedModel(
        network,
        labels=labels if supervised else None,
        preprocess=override_preprocess(base, given, size, channels),
        target_scale=scale,
    )


def head_of(recipe: Recipe, source: Source) -> tuple[tuple[str, ...], TargetScale]:
    """(names of the outputs, the scale of a regression): what the head is trained for.

    Raises:
        VitcliError: all numbers of a regression are equal.
    """
    if not objective_class(recipe.objective.name).regression:
        return source.classes, TargetScale()
    if not source.numeric:  # a plan without data
        return ("value",), TargetScale()
    values: Any = source.splits["train"].values
    # Sums that are rounded once: the scale is part of the weights, and a resume needs the same.
    mean = math.fsum(values) / len(values)
    std = math.sqrt(math.fsum((values - mean) ** 2) / len(values))
    if not std > TINY_SPREAD * abs(mean):
        raise VitcliError(
            f"`{source.notation}`: all {len(values):,} training images have the same "
            f"`{source.classes[0]}`, {mean:.12g}, so there is nothing to learn",
            "name another column: `--set data.label_column=NAME`",
        )
    return source.classes, TargetScale(mean, std)


def pretrained_model(
    recipe: Recipe, source: Source, watch: Watcher, *, verbose: bool = False
) -> LoadedModel:
    """The MODEL of a recipe, with a head for the classes of `source`.

    Raises:
        VitcliError: it cannot be loaded, or a setting does not fit it.
    """
    name = recipe.objective.name
    if not objective_class(name).supervised:
        raise VitcliError(
            f"objective `{name}` trains no head for the classes, and `finetune` needs one",
            f"`vitcli pretrain {recipe.data.name} --set objective.name={name}` trains without one",
        )
    model = stored_model(recipe, watch)
    labels, scale = head_of(recipe, source)
    keep = recipe.train.keep_head
    if keep:
        check_kept_head(model, labels, resolve_objective(recipe.objective, source.multi_label)[0])
        scale = model.target_scale  # the head of a regression gives numbers in its own scale
    # Else a head of zeros, as in the paper (appendix B.1.1): the first gradients reach the head
    # only.
    model = prepare_finetune(model, labels, keep_head=keep)
    model.target_scale = scale
    note_load_report(model, watch, verbose=verbose, new_head=not keep)
    return with_given_dropout(model, recipe)


def stored_model(recipe: Recipe, watch: Watcher, **more: Any) -> LoadedModel:
    """The MODEL of a recipe as it is stored, with the settings that weights leave open.

    Args:
        more: further arguments of `load_model`.
    """
    section = recipe.model
    given = section.model_dump(exclude_none=True, exclude={"name"})
    if foreign := sorted(set(given) - {*MODEL_KEYS, *DROPOUT}):
        raise VitcliError(
            f"the weights determine {', '.join(f'`model.{k}`' for k in foreign)}",
            f"you can set {', '.join(f'`model.{k}`' for k in (*MODEL_KEYS, *DROPOUT))}",
        )
    model = load_model(
        section.name or "",
        preprocess=recipe.preprocess.model_dump(exclude_none=True),
        seed=recipe.train.seed,
        watch=watch,
        **{key: given[key] for key in MODEL_KEYS if key in given},
        **more,
    )
    require_preprocess(model)
    return model


def with_given_dropout(model: LoadedModel, recipe: Recipe) -> LoadedModel:
    """The model with the dropout rates of the recipe, if it has some."""
    given = recipe.model.model_dump(exclude_none=True)
    rates = {key: given[key] for key in DROPOUT if key in given}
    return with_dropout(model, rates) if rates else model


def with_dropout(model: LoadedModel, rates: dict[str, Any]) -> LoadedModel:
    """The same weights in a network with other dropout rates."""
    old = model.network
    if isinstance(old, ResNet):
        raise VitcliError(
            f"a ResNet has no dropout: model.{', model.'.join(rates)}", "remove these settings"
        )
    # Dropout layers are created by the constructor, so the network is built anew.
    network = VisionTransformer(replace(old.config, **rates), old.position_resize)
    network.load_state_dict(old.state_dict())
    return replace(model, network=network)
