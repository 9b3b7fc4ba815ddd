"""Pre-training that goes on from weights, on images without labels."""

import shlex

from vitcli.config.schema import Recipe
from vitcli.data.source import Source
from vitcli.errors import VitcliError
from vitcli.progress import Watcher
from vitcli.train.objectives import objective_class
from vitcli.train.resolve import random_model, stored_model, with_given_dropout
from vitcli.weights.load import names_weights
from vitcli.weights.load_report import note_load_report
from vitcli.weights.loaded import LoadedModel


def initial_model(recipe: Recipe, source: Source, watch: Watcher) -> LoadedModel:
    """The model that a `pretrain` recipe starts from: random weights, or those of `model.name`.

    Weights lose their head. Those of a masked autoencoder keep their decoder for objective `mae`.

    Raises:
        VitcliError: it cannot be loaded or built, or weights meet an objective that needs labels.
    """
    section = recipe.model
    if not names_weights(str(section.name)):
        return random_model(recipe, source)
    name = recipe.objective.name
    if objective_class(name).supervised:
        typed = shlex.quote(str(section.name))
        raise VitcliError(
            f"`pretrain` trains weights further without labels, and objective `{name}` needs them",
            f"`vitcli finetune {recipe.data.name} --model {typed}`, or `--set objective.name=mae`",
        )
    model = stored_model(recipe, watch, num_classes=0)
    note_load_report(model, watch)
    if name == "mae" and model.decoder is not None:
        watch.note("`mae` continues with the decoder of the weights, and with its targets")
    return with_given_dropout(model, recipe)
