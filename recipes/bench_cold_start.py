"""Measure the start of the command line: wall clock and CPU seconds of whole processes.

The commands run in turn (A B C A B C ...). `import torch` is the floor of every command that loads
a model. The model is a Nano/8 with random weights. The package is compiled to bytecode first, as
`pip install` does.

    python recipes/bench_cold_start.py
    python recipes/bench_cold_start.py --runs 11 --json
"""

import argparse
import compileall
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import vitcli
from vitcli.preprocess import Preprocess
from vitcli.weights.loaded import create_model
from vitcli.weights.store import save_model

COMMANDS = {
    "vitcli --help": ["-m", "vitcli", "--help"],
    "import torch": ["-c", "import torch"],
    "vitcli predict one.jpg": ["-m", "vitcli", "predict", "one.jpg", "-m", "model.safetensors"],
}


def main() -> None:
    """Print a line per command, or a line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    compileall.compile_dir(str(Path(vitcli.__file__).parent), quiet=1)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder))
        for _ in range(given.runs + 1):  # the first round fills the page cache
            for name, words in COMMANDS.items():
                times[name].append(seconds([sys.executable, *words], folder))
    for name, pairs in times.items():
        wall, cpu = (sorted(values) for values in zip(*pairs[1:], strict=True))
        row = {
            "command": name,
            "runs": given.runs,
            "seconds": round(statistics.median(wall), 3),
            "least": round(wall[0], 3),
            "largest": round(wall[-1], 3),
            "cpu_seconds": round(statistics.median(cpu), 3),
        }
        sys.stdout.write(
            json.dumps(row) + "\n"
            if given.json
            else f"{name:24} {row['seconds']} s ({row['least']} to {row['largest']}), "
            f"CPU {row['cpu_seconds']} s\n"
        )


def make_files(folder: Path) -> None:
    """Write `one.jpg` and `model.safetensors`."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "one.jpg")
    net = create_model("Nano/8", num_classes=10, image_size=32)
    torch.nn.init.normal_(net.network.head.weight, std=0.02)
    net.preprocess, net.head_trained = Preprocess((32, 32)), True
    net.labels = tuple(f"class {i}" for i in range(10))
    save_model(str(folder / "model.safetensors"), net)


def seconds(words: list[str], folder: str) -> tuple[float, float]:
    """Wall-clock and CPU seconds of a process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(words, cwd=folder, capture_output=True, check=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return wall, cpu


if __name__ == "__main__":
    main()
