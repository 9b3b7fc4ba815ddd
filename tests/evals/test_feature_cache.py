"""Features that are computed once: what counts as the same, what is resumed, what is noticed."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.flipping import flips

from vitcli.data.source import load_data
from vitcli.errors import VitcliError
from vitcli.evals import feature_cache, feature_table
from vitcli.evals.feature_cache import CachedFeatures
from vitcli.evals.features import extract
from vitcli.preprocess import Preprocess
from vitcli.progress import Quiet
from vitcli.weights.feature_layers import set_representation
from vitcli.weights.loaded import create_model


class Heard(Quiet):
    """Remembers notes and warnings."""

    def __init__(self):
        self.lines = []

    def note(self, message):
        self.lines.append(message)

    warn = note


@pytest.fixture
def photos(here, monkeypatch):
    """A folder of 2 x 12 pictures, and an empty cache."""
    monkeypatch.setenv("VITCLI_CACHE", str(here / "cache"))
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        folder = here / "photos/train" / name
        folder.mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:02}.bmp")  # every file of one size
    return here / "photos"


@pytest.fixture
def net():
    model = create_model("Pico/4", image_size=8, depth=2)
    model.preprocess = Preprocess(image_size=(8, 8))
    return model


class Counted:
    """A model's `features`, which count the images that they see."""

    def __init__(self, model, monkeypatch, stop=None):
        self.seen, self.stop, self.real = 0, stop, model.features
        monkeypatch.setattr(model, "features", self)

    def __call__(self, images):
        if self.stop is not None and self.seen >= self.stop:
            raise KeyboardInterrupt
        self.seen += len(images)
        return self.real(images)


def features(net, photos, indices=None, watch=None, **settings):
    source = load_data(photos, whole=True)
    images = source.splits["train"]
    indices = np.arange(len(images)) if indices is None else np.asarray(indices)
    about, watch = {"model": "x"}, watch or Quiet()
    kept = CachedFeatures(
        net, source.fingerprint, about, watch=watch, **{"batch_size": 4} | settings
    )
    found = kept.extract(images, indices, label="images", with_pixels=True)
    kept.report()
    return found


def test_computed_once_and_only_what_is_missing(photos, net, monkeypatch):
    counted, heard = Counted(net, monkeypatch), Heard()
    some = features(net, photos, [1, 5, 6, 20])
    assert counted.seen == 4 and some.indices.tolist() == [1, 5, 6, 20]
    found = features(net, photos, watch=heard)
    assert counted.seen == 24
    assert "4 of 24" in heard.lines[0] and "cached features in" in heard.lines[-1]
    plain = extract(net, load_data(photos, whole=True).splits["train"], with_pixels=True)
    counted.seen = 0
    again = features(net, photos, batch_size=7)
    assert counted.seen == 0
    for name in ("outputs", "pixels"):
        values = getattr(again, name)
        np.testing.assert_allclose(values, getattr(plain, name), atol=1e-5)
        assert np.array_equal(values, getattr(found, name))
        assert isinstance(values, np.memmap)  # nothing was copied
    assert np.array_equal(again.labels, plain.labels)
    np.testing.assert_array_equal(some.outputs, again.outputs[[1, 5, 6, 20]])


def test_an_extraction_that_breaks_off_goes_on(photos, net, monkeypatch):
    counted = Counted(net, monkeypatch, stop=12)
    with pytest.raises(KeyboardInterrupt):
        features(net, photos)
    assert counted.seen == 12
    counted.stop = None
    found = features(net, photos)
    assert counted.seen == 24
    monkeypatch.setenv("VITCLI_CACHE", "elsewhere")
    assert np.array_equal(features(net, photos).outputs, found.outputs)  # bit for bit


def test_what_is_computed_anew(photos, net, monkeypatch):
    counted = Counted(net, monkeypatch)
    features(net, photos)

    def seen(**settings):
        counted.seen = 0
        features(net, photos, **settings)
        return counted.seen

    assert seen() == 0
    assert seen(precision="bf16") == 24 and seen(precision="fp32") == 0
    net.preprocess = Preprocess(image_size=(8, 8), mean=(0.4,))
    assert seen() == 24
    with torch.no_grad():
        net.network.blocks[1].mlp.fc1.bias[3] += 1e-3
    assert seen() == 24 and seen() == 0
    # A head makes no difference, and another representation does.
    net.network.head = torch.nn.Linear(net.config.feature_dim, 5)
    assert seen() == 0
    set_representation(net, "mean")
    assert seen() == 24
    monkeypatch.setattr("vitcli.evals.feature_cache.code_hash", lambda: "another version")
    assert seen() == 24


def test_a_file_that_changed_is_looked_at_again(photos, net, monkeypatch):
    counted = Counted(net, monkeypatch)
    found = features(net, photos)
    before = {name: np.array(getattr(found, name)) for name in ("outputs", "pixels")}
    path = photos / "train/a/05.bmp"
    Image.new("RGB", (8, 8), "red").save(path)  # as many bytes, another time
    os.utime(path, ns=(1, 1))
    counted.seen = 0
    after = features(net, photos)
    assert counted.seen == 1
    for name, values in before.items():
        assert np.flatnonzero((getattr(after, name) != values).any(axis=1)).tolist() == [5]


