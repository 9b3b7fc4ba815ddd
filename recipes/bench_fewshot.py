"""Few-shot in two ratios: features beside a bare forward pass, the solve beside scikit-learn.

    python recipes/bench_fewshot.py                    both
    python recipes/bench_fewshot.py solve --json       one, as a line of JSON
    OMP_NUM_THREADS=1 python recipes/bench_fewshot.py extract --model S/16 --threads 1 --cpu

`extract`: images a second of `evals.features.run_over` writing into an empty cache, beside the same
model on one batch in memory over and over, which reads and decodes nothing. The pictures are JPEGs
of 240 pixels of noise over a gradient, in memory. `solve`: 1000 classes x 10 images x 768 features
and 20 strengths. Ours decomposes, leaves images out (2,000 of the 10,000, see `MOST_LEFT_OUT`; with
`--all` also all of them), chooses and fits; theirs is RidgeClassifierCV on the same standardised
matrix with the same strengths, which leaves every image out. Both in turn (A B A B ...), medians
and the range of the ratio of each pair. `--cpu` counts the seconds of this process on all cores,
not the clock's: on a machine that others use, with one thread.
"""

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vitcli.data.image_set import ImageSet
from vitcli.evals.feature_cache import Rows, stamps_of
from vitcli.evals.features import run_over
from vitcli.evals.fewshot import protocol as fewshot
from vitcli.evals.fewshot import ridge
from vitcli.evals.fewshot.ridge import PATH, RidgePath
from vitcli.preprocess import Preprocess
from vitcli.weights.loaded import create_model

CLASSES, SHOTS, DIM = 1000, 10, 768
SIDE = 240


class Pictures:
    """JPEGs in memory, so that no disk is measured."""

    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(0)
        ramp = np.linspace(0, 200, SIDE)[:, None, None]
        self.files = []
        for _ in range(count):
            pixels = ramp + rng.normal(scale=20, size=(SIDE, SIDE, 3)) + rng.uniform(0, 50, 3)
            buffer = io.BytesIO()
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
            self.files.append(buffer.getvalue())

    def __len__(self) -> int:
        return len(self.files)

    def content(self, row: int) -> bytes:
        """The bytes of one."""
        return self.files[row]

    def describe(self, row: int) -> str:
        """What errors call it."""
        return f"picture {row}"


def compare(
    ours: Callable[[], Any], theirs: Callable[[], Any], pairs: int, *, cpu: bool
) -> dict[str, Any]:
    """Medians of both in seconds, and the ratio ours / theirs of each pair."""
    clock = time.process_time if cpu else time.perf_counter

    def seconds(work: Callable[[], Any]) -> float:
        start = clock()
        work()
        return clock() - start

    timed = [(seconds(ours), seconds(theirs)) for _ in range(pairs)]
    ratios = sorted(a / b for a, b in timed)
    return {
        "ours": round(statistics.median(a for a, _ in timed), 3),
        "theirs": round(statistics.median(b for _, b in timed), 3),
        "ratio": round(statistics.median(ratios), 3),
        "least": round(ratios[0], 3),
        "largest": round(ratios[-1], 3),
        "pairs": pairs,
    }


def extract(given: argparse.Namespace) -> dict[str, Any]:
    """The speed of the extraction over that of the forward pass alone: above 0.95 is wanted."""
    net = create_model(given.model)
    net.preprocess = Preprocess(image_size=(224, 224), crop_fraction=0.9)
    labels = np.zeros(given.images, dtype=np.int64)
    indices = np.arange(given.images)
    batch = torch.rand(given.batch_size, 3, 224, 224)
    pictures = Pictures(given.images)

    def ours() -> None:
        images = ImageSet("train", ("a",), labels, pictures)
        images._estimate_bytes = lambda _: float("inf")  # type: ignore[method-assign]
        with tempfile.TemporaryDirectory() as folder:
            table = Rows(Path(folder), given.images, net.config.feature_dim, {})
            for part in run_over(net, images, batch_size=given.batch_size):
                table.write(part.indices, part.outputs, stamps_of(images, indices[part.indices]))

    def theirs() -> None:
        with torch.inference_mode():
            for _ in range(given.images // given.batch_size):
                net.features(batch)

    theirs()
    row = compare(ours, theirs, given.pairs, cpu=given.cpu)
    speeds = {name: round(given.images / row[name], 1) for name in ("ours", "theirs")}
    inverse = {"ratio": 1 / row["ratio"], "least": 1 / row["largest"], "largest": 1 / row["least"]}
    return {
        "case": f"extract {given.model}, images/s",
        **row,
        **speeds,
        **{name: round(value, 3) for name, value in inverse.items()},
    }


def solve(given: argparse.Namespace) -> list[dict[str, Any]]:
    """The time of choosing and fitting over that of scikit-learn: below 0.1 is wanted."""
    from sklearn.linear_model import RidgeClassifierCV

    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(CLASSES), SHOTS)
    centres = rng.normal(size=(CLASSES, DIM)) * 10.0 ** rng.uniform(-1, 0.3, DIM)
    x = (centres[labels] + 3 * rng.normal(size=(len(labels), DIM))).astype(np.float32)
    matrix = RidgePath(x, labels, CLASSES).standardised(slice(None))
    chosen: dict[str, float] = {}

    def of(most: int, name: str) -> Callable[[], None]:
        def work() -> None:
            fewshot.MOST_LEFT_OUT = most
            path = RidgePath(x, labels, CLASSES)
            chosen[name] = fewshot.choose_l2(path).l2
            path.fit(chosen[name])

        return work

    def theirs() -> None:
        found = RidgeClassifierCV(alphas=PATH, fit_intercept=False).fit(matrix, labels)
        chosen["theirs"] = float(found.alpha_)

    rows = []
    some = ridge.MOST_LEFT_OUT
    for name, most in ((f"{some} left out", some), ("all", 10**9))[: 2 if given.all else 1]:
        row = compare(of(most, name), theirs, given.pairs, cpu=given.cpu)
        rows.append({"case": f"solve, {name}", **row, "chosen": dict(chosen)})
    return rows


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", help="extract, solve; both by default")
    parser.add_argument("--model", default="Ti/16")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu", action="store_true", help="CPU seconds, not the clock's")
    parser.add_argument("--all", action="store_true", help="also with every image left out")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    for what in given.what or ("extract", "solve"):
        for row in solve(given) if what == "solve" else [extract(given)]:
            if given.json:
                sys.stdout.write(json.dumps(row) + "\n")
            else:
                sys.stdout.write(
                    f"{row['case']:24} ours {row['ours']:8}  theirs {row['theirs']:8}  ratio "
                    f"{row['ratio']} ({row['least']} to {row['largest']}, {row['pairs']} pairs)"
                    f"{'  l2 ' + str(row['chosen']) if 'chosen' in row else ''}\n"
                )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
