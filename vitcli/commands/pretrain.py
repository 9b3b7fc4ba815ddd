"""`vitcli pretrain`: random weights -> a run directory."""

from pathlib import Path

from vitcli.config import ModelSection, Recipe, Settings, check, lay_over, load_recipe, nest
from vitcli.data.sources import Source
from vitcli.data.transforms import Preprocess
from vitcli.errors import VitcliError
from vitcli.run import check_free, new_path, place_of
from vitcli.train.find_lr import FoundRate, find_rate
from vitcli.train.objectives import is_supervised
from vitcli.train.session import Trained, train
from vitcli.vit import Model, create_model
from vitcli.vit.names import is_resnet
from vitcli.watch import Quiet, Watcher
from vitcli.weights.stated import stated_preprocess

FORMULA = "builtin:formula"


def run(
    data: str | None = None,
    *,
    recipe: str | None = None,
    settings: Settings | None = None,
    out: Path | None = None,
    resume: bool = False,
    track: str | None = None,
    watch: Watcher | None = None,
) -> Trained:
    """Train a model from random weights.

    Args:
        data: DATA; None takes the recipe's, and that of the default recipe needs no file.
        recipe: a recipe's name or file; None takes `pretrain_formula` for images drawn from
            formulas and `pretrain` for anybody's own.
        settings: nested settings laid over the recipe.
        out: the run directory; None makes `runs/RECIPE`, numbered when that is taken.
        resume: go on with the run at `out`.
        track: `tensorboard`, `wandb` or `trackio`, given every record.

    Raises:
        VitcliError: bad input; nothing is left half-written.
    """
    watch = watch or Quiet()
    name, resolved = resolve(data, recipe, settings, watch)
    return train(
        resolved,
        lambda source: random_model(resolved, source),
        out=place_of(out, Path(name).stem, resume),
        resume=resume,
        watch=watch,
        track=track,
    )


def find_lr(
    data: str | None = None,
    *,
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
    name, resolved = resolve(data, recipe, settings, watch)
    out = out or new_path(f"{Path(name).stem}-lr")
    check_free(out)
    return find_rate(resolved, lambda s: random_model(resolved, s), out=out, watch=watch)


def resolve(
    data: str | None, recipe: str | None, settings: Settings | None, watch: Watcher
) -> tuple[str, Recipe]:
    """(a recipe's name or file, the recipe that comes of the arguments of `run`)."""
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


def random_model(recipe: Recipe, source: Source) -> Model:
    """The recipe's variant with fresh weights, a head where the objective has classes, a transform.

    Raises:
        VitcliError: no such variant, or settings that contradict each other.
    """
    section = recipe.model
    supervised = is_supervised(recipe.objective.name)
    classes = len(source.classes) if supervised else 0
    settings = {"num_classes": classes, **section.architecture()}
    try:
        model = create_model(section.name or "", seed=recipe.train.seed, **settings)
    except ValueError as error:
        raise VitcliError(
            f"this model cannot be built: {error}",
            "`model.name` is for example `B/16`, `R50+B/16`, `Axial-B/32` or `R50x1`; the patch "
            "size divides `model.image_size`",
        ) from error
    model.labels = source.classes if supervised else None
    size, channels = model.config.image_size, model.config.num_channels
    base = Preprocess(image_size=size, mean=(0.5,), std=(0.5,), num_channels=channels)
    given = recipe.preprocess.model_dump(exclude_none=True)
    model.preprocess = stated_preprocess(base, given, size, channels)
    return model
