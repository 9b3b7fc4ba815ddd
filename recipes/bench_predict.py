"""Compare the images/s of `predict` with those of the model alone on batches in memory.

`vitcli.commands.predict` reads a folder of 2,000 JPEG files: photographs of `flower_photos`,
enlarged to 300 to 500 px per side. The model is an S/16 at 224 px with random weights and 1,000
invented class names. The model alone runs on as many normalised batches of the same size, with the
same threads. Both run in turn (A B A B ...) over parts of the folder. The output has the medians,
and the median, minimum and maximum of the ratio of each pair.

    python recipes/bench_predict.py
    python recipes/bench_predict.py --piece 2000 --pairs 3 --model Ti/16
"""

import argparse
import io
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch

import numpy as np
import pyarrow.parquet as pq
import torch
from measuring import SHARED, add_json_option
from PIL import Image

from vitcli.commands import predict
from vitcli.evals.features import autocast
from vitcli.preprocess import Preprocess
from vitcli.weights.loaded import LoadedModel, create_model

FLOWERS = SHARED / "flower_photos/train.parquet"
CLASSES = 1000
WARM_IMAGES = 64


def make_folder(folder: Path, count: int) -> list[str]:
    """Write `count` JPEG files of 300 to 500 px per side; return their paths."""
    table = pq.read_table(FLOWERS)
    contents = [row["bytes"] for row in table["image"].to_pylist()]
    rng = np.random.default_rng(0)
    files = []
    for i in range(count):
        with Image.open(io.BytesIO(contents[i % len(contents)])) as opened:
            width, height = (int(side) for side in rng.integers(300, 501, 2))
            image = opened.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        files.append(str(folder / f"{i:05}.jpg"))
        image.save(files[-1], "JPEG", quality=int(rng.integers(75, 95)))
    return files


def make_model(name: str) -> LoadedModel:
    """A classifier with random weights."""
    net = create_model(name, num_classes=CLASSES, image_size=224)
    torch.nn.init.normal_(net.network.head.weight, std=0.02)
    net.preprocess = Preprocess((224, 224), crop_fraction=0.875)
    net.labels = tuple(f"class {i}" for i in range(CLASSES))
    net.head_trained = True
    return net.eval()


def predicting(net: LoadedModel, files: list[str], batch_size: int, precision: str) -> float:
    """Seconds for the rows of all files."""
    start = time.perf_counter()
    rows = list(predict.run(files, model=net, batch_size=batch_size, precision=precision))
    seconds = time.perf_counter() - start
    assert len(rows) == len(files) and not any(row["error"] for row in rows)
    return seconds


def alone(net: LoadedModel, batch: torch.Tensor, count: int, precision: str) -> float:
    """Seconds of the model for `count` images that are in memory."""
    start = time.perf_counter()
    with torch.inference_mode(), autocast(precision, batch.device):
        for i in range(0, count, len(batch)):
            net(batch[: min(len(batch), count - i)]).cpu()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--piece", type=int, default=192, help="images per measurement")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--model", default="S/16")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--threads", type=int, help="threads of torch; default: chosen by torch")
    add_json_option(parser)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    net = make_model(given.model)
    device = predict.pick_device()
    net = net.to(device)
    noise = torch.randint(0, 256, (given.batch_size, 3, 224, 224), dtype=torch.uint8)
    assert net.preprocess is not None
    batch = net.preprocess.normalize(noise.to(device))
    size, precision = given.batch_size, given.precision
    with tempfile.TemporaryDirectory() as folder:
        files = make_folder(Path(folder), given.images)
        predicting(net, files[:WARM_IMAGES], size, precision)
        alone(net, batch, WARM_IMAGES, precision)
        pairs = []
        for number in range(given.pairs):
            begin = number * given.piece % max(1, len(files) - given.piece + 1)
            piece = files[begin : begin + given.piece]
            with_files = predicting(net, piece, size, precision)
            pairs.append((with_files, alone(net, batch, len(piece), precision)))
    speeds = [given.piece / statistics.median(times) for times in zip(*pairs, strict=True)]
    ratios = sorted(ready / files for files, ready in pairs)
    case = f"{given.model} {precision}, batch {size}"
    own = [given.piece / files for files, _ in pairs]
    given.json.add(f"predict, {case}", own, "images/s", "higher")
    given.json.add(f"predict, {case}: share of the model alone", ratios, "", "higher")
    what = (
        f"{given.model} {precision} {device.type}, {torch.get_num_threads()} threads, batch {size}"
    )
    sys.stdout.write(
        f"{what}: "
        f"predict {speeds[0]:.1f} img/s, the model alone {speeds[1]:.1f} img/s, ratio "
        f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})\n"
    )


if __name__ == "__main__":
    main()
