"""The environment and settings of runs in several processes."""

import os
from pathlib import Path

from vitcli import distributed as launch

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
