"""The window of wide samples: every reader of pixels, against numpy arithmetic on written files."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from vitcli.commands import check, patchify
from vitcli.commands.pretrain import run as pretrain
from vitcli.data.augment.test_time import TTATransform
from vitcli.data.sample_range import measure_samples
from vitcli.data.source import load_data
from vitcli.decode import ImageError, open_image, read_image, read_wide_samples
from vitcli.errors import VitcliError
from vitcli.pixels import PixelFormat, choose_window
from vitcli.preprocess import Preprocess
from vitcli.run import Run
from vitcli.weights.load import load_model

RAMP = np.linspace(0, 4095, 16 * 16).astype(np.uint16).reshape(16, 16)


def by_hand(samples, low, high):
    levels = (samples.astype(np.float64) - low) * 255 / (high - low)
    return np.where(np.isnan(levels), 0, np.clip(np.rint(levels), 0, 255)).astype(np.uint8)


def encoded(samples, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(samples).save(file, kind)
    return file.getvalue()


def dataset(folder, samples=RAMP, suffix="png"):
    """Two classes of eight 16-bit images each; the second class is upside down."""
    for split, count in (("train", 8), ("test", 4)):
        for label, image in (("a", samples), ("b", samples[::-1])):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                file = folder / split / label / f"{i}.{suffix}"
                Image.fromarray(np.roll(image, i, 1)).save(file)
    return folder


@pytest.mark.parametrize("window", [(0, 4095), (100, 900), (-50, 7000)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_integers_are_mapped_and_clipped(kind, window):
    found = read_image(encoded(RAMP, kind), PixelFormat("L", window))
    assert (np.asarray(found) == by_hand(RAMP, *window)).all()


def test_signed_and_float_samples():
    hounsfield = np.linspace(-1024, 3000, 64).astype(np.int32).reshape(8, 8)
    found = read_image(encoded(hounsfield, "TIFF"), PixelFormat("RGB", (-160, 240)))
    assert (np.asarray(found) == by_hand(hounsfield, -160, 240)[..., None]).all()
    floats = hounsfield.astype(np.float32) / 10
    floats[0, :3] = np.nan, np.inf, -np.inf
    found = read_image(encoded(floats, "TIFF"), PixelFormat("L", (-20, 30)))
    assert (np.asarray(found) == by_hand(floats, -20, 30)).all()


def test_eight_bit_images_do_not_change():
    image = encoded((RAMP >> 4).astype(np.uint8))
    assert (
        read_image(image, PixelFormat("L", (0, 10))).tobytes() == read_image(image, "L").tobytes()
    )
    assert read_wide_samples(image) is None


def test_every_reader_takes_the_window_of_the_transform(tmp_path):
    window = (100.0, 3000.0)
    preprocess = Preprocess((16, 16), num_channels=1, window=window)
    wanted = by_hand(RAMP, *window)
    file = tmp_path / "ramp.png"
    file.write_bytes(encoded(RAMP))
    assert (preprocess.pixels(file).numpy()[0] == wanted).all()
    assert (preprocess.pixels(RAMP).numpy()[0] == wanted).all()  # an array of uint16
    assert (TTATransform(preprocess, "crops:5").pixels(file).numpy()[0, 0] == wanted).all()
    with open_image(file, preprocess.pixel_format) as picture:
        part = picture.part((2, 3, 9, 10))
    assert (np.asarray(part) == wanted[3:10, 2:9]).all()
    images = load_data(str(dataset(tmp_path / "data"))).splits["train"]
    row = next(i for i in range(len(images)) if images.describe(i).endswith("a/0.png"))
    narrow = by_hand(RAMP, 0, 50)
    assert (np.asarray(images.read(row, preprocess.pixel_format)) == wanted).all()
    # The cache in memory holds one window, and another window must not be answered from it.
    assert (np.asarray(images.read(row, PixelFormat("L", (0, 50)))) == narrow).all()
    with images.open(row, preprocess.pixel_format) as picture:
        assert (np.asarray(picture.whole()) == wanted).all()


@pytest.mark.parametrize(
    ("images", "window"),
    [
        ([np.array([0, 255], np.uint16)], (0, 255)),
        ([np.array([0, 256], np.uint16)], (0, 1023)),
        ([np.array([9, 4000], np.uint16), np.array([0, 7], np.uint16)], (0, 4095)),
        ([np.array([0, 9000], np.int32)], (0, 16383)),
        ([np.array([0, 16384], np.uint16)], (0, 65535)),
        ([np.array([0, 0.7], np.float32)], (0, 1)),
        ([np.array([0, 0.7], np.float32), np.array([0, 99.0], np.float32)], (0, 255)),
        ([np.array([0, 60000.0], np.float32)], (0, 65535)),
        ([np.array([-5, -5], np.int32)], (-5, -4)),
    ],
)
def test_the_window_that_suits_samples(images, window):
    assert choose_window(images) == window


def test_percentiles_for_negative_samples():
    samples = np.arange(-1000, 1001, dtype=np.int32)
    assert choose_window([samples]) == (-990.0, 990.0)  # 0.5 % of 2,000 steps at each end


@pytest.mark.parametrize("window", [(3, 3), (4, 1), (0, float("nan")), (0, float("inf")), (1,)])
def test_windows_that_are_none(window):
    with pytest.raises(VitcliError, match="window"):
        Preprocess((8, 8), window=window)


def test_a_transform_without_a_window_is_written_as_before():
    plain, windowed = Preprocess((8, 8)), Preprocess((8, 8), window=(-1, 2))
    assert "window" not in plain.to_dict()
    assert windowed.to_dict()["window"] == [-1.0, 2.0]
    assert all(Preprocess.from_dict(p.to_dict()) == p for p in (plain, windowed))


def test_unreadable_images_and_8_bits_give_no_range(tmp_path):
    folder = dataset(tmp_path / "bytes", (RAMP >> 4).astype(np.uint8))
    (folder / "train/a/broken.png").write_bytes(b"no image")
    assert measure_samples(load_data(str(folder)).splits["train"]) is None


TINY = {
    "model": {"name": "Ti/4", "image_size": 16, "depth": 1},
    "objective": {"name": "softmax"},
    "train": {"steps": 2, "batch_size": 8},
    "data": {"workers": 0},
}


def test_a_run_records_the_window_and_predict_takes_it(tmp_path):
    data, run = dataset(tmp_path / "data"), tmp_path / "run"
    pretrain(str(data), recipe="pretrain", settings=TINY, out=run)
    model = load_model(str(run))
    assert model.preprocess.window == (0, 4095)
    assert json.loads((run / "provenance.json").read_text())["window"] == [0, 4095]
    given = {**TINY, "preprocess": {"window": [5, 900]}}
    pretrain(str(data), recipe="pretrain", settings=given, out=tmp_path / "given")
    assert load_model(str(tmp_path / "given")).preprocess.window == (5, 900)
    assert Run(tmp_path / "given").provenance()["window"] == [5, 900]


def test_a_decoded_dataset_records_its_window(tmp_path):
    data, out = dataset(tmp_path / "data"), tmp_path / "stored"
    patchify.run(str(data), patch_size=4, image_size=16, out=str(out))
    images = load_data(str(out)).splits["train"]
    assert images.stored_window == (0, 4095)
    assert (np.asarray(images.read(0, "L")) == by_hand(RAMP, 0, 4095)).all()
    again = patchify.run(str(data), patch_size=4, image_size=16, out=str(out))
    assert again.stored_bytes > 0  # complete, and not refused as another dataset
    run = tmp_path / "run"
    pretrain(str(out), recipe="pretrain", settings=TINY, out=run)
    assert load_model(str(run)).preprocess.window == (0, 4095)


def test_check_tells_the_range_and_the_window(tmp_path):
    found = check.run(str(dataset(tmp_path / "data")))
    assert found.to_json()["samples"] == {
        "bits": 16, "min": 0.0, "max": 4095.0, "images": 16, "window": [0.0, 4095.0],
    }  # fmt: skip
    assert any("nearly black" in line for line in found.problems())
    full = check.run(str(dataset(tmp_path / "full", RAMP * 16)))
    assert not any("nearly black" in line for line in full.problems())
    plain = check.run(str(dataset(tmp_path / "plain", (RAMP >> 4).astype(np.uint8))))
    assert plain.to_json()["samples"] is None


def dicom_file(stored, *, bits=12, signed=False, preamble=True, **tags):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"  # CT image
    data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    data.Rows, data.Columns = stored.shape[-3:-1] if stored.shape[-1] == 3 else stored.shape[-2:]
    data.SamplesPerPixel = 3 if stored.shape[-1] == 3 else 1
    if data.SamplesPerPixel == 3:
        data.PlanarConfiguration = 0
    elif stored.ndim == 3:
        data.NumberOfFrames = len(stored)
    data.PhotometricInterpretation = "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = 8 * stored.itemsize, bits, bits - 1
    data.PixelRepresentation = int(signed)
    data.PixelData = stored.tobytes()
    for key, value in tags.items():
        setattr(data, key, value)
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()


def test_dicom_becomes_hounsfield_units():
    file = dicom_file(RAMP, RescaleSlope=2, RescaleIntercept=-1024)
    assert (read_wide_samples(file) == RAMP.astype(np.int32) * 2 - 1024).all()
    found = read_image(file, PixelFormat("L", (-160, 240)))
    assert (np.asarray(found) == by_hand(RAMP.astype(float) * 2 - 1024, -160, 240)).all()


def test_the_window_of_a_dicom_file():
    """PS3.3, C.11.2.1.2.1: y = ((x - (c - 0.5)) / (w - 1) + 0.5) * 255, clipped."""
    tags = {"WindowCenter": [2048, 40], "WindowWidth": [4096, 400]}
    y = ((RAMP.astype(float) - (2048 - 0.5)) / (4096 - 1) + 0.5) * 255
    wanted = np.clip(np.rint(y), 0, 255)
    assert (np.asarray(read_image(dicom_file(RAMP, **tags), "L")) == wanted).all()
    dark = dicom_file(RAMP, PhotometricInterpretation="MONOCHROME1", **tags)
    assert (np.asarray(read_image(dark, "L")) == 255 - wanted).all()
    given = PixelFormat("L", (0, 100))
    assert (np.asarray(read_image(dark, given)) == 255 - by_hand(RAMP, 0, 100)).all()
    plain = read_image(dicom_file(RAMP), "L")  # without one: all values of 12 bits
    assert (np.asarray(plain) == by_hand(RAMP, 0, 4095)).all()


def test_other_dicom_pixels():
    grey = (RAMP >> 4).astype(np.uint8)
    assert (np.asarray(read_image(dicom_file(grey, bits=8), "L")) == grey).all()
    inverse = dicom_file(grey, bits=8, PhotometricInterpretation="MONOCHROME1")
    assert (np.asarray(read_image(inverse, "L")) == 255 - grey).all()
    colours = np.stack([grey, grey.T, 255 - grey], -1)
    file = dicom_file(colours, bits=8, PhotometricInterpretation="RGB")
    assert (np.asarray(read_image(file)) == colours).all()
    frames = dicom_file(np.stack([grey, 255 - grey]), bits=8)
    assert (np.asarray(read_image(frames, "L")) == grey).all()
    signed = RAMP.astype(np.int16) - 2000
    assert (read_wide_samples(dicom_file(signed, bits=16, signed=True)) == signed).all()
    fraction = dicom_file(RAMP, RescaleSlope=0.5, RescaleIntercept=0)
    assert (read_wide_samples(fraction) == RAMP / 2).all()


def test_a_folder_of_dicom_files(tmp_path):
    for split in ("train", "test"):
        for label, image in (("a", RAMP), ("b", RAMP[::-1])):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(2):
                file = tmp_path / split / label / f"{i}.dcm"
                file.write_bytes(
                    dicom_file(np.roll(image, i, 1), RescaleIntercept=-1024, RescaleSlope=1)
                )
    images = load_data(str(tmp_path)).splits["train"]
    found = measure_samples(images)
    assert (found.low, found.high, found.num_images) == (-1024, 3071, 4)
    assert -1024 <= found.window[0] < -1000 and 3000 < found.window[1] <= 3071


def test_dicom_files_without_a_suffix(tmp_path, monkeypatch):
    """As a PACS exports them: `IM000001`, or the unique identifier of the image."""
    names = ("IM000001", "1.2.840.113619.2.55", "MR.IMA", "0.dcm")
    for label, image in (("a", RAMP), ("b", RAMP[::-1])):
        (tmp_path / label).mkdir()
        for i, name in enumerate(names):
            (tmp_path / label / name).write_bytes(dicom_file(np.roll(image, i, 1)))
        (tmp_path / label / "README").write_text("x" * 200)
        (tmp_path / label / "notes.txt").write_bytes(dicom_file(RAMP))
    (tmp_path / "a/DICOMDIR").write_bytes(dicom_file(RAMP))
    data = load_data(str(tmp_path), whole=True)
    images = data.splits["train"]
    assert sorted(images.file_name(i) for i in range(len(images))) == sorted(2 * names)
    row = next(i for i in range(len(images)) if images.describe(i).endswith("a/IM000001"))
    assert (np.asarray(images.read(row, "L")) == by_hand(RAMP, 0, 4095)).all()
    assert any("6 files without an image suffix: DICOM" in note for note in data.notes)
    assert not any("pip install" in note for note in data.notes)
    monkeypatch.setattr("vitcli.data.readers.folder.can_read_dicom", lambda: False)
    notes = load_data(str(tmp_path), whole=True).notes
    assert any("`pip install 'vitcli[medical]'`" in note for note in notes)


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(np.uint16, 0, 4095), (np.int16, -1000, 1500), (np.float64, -1, 1), (np.int64, 0, 60000)],
)
def test_arrays_with_wide_samples_are_mapped_by_a_window(tmp_path, dtype, low, high):
    """`.npz` like files: the window comes from the training images, or from the setting."""
    samples = np.linspace(low, high, 12 * 256).reshape(12, 16, 16)
    samples = np.stack([np.roll(samples[0], i) for i in range(12)]).astype(dtype)
    samples[:, 0, :2] = low, high
    path = tmp_path / "scans.npz"
    np.savez(path, images=samples, labels=np.arange(12) % 2)
    images = load_data(str(path), whole=True).splits["train"]
    found = measure_samples(images)
    assert (found.low, found.high) == (low, high)
    for window in (found.window, (low / 2, high / 2)):
        wanted = by_hand(samples[3].astype(np.float64), *window)
        seen = np.asarray(images.read(3, PixelFormat("L", window))).astype(int)
        assert abs(seen - wanted).max() <= (dtype == np.float64)  # float32 rounds half a level
    result = check.run(str(path))
    assert result.window == found.window
    assert (result.samples.low, result.samples.high) == (low, high)


def test_damaged_dicom_and_too_many_pixels():
    file = dicom_file(RAMP)
    with pytest.raises(ImageError, match="more than the limit"):
        read_image(file, max_pixels=100)
    with pytest.raises(ImageError):
        read_image(file[:-200])
    with pytest.raises(ImageError):
        read_image(file[:140])


@pytest.mark.parametrize(
    ("module", "head", "extra"),
    [
        ("pydicom", bytes(128) + b"DICM", "medical"),
        ("pillow_jxl", b"\xff\x0a" + bytes(20), "jxl"),
        ("pillow_jxl", b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(20), "jxl"),
    ],
)
def test_a_missing_package_is_named(module, head, extra, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ImageError) as caught:
        read_image(head)
    assert f"vitcli[{extra}]" in caught.value.hint


def test_jpeg_xl():
    pytest.importorskip("pillow_jxl")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JXL", lossless=True)
    assert (np.asarray(read_image(file.getvalue())) == pixels).all()
