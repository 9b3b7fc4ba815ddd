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
from pathlib import Path

from measuring import add_json_option

RECIPE = """
command = "{command}"

[model]
{model}

[augment]
crop = "pad"
crop_padding = 4

[objective]
name = "softmax"
label_smoothing = 0.1

[optim]
name = "muon"
matrix_lr = 0.01
momentum = 0.95
lr = 1e-3

[schedule]
name = "linear"
warmup_fraction = 0.1

[train]
epochs = {epochs}
batch_size = 64
eval_steps = 1000000
"""
SCRATCH = """name = "Nano/8"
image_size = 32
pool = "quadrants"
position = "sincos2d"
class_token = false"""


def main() -> None:
    """Print a line for each seed, then means and the difference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("model", help="the pre-trained run, a Nano/8 as the recipe makes it")
    parser.add_argument("--part", default="2%", help="of the training images")
    parser.add_argument("--epochs", type=float, default=40)
    parser.add_argument("--seeds", type=int, default=5)
    add_json_option(parser)
    given = parser.parse_args()
    found: dict[str, list[float]] = {"formula": [], "scratch": []}
    for seed in range(given.seeds):
        settings = [f"data.train_split=train[:{given.part}]"]
        settings += [f"data.split_seed={seed}", f"train.seed={seed}"]
        for name, command, model in (
            ("formula", "finetune", f"name = {json.dumps(given.model)}"),
            ("scratch", "pretrain", SCRATCH),
        ):
            recipe = RECIPE.format(command=command, model=model, epochs=given.epochs)
            found[name].append(accuracy(given.data, command, recipe, settings))
        pair = "  ".join(f"{name} {100 * values[-1]:.2f}" for name, values in found.items())
        sys.stdout.write(f"seed {seed}: {pair}\n")
        sys.stdout.flush()
    for name, values in found.items():
        told(name, values)
    gains = [a - b for a, b in zip(found["formula"], found["scratch"], strict=True)]
    told("difference", gains)
    points = [100 * gain for gain in gains]
    given.json.add("fine-tuning from formulas beside scratch", points, "points", "higher")


def told(name: str, values: list[float]) -> None:
    """Print mean and sample standard deviation, in per cent."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    mean = statistics.mean(values)
    sys.stdout.write(f"{name:10} {100 * mean:.2f} ± {100 * spread:.2f} (n = {len(values)})\n")


def accuracy(data: str, command: str, recipe: str, settings: list[str]) -> float:
    """Of one training run, on the test split."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.toml")
        path.write_text(recipe)
        words = [sys.executable, "-m", "vitcli", command, data, "--recipe", str(path), "--json"]
        words += ["--out", f"{folder}/run", *(w for s in settings for w in ("--set", s))]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return float(json.loads(done.stdout)["figures"]["accuracy"])


if __name__ == "__main__":
    main()
