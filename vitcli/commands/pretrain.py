"""`vitcli pretrain`: random weights, or weights and images without labels -> a run directory."""

from pathlib import Path

from vitcli.config.schema import Settings
from vitcli.progress import Quiet, Watcher
from vitcli.train.further import initial_model
from vitcli.train.resolve import pretrain_recipe
from vitcli.train.session import TrainResult, train


def run(
    data: str | None = None,
    *,
    recipe: str | None = None,
    settings: Settings | None = None,
    out: Path | None = None,
    resume: bool = False,
    track: str | None = None,
    check: bool = True,
    watch: Watcher | None = None,
) -> TrainResult:
    """Train a model from random weights, or the weights in `model.name` further without labels.

    Args:
        data: DATA; None takes that of the recipe. The default recipe needs no files.
        recipe: name or file of a recipe; None takes `pretrain_formula` for images generated from
            formulas, and settings that suit DATA and the machine for any other data.
        settings: nested settings that override the recipe.
        out: the run directory; None creates `runs/RECIPE`, with a number if that exists.
        resume: resume the run in `out`, whose recipe is the default.
        track: `tensorboard`, `wandb` or `trackio`, which receives every record.
        check: look for near copies between the splits, see `warn_of_copies`.

    Raises:
        VitcliError: bad input.
        Stopped: a signal came; the state is saved.
    """
    watch = watch or Quiet()
    resolved = pretrain_recipe(data, recipe, settings, watch, out if resume else None)
    return train(
        resolved.recipe,
        lambda source: initial_model(resolved.recipe, source, watch),
        opened=resolved.source,
        defaults=resolved.defaults,
        out=out,
        stem=Path(resolved.name).stem,
        resume=resume,
        watch=watch,
        track=track,
        check=check,
    )
