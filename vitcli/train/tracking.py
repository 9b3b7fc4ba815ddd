"""`--track`: every record also goes to TensorBoard, Weights & Biases or trackio.

Through Accelerate's trackers; how each is reached (accounts, addresses) is its own affair.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from vitcli.config import Recipe
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
    accelerator.init_trackers(PROJECT, config=flat(recipe.model_dump(mode="json")))

    def record(values: dict[str, Any]) -> None:
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and k != "step"}
        accelerator.log(numbers, step=int(values["step"]))

    try:
        yield record
    finally:
        accelerator.end_training()


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optim": {"lr": 1}}` -> `{"optim.lr": 1}`; what is no number is text, what is None goes."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float | str):
            found[prefix + key] = value
        elif value is not None:
            found[prefix + key] = str(value)
    return found
