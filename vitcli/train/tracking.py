"""`--track`: every record also goes to TensorBoard, Weights & Biases or trackio.

Through Accelerate's trackers; how each is reached (accounts, addresses) is its own affair.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from vitcli.config.recipe import flat_settings
from vitcli.config.schema import Recipe
from vitcli.errors import VitcliError

PROJECT = "vitcli"
# Name -> the packages of which one must be there.
TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}


def check_tracker(name: str) -> None:
    """Whether there is such a tracker, and its package.

    Raises:
        VitcliError: not so.
    """
    if name not in TRACKERS:
        raise VitcliError(f"no tracker `{name}`", f"there are {', '.join(TRACKERS)}")
    if not any(find_spec(package) for package in TRACKERS[name]):
        raise VitcliError(
            f"`--track {name}` needs a package that is not installed",
            f"`pip install {TRACKERS[name][0]}`",
        )


@contextmanager
def tracking(
    accelerator: Any, name: str | None, recipe: Recipe
) -> Iterator[Callable[[dict[str, Any]], None] | None]:
    """A function that takes a record of metrics.jsonl, or None; closed with the block."""
    if name is None:
        yield None
        return
    accelerator.init_trackers(PROJECT, config=flat(recipe))

    def record(values: dict[str, Any]) -> None:
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and k != "step"}
        accelerator.log(numbers, step=int(values["step"]))

    try:
        yield record
    finally:
        accelerator.end_training()


def flat(recipe: Recipe) -> dict[str, Any]:
    """Dotted names of the settings; what is no number is text, what is None goes."""
    found = {k: v for k, v in flat_settings(recipe).items() if v is not None}
    return {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in found.items()}
