"""Runs in several processes: their environment, and one run from a recipe."""

import os
from pathlib import Path

from support.tiny import tiny_recipe

from vitcli import distributed as launch
from vitcli.commands.pretrain import random_model
from vitcli.progress import Quiet
from vitcli.train.session import train

TESTS = Path(__file__).parents[1]
ENVIRONMENT = {
    **{
        k: v
        for k, v in os.environ.items()
        if k not in (*launch.WORLD_SIZE_VARIABLES, *launch.RANK_VARIABLES)
    },
    "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), str(TESTS / "train")]),
    "OMP_NUM_THREADS": "1",
}
PLAIN = {  # no dropout: its masks are drawn for each process
    "model": {"dropout_rate": 0.0, "drop_path_rate": 0.0},
    "optim": {"name": "sgd", "lr": 0.1},
}


def go(out, sections, resume=False):
    recipe = tiny_recipe(**sections)
    return train(
        recipe,
        lambda source: random_model(recipe, source),
        out=Path(out),
        resume=resume,
        watch=Quiet(),
    )
