"""Loading B/16 from safetensors beside reading the same file, in one run.

Three things in turn (A B C A B C …), on a file that lies in the page cache: `load_model`, a plain
read of all bytes into fresh memory, and safetensors' own `load_file`. After the first and the third
one value of every page is read, since both only map the file. Printed are medians and the ratio of
`load_model` to each of the others, as the median of the rounds.

    python recipes/bench_load.py            B/16 of random weights in a temporary file
    python recipes/bench_load.py x.safetensors
"""

import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file

from vitcli.weights.load import load_model
from vitcli.weights.loaded import create_model
from vitcli.weights.store import save_model

ROUNDS = 9
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


def measure(path: Path) -> None:
    """Print a line for each way, and the ratios."""
    ways = {"load_model": ours, "plain read": plain, "safetensors": safetensors}
    for work in ways.values():
        work(path)
    rounds = [[seconds(work, path) for work in ways.values()] for _ in range(ROUNDS)]
    megabytes = path.stat().st_size / 1e6
    for name, times in zip(ways, zip(*rounds, strict=True), strict=True):
        median = statistics.median(times)
        sys.stdout.write(
            f"{name:12} {1e3 * median:7.1f} ms ({1e3 * min(times):.1f} to {1e3 * max(times):.1f})"
            f"  {megabytes / median:7.0f} MB/s\n"
        )
    for i, name in list(enumerate(ways))[1:]:
        ratio = statistics.median(times[0] / times[i] for times in rounds)
        sys.stdout.write(f"load_model / {name}: {ratio:.2f}\n")


def main() -> None:
    """Measure the file on the command line, or one of random weights."""
    sys.stdout.write(f"torch {torch.__version__}, threads {torch.get_num_threads()}\n")
    if len(sys.argv) > 1:
        measure(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_model(path, create_model("B/16", num_classes=1000))
        measure(path)


if __name__ == "__main__":
    main()
