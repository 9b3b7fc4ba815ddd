"""A training run of a second, for tests that need a real one."""

import json
import subprocess
import sys
from pathlib import Path

from vitcli.config.recipe import check
from vitcli.config.schema import Recipe
from vitcli.progress import Quiet
from vitcli.train.resolve import random_model
from vitcli.train.session import train

TINY = {
    "command": "pretrain",
    "data": {"name": "builtin:digits"},
    "model": {
        "name": "Pico/4",
        "image_size": 8,
        "depth": 2,
        "embed_dim": 32,
        "num_heads": 2,
        "mlp_dim": 64,
        "pool": "mean",
        "dropout_rate": 0.1,
        "drop_path_rate": 0.1,
    },
    "augment": {"crop": "pad", "crop_padding": 1, "flip_rate": 0.0},
    "optim": {"name": "muon", "momentum": 0.95, "lr": 1e-3},
    "schedule": {"name": "linear", "warmup_fraction": 0.1},
    "train": {
        "steps": 8,
        "eval_steps": 4,  # an evaluation takes longer than a step
        "batch_size": 32,
        "ema_decay": 0.9,
        "precision": "fp32",
        "log_steps": 1,
    },
}


def tiny_recipe(**sections) -> Recipe:
    merged = {k: dict(v) if isinstance(v, dict) else v for k, v in TINY.items()}
    for name, values in sections.items():
        merged[name] = {**merged.get(name, {}), **values}
    return check(Recipe, merged, "tiny")


def write_tiny(path: Path, **sections) -> Path:
    path.write_text(tiny_recipe(**sections).to_toml())
    return path


def train_recipe(out, recipe, resume=False, watch=None, track=None):
    """Train the model of a recipe from random weights."""
    return train(
        recipe,
        lambda source: random_model(recipe, source),
        out=Path(out),
        resume=resume,
        watch=watch or Quiet(),
        track=track,
    )


def train_tiny(out, *, resume=False, watch=None, track=None, **sections):
    return train_recipe(out, tiny_recipe(**sections), resume, watch, track)


def vitcli(*arguments, cwd=None, env=None, timeout=300) -> subprocess.CompletedProcess:
    """The real command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "vitcli", *map(str, arguments)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> bytes:
    return (run / "model.safetensors").read_bytes()
