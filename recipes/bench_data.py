"""Compare the training pipeline with a plain Pillow pipeline: images per second, in one run.

Both read the same files in the same order with the same number of threads. They crop a random part
of 5 to 100 % of the area, resize it to 224 px (bilinear), flip half of the images and fill batches.
The plain pipeline is the usual first version: open, convert to RGB, crop, resize, transpose, float
tensor, stack. Ours returns bytes, which the model normalises on the device. The two run in turn
(A B A B ...). The output has the median speeds, and the median, smallest and largest ratio of the
pairs.

    python recipes/bench_data.py                  run every case
    python recipes/bench_data.py flowers          run one case

"kept" is our pipeline from the second epoch on, when the decoded images fit in memory. "stored"
reads what `vitcli patchify DATA --out DIR` made of the files, with shorter sides of at most 256 px.
The plain pipeline reads the files in both cases. "photographs" is flowers and messy together.
"12 MP" is 4000 x 3000 JPEGs made from a photograph of `messy`.
"""

import argparse
import io
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
import torch
from measuring import SHARED, Figures, add_json_option
from PIL import Image

from vitcli.config.schema import AugmentSection
from vitcli.data import image_set as sets
from vitcli.data.augment.transform import TrainTransform, inception_box
from vitcli.data.decoded_cache import write_decoded
from vitcli.data.image_set import ImageSet
from vitcli.data.loader import TrainLoader
from vitcli.data.sampler import images_at
from vitcli.data.source import Source, load_data
from vitcli.decode import ImageError, read_image
from vitcli.preprocess import Preprocess

SIDE, BATCH, PAIRS = 224, 32, 7
WORKERS = (0, 1, 2)
MIN_AREA = 0.05
STORED_SIDE = 256  # 224 / 0.875: what an evaluation at 224 resizes to
Way = Literal["files", "kept", "stored"]
PREPROCESS = Preprocess((SIDE, SIDE), interpolation="bilinear")


