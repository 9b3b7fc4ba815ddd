"""Trackers such as TensorBoard, which receive every record of a run; this module is light."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from vitcli.errors import VitcliError, unknown

if TYPE_CHECKING:
    from vitcli.config.schema import Recipe

Track = Callable[[dict[str, Any]], None]

PROJECT = "vitcli"  # the name of the project in trackers
# The packages of each tracker; one of them must be installed.
TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}


def check_tracker(name: str) -> None:
    """Check that the tracker exists and its package is installed."""
    if name not in TRACKERS:
        raise unknown("tracker", name, TRACKERS)
    if not any(find_spec(package) for package in TRACKERS[name]):
        raise VitcliError(
            f"`--track {name}` needs a package that is not installed",
            f"`pip install {TRACKERS[name][0]}`",
        )


@contextmanager
def tracking(accelerator: Any, name: str | None, recipe: "Recipe") -> Iterator[Track | None]:
    """Give a function that sends a record to the tracker `name`; close the tracker at the end."""
    if name is None:
        yield None
        return
    accelerator.init_trackers(PROJECT, config=tracker_config(recipe))

    def track(record: dict[str, Any]) -> None:
        # The step is the axis of every plot, not a value of its own.
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        accelerator.log(numbers, step=int(record["step"]))

    try:  # closed also after an error: trackers write their last records then
        yield track
    finally:
        accelerator.end_training()


def tracker_config(recipe: "Recipe") -> dict[str, Any]:
    """The settings by dotted name. Trackers take numbers and text only, and no None."""
    from vitcli.config.recipe import flat_settings

    found = {k: v for k, v in flat_settings(recipe).items() if v is not None}
    return {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in found.items()}
