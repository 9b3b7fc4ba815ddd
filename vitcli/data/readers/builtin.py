"""Images that scikit-learn carries: `builtin:digits`, and two photographs for demonstrations.

`china.jpg` and `flower.jpg` are CC BY 2.0; scikit-learn's `datasets/images/README.txt` names their
authors. The files are read from the installed package. An import of `sklearn.datasets` takes 3 s of
a CPU, because it loads scipy.stats and pandas too.
"""

import gzip
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitcli.data.image_set import ArrayStore, ImageSet
from vitcli.data.source import DataRequest, Source, make_source
from vitcli.data.stratify import stratified_split
from vitcli.decode import read_image

DIGITS_TEST_FRACTION = 0.2
PHOTOGRAPHS = ("china.jpg", "flower.jpg")
HALVES = ("left", "right")


def load_digits(request: DataRequest) -> Source:
    """1,797 grey digits of 8x8 pixels, 0..16 scaled to 0..255, in scikit-learn's order.

    A stratified fifth is the test split, for every seed. The last 360 images would be a harder
    test, because other people wrote them.
    """
    notation = request.notation
    table = digits_table()
    pixels = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # (n, Y, X)
    labels = table[:, -1].astype(np.int64)
    classes = [str(digit) for digit in range(10)]
    store = ArrayStore(notation, pixels)
    train, test = stratified_split(labels, DIGITS_TEST_FRACTION, 0)
    splits = {
        name: ImageSet(name, classes, labels[rows], store, rows)
        for name, rows in (("train", train), ("test", test))
    }
    notes = [
        f"{notation}: a fixed, stratified fifth of the images is the test split "
        f"({len(train):,} train, {len(test):,} test)"
    ]
    return make_source(request, splits, [pixels.tobytes()], notes)


@cache
def digits_table() -> NDArray[np.float64]:
    """(1797, 65) as `sklearn.datasets.load_digits` reads it: 64 pixels, 0 to 16, and the label."""
    with gzip.open(sklearn_datasets() / "data" / "digits.csv.gz", "rt", encoding="ascii") as file:
        table = np.loadtxt(file, delimiter=",")
    table.flags.writeable = False  # the callers share it
    return table


class HalvesStore:
    """The left halves of the pictures, then the right halves: neighbours differ in content."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(HALVES) * len(self.files)

    def content(self, row: int) -> Image.Image:
        half, number = divmod(row, len(self.files))
        picture = read_image(self.files[number])
        start = half * picture.width // 2
        return picture.crop((start, 0, start + picture.width // 2, picture.height))

    def describe(self, row: int) -> str:
        half, number = divmod(row, len(self.files))
        return f"{self.files[number].name}, {HALVES[half]} half"


def sklearn_photographs() -> ImageSet | None:
    """Four halves of two photographs; None if this scikit-learn does not carry them."""
    files = [sklearn_datasets() / "images" / name for name in PHOTOGRAPHS]
    if not all(file.is_file() for file in files):
        return None
    store = HalvesStore(files)
    return ImageSet("images", ("",), np.zeros(len(store), dtype=np.int64), store)


def sklearn_datasets() -> Path:
    """The folder of scikit-learn's data, found without an import of scikit-learn."""
    spec = find_spec("sklearn")
    roots = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(roots or ()), "")) / "datasets"
