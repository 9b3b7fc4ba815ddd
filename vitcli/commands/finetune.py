"""`vitcli finetune`: pretrained weights -> a run directory with a head for the data's classes."""

from pathlib import Path

from vitcli.config.schema import Settings
from vitcli.progress import Quiet, Watcher
from vitcli.train.resolve import finetune_recipe, pretrained_model
from vitcli.train.session import TrainResult, train


def run(
    data: str | None = None,
    *,
    model: str | None = None,
    recipe: str | None = None,
    settings: Settings | None = None,
    out: Path | None = None,
    resume: bool = False,
    track: str | None = None,
    check: bool = True,
    verbose: bool = False,
    watch: Watcher | None = None,
) -> TrainResult:
    """Fine-tune a model on labelled images (section 3.2 of the paper).

    Args:
        data: DATA; None takes that of the recipe, `builtin:digits` by default.
        model: MODEL; None takes the newest finished `pretrain` run.
        recipe: name or file of a recipe; None takes `finetune_digits` for the built-in digits,
            and settings that suit DATA and the machine for any other data.
        settings: nested settings that override the recipe.
        out: the run directory; None creates `runs/RECIPE`, with a number if that exists.
        resume: resume the run in `out`, whose recipe is the default.
        track: `tensorboard`, `wandb` or `trackio`, which receives every record.
        check: look for near copies between the splits, see `warn_of_copies`.
        verbose: report how each tensor was loaded.

    Raises:
        VitcliError: bad input.
        Stopped: a signal came; the state is saved.
    """
    watch = watch or Quiet()
    resolved = finetune_recipe(data, model, recipe, settings, watch, out if resume else None)
    return train(
        resolved.recipe,
        lambda source: pretrained_model(resolved.recipe, source, watch, verbose=verbose),
        opened=resolved.source,
        defaults=resolved.defaults,
        out=out,
        stem=Path(resolved.name).stem,
        resume=resume,
        watch=watch,
        track=track,
        check=check,
    )
