"""`builtin:digits`: the handwritten digits that scikit-learn carries.

Two photographs that scikit-learn carries, for commands that are given none.

`china.jpg` and `flower.jpg`, CC BY 2.0: scikit-learn's `datasets/images/README.txt` names
danielbuechele for both, and for the second links to vultilion. They are read where scikit-learn has
them.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from vitcli.data.image_set import ArrayStore, ImageSet, Request, Source
from vitcli.data.labels import make_source
from vitcli.data.splits import stratified_split
from vitcli.decode import read_image

TEST_FRACTION = 0.2


def load_digits(request: Request) -> Source:
    """1,797 digits of 8x8 grey pixels, 0..16 scaled to 0..255, in scikit-learn's order.

    A fixed stratified fifth is the test set, whatever the seed: scikit-learn's last 360 were
    written by other people than most of the first.
    """
    from sklearn.datasets import load_digits as read_digits

    notation = request.notation
    images, labels = read_digits(return_X_y=True)
    pixels = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # (n, Y, X)
    classes = [str(digit) for digit in range(10)]
    store = ArrayStore(notation, pixels)
    keep, aside = stratified_split(labels, TEST_FRACTION, 0)
    splits = {
        name: ImageSet(name, classes, labels[rows], store, rows)
        for name, rows in (("train", keep), ("test", aside))
    }
    notes = [
        f"{notation}: a fixed stratified fifth is the test set "
        f"({len(keep):,} train, {len(aside):,} test)"
    ]
    return make_source(request, splits, [pixels.tobytes()], notes)


NAMES = ("china.jpg", "flower.jpg")
HALVES = ("left", "right")


class Halves:
    """The left and the right half of each; neighbours in the order are of different pictures."""

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


def photographs() -> ImageSet | None:
    """Four halves of two photographs; None where this scikit-learn does not carry them."""
    # Its place is asked for and not the package, whose import takes a second.
    spec = find_spec("sklearn")
    roots = spec.submodule_search_locations if spec is not None else None
    folder = Path(next(iter(roots or ()), "")) / "datasets" / "images"
    files = [folder / name for name in NAMES]
    if not all(file.is_file() for file in files):
        return None
    store = Halves(files)
    return ImageSet("images", ("",), np.zeros(len(store), dtype=np.int64), store)
