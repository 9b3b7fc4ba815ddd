"""Batches on their way to a device."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from vitcli.data.augment.mixing import Mix
from vitcli.data.batch import Batch, move_to_device
from vitcli.data.image_set import ArrayPicture
from vitcli.decode import open_image


def a_batch(number=0):
    images = torch.full((2, 3, 4, 4), number, dtype=torch.uint8)
    labels = torch.zeros(2, dtype=torch.int64)
    mix = Mix(torch.ones(2), torch.zeros(2, 4))
    return Batch(images, labels, labels, labels, mix=mix)


def test_nothing_moves_where_it_is_already():
    batches = [a_batch(i) for i in range(3)]
    assert all(
        a is b
        for a, b in zip(move_to_device(iter(batches), torch.device("cpu")), batches, strict=True)
    )
    moved = next(move_to_device(iter(batches), torch.device("meta")))
    assert {x.device.type for x in moved.tensors()} == {"meta"}
    assert len(moved.tensors()) == 4
    assert moved.to(torch.device("meta")) is moved
    assert moved.images.dtype == torch.uint8  # normalised there


def test_a_gpu_copies_beside_the_step(monkeypatch):
    """In a stream of its own, which the step's waits for before it reads."""
    log = []

    class Stream:
        def __init__(self, name="copies"):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    steps = Stream("steps")

    @contextmanager
    def within(stream):
        log.append(f"in {stream.name}")
        yield
        log.append("out")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: steps)

    class Recorded:
        def record_stream(self, stream):
            log.append(f"kept for {stream.name}")

    class Fake:
        def __init__(self, number):
            self.number = number

        def to(self, device):
            log.append(f"copy {self.number}")
            return self

        def tensors(self):
            return [Recorded()]

    for batch in move_to_device(iter([Fake(0), Fake(1)]), torch.device("cuda")):
        log.append(f"step {batch.number}")
    one = ["in copies", "copy {0}", "out", "steps waits for copies", "kept for steps", "step {0}"]
    assert log == [line.format(number) for number in range(2) for line in one]


@pytest.mark.parametrize("shape", [(9, 7, 3), (9, 7)])
def test_a_part_of_pixels_in_memory_is_that_of_a_picture(shape):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    array.flags.writeable = False
    picture = ArrayPicture(array, "x")
    with open_image(picture.whole(), picture.mode) as other:
        assert picture.size == other.size == (7, 9)
        for box in [(0, 0, 7, 9), (2, 3, 5, 4)]:
            assert picture.part(box).tobytes() == other.part(box).tobytes()
            assert (picture.pixels(box) == other.pixels(box)).all()
    part = picture.pixels((0, 0, 7, 9))
    part[:] = 0  # its own copy
    assert array.any()
    assert picture.whole().mode == picture.mode
