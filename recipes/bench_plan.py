"""Compare the estimates of `vitcli plan` with real runs: `python recipes/bench_plan.py`.

Ten recipes from tiny to S/16 differ in model, image size, batch, optimizer, precision and
checkpointing. They train on a few hundred small JPEGs. In each round, each recipe is planned and
then run for a few dozen steps in a process of its own. The output gives medians over the rounds:
seconds per step, seconds of the command, peak resident memory, as predicted / real. Linux only.

    python recipes/bench_plan.py                        all recipes, two rounds
    python recipes/bench_plan.py --only 2,7 --rounds 3
    python recipes/bench_plan.py --steps 6 --rounds 1   quick; memory does not depend on the steps
    python recipes/bench_plan.py --evaluated --rounds 1 ten other recipes whose run evaluates 315
                                                        images, memory only
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Figures, add_json_option
from PIL import Image

KILO, MEGA = 2**10, 2**20
IMAGES, CLASSES, SIDE = 340, 10, 64

# model, pixels, batch, optimizer, precision, activation checkpointing, steps
CASES = [
    ("Pico/4", 32, 128, "adamw", "fp32", False, 40),
    ("Nano/8", 32, 128, "muon", "fp32", False, 40),
    ("Nano/4", 32, 64, "sgd", "fp32", False, 40),
    ("Pico/4", 32, 128, "muon", "bf16", False, 40),
    ("Ti/16", 96, 32, "adamw", "fp32", False, 30),
    ("Ti/16", 160, 16, "lion", "bf16", False, 30),
    ("Ti/16", 224, 8, "adamw", "fp32", True, 24),
    ("S/32", 224, 16, "lamb", "fp32", False, 24),
    ("S/16", 96, 32, "adafactor", "bf16", False, 24),
    ("S/16", 224, 8, "adamw", "fp32", False, 24),
]

# Ten other recipes with an ordinary test set, as flags. Two steps each: only the memory counts.
COMMON = "train.steps=2 train.batch_size=16 data.test_fraction=0.45"
EVALUATED = [
    ("finetune", "model.name=Ti/16 lora.rank=8 optim.name=adamw"),
    ("pretrain", "model.name=Ti/16 model.image_size=96 objective.name=mae"),
    ("pretrain", "model.name=Ti/16 model.image_size=96 objective.name=masked_patch"),
    ("pretrain", "model.name=Ti/16 model.image_size=112 model.position=relative"),
    ("pretrain", "model.name=Ti/16 model.image_size=128 train.ema_decay=0.99"),
    ("finetune", "model.name=S/32 train.freeze=blocks:6"),
    ("pretrain", "model.name=R+Ti/16 model.image_size=128"),
    ("pretrain", "model.name=Pico/4 model.image_size=48 model.num_registers=4"),
    ("pretrain", "model.name=Ti/16 model.image_size=128 train.precision=bf16"),
    ("finetune", "model.name=R50x1 model.image_size=64"),
]


def make_images(folder: Path, number: int) -> None:
    """Write a folder of small noise JPEGs, one subfolder per class."""
    rng = np.random.default_rng(0)
    for i in range(number):
        place = folder / f"class_{i % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.jpg")


def settings(case: tuple[Any, ...]) -> list[str]:
    """The case as `--set` flags for the recipe `pretrain`."""
    model, size, batch, optimizer, precision, checkpointing, steps = case
    keys = {
        "model.name": model,
        "model.image_size": size,
        "optim.name": optimizer,
        "optim.lr": 1e-4,
        "train.steps": steps,
        "train.batch_size": batch,
        "train.precision": precision,
        "train.activation_checkpointing": str(checkpointing).lower(),
        "train.eval_steps": 1_000_000,
        "data.test_fraction": 0.03,
    }
    return [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]


def run(arguments: list[str], place: Path) -> tuple[str, float, int]:
    """Run a command -> its output, its seconds, and its peak resident bytes."""
    output, errors = place / "output", place / "errors"
    start = time.perf_counter()
    with output.open("w") as out, errors.open("w") as err:
        child = subprocess.Popen(
            [sys.executable, "-m", "vitcli", *arguments], stdout=out, stderr=err, cwd=place
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(errors.read_text())
    return output.read_text(), time.perf_counter() - start, usage.ru_maxrss * KILO


def compare(case: tuple[Any, ...], data: Path, rounds: int, figures: Figures) -> None:
    """Print one line: predicted / real for a step, the command, and the memory."""
    found: dict[str, list[tuple[float, float]]] = {"step": [], "whole": [], "memory": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            flags = settings(case)
            output, _, _ = run(["pretrain", str(data), *flags, "--dry-run", "--json"], place)
            plan = json.loads(output)
            _, whole, peak = run(["pretrain", str(data), *flags, "--out", "run", "--json"], place)
            lines = (place / "run/metrics.jsonl").read_text().splitlines()
            records = [json.loads(line) for line in lines]
            spent = sum(r["seconds"] for r in records if "train/loss" in r)
            found["step"].append((plan["time"]["train"] / plan["steps"], spent / plan["steps"]))
            found["whole"].append((plan["seconds"], whole))
            found["memory"].append((plan["memory_bytes"] / MEGA, peak / MEGA))
    model, size, batch, optimizer, precision, checkpointing, _ = case
    line = f"{model:7} {size:4} {batch:4}  {optimizer:9} {precision} {'ckpt' * checkpointing:4}"
    title = " ".join(line.split())
    for name, pairs in found.items():
        guess, real = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratios = sorted(g / r for g, r in pairs)
        errors = [100 * abs(math.log(ratio)) for ratio in ratios]
        figures.add(f"plan, {title}: error of {name}", errors, "%", "lower")
        line += f"  {name} {guess:7.4g}/{real:7.4g} = {statistics.median(ratios):.2f}"
        line += f" ({ratios[0]:.2f}-{ratios[-1]:.2f})"
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def compare_memory(number: int, data: Path, rounds: int) -> None:
    """Print one line: predicted / real peak memory of a recipe of `EVALUATED`."""
    command, words = EVALUATED[number]
    flags = [part for word in [*words.split(), *COMMON.split()] for part in ("--set", word)]
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            planned = ["plan", command, str(data), *flags, "--no-probe", "--json"]
            plan = json.loads(run(planned, place)[0])
            _, _, peak = run([command, str(data), *flags, "--out", "run", "--json"], place)
        guess, real = plan["memory_bytes"] / MEGA, peak / MEGA
        sys.stdout.write(f"{number} {command} {words}: {guess:.0f} / {real:.0f} MiB")
        sys.stdout.write(f" = {guess / real:.2f}\n")
        sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", default="", help="numbers of recipes, from 0, with commas")
    parser.add_argument("--steps", type=int, help="optimizer steps of every recipe")
    parser.add_argument("--evaluated", action="store_true", help="the recipes that evaluate")
    add_json_option(parser)
    given = parser.parse_args()
    cases = EVALUATED if given.evaluated else CASES
    chosen = [int(n) for n in given.only.split(",") if n] or range(len(cases))
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "images"
        make_images(data, 700 if given.evaluated else IMAGES)
        for number in chosen:
            if given.evaluated:
                compare_memory(number, data, given.rounds)
                continue
            case = CASES[number]
            compare((*case[:-1], given.steps or case[-1]), data, given.rounds, given.json)


if __name__ == "__main__":
    main()
