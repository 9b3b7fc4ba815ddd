"""Loading: the same batches whoever makes them, each image once, and nothing left hanging."""

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from vitcli.config.schema import AugmentSection
from vitcli.data.augment.transform import TrainTransform, image_rng
from vitcli.data.image_set import ArrayStore, ImageSet
from vitcli.data.loader import TrainLoader, eval_batches
from vitcli.data.prefetch import default_workers
from vitcli.data.sampler import epoch_order, images_at
from vitcli.decode import ImageError
from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess

N = 23
PREPROCESS = Preprocess((6, 8))


class Breakable(ArrayStore):
    """Pictures in memory, some of which cannot be read."""

    def __init__(self, images, broken):
        super().__init__("memory", images)
        self.broken = broken

    def content(self, row):
        if row in self.broken:
            raise ImageError(self.describe(row), "it is broken")
        return super().content(row)


def some_images(broken=(), classes=3, n=N):
    """`n` pictures of 9x9 noise; picture i has class i modulo `classes`."""
    pixels = np.random.default_rng(0).integers(0, 256, (n, 9, 9, 3), dtype=np.uint8)
    names = [f"class {i}" for i in range(classes)]
    return ImageSet("train", names, np.arange(n) % classes, Breakable(pixels, set(broken)))


def loader(images=None, **settings):
    transform = TrainTransform(PREPROCESS, AugmentSection(flip_rate=0.5))
    settings = {"batch_size": 8, "seed": 1, "workers": 0} | settings
    return TrainLoader(images or some_images(), transform, **settings)


def same(one, other):
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("images", "labels", "indices", "epochs")
    )


def loader_threads():
    return [t for t in threading.enumerate() if t.name.startswith("vitcli-loader")]


def test_an_epoch_shows_every_image_once():
    for epoch in range(3):
        assert sorted(epoch_order(N, 0, epoch).tolist()) == list(range(N))
    assert (epoch_order(N, 0, 0) != epoch_order(N, 0, 1)).any()
    assert (epoch_order(N, 0, 0) != epoch_order(N, 1, 0)).any()
    assert (epoch_order(N, 7, 2) == np.random.default_rng((7, 2)).permutation(N)).all()


