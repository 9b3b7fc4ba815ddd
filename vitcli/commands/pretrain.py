"""`vitcli pretrain`: random weights -> a run directory."""

from pathlib import Path

from vitcli.config.schema import Settings
from vitcli.progress import Quiet, Watcher
from vitcli.run import check_free, new_path, training_path
from vitcli.train.lr_finder import FoundRate, find_rate
from vitcli.train.session import TrainResult, train
from vitcli.train.starting import pretrain_recipe, random_model


def run(
    data: str | None = None,
    *,
    recipe: str | None = None,
    settings: Settings | None = None,
    out: Path | None = None,
    resume: bool = False,
    track: str | None = None,
    watch: Watcher | None = None,
) -> TrainResult:
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
    name, resolved = pretrain_recipe(data, recipe, settings, watch)
    return train(
        resolved,
        lambda source: random_model(resolved, source),
        out=training_path(out, Path(name).stem, resume),
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
    name, resolved = pretrain_recipe(data, recipe, settings, watch)
    out = out or new_path(f"{Path(name).stem}-lr")
    check_free(out)
    return find_rate(resolved, lambda s: random_model(resolved, s), out=out, watch=watch)
