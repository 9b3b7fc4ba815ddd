"""Measure the start of the command line: wall clock and CPU seconds of whole processes.

The commands run in turn (A B C A B C ...). `import torch` is the floor of every command that loads
a model. The model is a Nano/8 with random weights. The package is compiled to bytecode first, as
`pip install` does.

    python recipes/bench_cold_start.py
    python recipes/bench_cold_start.py --runs 11
"""

import argparse
import compileall
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measuring import add_json_option
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
    """Print a line per command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=9)
    add_json_option(parser)
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
        given.json.add(f"{name}, cold start", wall, "s", "lower")
        given.json.add(f"{name}, cold start, CPU time", cpu, "CPU-s", "lower")
        sys.stdout.write(
            f"{name:24} {statistics.median(wall):.3f} s ({wall[0]:.3f} to {wall[-1]:.3f}), "
            f"CPU {statistics.median(cpu):.3f} s\n"
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
