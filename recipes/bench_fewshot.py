"""Compare few-shot extraction with a forward pass, and the solver with scikit-learn.

    python recipes/bench_fewshot.py                    both
    python recipes/bench_fewshot.py solve              one
    OMP_NUM_THREADS=1 python recipes/bench_fewshot.py extract --model S/16 --threads 1 --cpu

`extract` compares the images/s of `evals.features.extract_batches`, which writes into an empty
cache, with the same model on one batch in memory, which reads and decodes nothing. The images are
JPEGs of 240 x 240 px in memory, noise over a gradient.

`solve` uses 1000 classes x 10 images x 768 features and 20 values of l2. Ours decomposes, leaves
images out (2,000 of the 10,000, see `MAX_LEFT_OUT`; `--all` also measures all of them), chooses and
fits. Theirs is RidgeClassifierCV on the same standardised matrix with the same values; it leaves
every image out.

Both run in turn (A B A B ...). The output has medians, and the range of the ratio of each pair.
`--cpu` counts CPU seconds of this process on all cores; use it with one thread on a shared machine.
"""

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import add_json_option
from PIL import Image

from vitcli.data.image_set import ImageSet
from vitcli.evals.feature_cache import file_stamps
from vitcli.evals.feature_table import FeatureTable
from vitcli.evals.features import extract_batches
from vitcli.evals.fewshot import ridge
from vitcli.evals.fewshot.ridge import L2_CANDIDATES, RidgePath, choose_ridge_l2
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
        """The bytes of one image."""
        return self.files[row]

    def describe(self, row: int) -> str:
        """The name of one image in errors."""
        return f"picture {row}"


def compare(
    ours: Callable[[], Any], theirs: Callable[[], Any], pairs: int, *, cpu: bool
) -> dict[str, Any]:
    """Medians of both in seconds, and the ratio ours / theirs of the pairs."""
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
        "ratios": ratios,
    }


def extract(given: argparse.Namespace) -> dict[str, Any]:
    """Speed of the extraction relative to the forward pass alone; the target is above 0.95."""
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
            table = FeatureTable(Path(folder), given.images, net.config.feature_dim, {})
            table.create()
            for part in extract_batches(net, images, batch_size=given.batch_size):
                table.write(part.indices, part.outputs, file_stamps(images, indices[part.indices]))

    def theirs() -> None:
        with torch.inference_mode():
            for _ in range(given.images // given.batch_size):
                net.features(batch)

    theirs()
    row = compare(ours, theirs, given.pairs, cpu=given.cpu)
    speeds = {name: round(given.images / row[name], 1) for name in ("ours", "theirs")}
    inverse = {"ratio": 1 / row["ratio"], "least": 1 / row["largest"], "largest": 1 / row["least"]}
    shares = [1 / ratio for ratio in row["ratios"]]
    given.json.add(f"extract {given.model}: share of the forward pass", shares, "", "higher")
    return {
        "case": f"extract {given.model}, images/s",
        **row,
        **speeds,
        **{name: round(value, 3) for name, value in inverse.items()},
    }


def solve(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Time to choose l2 and fit relative to scikit-learn; the target is below 0.1."""
    from sklearn.linear_model import RidgeClassifierCV

    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(CLASSES), SHOTS)
    centres = rng.normal(size=(CLASSES, DIM)) * 10.0 ** rng.uniform(-1, 0.3, DIM)
    x = (centres[labels] + 3 * rng.normal(size=(len(labels), DIM))).astype(np.float32)
    matrix = RidgePath(x, labels, CLASSES).standardised(slice(None))
    chosen: dict[str, float] = {}

    def of(most: int, name: str) -> Callable[[], None]:
        def work() -> None:
            ridge.MAX_LEFT_OUT = most
            path = RidgePath(x, labels, CLASSES)
            chosen[name] = choose_ridge_l2(path).l2
            path.fit(chosen[name])

        return work

    def theirs() -> None:
        found = RidgeClassifierCV(alphas=L2_CANDIDATES, fit_intercept=False).fit(matrix, labels)
        chosen["theirs"] = float(found.alpha_)

    rows = []
    some = ridge.MAX_LEFT_OUT
    for name, most in ((f"{some} left out", some), ("all", 10**9))[: 2 if given.all else 1]:
        row = compare(of(most, name), theirs, given.pairs, cpu=given.cpu)
        title = f"solve, {name}: time beside RidgeClassifierCV"
        given.json.add(title, row["ratios"], "times as long", "lower")
        rows.append({"case": f"solve, {name}", **row, "chosen": dict(chosen)})
    return rows


def main() -> None:
    """Run the measurements of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", help="extract or solve; default: both")
    parser.add_argument("--model", default="Ti/16")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu", action="store_true", help="count CPU seconds")
    parser.add_argument("--all", action="store_true", help="also leave every image out")
    add_json_option(parser)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    for what in given.what or ("extract", "solve"):
        for row in solve(given) if what == "solve" else [extract(given)]:
            sys.stdout.write(
                f"{row['case']:24} ours {row['ours']:8}  theirs {row['theirs']:8}  ratio "
                f"{row['ratio']} ({row['least']} to {row['largest']}, {row['pairs']} pairs)"
                f"{'  l2 ' + str(row['chosen']) if 'chosen' in row else ''}\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