class Files:
    """Files in memory, so that the disk is not measured."""

    def __init__(self, files: Sequence[bytes]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def content(self, row: int) -> bytes:
        """The bytes of a file."""
        return self.files[row]

    def describe(self, row: int) -> str:
        """The name of a file in errors."""
        return f"file {row}"


def plain(files: Sequence[bytes], steps: int, workers: int) -> Iterator[torch.Tensor]:
    """(B, 3, Y, X) float32 batches of the plain pipeline."""

    def make(index: int) -> torch.Tensor:
        rng = np.random.default_rng(index)
        with Image.open(io.BytesIO(files[index])) as opened:
            image = opened.convert("RGB")
        box = inception_box(image.size, rng, MIN_AREA)
        image = image.crop(box).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        array = torch.from_numpy(np.array(image))
        return array.permute(2, 0, 1).contiguous().float().div(255)

    _, order = images_at(0, steps * BATCH, len(files), 0)
    batches = [order[i : i + BATCH].tolist() for i in range(0, len(order), BATCH)]
    if not workers:
        for batch in batches:
            yield torch.stack([make(index) for index in batch])
        return
    with ThreadPoolExecutor(workers) as pool:
        made = pool.map(make, order.tolist())
        for batch in batches:
            yield torch.stack([next(made) for _ in batch])


def ours(images: ImageSet, steps: int, workers: int) -> Iterator[torch.Tensor]:
    """(B, 3, Y, X) uint8 batches of `TrainLoader`."""
    transform = TrainTransform(PREPROCESS, AugmentSection(min_area=MIN_AREA))
    loader = TrainLoader(images, transform, batch_size=BATCH, seed=0, workers=workers, strict=True)
    return (batch.images for batch in loader.batches(0, steps))


def seconds(batches: Callable[[], Iterator[torch.Tensor]]) -> float:
    """The time in seconds to make all batches."""
    start = time.perf_counter()
    for _ in batches():
        pass
    return time.perf_counter() - start


@contextmanager
def ready(files: Sequence[bytes], way: Way) -> Iterator[ImageSet]:
    """The files as an image set for the loader."""
    sets.CACHE_BYTES = 1 << 40 if way == "kept" else 0
    images = ImageSet("train", ["a"], np.zeros(len(files), dtype=np.int64), Files(files))
    if way != "stored":
        yield images
        return
    with tempfile.TemporaryDirectory() as folder:
        fingerprint = sha256(b"".join(files)).hexdigest()
        source = Source("files", {"train": images}, ("a",), fingerprint)
        write_decoded(source, Path(folder), side=STORED_SIDE)
        stored = load_data(folder, whole=True, labelled=False).splits["train"]
        assert len(stored) == len(files)
        yield stored


def compare(
    name: str, files: Sequence[bytes], images: ImageSet, workers: int, figures: Figures
) -> None:
    """Run both pipelines in turn over every image at least once, and print the speeds."""
    steps = -(-len(files) // BATCH)

    def first() -> Iterator[torch.Tensor]:
        return ours(images, steps, workers)

    def second() -> Iterator[torch.Tensor]:
        return plain(files, steps, workers)

    seconds(first), seconds(second)
    pairs = [(seconds(first), seconds(second)) for _ in range(PAIRS)]
    speeds = [steps * BATCH / statistics.median(times) for times in zip(*pairs, strict=True)]
    ratios = sorted(theirs / mine for mine, theirs in pairs)
    own = [steps * BATCH / mine for mine, _ in pairs]
    figures.add(f"{name}, {workers} threads", own, "images/s", "higher")
    figures.add(f"{name}, {workers} threads: beside Pillow", ratios, "times as fast", "higher")
    sys.stdout.write(
        f"{name:18} {workers} threads  ours {speeds[0]:7.1f} img/s  plain {speeds[1]:7.1f} img/s  "
        f"ratio {statistics.median(ratios):5.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})\n"
    )
    sys.stdout.flush()


def flowers() -> list[bytes]:
    """The photographs of flower_photos, about 240 px per side."""
    table = pq.read_table(SHARED / "flower_photos/train.parquet")
    return [row["bytes"] for row in table["image"].to_pylist()]


def messy() -> list[bytes]:
    """Files of unusual formats that both can read: 500-px photographs and some large ones."""
    files = []
    with tarfile.open(SHARED / "messy.tar.xz") as archive:
        for member in archive:
            if member.isfile() and member.name.startswith("messy/odd/"):
                opened = archive.extractfile(member)
                assert opened is not None
                content = opened.read()
                try:
                    read_image(content)
                except ImageError:
                    continue
                files.append(content)
    return files


def twelve_megapixels() -> list[bytes]:
    """Large photographs, like those of a phone."""
    largest = max(messy(), key=lambda content: np.prod(Image.open(io.BytesIO(content)).size))
    photo = read_image(largest)
    files = []
    for quality in range(78, 94):
        with tempfile.SpooledTemporaryFile() as file:
            size = (4000, 3000) if quality % 2 else (3000, 4000)
            photo.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
            file.seek(0)
            files.append(file.read())
    return files * 2


def photographs() -> list[bytes]:
    """Flowers and messy together."""
    return flowers() + messy()


CASES: dict[str, tuple[Callable[[], list[bytes]], Way]] = {
    "flowers": (flowers, "files"),
    "flowers kept": (flowers, "kept"),
    "messy": (messy, "files"),
    "photographs": (photographs, "files"),
    "photographs stored": (photographs, "stored"),
    "12 MP": (twelve_megapixels, "files"),
    "12 MP stored": (twelve_megapixels, "stored"),
}


def main() -> None:
    """Measure the cases named on the command line, or all cases."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("case", nargs="*", help=f"of {', '.join(CASES)}; default: all")
    add_json_option(parser)
    given = parser.parse_args()
    for name in given.case or CASES:
        make, way = CASES[name]
        files = make()
        with ready(files, way) as images:
            for workers in WORKERS:
                compare(name, files, images, workers, given.json)


if __name__ == "__main__":
    main()
