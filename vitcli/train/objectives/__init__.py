"""Training objectives, and the registry of all.

To add an objective, write its class in this package and enter it in `OBJECTIVES`.
"""

import torch

from vitcli.config.schema import ObjectiveSection
from vitcli.errors import VitcliError, quoted, unknown
from vitcli.train.objectives.base import Objective
from vitcli.train.objectives.classification import Sigmoid, Softmax
from vitcli.train.objectives.descriptors import Descriptors, Guided
from vitcli.train.objectives.distillation import Distill
from vitcli.train.objectives.mae import Mae
from vitcli.train.objectives.masked_patch import MaskedPatch
from vitcli.train.objectives.regression import Mse
from vitcli.weights.loaded import LoadedModel

# Settings whose presence decides what is learned, so that no objective may ignore them.
STRICT = ("head_bias", "class_weights", "focal_gamma", "asymmetric_gammas", "logit_adjustment")
AUTO = "auto"  # `softmax`, or `sigmoid` if an image may have several labels

OBJECTIVES: dict[str, type[Objective]] = {
    "softmax": Softmax,
    "sigmoid": Sigmoid,
    "mse": Mse,
    "descriptors": Descriptors,
    "guided": Guided,
    "masked_patch": MaskedPatch,
    "mae": Mae,
    "distill": Distill,
}


def objective_class(name: str) -> type[Objective]:
    """The class of the objective `name`; for `auto`, before the data is known, that of `softmax`.

    Raises:
        VitcliError: there is no such objective.
    """
    if name == AUTO:
        return Softmax
    if name not in OBJECTIVES:
        raise unknown("objective", name, [AUTO, *OBJECTIVES])
    return OBJECTIVES[name]


def resolve_objective(
    section: ObjectiveSection, multi_label: bool
) -> tuple[ObjectiveSection, list[str]]:
    """(the section with `auto` replaced by an objective for the data, notes for the user).

    Args:
        multi_label: an image may have any number of labels.

    Raises:
        VitcliError: the objective takes one class per image, and the images have several.
    """
    name, notes = section.name, []
    if name == AUTO:
        name = "sigmoid" if multi_label else "softmax"
        if multi_label:
            notes.append("images have several labels: objective `sigmoid`")
    objective = objective_class(name)
    if multi_label and objective.supervised and not objective.multi_label:
        able = " or ".join(f"`{key}`" for key, kind in OBJECTIVES.items() if kind.multi_label)
        raise VitcliError(
            f"objective `{name}` takes one class per image, and these images have several labels",
            f"set `objective.name` to {able}",
        )
    for key in STRICT:
        if getattr(section, key) is not None and key not in objective.settings:
            users = [known for known, kind in OBJECTIVES.items() if key in kind.settings]
            raise VitcliError(
                f"`objective.{key}` is for {quoted(users)}, and the objective is `{name}`",
                f"remove it, or `--set objective.name={users[0]}`",
            )
    return section.model_copy(update={"name": name}), [*notes, *objective.notes(section)]


def build_objective(
    model: LoadedModel, section: ObjectiveSection, seed: int, multi_label: bool = False
) -> Objective:
    """Build the objective of `section` around `model`; `seed` draws the weights of its own heads.

    Raises:
        VitcliError: it does not fit the data or the model.
    """
    section, _ = resolve_objective(section, multi_label)
    # In a fork, so that the objective does not change the random numbers that the caller draws.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind: type = OBJECTIVES[section.name]  # every class takes (model, section)
        objective: Objective = kind(model, section)
    if objective.supervised:
        model.head_activation = objective.head_activation
        model.thresholds = None  # those of the head before this training
    return objective
