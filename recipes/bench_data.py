"""The training pipeline beside a plain Pillow one, in one run: images a second.

Both read the same files in the same order with the same number of threads, cut a random part of
5..100 % of the area, resize it to 224 pixels (bilinear), flip half of them, and fill batches. The
plain one is what one writes first: open, convert to RGB, crop, resize, transpose, float tensor,
stacked. Ours hands on bytes; a model's normalisation divides them on the device. They run in turn
(A B A B ...); printed are medians, and median, least and largest of the ratio of each pair.

    python recipes/bench_data.py                  every case
    python recipes/bench_data.py flowers --json   one, as a line of JSON

"kept" is ours as it runs from the second epoch on, where decoded pictures fit in memory, "stored"
on what `vitcli patchify DATA --out DIR` made of the files, with shorter sides of 256 pixels at most
(both beside the plain pipeline on the files). "photographs" are flowers and messy together.
"12 MP" are 4000 x 3000 JPEGs made from a photograph of `messy`.
"""

import io
import json
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from vitcli.config.schema import AugmentSection
from vitcli.data import image_set as sets
from vitcli.data.augment.transform import TrainTransform, inception_box
from vitcli.data.decoded_cache import write_decoded
from vitcli.data.image_set import ImageSet
from vitcli.data.loader import TrainLoader, images_at
from vitcli.data.source import Source, load_data
from vitcli.decode import ImageError, read_image
from vitcli.preprocess import Preprocess

SHARED = Path(__file__).parents[1].parent / "shared/data"
SIDE, BATCH, PAIRS = 224, 32, 7
WORKERS = (0, 1, 2)
MIN_AREA = 0.05
STORED_SIDE = 256  # 224 / 0.875: what an evaluation at 224 resizes to
Way = Literal["files", "kept", "stored"]
PREPROCESS = Preprocess((SIDE, SIDE), interpolation="bilinear")


class Files:
    """Files in memory, so that no disk is measured."""

    def __init__(self, files: Sequence[bytes]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def content(self, row: int) -> bytes:
        """The bytes of one."""
        return self.files[row]

    def describe(self, row: int) -> str:
        """What errors call it."""
        return f"file {row}"


def plain(files: Sequence[bytes], steps: int, workers: int) -> Iterator[torch.Tensor]:
    """(B, 3, Y, X) float32 batches, as one writes them without us."""

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
    """(B, 3, Y, X) uint8 batches of the training loader."""
    transform = TrainTransform(PREPROCESS, AugmentSection(min_area=MIN_AREA))
    loader = TrainLoader(images, transform, batch_size=BATCH, seed=0, workers=workers, strict=True)
    return (batch.images for batch in loader.batches(0, steps))


def seconds(batches: Callable[[], Iterator[torch.Tensor]]) -> float:
    """How long it takes to have them all."""
    start = time.perf_counter()
    for _ in batches():
        pass
    return time.perf_counter() - start


@contextmanager
def ready(files: Sequence[bytes], way: Way) -> Iterator[ImageSet]:
    """The files as the loader is to read them."""
    sets.CACHE_BYTES = 1 << 40 if way == "kept" else 0
    images = ImageSet("train", ["a"], np.zeros(len(files), dtype=np.int64), Files(files))
    if way != "stored":
        yield images
        return
    with tempfile.TemporaryDirectory() as folder:
        write_decoded(
            Source("files", {"train": images}, ("a",), ""), Path(folder), side=STORED_SIDE
        )
        stored = load_data(folder, whole=True, labelled=False).splits["train"]
        assert len(stored) == len(files)
        yield stored


def compare(
    name: str, files: Sequence[bytes], images: ImageSet, way: Way, workers: int
) -> dict[str, Any]:
    """Both pipelines over every image at least once, in turn."""
    steps = -(-len(files) // BATCH)

    def first() -> Iterator[torch.Tensor]:
        return ours(images, steps, workers)

    def second() -> Iterator[torch.Tensor]:
        return plain(files, steps, workers)

    seconds(first), seconds(second)
    pairs = [(seconds(first), seconds(second)) for _ in range(PAIRS)]
    speeds = [steps * BATCH / statistics.median(times) for times in zip(*pairs, strict=True)]
    ratios = sorted(theirs / mine for mine, theirs in pairs)
    return {
        "case": name if way == "files" else f"{name} {way}",
        "images": len(files),
        "workers": workers,
        "ours": round(speeds[0], 1),
        "plain": round(speeds[1], 1),
        "ratio": round(statistics.median(ratios), 2),
        "least": round(ratios[0], 2),
        "largest": round(ratios[-1], 2),
    }


def flowers() -> list[bytes]:
    """The photographs of flower_photos, about 240 pixels a side."""
    table = pq.read_table(SHARED / "flower_photos/train.parquet")
    return [row["bytes"] for row in table["image"].to_pylist()]


def messy() -> list[bytes]:
    """The odd files that both can read: 500-pixel photographs and some large ones."""
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
    """Large photographs, as a phone makes them."""
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
    """Both, mixed."""
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
    """Measure the cases that the command line names, or all."""
    torch.set_num_threads(1)
    arguments = sys.argv[1:]
    as_json = "--json" in arguments
    names = [a for a in arguments if not a.startswith("--")] or list(CASES)
    for name in names:
        make, way = CASES[name]
        files = make()
        with ready(files, way) as images:
            for workers in WORKERS:
                row = compare(name.removesuffix(f" {way}"), files, images, way, workers)
                if as_json:
                    sys.stdout.write(json.dumps(row) + "\n")
                else:
                    sys.stdout.write(
                        f"{row['case']:18} {workers} threads  ours {row['ours']:7.1f} img/s  "
                        f"plain {row['plain']:7.1f} img/s  "
                        f"ratio {row['ratio']:5.2f} ({row['least']:.2f} to {row['largest']:.2f})\n"
                    )
                sys.stdout.flush()


if __name__ == "__main__":
    main()