def test_positions_are_one_endless_stream():
    stream = np.concatenate([epoch_order(N, 3, epoch) for epoch in range(4)])
    epochs, indices = images_at(5, 60, N, 3)
    assert (indices == stream[5:65]).all()
    assert (epochs == np.arange(5, 65) // N).all()


def test_batches_are_what_the_parts_give():
    images = some_images()
    made = list(loader(images).batches(16, 3))
    transform = TrainTransform(PREPROCESS, AugmentSection(flip_rate=0.5))
    for step, batch in enumerate(made):
        epochs, indices = images_at(16 + 8 * step, 8, N, 1)
        assert batch.indices.tolist() == indices.tolist()
        assert batch.epochs.tolist() == epochs.tolist()
        assert batch.labels.tolist() == (indices % 3).tolist()
        assert batch.images.shape == (8, 3, 6, 8) and batch.images.dtype == torch.uint8
        for i in range(8):
            rng = image_rng(1, int(epochs[i]), int(indices[i]))
            assert torch.equal(batch.images[i], transform(images.read(int(indices[i])), rng))


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_threads_makes_the_same(workers):
    inline = list(loader().batches(0, 7))
    threaded = list(loader(workers=workers).batches(0, 7))
    assert len(inline) == len(threaded) == 7
    assert all(map(same, inline, threaded))
    assert not loader_threads()


def test_any_number_of_processes_makes_the_same_together():
    whole = list(loader().batches(0, 6))
    halves = [list(loader(rank=r, world_size=2).batches(0, 6)) for r in range(2)]
    for batch, *parts in zip(whole, *halves, strict=True):
        for name in ("images", "labels", "indices", "epochs"):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(getattr(batch, name), joined)


@pytest.mark.parametrize("channels", [1, 3])
def test_batches_are_filled_in_place_with_the_channels_last(channels):
    """What decoders give is copied as it lies; only `normalize` takes the channels apart."""
    preprocess = Preprocess((6, 8), num_channels=channels)
    made = TrainLoader(
        some_images(),
        TrainTransform(preprocess, AugmentSection()),
        batch_size=8,
        seed=1,
        workers=0,
    )
    train = next(made.batches(0, 1)).images
    seen = next(iter(eval_batches(some_images(), preprocess, batch_size=8, workers=0))).images
    for images in (train, seen):
        assert images.shape[1:] == (channels, 6, 8)
        assert images.is_contiguous(memory_format=torch.channels_last)
        normal = preprocess.normalize(images)
        assert normal.is_contiguous()
        assert torch.equal(normal, (images.contiguous() / 255 - 0.5) / 0.5)


def test_starting_later_continues_the_stream():
    whole = list(loader().batches(0, 8))
    later = list(loader().batches(5 * 8, 3))
    assert all(map(same, whole[5:], later))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_replaced_by_the_next_of_its_class(workers):
    broken = {0, 4, 7}  # 7 follows 4 in class 1
    train = loader(some_images(broken), workers=workers)
    batches = list(train.batches(0, 6))
    _, wanted = images_at(0, 48, N, 1)
    shown = torch.cat([batch.indices for batch in batches]).numpy()
    replaced = {0: 3, 4: 10, 7: 10}
    assert shown.tolist() == [replaced.get(int(i), int(i)) for i in wanted]
    labels = torch.cat([batch.labels for batch in batches]).numpy()
    assert (labels == wanted % 3).all()
    assert train.broken == {f"image {i} of memory": "it is broken" for i in broken}
    assert {entry for batch in batches for entry in batch.broken} == set(train.broken.items())


def test_the_last_of_a_class_is_replaced_by_its_first():
    train = loader(some_images({21}))
    assert 0 in {
        int(batch.indices[i])
        for batch in train.batches(0, 3)
        for i, index in enumerate(images_at(0, 24, N, 1)[1].reshape(3, 8)[0])
    }
    assert train._read_or_replace(train.images, 21, "RGB", lambda picture: None, []) == 0


def test_strict_raises_in_the_consumer():
    for workers in (0, 2):
        with pytest.raises(ImageError, match="image 4 of memory"):
            list(loader(some_images({4}), workers=workers, strict=True).batches(0, 4))
    assert not loader_threads()


def test_a_class_without_readable_images_is_an_error():
    broken = set(range(1, N, 3))
    with pytest.raises(VitcliError, match="none of the images of class `class 1` can be read"):
        list(loader(some_images(broken)).batches(0, 3))


def test_a_fault_in_a_thread_reaches_the_consumer():
    train = loader(workers=2)

    def fail(image, rng):
        raise ZeroDivisionError

    train.transform.view = fail
    with pytest.raises(ZeroDivisionError):
        list(train.batches(0, 5))
    assert not loader_threads()


def test_stopping_early_ends_the_threads():
    batches = loader(workers=2).batches(0, 10_000)
    next(batches)
    assert loader_threads()
    batches.close()
    assert not loader_threads()


def test_a_loader_left_open_does_not_hold_up_the_exit():
    code = (
        "import numpy as np\n"
        "from vitcli.config.schema import AugmentSection\n"
        "from vitcli.data.augment.transform import TrainTransform\n"
        "from vitcli.data.loader import TrainLoader\n"
        "from vitcli.data.image_set import ArrayStore, ImageSet\n"
        "from vitcli.preprocess import Preprocess\n"
        "store = ArrayStore('x', np.zeros((50, 8, 8), dtype=np.uint8))\n"
        "images = ImageSet('train', ['a'], np.zeros(50, dtype=np.int64), store)\n"
        "transform = TrainTransform(Preprocess((8, 8)), AugmentSection(flip_rate=0.5))\n"
        "loader = TrainLoader(images, transform, batch_size=4, seed=0, workers=2)\n"
        "batches = loader.batches(0, 999)\n"
        "print(len(next(batches)))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (ran.stdout, ran.stderr, ran.returncode) == ("4\n", "", 0)


def test_a_batch_that_does_not_divide():
    with pytest.raises(VitcliError, match="8 images does not divide among 3") as caught:
        loader(world_size=3)
    assert "`--batch-size 6`" in str(caught.value.hint)


def test_workers_leave_a_core():
    assert default_workers() >= 1
    assert default_workers(1000) == 1


class Drawn:
    """A set that makes whole batches, as images from formulas do."""

    kind = "batches"
    labels = np.arange(N, dtype=np.int64) % 3

    def __len__(self):
        return N

    def batch(self, epochs, indices, size, seed):
        images = np.zeros((len(indices), 3, *size), dtype=np.uint8)
        images[:] = indices[:, None, None, None]
        return images, self.labels[indices]


@pytest.mark.parametrize("workers", [0, 2])
def test_sets_that_make_batches_are_asked_for_them(workers):
    train = TrainLoader(Drawn(), None, batch_size=8, seed=1, workers=workers, image_size=(4, 5))
    for step, batch in enumerate(train.batches(0, 4)):
        wanted = images_at(8 * step, 8, N, 1)[1]
        assert batch.images.shape == (8, 3, 4, 5)
        assert batch.images[:, 0, 0, 0].tolist() == wanted.tolist() == batch.indices.tolist()
        assert batch.labels.tolist() == (wanted % 3).tolist()
        part = batch.part(2, 5)
        assert part.indices.tolist() == wanted[2:5].tolist()
        assert torch.equal(part.images, batch.images[2:5])


# Evaluation


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_evaluation_sees_every_image_once_in_order(workers, batch_size):
    images = some_images()
    batches = list(eval_batches(images, PREPROCESS, batch_size=batch_size, workers=workers))
    assert torch.cat([b.indices for b in batches]).tolist() == list(range(N))
    assert torch.cat([b.labels for b in batches]).tolist() == images.labels.tolist()
    wanted = torch.stack([PREPROCESS.pixels(images.read(i)) for i in range(N)])
    assert torch.equal(torch.cat([b.images for b in batches]), wanted)
    assert max(map(len, batches)) <= batch_size


@pytest.mark.parametrize("world_size", [2, 3, 30])
def test_processes_share_the_evaluation(world_size):
    seen = [
        batch.indices
        for rank in range(world_size)
        for batch in eval_batches(
            some_images(), PREPROCESS, batch_size=4, workers=0, rank=rank, world_size=world_size
        )
    ]
    assert torch.cat(seen).tolist() == list(range(N))


def test_evaluation_leaves_out_and_lists_what_cannot_be_read():
    images = some_images({0, 1, 2, 3, 9})
    batches = list(eval_batches(images, PREPROCESS, batch_size=4, workers=2))
    assert len(batches[0]) == 0 and batches[0].images.shape == (0, 3, 6, 8)
    assert torch.cat([b.indices for b in batches]).tolist() == [
        i for i in range(N) if i not in {0, 1, 2, 3, 9}
    ]
    told = [line for batch in batches for line in batch.errors]
    assert told == [f"image {i} of memory: it is broken" for i in (0, 1, 2, 3, 9)]


def test_a_name_and_its_reason_stay_apart():
    """A reason may contain a colon, so the two are never parsed from one text."""

    class Odd(Breakable):
        def content(self, row):
            raise ImageError("a: b.png", "the file is damaged: it ends early")

    images = ImageSet("test", ["x"], np.zeros(2, dtype=int), Odd(np.zeros((2, 9, 9, 3)), ()))
    (batch,) = eval_batches(images, PREPROCESS, batch_size=4, workers=0)
    assert dict(batch.broken) == {"a: b.png": "the file is damaged: it ends early"}


def test_a_limit_is_spread_over_the_set():
    batches = eval_batches(some_images(), PREPROCESS, batch_size=4, workers=0, limit=5)
    assert torch.cat([b.indices for b in batches]).tolist() == [0, 4, 9, 13, 18]
    batches = eval_batches(some_images(), PREPROCESS, batch_size=4, workers=0, limit=99)
    assert sum(map(len, batches)) == N


def test_a_batch_moves_as_a_whole():
    batch = next(eval_batches(some_images({1}), PREPROCESS, batch_size=4, workers=0))
    moved = batch.to(torch.device("meta"))
    assert moved.images.device.type == moved.labels.device.type == "meta"
    assert moved.broken == batch.broken


def test_grey_pictures_for_grey_models():
    grey = Preprocess((6, 8), num_channels=1)
    batch = next(eval_batches(some_images(), grey, batch_size=4, workers=0))
    assert batch.images.shape == (4, 1, 6, 8)
    wanted = grey.pixels(Image.fromarray(np.asarray(some_images().read(0, "L"))))
    assert torch.equal(batch.images[0], wanted)
