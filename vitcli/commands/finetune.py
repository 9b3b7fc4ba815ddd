"""`vitcli finetune`: pretrained weights -> a run directory with a head for the data's classes."""

from pathlib import Path

from vitcli.config.schema import Settings
from vitcli.progress import Quiet, Watcher
from vitcli.run import check_free, new_path, training_path
from vitcli.train.lr_finder import FoundRate, find_rate
from vitcli.train.session import TrainResult, train
from vitcli.train.starting import finetune_recipe, pretrained_model


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
) -> TrainResult:
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
    name, resolved = finetune_recipe(data, model, recipe, settings, watch, out if resume else None)
    return train(
        resolved,
        lambda source: pretrained_model(resolved, source, watch, verbose=verbose),
        out=training_path(out, Path(name).stem, resume),
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
    name, resolved = finetune_recipe(data, model, recipe, settings, watch)
    out = out or new_path(f"{Path(name).stem}-lr")
    check_free(out)
    return find_rate(resolved, lambda s: pretrained_model(resolved, s, watch), out=out, watch=watch)
