"""SIGKILL at random moments, resume, and compare the bytes of the weights with a run never stopped.

Each configuration is killed so many times at moments drawn from a seed: while it reads, trains,
evaluates or writes. Runs are forks of this process, so that a hundred kills take minutes.

    OMP_NUM_THREADS=1 python recipes/prove_resume.py --kills 16
"""

import argparse
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vitcli.commands.pretrain import random_model
from vitcli.config.recipe import check
from vitcli.config.schema import Recipe
from vitcli.progress import Quiet
from vitcli.train.session import train

BASE: dict[str, dict[str, Any]] = {
    "data": {"name": "builtin:digits"},
    "model": {
        "name": "Pico/4",
        "image_size": 8,
        "depth": 2,
        "embed_dim": 32,
        "num_heads": 2,
        "mlp_dim": 64,
        "dropout_rate": 0.1,
        "drop_path_rate": 0.1,
    },
    "augment": {"crop": "pad", "crop_padding": 1, "flip_rate": 0.0},
    "optim": {"name": "adamw", "lr": 1e-3},
    "schedule": {"name": "linear", "warmup_fraction": 0.1},
    "train": {
        "steps": 120,
        "batch_size": 32,
        "precision": "fp32",
        "log_steps": 1,
        "checkpoint_steps": 3,
        "eval_steps": 40,
    },
}
CASES: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "one process": (1, {}),
    "two processes": (2, {}),
    "accumulation": (1, {"train": {"micro_batch_size": 8}}),
    "averaged weights": (1, {"train": {"ema_decay": 0.99}}),
    "mixup and cutmix": (1, {"augment": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}}),
    "Muon, smaller sizes": (
        1,
        {"optim": {"name": "muon"}, "train": {"smaller_sizes": [[4, 0.5]]}},
    ),
    "masked patches": (1, {"objective": {"name": "masked_patch"}}),
}


def main() -> None:
    """Print a line for each configuration; end with 1 where bits differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=15, help="of each configuration")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, total, wrong = random.Random(given.seed), 0, 0
    for name, (processes, changes) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            sections = {k: {**BASE.get(k, {}), **changes.get(k, {})} for k in BASE | changes}
            recipe = check(Recipe, {"command": "pretrain", **sections}, name)
            began = time.monotonic()
            finish(start(recipe, Path(folder, "whole"), processes))
            length = time.monotonic() - began
            kills = 0
            while kills < given.kills:
                team = start(recipe, Path(folder, "killed"), processes)
                # Now and then in the first moments, mostly somewhere in the next stretch.
                time.sleep(rng.random() * length * (0.1 if rng.random() < 0.3 else 0.5))
                if Path(folder, "killed/result.json").exists():
                    finish(team)
                    Path(folder, "killed").rename(Path(folder, f"done-{kills}"))
                    wrong += differs(folder, f"done-{kills}")
                    continue
                for process in team:
                    os.kill(process, signal.SIGKILL)
                for process in team:
                    os.waitpid(process, 0)
                kills += 1
            finish(start(recipe, Path(folder, "killed"), processes))
            different = differs(folder, "killed")
            wrong, total = wrong + different, total + kills
            said = "DIFFERENT" if different else "the same bytes"
            sys.stdout.write(f"{name:22} {kills} kills: {said}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{total} kills, {wrong} runs with other bits\n")
    raise SystemExit(1 if wrong else 0)


def differs(folder: str, name: str) -> bool:
    """Whether the weights are not those of the run that was never stopped."""
    a, b = (Path(folder, run, "model.safetensors").read_bytes() for run in ("whole", name))
    return a != b


def start(recipe: Recipe, out: Path, processes: int) -> list[int]:
    """Fork the processes of one run, which goes on from whatever is at `out`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    team = []
    for rank in range(processes):
        process = os.fork()
        if process:
            team.append(process)
            continue
        status = 1
        try:
            if processes > 1:
                os.environ |= {
                    "WORLD_SIZE": str(processes),
                    "LOCAL_WORLD_SIZE": str(processes),
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                }
            make = lambda source: random_model(recipe, source)  # noqa: E731
            train(recipe, make, out=out, resume=True, watch=Quiet())
            status = 0
        finally:
            os._exit(status)
    return team


def finish(team: list[int]) -> None:
    """Wait for the end of a run, which must be a good one."""
    for process in team:
        _, status = os.waitpid(process, 0)
        if status:
            raise RuntimeError(f"a run that was not killed ended with {status}")


if __name__ == "__main__":
    main()
