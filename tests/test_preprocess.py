"""The evaluation transform against the official pipelines' outputs, and by its properties."""

import io
import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from math import floor

import numpy as np
import pytest
import torch
from PIL import Image

from vitcli import preprocess as module
from vitcli.config.schema import AugmentSection
from vitcli.data.augment.transform import CROPS, TrainTransform
from vitcli.decode import ImageError
from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
GREY_LEVEL = 1 / 127.5
# The pipelines of shared/reference/preprocessing/torch_meta.json: the same settings here, and how
# far apart the results may be. Only what Pillow made can be met exactly.
PIPELINES = {
    "hf_vit_pil_32": (Preprocess((32, 32), "squash", interpolation="bilinear"), 1e-6),
    "hf_vit_32": (Preprocess((32, 32), "squash", interpolation="bilinear"), 1.01 * GREY_LEVEL),
    "hf_deit_32": (Preprocess((32, 32), "squash", 40), 12 * GREY_LEVEL),
    "timm_bicubic_pct09": (Preprocess((32, 32), crop_fraction=0.9), 1e-6),
    "timm_bilinear_squash": (
        Preprocess((32, 32), "squash", interpolation="bilinear", **IMAGENET),
        1e-6,
    ),
}
# Its crop starts one pixel further up on image0: it floors an offset of 9.5.
OTHER_OFFSET = {"hf_dinov2_32"}


@pytest.fixture(scope="module")
def reference(shared):
    folder = shared / "reference/preprocessing"
    arrays = np.load(folder / "torch_preprocessing.npz")
    return json.loads((folder / "torch_meta.json").read_text())["pipelines"], arrays


def test_every_reference_pipeline_is_looked_at(reference):
    described, arrays = reference
    named = {key.split("/")[0] for key in arrays if "/" in key}
    assert named == PIPELINES.keys() | OTHER_OFFSET == described.keys() - {"jpeg_pil"}


@pytest.mark.parametrize("name", PIPELINES)
def test_official_pipelines(reference, name):
    _, arrays = reference
    preprocess, tolerance = PIPELINES[name]
    cases = [key for key in arrays if key.startswith(f"{name}/")]
    assert len(cases) == 3
    for key in cases:
        image = Image.fromarray(arrays[key.split("/")[1]])
        assert np.abs(preprocess(image).numpy() - arrays[key]).max() <= tolerance, key


# The same of google_meta.json, without antialiasing, and the share of values that may be one level
# off: where big_vision cuts off what is nearly whole, and all where vit_jax keeps the fractions.
GOOGLE = {
    "vit_jax_lit_32_crop0": (Preprocess((32, 32), "squash"), 0.005),
    "vit_jax_eval_32": (Preprocess((32, 32), "squash"), 1.0),
    "vit_jax_eval_48": (Preprocess((48, 48), "squash"), 1.0),
    "bv_resize": (Preprocess((32, 32), "squash"), 0.005),
    "bv_fewshot": (Preprocess((32, 32), "squash", 40), 0.005),
    "bv_vgg": (Preprocess((32, 32), "squash", **IMAGENET), 0.005),
}


@pytest.mark.parametrize("name", GOOGLE)
def test_googles_pipelines(shared, name):
    arrays = np.load(shared / "reference/preprocessing/google_preprocessing.npz")
    preprocess, share = GOOGLE[name]
    plain = replace(preprocess, interpolation="bilinear", antialias=False)
    for number in range(3):
        expected = arrays[f"{name}/image{number}"].transpose(2, 0, 1)
        found = plain(Image.fromarray(arrays[f"image{number}"])).numpy()
        apart = np.abs(found - expected) * np.array(plain.std)[:, None, None] * 255
        assert apart.max() < 1.01, number
        assert (apart > 0.01).mean() <= share, number


@pytest.mark.parametrize("height", range(20, 45))
def test_a_picture_smaller_than_the_crop_lies_over_the_middle(height):
    """As torchvision pads in `CenterCrop`: half of the margin, rounded down, before it."""
    picture = Image.fromarray(np.full((height, height), 9, np.uint8))
    fitted = np.asarray(Preprocess((32, 32), resize_size=height, num_channels=1).fit(picture))
    before = max(0, 32 - height) // 2
    assert (fitted[before:, before:][:height, :height] == 9).all()
    assert (fitted == 9).sum() == min(height, 32) ** 2


def test_decoding_is_pillows(reference, shared):
    _, arrays = reference
    sample = shared / "reference/preprocessing/sample.jpg"
    pixels = Preprocess((64, 80)).pixels(sample)
    assert (pixels.numpy().transpose(1, 2, 0) == arrays["jpeg_pil"]).all()


