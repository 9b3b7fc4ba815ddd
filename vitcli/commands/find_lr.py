"""`--find-lr` of `vitcli pretrain` and `vitcli finetune`: a learning-rate range test."""

from functools import partial
from pathlib import Path
from typing import Literal

from vitcli.config.schema import Settings
from vitcli.progress import Quiet, Watcher
from vitcli.run import check_free, new_output
from vitcli.train.build import MakeModel
from vitcli.train.further import initial_model
from vitcli.train.lr_finder import FoundRate, find_rate
from vitcli.train.resolve import finetune_recipe, pretrain_recipe, pretrained_model


def run(
    data: str | None = None,
    *,
    command: Literal["pretrain", "finetune"],
    model: str | None = None,
    recipe: str | None = None,
    settings: Settings | None = None,
    out: Path | None = None,
    watch: Watcher | None = None,
) -> FoundRate:
    """Run a learning-rate range test for the run that `command` makes with these arguments.

    Args:
        out: a new folder for the curve; None creates `runs/RECIPE-lr`.

    Raises:
        VitcliError: bad input, or a loss that does not fall at any rate.
    """
    watch = watch or Quiet()
    if command == "pretrain":
        resolved = pretrain_recipe(data, recipe, settings, watch)
        make_model: MakeModel = partial(initial_model, resolved.recipe, watch=watch)
    else:
        resolved = finetune_recipe(data, model, recipe, settings, watch)
        make_model = partial(pretrained_model, resolved.recipe, watch=watch)
    if out is not None:
        check_free(out)
    with new_output(out, f"{Path(resolved.name).stem}-lr") as folder:
        return find_rate(resolved.recipe, make_model, resolved.source, out=folder, watch=watch)
