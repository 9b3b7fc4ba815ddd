"""Measure how memory grows with the number of images: `python recipes/bench_memory.py`.

The script makes folders, CSV files and parquet files of small JPEGs that all differ. It trains a
few steps on each in a process of its own. It prints the peak resident memory, with and without
mapped files, and the bytes per further image. What should grow is the index (paths, labels, order)
and, up to 200,000 images, the record of all images and the hashes of the search for copies;
`--no-check` leaves out the hashes. Pages of a mapped parquet cache stay resident until a program
needs the memory. Linux only.
"""

import argparse
import io
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from measuring import Figures, add_json_option
from PIL import Image

CLASSES = 10
SIDE = 64
STEPS = 3
KILO, MEGA = 2**10, 2**20
POLL = 0.02  # seconds


def picture(number: int) -> bytes:
    """A small JPEG of random colours, which no other number has."""
    blocks = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize((SIDE, SIDE)).save(buffer, "JPEG")
    return buffer.getvalue()


def make_folder(place: Path, count: int) -> Path:
    """Make `count` files."""
    for i in range(count):
        folder = place / "folder" / f"class_{i % CLASSES}"
        if i < CLASSES:
            folder.mkdir(parents=True)
        (folder / f"{i:09}.jpg").write_bytes(picture(i))
    return place / "folder"


def make_csv(place: Path, count: int) -> Path:
    """Make a table of the same files."""
    make_folder(place, count)
    with (place / "table.csv").open("w") as file:
        file.write("path,label\n")
        for i in range(count):
            name = f"class_{i % CLASSES}"
            file.write(f"folder/{name}/{i:09}.jpg,{name}\n")
    return place / "table.csv"


def make_parquet(place: Path, count: int) -> Path:
    """Make one file with `count` rows, written in parts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64())])
    with pq.ParquetWriter(place / "x.parquet", schema) as writer:
        for start in range(0, count, 1000):
            part = range(start, min(start + 1000, count))
            images = [{"bytes": picture(i), "path": None} for i in part]
            columns = {"image": images, "label": [i % CLASSES for i in part]}
            writer.write_table(pa.table(columns, schema=schema))
    return place / "x.parquet"


KINDS = {"folder": make_folder, "csv": make_csv, "parquet": make_parquet}


def train(data: Path, place: Path, flags: list[str]) -> tuple[int, int]:
    """Peak resident bytes of `vitcli pretrain` on `data`, with and without mapped files."""
    settings = ["model.name=Pico/8", "model.image_size=32", "model.depth=1", "data.workers=1"]
    settings += ["train.batch_size=32", "train.precision=fp32", "train.eval_steps=1000000"]
    # The held-out splits are evaluated at the end; one image per class is enough.
    settings += ["data.validation_fraction=0.000001", "data.test_fraction=0.000001"]
    settings += [f"train.steps={STEPS}"]
    command = [sys.executable, "-m", "vitcli", "pretrain", str(data), "--out", str(place / "run")]
    command += [part for setting in settings for part in ("--set", setting)] + flags
    caches = {"HF_DATASETS_CACHE": str(place / "cache"), "VITCLI_CACHE": str(place / "vitcli")}
    environment = {**os.environ, **caches}
    with (place / "log").open("w+") as log:
        child = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        own = 0
        while child.poll() is None:
            own = max(own, own_memory(child.pid))
            time.sleep(POLL)
        if child.returncode:
            raise SystemExit((place / "log").read_text())
    # RUSAGE_CHILDREN is the maximum over all children, so each run needs a fresh parent.
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * KILO, own


def own_memory(pid: int) -> int:
    """Resident bytes without mapped files, which the system drops when it needs memory."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * KILO


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", default="1000,10000,100000")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--no-check", action="store_true", help="without the search for copies")
    add_json_option(parser)
    parser.add_argument("--one", nargs=2, metavar=("KIND", "COUNT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    flags = ["--no-check"] * given.no_check
    if given.one:
        kind, count = given.one[0], int(given.one[1])
        with tempfile.TemporaryDirectory() as folder:
            resident, own = train(KINDS[kind](Path(folder), count), Path(folder), flags)
        sys.stdout.write(f"{resident} {own}\n")
        return
    counts = [int(count) for count in given.counts.split(",")]
    figures: Figures = given.json
    for kind in given.kinds.split(","):
        first: tuple[int, int] | None = None
        for count in counts:
            command = [sys.executable, __file__, "--one", kind, str(count), *flags]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            resident, own = map(int, done.stdout.split())
            line = f"{kind:8} {count:9,} images  resident {resident / MEGA:6.1f} MiB"
            line += f", without mapped files {own / MEGA:6.1f} MiB"
            if first is not None:
                images = count - counts[0]
                more = [
                    (now - then) / images for now, then in zip((resident, own), first, strict=True)
                ]
                line += f"  (per further image: {more[0]:.0f} and {more[1]:.0f} bytes)"
                if count == counts[-1]:
                    unchecked = ", --no-check" if given.no_check else ""
                    name = f"memory of a run, {kind}, {count} different images{unchecked}"
                    figures.add(name, own / MEGA, "MiB", "lower")
            first = first or (resident, own)
            sys.stdout.write(line + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
