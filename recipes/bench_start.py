"""What a start from formulas is worth: fine-tuning on 1,000 images beside the same from scratch.

For each seed another stratified part of the training images; both sides take the same recipe, the
same images and as many steps, so the same minutes. Prints the accuracies on the whole test split.

    vitcli pretrain                                          # once: runs/pretrain_formula
    python recipes/bench_start.py cifar10/ runs/pretrain_formula --part 2% --seeds 5
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile

SCRATCH = ["model.pool=quadrants", "model.position=sincos2d", "model.class_token=false"]
SETTINGS = [
    "objective.name=softmax",
    "objective.label_smoothing=0.1",
    "augment.crop=pad",
    "optim.name=muon",
    "optim.matrix_lr=0.01",
    "optim.momentum=0.95",
    "optim.lr=1e-3",
    "schedule.name=linear",
]


def main() -> None:
    """Print a line for each seed, then means and the difference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("model", help="the pre-trained run, a Nano/8 as the recipe makes it")
    parser.add_argument("--part", default="2%", help="of the training images")
    parser.add_argument("--epochs", type=float, default=40)
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    found: dict[str, list[float]] = {"formula": [], "scratch": []}
    for seed in range(given.seeds):
        for name, model, more in (
            ("formula", given.model, []),
            ("scratch", "Nano/8", [*SCRATCH, "model.image_size=32"]),
        ):
            settings = [*SETTINGS, *more, f"data.train_split=train[:{given.part}]"]
            settings += [f"data.split_seed={seed}", f"train.seed={seed}"]
            found[name].append(accuracy(given.data, model, given.epochs, settings))
        pair = "  ".join(f"{name} {100 * values[-1]:.2f}" for name, values in found.items())
        sys.stdout.write(f"seed {seed}: {pair}\n")
        sys.stdout.flush()
    for name, values in found.items():
        told(name, values)
    told("difference", [a - b for a, b in zip(found["formula"], found["scratch"], strict=True)])


def told(name: str, values: list[float]) -> None:
    """Print mean and sample standard deviation, in per cent."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    mean = statistics.mean(values)
    sys.stdout.write(f"{name:10} {100 * mean:.2f} ± {100 * spread:.2f} (n = {len(values)})\n")


def accuracy(data: str, model: str, epochs: float, settings: list[str]) -> float:
    """Of one fine-tuning run, on the test split."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "vitcli", "finetune", data, "--model", model, "--json"]
        command += ["--epochs", str(epochs), "--batch-size", "64", "--out", f"{folder}/run"]
        command += [word for setting in settings for word in ("--set", setting)]
        command += ["--set", f"train.eval_steps={10**6}"]
        done = subprocess.run(command, capture_output=True, check=True)
        return float(json.loads(done.stdout)["figures"]["accuracy"])


if __name__ == "__main__":
    main()
