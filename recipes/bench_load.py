"""Loading B/16 from safetensors beside reading the same file, in one run.

Three things in turn (A B C A B C …), on a file that lies in the page cache: `load_model`, a plain
read of all bytes into fresh memory, and safetensors' own `load_file`. After the first and the third
one value of every page is read, since both only map the file. Printed are medians and the ratio of
`load_model` to each of the others, as the median of the rounds.

    python recipes/bench_load.py            B/16 of random weights in a temporary file
    python recipes/bench_load.py x.safetensors
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from measuring import Figures, add_json_option
from safetensors.torch import load_file

from vitcli.weights.load import load_model
from vitcli.weights.loaded import create_model
from vitcli.weights.store import save_model

PAGE_VALUES = 1024  # float32 in 4 KiB


def touch(tensors: Iterable[torch.Tensor]) -> None:
    """Read a value of every page."""
    for tensor in tensors:
        tensor.detach().flatten()[::PAGE_VALUES].sum()


def ours(path: Path) -> None:
    touch(load_model(path).state_dict().values())


def plain(path: Path) -> None:
    path.read_bytes()


def safetensors(path: Path) -> None:
    touch(load_file(path).values())


def seconds(work: Callable[[Path], None], path: Path) -> float:
    gc.collect()
    start = time.perf_counter()
    work(path)
    return time.perf_counter() - start


def measure(path: Path, count: int, figures: Figures) -> None:
    """Print a line for each way, and the ratios."""
    ways = {"load_model": ours, "plain read": plain, "safetensors": safetensors}
    for work in ways.values():
        work(path)
    rounds = [[seconds(work, path) for work in ways.values()] for _ in range(count)]
    megabytes = path.stat().st_size / 1e6
    for name, times in zip(ways, zip(*rounds, strict=True), strict=True):
        median = statistics.median(times)
        sys.stdout.write(
            f"{name:12} {1e3 * median:7.1f} ms ({1e3 * min(times):.1f} to {1e3 * max(times):.1f})"
            f"  {megabytes / median:7.0f} MB/s\n"
        )
    for i, name in list(enumerate(ways))[1:]:
        ratios = [times[0] / times[i] for times in rounds]
        sys.stdout.write(f"load_model / {name}: {statistics.median(ratios):.2f}\n")
        figures.add(f"load_model beside {name}", ratios, "times as long", "lower")


def main() -> None:
    """Measure the file on the command line, or one of random weights."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, help="default: B/16 of random weights")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--model", default="B/16", help="of the random weights")
    add_json_option(parser)
    given = parser.parse_args()
    sys.stdout.write(f"torch {torch.__version__}, threads {torch.get_num_threads()}\n")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        if given.file is None:
            save_model(path, create_model(given.model, num_classes=1000))
        measure(given.file or path, given.rounds, given.json)


if __name__ == "__main__":
    main()
