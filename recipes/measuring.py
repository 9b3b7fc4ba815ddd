"""What the benchmarks share: facts about the machine, timed commands, and figures in one form.

A benchmark calls `add_json_option`, and `given.json.add(...)` for each figure that RESULTS.md has.
`bench_all.py` reads these figures.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitcli.cost.machine import cpu_name, usable_cores
from vitcli.run import describe_environment

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared/data"


class Figures:
    """Appends figures to a file, one JSON object per line; without a file it does nothing."""

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    def add(self, name: str, values: float | Sequence[float], unit: str, better: str) -> None:
        """Add the median of one or several measurements.

        The spread is half of the distance from the smallest to the largest; None for one value.
        `better` is `higher` or `lower`.
        """
        assert better in ("higher", "lower")
        many = [float(v) for v in (values if isinstance(values, Sequence) else [values])]
        spread = (max(many) - min(many)) / 2 if len(many) > 1 else None
        row = {"name": name, "value": statistics.median(many), "unit": unit}
        if self.path is not None:
            with Path(self.path).open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, "spread": spread, "better": better}) + "\n")


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """The option `--json FILE`, whose value is `Figures`."""
    parser.add_argument(
        "--json",
        type=Figures,
        default=Figures(),
        metavar="FILE",
        help="append the figures to this file as JSON lines",
    )


@dataclass(frozen=True)
class Timed:
    """A command that has ended: its output, and its seconds from start to exit.

    `cpu_seconds` are those of all threads and processes of the command.
    """

    output: str
    seconds: float
    cpu_seconds: float


def run_timed(words: Sequence[object]) -> Timed:
    """Run a command and measure it.

    Raises:
        SystemExit: the command fails; its error is the message.
    """
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [str(word) for word in words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}\n{done.stderr}")
    used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return Timed(done.stdout, seconds, used)


def run_vitcli(*words: object) -> Timed:
    """Run `vitcli WORDS` as a process and measure it."""
    return run_timed([sys.executable, "-m", "vitcli", *words])


def processor() -> str:
    """The processor with family and model, because virtual machines often hide its name."""
    found = {}
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.is_file() else []:
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    numbers = [f"{key} {found[key]}" for key in ("cpu family", "model") if key in found]
    return f"{cpu_name()} ({', '.join(numbers)})" if numbers else cpu_name()


def machine() -> dict[str, Any]:
    """Date, processor, cores, threads, versions and commit."""
    about = describe_environment()
    cores = usable_cores()
    return {
        "date": about["time"],
        "processor": processor(),
        "cores": cores,
        "threads": int(os.environ.get("OMP_NUM_THREADS") or cores),
        "commit": about["commit"],
        "versions": {"vitcli": about["vitcli"], "python": about["python"], **about["libraries"]},
    }
