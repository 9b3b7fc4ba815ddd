"""`builtin:digits`: the handwritten digits that scikit-learn carries."""

import numpy as np

from vitcli.data.assemble import make_source
from vitcli.data.sets import ArrayStore, ImageSet, Request, Source
from vitcli.data.splits import stratified_split

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
