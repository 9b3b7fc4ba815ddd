"""Whole commands from a cold start of Python, the caches of the system warm.

    python recipes/bench_cold.py                 --help, predict and inspect, five times each
    python recipes/bench_cold.py help --runs 20

The image is 224 px of noise; the models have random weights: a Nano/8 for `predict`, and a Ti/16
for `inspect`. The output has medians with the smallest and the largest of the runs.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from measuring import add_json_option, run_vitcli
from PIL import Image

from vitcli.preprocess import Preprocess
from vitcli.weights.loaded import create_model
from vitcli.weights.store import save_model

COMMANDS = ("help", "predict", "inspect")


def save_random(path: Path, name: str, image_size: int) -> Path:
    """The weights file of a classifier of two classes with random weights."""
    model = create_model(name, num_classes=2, image_size=image_size)
    model.preprocess = Preprocess((image_size, image_size))
    model.labels, model.head_trained = ("cat", "dog"), True
    save_model(path, model)
    return path


def command(name: str, folder: Path) -> list[object]:
    """The words of a command, whose files are made in `folder`."""
    if name == "help":
        return ["--help"]
    image = folder / "image.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    Image.fromarray(noise).save(image)
    variant, size = ("Nano/8", 32) if name == "predict" else ("Ti/16", 224)
    model = save_random(folder / f"{name}.safetensors", variant, size)
    words: list[object] = [name, image, "--model", model]
    return [*words, "--no-bias", "--out", folder / "report"] if name == "inspect" else words


def main() -> None:
    """Print seconds and CPU-seconds of each command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("commands", nargs="*", help=f"of {', '.join(COMMANDS)}; default: all")
    parser.add_argument("--runs", type=int, default=5)
    add_json_option(parser)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in given.commands or COMMANDS:
            words = command(name, Path(folder))
            runs = [run_vitcli(*words) for _ in range(given.runs + 1)][1:]  # the first one warms up
            for unit, values in (
                ("s", [run.seconds for run in runs]),
                ("CPU-s", [run.cpu_seconds for run in runs]),
            ):
                given.json.add(f"cold start of {name}, {unit}", values, unit, "lower")
                sys.stdout.write(
                    f"{name:8} {statistics.median(values):6.2f} {unit:5} "
                    f"({min(values):.2f} to {max(values):.2f})\n"
                )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