def test_the_resized_side_is_floored_as_timm_does():
    preprocess = Preprocess((224, 224), crop_fraction=0.9)
    assert preprocess._resized_shape(Image.new("RGB", (500, 300)))[0] == floor(224 / 0.9) == 248


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
@pytest.mark.parametrize("fraction", [1.0, 0.875])
@pytest.mark.parametrize("size", [(1, 1), (3000, 8), (5, 2500), (31, 47), (64, 48)])
def test_the_size_is_always_the_models(mode, fraction, size):
    preprocess = Preprocess((24, 32), mode, crop_fraction=fraction)
    assert preprocess.pixels(Image.new("RGB", size)).shape == (3, 24, 32)


def test_a_picture_of_the_models_size_passes_unchanged():
    noise = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    for mode in ("crop", "squash", "pad"):
        preprocess = Preprocess((28, 28), mode, num_channels=1)
        assert (preprocess.pixels(Image.fromarray(noise))[0].numpy() == noise).all()


def test_crop_takes_the_middle():
    columns = np.tile(np.arange(90, dtype=np.uint8), (30, 1))
    pixels = Preprocess((30, 30), num_channels=1).pixels(Image.fromarray(columns))
    assert (pixels[0, 0].numpy() == np.arange(30, 60)).all()


def test_pad_shows_all_on_the_mean_colour():
    white = Image.new("RGB", (40, 20), "white")
    pixels = Preprocess((40, 40), "pad", mean=(0.2, 0.4, 0.6), std=(1.0,)).pixels(white)
    assert (pixels[:, 10:30] == 255).all()
    assert (pixels[:, :10].amax((1, 2)) == torch.tensor([51, 102, 153])).all()
    normal = Preprocess((40, 40), "pad", mean=(0.2, 0.4, 0.6), std=(1.0,))(white)
    assert normal[:, :10].abs().max() < 1e-6


def test_normalize_is_its_formula_and_leaves_its_input():
    preprocess = Preprocess((4, 4), **IMAGENET)
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    before = images.clone()
    result = preprocess.normalize(images)
    mean, std = (np.array(IMAGENET[k]).reshape(3, 1, 1) for k in ("mean", "std"))
    assert np.abs(result.numpy() - (images.numpy() / 255 - mean) / std).max() < 1e-6
    assert result.dtype == torch.float32 and torch.equal(images, before)


def test_grey_models_read_grey():
    preprocess = Preprocess((28, 28), num_channels=1)
    colour = Image.new("RGB", (28, 28), (255, 0, 0))
    result = preprocess(colour)
    assert result.shape == (1, 28, 28)
    assert abs(float(result[0, 0, 0]) - (76 / 255 - 0.5) / 0.5) < 1e-6  # 0.299 * 255


def test_it_travels_as_plain_values():
    preprocess = Preprocess((32, 24), "pad", None, 0.9, "bilinear", **IMAGENET)
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess


@pytest.mark.parametrize(("rounding", "first"), [("even", (0, 2, 2, 4)), ("down", (0, 1, 2, 3))])
def test_a_middle_between_two_pixels_is_rounded_as_asked(rounding, first):
    """Margins of 1, 3, 5 and 7 pixels: halves of 0.5, 1.5, 2.5 and 3.5."""
    found = []
    for margin in (1, 3, 5, 7):
        columns = np.arange(8 + margin, dtype=np.uint8)
        picture = Image.fromarray(np.tile(columns, (8, 1)))
        found.append(Preprocess((8, 8), crop_rounding=rounding, num_channels=1).fit(picture))
    assert tuple(image.getpixel((0, 0)) for image in found) == first


def test_another_size_keeps_the_share_of_the_crop():
    assert Preprocess((224, 224), resize_size=256).resized_to((448, 448)).resize_size == 512
    bigger = Preprocess((224, 224), crop_fraction=0.9).resized_to((384, 384))
    assert bigger.image_size == (384, 384) and bigger.crop_fraction == 0.9


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"resize_mode": "stretch"}, "`stretch`"),
        ({"interpolation": "box"}, "`box`"),
        ({"mean": (0.5, 0.5)}, "2 values, but there are 3 channels"),
        ({"antialias": False, "interpolation": "lanczos"}, "antialias"),
        ({"crop_fraction": 0.0}, "crop_fraction"),
        ({"num_channels": 4}, "num_channels"),
        ({"border": -1}, "border"),
    ],
)
def test_wrong_settings_are_named(settings, words):
    with pytest.raises(VitcliError, match=words) as caught:
        Preprocess((32, 32), **settings)
    assert caught.value.hint