def test_other_data_of_the_same_names_and_sizes(photos, net, here):
    before = features(net, photos)
    shutil.copytree(photos, here / "others")
    for path in (here / "others").rglob("*.bmp"):
        facts = path.stat()
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    one, two = (load_data(p, whole=True).fingerprint for p in (photos, here / "others"))
    assert one == two  # the fingerprint looks at no content
    assert (features(net, here / "others").outputs != before.outputs).any(axis=1).all()


def test_a_damaged_row_is_noticed(photos, net, monkeypatch):
    counted, heard = Counted(net, monkeypatch), Heard()
    before = np.array(features(net, photos).outputs)
    for table in (Path(os.environ["VITCLI_CACHE"]) / "features").glob("*/rows.f32"):
        content = bytearray(table.read_bytes())
        content[len(content) // 2] ^= 1
        table.write_bytes(content)
    counted.seen = 0
    after = features(net, photos, watch=heard)
    assert counted.seen == 1
    np.testing.assert_allclose(after.outputs, before, atol=1e-5)  # alone in its batch now
    assert sum("computing 1 damaged row of" in line for line in heard.lines) == 2


def test_each_flipped_bit_is_noticed(photos, net, monkeypatch):
    chosen = np.arange(6)
    found = features(net, photos, chosen)
    expected = [np.array(values) for values in (found.outputs, found.pixels)]
    counted = Counted(net, monkeypatch)

    def check(position):
        counted.seen = 0
        after = features(net, photos, chosen)
        for values, wanted in zip((after.outputs, after.pixels), expected, strict=True):
            changed = (values != wanted).any(axis=1)
            assert changed.sum() <= counted.seen, position  # only rows that were computed again
            np.testing.assert_allclose(values, wanted, atol=1e-5)

    tables = Path(os.environ["VITCLI_CACHE"]) / "features"  # one of features, and one of pixels
    before = {path: path.read_bytes() for path in tables.glob("*/*")}

    def check_and_restore(position):
        check(position)
        # A row that is computed again, in another batch, may differ in its last bits.
        for path, content in before.items():
            path.write_bytes(content)

    for name, places in {"rows.f32": 12, "rows.sums": 10, "about.json": 3}.items():
        for path in sorted(tables.glob(f"*/{name}")):
            flips(path, check_and_restore, places)


def test_unreadable_images_are_tried_again(photos, net, monkeypatch):
    path = photos / "train/b/03.bmp"
    good = path.read_bytes()
    path.write_bytes(b"cut")
    counted = Counted(net, monkeypatch)
    for _ in range(2):
        found = features(net, photos)
        assert counted.seen == 23 and len(found.broken) == 1 and "03.bmp" in found.broken[0]
        assert found.indices.tolist() == [i for i in range(24) if i != 15]
    path.write_bytes(good)
    source = load_data(photos, whole=True)  # another size, so other data
    assert features(net, photos).broken == () and len(source.splits["train"]) == 24
    with pytest.raises(VitcliError, match="none of 1 images can be read"):
        path.write_bytes(b"cut")
        features(net, photos, [15])


def test_without_a_cache(photos, net, monkeypatch):
    counted, heard = Counted(net, monkeypatch), Heard()
    for _ in range(2):
        found = features(net, photos, [3, 9], use_cache=False)
        assert found.indices.tolist() == [3, 9]
    assert counted.seen == 4 and not Path("cache").exists()
    Path("file").write_text("")
    monkeypatch.setenv("VITCLI_CACHE", "file")
    assert len(features(net, photos, watch=heard).outputs) == 24
    assert "features are not cached in" in heard.lines[0]


def test_a_full_disk(photos, net, monkeypatch):
    heard = Heard()
    monkeypatch.setattr(feature_table, "MAX_DISK_FRACTION", 0.0)
    assert len(features(net, photos, watch=heard).outputs) == 24
    assert "do not fit" in heard.lines[0]
    monkeypatch.setattr(feature_table, "MAX_DISK_FRACTION", 0.9)
    real = feature_table.FeatureTable.write

    def write(table, *values):
        table._path = lambda name: Path("/dev/full")
        real(table, *values)

    monkeypatch.setattr(feature_table.FeatureTable, "write", write)
    with pytest.raises(VitcliError, match="No space left") as caught:
        features(net, photos)
    assert "--no-cache" in caught.value.hint


def test_the_cache_stays_bounded(photos, net):
    for mean in (0.1, 0.2, 0.3):
        net.preprocess = Preprocess(image_size=(8, 8), mean=(mean,))
        features(net, photos)
    root = feature_table.feature_cache_folder()
    tables = sorted(root.glob("*/about.json"))
    assert len(tables) == 6
    for age, path in enumerate(tables):
        os.utime(path, (age, age))
    whole = feature_table.evict([])
    kept = tables[1].parent
    left = feature_table.evict([kept], whole // 2)
    assert left <= whole // 2 and kept.is_dir()
    assert not tables[0].parent.exists() and tables[5].parent.exists()


def test_every_source_of_the_code_hash_exists():
    package = Path(feature_cache.__file__).parents[1]
    assert all(any(package.glob(pattern)) for pattern in feature_cache.CODE)
