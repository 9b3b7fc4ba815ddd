import numpy as np
import pytest
import torch

from vitcli.data.image_set import ArrayStore, ImageSet
from vitcli.errors import VitcliError
from vitcli.evals.features import autocast, extract
from vitcli.preprocess import Preprocess
from vitcli.weights.loaded import create_model


@pytest.fixture
def model():
    net = create_model("Pico/8", num_classes=3, image_size=16, depth=2)
    torch.nn.init.normal_(net.network.head.weight)
    net.preprocess = Preprocess(image_size=(16, 16))
    return net


@pytest.fixture
def images():
    pixels = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)
    return ImageSet("test", ("a", "b"), np.arange(7) % 2, ArrayStore("noise", pixels)), pixels


def test_every_image_once_in_order(model, images):
    found = extract(model, images[0], batch_size=3, with_pixels=True)
    x = model.preprocess.normalize(torch.from_numpy(images[1]).permute(0, 3, 1, 2))
    with torch.no_grad():
        expected = model.features(x).numpy()
    np.testing.assert_allclose(found.outputs, expected, atol=1e-5)
    assert found.indices.tolist() == list(range(7)) and found.broken == ()
    assert found.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    np.testing.assert_allclose(found.pixels, x.flatten(1).numpy(), atol=1e-6)
    logits = extract(model, images[0], output="logits", batch_size=7).outputs
    head = model.network.head
    np.testing.assert_allclose(logits, head(torch.from_numpy(expected)).detach(), atol=1e-4)


def test_pixels_of_large_images_are_averaged(images):
    net = create_model("Pico/16", image_size=64, depth=1)
    net.preprocess = Preprocess(image_size=(64, 64), interpolation="nearest")
    found = extract(net, images[0], with_pixels=True)
    assert found.pixels.shape == (7, 3 * 32 * 32)


class BrokenStore:
    def __init__(self, good):
        self.good = good

    def __len__(self):
        return 4

    def content(self, row):
        return b"not an image" if row in (1, 3) else self.good

    def describe(self, row):
        return f"row {row}"


def test_broken_images_are_left_out_and_told(model, images):
    good = images[0].read(0)
    store = ImageSet("test", ("a", "b"), np.arange(4) % 2, BrokenStore(good))
    found = extract(model, store, batch_size=2)
    assert found.indices.tolist() == [0, 2] and len(found.broken) == 2
    assert "row 1" in found.broken[0]
    with pytest.raises(VitcliError, match="none of 2 images can be read"):
        extract(model, store.subset(np.array([1, 3])))


def test_without_preprocessing(images):
    net = create_model("Pico/8", image_size=16, depth=1)
    with pytest.raises(VitcliError, match=r"preprocess\.mean"):
        extract(net, images[0])


def test_precisions():
    cpu = torch.device("cpu")
    linear, x = torch.nn.Linear(4, 4), torch.ones(1, 4)
    for name, dtype in (("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(name, cpu):
            assert linear(x).dtype == dtype, name
    with pytest.raises(VitcliError, match="precision"):
        autocast("fp8", cpu)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_nothing(batch_size, model, images):
    with pytest.raises(VitcliError, match=f"`--batch-size` is {batch_size}"):
        extract(model, images[0], batch_size=batch_size)


def test_numbers_that_are_none(model, images):
    torch.nn.init.constant_(model.network.head.weight, float("nan"))
    assert np.isfinite(extract(model, images[0]).outputs).all()  # what the head reads
    with pytest.raises(VitcliError, match="the outputs of the model are not finite"):
        extract(model, images[0], output="logits")