def test_unknown_keys_are_named():
    with pytest.raises(VitcliError, match="unknown key `crop`"):
        Preprocess.from_dict({"image_size": [8, 8], "crop": 3})
    with pytest.raises(VitcliError, match="`image_size` is missing"):
        Preprocess.from_dict({})


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
def test_the_border_of_objectnet_is_cut_off_in_every_mode(mode):
    """Its images have a red border, which a squashed image would show at all four sides."""
    inner = Image.effect_noise((60, 40), 80).convert("RGB")
    framed = Image.new("RGB", (64, 44), (255, 0, 0))
    framed.paste(inner, (2, 2))
    plain = Preprocess((32, 32), mode, interpolation="bilinear")
    cut = replace(plain, border=2)
    assert torch.equal(cut(framed), plain(inner))
    assert not torch.equal(plain(framed), plain(inner)) or mode == "crop"
    assert Preprocess.from_dict(json.loads(json.dumps(cut.to_dict()))) == cut
    assert "border" not in plain.to_dict()
    with pytest.raises(VitcliError, match="border of 2 px"):
        cut(Image.new("RGB", (4, 9)))


@pytest.mark.parametrize("crop", CROPS)
def test_no_training_crop_shows_the_border(crop):
    framed = Image.new("RGB", (44, 36), (255, 0, 0))
    framed.paste(Image.new("RGB", (40, 32), (0, 0, 255)), (2, 2))
    preprocess = Preprocess((16, 16), "squash", interpolation="bilinear", border=2)
    transform = TrainTransform(preprocess, AugmentSection(crop=crop, crop_padding=0))
    for seed in range(40):
        red, _, blue = transform(framed, np.random.default_rng(seed))
        assert red.max() == 0 and blue.min() == 255


GREY = (np.arange(64 * 48).reshape(64, 48) * 7 % 256).astype(np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], axis=2)  # (Y, X, C)


@pytest.mark.parametrize(
    ("source", "same"),
    [
        (GREY, GREY),
        (GREY[:, :, None], GREY),
        (GREY.astype(np.int64), GREY),
        (GREY.astype(np.uint16) * 257, GREY),
        (GREY > 127, np.where(GREY > 127, 255, 0).astype(np.uint8)),
        (torch.from_numpy(GREY), GREY),
        (torch.from_numpy(GREY)[None].float() / 255, GREY),
        (COLOUR, COLOUR),
        (COLOUR / 255.0, COLOUR),
        (COLOUR.astype(np.uint16) * 257, COLOUR),
        (np.concatenate([COLOUR, np.full((64, 48, 1), 255, np.uint8)], axis=2), COLOUR),
        (torch.from_numpy(COLOUR.transpose(2, 0, 1)), COLOUR),
    ],
)
def test_arrays_and_tensors_are_read_like_the_image_of_their_pixels(source, same):
    transform = Preprocess(image_size=(24, 24))
    expected = transform.pixels(Image.fromarray(same))
    assert torch.equal(transform.pixels(source), expected)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.zeros((2, 3, 8, 8), np.uint8), r"its shape is \(2, 3, 8, 8\)"),
        (np.zeros((3, 8, 8), np.uint8), r"its shape is \(3, 8, 8\)"),
        (np.zeros((0, 8), np.uint8), r"its shape is \(0, 8\)"),
        (np.full((8, 8), 300), "its values are 300 to 300, not 0 to 255"),
        (np.full((8, 8), -1.5), "its values are -1.5 to -1.5, not 0 to 1"),
        (np.full((8, 8), np.nan), "its values are nan to nan"),
        (np.full((8, 8), 1j), "its values are complex128"),
        (torch.full((3, 8, 8), 7.0), "its values are 7 to 7, not 0 to 1"),
    ],
)
def test_arrays_that_are_no_image_are_refused(source, words):
    with pytest.raises(ImageError, match=words):
        Preprocess(image_size=(24, 24))(source)


def test_an_image_without_a_finite_pixel_is_refused():
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(file, "TIFF")
    with pytest.raises(ImageError, match="no pixel is a finite number"):
        Preprocess(image_size=(24, 24))(file.getvalue())


def test_an_image_on_the_web(monkeypatch):
    png = io.BytesIO()
    Image.fromarray(COLOUR).save(png, "PNG")

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if "photo" in self.path else 404)
            self.end_headers()
            if "photo" in self.path:
                self.wfile.write(png.getvalue())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base, transform = f"http://127.0.0.1:{server.server_port}", Preprocess(image_size=(24, 24))
    try:
        expected = transform.pixels(Image.fromarray(COLOUR))
        assert torch.equal(transform.pixels(f"{base}/photo.png?size=1"), expected)
        with pytest.raises(ImageError, match=r"no\.png`: cannot fetch it: there is no file at"):
            transform(f"{base}/no.png")
        monkeypatch.setattr(module, "FETCH_BYTES", 8)
        with pytest.raises(ImageError, match="it has more than"):
            transform(f"{base}/photo.png")
    finally:
        server.shutdown()
        server.server_close()
    for url in (f"{base}/photo.png", "http://[::1/x.png", "http://127.0.0.1:99999/x.png"):
        with pytest.raises(ImageError, match="cannot fetch it"):
            transform(url)
