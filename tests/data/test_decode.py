"""Reading: every file of the messy collection, and pixels against formulas."""

import io
import os
import re
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
from PIL import Image

from vitcli.decode import ImageError, open_image, read_image
from vitcli.errors import printable

NUM_MESSY = 131
DIFFERENT_PHOTO = 20.0  # mean difference in grey levels that only another picture would have


def pixels(source, mode="RGB"):
    return np.asarray(read_image(source, mode)).astype(np.float64)


def manifest(shared):
    """(path as it is on disk, kind, expected, what Pillow alone gives) for each messy file."""
    lines = (shared / "data/messy_manifest.tsv").read_text(encoding="utf-8").splitlines()[1:]
    for line in lines:
        path, kind, expected, _, _, pillow = line.split("\t")
        raw = path.encode().replace(rb"\n", b"\n").replace(rb"\t", b"\t").replace(rb"\xe9", b"\xe9")
        yield os.fsdecode(raw), kind, expected, pillow


@pytest.fixture(scope="module")
def messy(shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("messy")
    with tarfile.open(shared / "data/messy.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "messy"


def test_every_messy_file_is_as_the_manifest_says(shared, messy):
    rows = list(manifest(shared))
    assert len(rows) == NUM_MESSY
    for path, kind, expected, pillow in rows:
        if path.startswith("huge/") and "MP.jpg" in path:
            continue  # test_huge_photographs
        file = messy / path
        if "FAIL" in pillow:
            with pytest.raises(ImageError) as caught:
                read_image(file)
            assert printable(file) in caught.value.message
            assert caught.value.reason
        else:
            assert "ok" in expected or kind == "hidden file (leading dot)", path
            image = read_image(file)
            upright = re.search(r"upright (\d+)x(\d+)", pillow)
            assert upright and image.size == (int(upright[1]), int(upright[2])), path
            assert image.mode == "RGB"
            assert not image.info


REASONS = {
    "ants/truncated_60pct.jpg": "cut off",
    "ants/truncated_header.jpg": "cut off",
    "ants/truncated.png": "cut off",
    "ants/badcrc.png": "damaged",
    "bees/zero.jpg": "empty",
    "bees/text.jpg": "text, not an image",
    "bees/html_404.jpg": "HTML page",
    "bees/lfs_pointer.jpg": "Git LFS pointer",
    "bees/doc.jpg": "PDF",
    "bees/svg.png": "SVG",
    "bees/gif_header.gif": "GIF",
    "bees/directory.jpg": "folder",
    "bees/dangling.jpg": "link to `nowhere.jpg`, which does not exist",
}


@pytest.mark.parametrize("path", REASONS)
def test_the_reason_is_named(messy, path):
    with pytest.raises(ImageError, match=re.escape(REASONS[path])):
        read_image(messy / "broken" / path)


def test_what_pillow_cannot_read_is_named_with_a_way_out(tmp_path):
    tiff = b"II*\0\x10\0\0\0" + b"\1\2\3\4" * 100
    files = {
        "notes.txt": (b"hi", "it is text, not an image", "image file"),
        "a.CR2": (b"II*\0\x10\0\0\0CR\2\0" + bytes(99), "camera raw", "JPEG or PNG"),
        "a.nef": (tiff, "camera raw", "JPEG or PNG"),
        "a.raf": (b"FUJIFILMCCD-RAW 0201" + bytes(99), "camera raw", "JPEG or PNG"),
        "a.rw2": (b"IIU\0\x18\0\0\0" + bytes(99), "camera raw", "JPEG or PNG"),
        "a.orf": (b"IIRO\x08\0\0\0" + bytes(99), "camera raw", "JPEG or PNG"),
        "a.cr3": (b"\0\0\0\x18ftypcrx " + bytes(99), "camera raw", "JPEG or PNG"),
        "a.heic": (b"\0\0\0\x18ftypheic" + bytes(99), "HEIC", "JPEG or PNG"),
        "a.bin": (bytes(range(1, 99)), "does not know", "JPEG or PNG"),
    }
    for name, (content, reason, hint) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError) as caught:
            read_image(tmp_path / name)
        assert reason in caught.value.reason, name
        assert hint in (caught.value.hint or ""), name
    (tmp_path / "a.tif").write_bytes(tiff)
    with pytest.raises(ImageError, match="is damaged"):
        read_image(tmp_path / "a.tif")


def test_all_orientations_show_the_same_picture(messy):
    first = pixels(messy / "odd/ants/exif_orientation_1.jpg")
    others = [messy / f"odd/ants/exif_orientation_{i}.jpg" for i in range(2, 9)]
    for path in [*others, messy / "odd/ants/exif_orientation_6.png"]:
        assert np.abs(pixels(path) - first).mean() < 2.5, path.name
    flipped = np.abs(first[:, ::-1] - first).mean(), np.abs(first[::-1] - first).mean()
    assert min(flipped) > DIFFERENT_PHOTO  # the comparison can tell


def test_samples_wider_than_a_byte_are_scaled(messy):
    bees = messy / "odd/bees"
    assert pixels(bees / "gray16.png", "L").mean() == pytest.approx(122.2, abs=0.3)
    photo = pixels(bees / "lzw.tif", "L")  # float32.tif is this picture's grey / 255
    assert np.abs(pixels(bees / "float32.tif", "L") - photo).max() <= 1


def test_cmyk_is_not_inverted(messy):
    grey, cmyk = (pixels(messy / "odd/bees" / name, "L") for name in ("gray_L.jpg", "cmyk.jpg"))
    assert np.abs(grey - cmyk).mean() < 2


def test_alpha_lies_on_white_in_the_messy_files(messy):
    for name in ("rgba.png", "gray_alpha_LA.png", "lossless_alpha.webp"):
        path = messy / "odd/bees" / name
        with Image.open(path) as image:
            stored = np.asarray(image.convert("RGBA")).astype(np.float64)
        alpha = stored[..., 3:] / 255
        wanted = stored[..., :3] * alpha + 255 * (1 - alpha)
        assert np.abs(pixels(path) - wanted).max() <= 1, name


def test_adobe_rgb_becomes_srgb(messy):
    """Against the definitions of both colour spaces (AdobeRGB1998, IEC 61966-2-1)."""
    path = messy / "broken/bees/plain_3.jpg"
    with Image.open(path) as image:
        stored = np.asarray(image).astype(np.float64) / 255
    adobe_to_xyz = [
        [0.5766690, 0.1855582, 0.1882286],
        [0.2973450, 0.6273636, 0.0752915],
        [0.0270314, 0.0706889, 0.9913375],
    ]
    xyz_to_srgb = [
        [3.2404542, -1.5371385, -0.4985314],
        [-0.9692660, 1.8760108, 0.0415560],
        [0.0556434, -0.2040259, 1.0572252],
    ]
    linear = stored ** (563 / 256) @ np.transpose(adobe_to_xyz) @ np.transpose(xyz_to_srgb)
    linear = linear.clip(0, 1)
    wanted = 255 * np.where(
        linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055
    )
    result = pixels(path)
    assert np.abs(result - wanted).mean() < 0.6
    assert np.abs(stored * 255 - wanted).mean() > 3  # ignoring the profile would be seen


def test_a_profile_that_does_not_fit_is_ignored():
    colours = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    for profile in (b"garbage", b"\0" * 200):
        file = io.BytesIO()
        colours.save(file, "PNG", icc_profile=profile)
        assert (pixels(file.getvalue()) == np.asarray(colours)).all()


def test_huge_bomb_is_refused_before_memory_is_taken(messy):
    bomb = messy / "huge/bees/bomb_30000x30000_1bit.png"
    with pytest.raises(ImageError, match="30000 x 30000 pixels, more than the limit"):
        read_image(bomb)
    code = (
        "import resource, sys; from vitcli.decode import ImageError, read_image\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: read_image(sys.argv[1])\n"
        "except ImageError: pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(bomb)], capture_output=True, text=True, check=True
    )
    assert int(ran.stdout) < 60_000  # KiB; all plugins are loaded in between


@pytest.mark.slow
def test_huge_photographs(messy):
    assert read_image(messy / "huge/ants/photo_12000x9000_108MP.jpg").size == (12000, 9000)
    assert read_image(messy / "huge/bees/photo_14000x14000_196MP.jpg").size == (14000, 14000)


def test_a_limit_of_pixels_can_be_given():
    with pytest.raises(ImageError, match="3 x 2 pixels"):
        read_image(Image.new("RGB", (3, 2)), max_pixels=5)
    assert read_image(Image.new("RGB", (3, 2)), max_pixels=6).size == (3, 2)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
KEY = 100


def keyed(values, white):
    """What a picture with one transparent level looks like on white."""
    return np.where(values == white, 255, values)


def transparent_pictures():
    """(name, file, the grey that it shows)."""
    grey, alpha = Image.fromarray(RAMP), Image.fromarray(RAMP.T.copy())
    share = RAMP.T / 255
    over = RAMP * share + 255 * (1 - share)
    yield "RGBA", encoded(Image.merge("RGBA", [grey, grey, grey, alpha])), over
    yield "LA", encoded(Image.merge("LA", [grey, alpha])), over
    yield "L key", encoded(grey, transparency=KEY), keyed(RAMP, KEY)
    rgb = Image.merge("RGB", [grey] * 3)
    yield "RGB key", encoded(rgb, transparency=(KEY,) * 3), keyed(RAMP, KEY)
    palette = grey.convert("P")
    palette.putpalette([level for level in range(256) for _ in range(3)])
    palette.frombytes(RAMP.tobytes())
    yield "P key", encoded(palette, transparency=KEY), keyed(RAMP, KEY)
    shares = bytes(255 - level for level in range(256))
    share = (255.0 - RAMP) / 255
    over = RAMP * share + 255 * (1 - share)
    yield "P table", encoded(palette, transparency=shares), over
    yield "GIF", encoded(palette, "GIF", transparency=KEY), keyed(RAMP, KEY)
    bits = Image.fromarray(RAMP > KEY)
    yield "1 key", encoded(bits, transparency=0), np.full((8, 8), 255)
    wide = Image.fromarray(RAMP.astype(np.uint16) * 257)
    yield "I;16", encoded(wide), RAMP


@pytest.mark.parametrize("name,file,shown", list(transparent_pictures()))
def test_alpha_in_any_mode_lies_on_white(name, file, shown):
    assert np.abs(pixels(file, "L") - shown).max() <= 1
    assert np.abs(pixels(file) - shown[..., None]).max() <= 1


def test_modes_that_only_live_in_memory():
    grey, alpha = Image.fromarray(RAMP), Image.fromarray(RAMP.T.copy())
    share = RAMP.T / 255
    over = RAMP * share + 255 * (1 - share)
    palette = Image.new("PA", (8, 8))
    palette.putpalette([level for level in range(256) for _ in range(3)])
    palette.im.putband(grey.im, 0)
    palette.im.putband(alpha.im, 1)
    assert np.abs(pixels(palette, "L") - over).max() <= 1
    premultiplied = Image.merge("RGBA", [grey, grey, grey, alpha]).convert("RGBa")
    # Premultiplying rounds, and dividing by a small alpha again makes that visible.
    opaque_enough = RAMP.T > 60
    assert np.abs(pixels(premultiplied, "L") - over)[opaque_enough].max() <= 3


@pytest.mark.parametrize(
    "samples",
    [
        RAMP.astype(np.uint16) * 257,
        RAMP.astype(np.int32) * 257,
        RAMP.astype(np.float32) / 255,
        RAMP.astype(np.float32),
        RAMP.astype(np.float32) * 257,
    ],
    ids=["uint16", "int32", "unit float", "byte float", "wide float"],
)
def test_tiff_samples_of_any_width(samples):
    result = pixels(encoded(Image.fromarray(samples), "TIFF"), "L")
    assert np.abs(result - RAMP).max() <= 1


def test_not_a_number_is_black():
    samples = np.full((2, 2), 0.5, dtype=np.float32)
    samples[0, 0] = np.nan
    result = pixels(encoded(Image.fromarray(samples), "TIFF"), "L")
    assert result[0, 0] == 0 and abs(result[1, 1] - 127.5) <= 1


def test_lab_is_converted():
    lab = Image.new("LAB", (2, 2), (255, 128, 128))
    assert pixels(lab).min() > 250


def test_every_kind_of_source_gives_the_same(tmp_path):
    data = encoded(Image.fromarray(np.stack([RAMP] * 3, -1)), "JPEG", quality=90)
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    first = pixels(path)
    with path.open("rb") as file, Image.open(path) as image:
        for source in (str(path), data, io.BytesIO(data), file, image):
            assert (pixels(source) == first).all()


def test_reading_twice_changes_nothing_more(messy):
    for name in ("odd/ants/exif_orientation_6.jpg", "broken/bees/plain_3.jpg"):
        once = read_image(messy / name)
        assert (np.asarray(read_image(once)) == np.asarray(once)).all()


def test_the_users_picture_is_left_alone():
    image = Image.new("RGB", (4, 2), (1, 2, 3))
    image.info["exif"] = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    result = read_image(image)
    assert result.size == (2, 4)
    assert image.size == (4, 2) and "exif" in image.info
    plain = Image.new("RGB", (4, 2))
    read_image(plain).putpixel((0, 0), (9, 9, 9))
    assert plain.getpixel((0, 0)) == (0, 0, 0)


def test_what_is_no_file(tmp_path):
    with pytest.raises(ImageError, match="the file does not exist") as caught:
        read_image(tmp_path / "missing.jpg")
    assert caught.value.hint
    pipe = tmp_path / "pipe.jpg"
    os.mkfifo(pipe)
    with pytest.raises(ImageError, match="not a regular file"):
        read_image(pipe)
    with pytest.raises(ImageError, match="null byte"):
        read_image("a\0b.jpg")


def test_postscript_is_not_run():
    with pytest.raises(ImageError, match="PostScript"):
        read_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")


def test_no_warning_escapes_from_threads(messy):
    """pytest makes a warning an error, in a thread as well; several read at once."""
    names = ("palette_transparent.png", "mpo.jpg", "icc_lab_profile.jpg", "gray16.png")
    paths = [messy / "odd/bees" / name for name in names]
    paths += [messy / "odd/ants/exif_garbage.jpg", messy / "odd/ants/exif_orientation_99.jpg"]
    failures = []

    def read_all():
        for path in paths:
            try:
                read_image(path)
            except Exception as error:
                failures.append((path, error))

    threads = [threading.Thread(target=read_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_pillows_own_limit_is_left_as_it_is():
    assert Image.MAX_IMAGE_PIXELS == 1024 * 1024 * 1024 // 4 // 3


def test_damaged_at_random_is_read_or_refused(messy):
    rng = np.random.default_rng(0)
    names = ("palette.png", "lossy.webp", "lzw.tif", "still.gif", "progressive.jpg", "photo.jp2")
    for name in (*names, "interlaced_like.bmp", "rgb16.png", "float32.tif"):
        whole = np.frombuffer((messy / "odd/bees" / name).read_bytes(), dtype=np.uint8)
        for _ in range(6):
            bad = whole[: rng.integers(1, len(whole))].copy()
            where = rng.integers(0, len(bad), size=8)
            bad[where] = rng.integers(0, 256, size=8, dtype=np.uint8)
            try:
                assert read_image(bad.tobytes(), max_pixels=4_000_000).mode == "RGB"
            except ImageError as error:
                assert error.reason


PART = (120, 60, 420, 290)


@pytest.mark.parametrize(
    "name",
    [
        *(f"odd/ants/exif_orientation_{i}.jpg" for i in range(1, 9)),
        "odd/ants/exif_orientation_6.png",
        "broken/bees/plain_3.jpg",
        *(f"odd/bees/{n}" for n in ("cmyk.jpg", "gray_L.jpg", "progressive.jpg", "rgba.png")),
        *(f"odd/bees/{n}" for n in ("gray16.png", "float32.tif", "palette_transparent.png")),
        *(f"odd/bees/{n}" for n in ("lzw.tif", "still.gif", "lossless_alpha.webp", "mpo.jpg")),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_part_is_a_part_of_the_whole(messy, name, mode):
    whole = read_image(messy / name, mode)
    with open_image(messy / name, mode) as picture:
        assert picture.size == whole.size
        box = (*PART[:2], min(PART[2], whole.width), min(PART[3], whole.height))
        part = picture.part(box)
        assert (np.asarray(part) == np.asarray(whole.crop(box))).all()
        assert part.mode == mode and not part.info
        assert (np.asarray(picture.whole()) == np.asarray(whole)).all()


@pytest.fixture(scope="module")
def large(messy):
    """A photograph of 2880 x 1795, its file, and the same as a camera held sideways stores it."""
    file = (messy / "odd/pizza slice ü/unsplash_2880x1795.jpg").read_bytes()
    turned = Image.Exif()
    turned[0x0112] = 6
    photo = read_image(file)
    sideways = photo.transpose(Image.Transpose.ROTATE_90)
    return photo, file, encoded(sideways, "JPEG", quality=95, exif=turned)


BOXES = [
    (0, 0, 2880, 1795),
    (101, 203, 1901, 1603),
    (1000, 700, 2000, 1300),
    (2203, 1209, 2503, 1509),
]


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("stored", [1, 2], ids=["upright", "sideways"])
def test_a_jpeg_is_decoded_no_larger_than_needed(large, box, stored):
    """The same part, at the smallest of 1, 1/2, 1/4, 1/8 that still has the size asked for."""
    photo, file = large[0], large[stored]
    width, height = box[2] - box[0], box[3] - box[1]
    with open_image(file) as picture:
        assert picture.size == photo.size
        for target in (224, 96, 500):
            part = picture.part(box, at_least=(target, target))
            scale = max(s for s in (1, 2, 4, 8) if s == 1 or min(width, height) >= s * target)
            assert abs(part.width - width / scale) <= 0.5
            assert abs(part.height - height / scale) <= 0.5
            if min(width, height) >= target:
                assert min(part.size) >= target
            small = (16, 16)  # moved by half a pixel, so compared where that is little
            got = np.asarray(part.resize(small, Image.Resampling.BOX)).astype(float)
            wanted = np.asarray(photo.crop(box).resize(small, Image.Resampling.BOX)).astype(float)
            assert np.abs(got - wanted).mean() < 3
            assert np.abs(got[:, 1:] - wanted[:, :-1]).mean() > 4  # the comparison can tell


def test_the_largest_scale_of_a_tiny_picture():
    for size in ((1, 1), (7, 3), (8, 9), (15, 31), (17, 64)):
        file = encoded(Image.new("RGB", size, (40, 90, 160)), "JPEG")
        with open_image(file) as picture:
            part = picture.part((0, 0, *size), at_least=(1, 1))
            scale = max(s for s in (1, 2, 4, 8) if s <= min(size))
            wanted = tuple(max(1, round(side / scale)) for side in size)
            assert part.size == wanted
            assert np.abs(np.asarray(part).astype(int) - (40, 90, 160)).max() <= 3


def test_a_damaged_jpeg_is_refused_at_every_scale(messy):
    for name in ("truncated_60pct.jpg", "truncated_last_bytes.jpg"):
        for target in (500, 100, 50):
            with (
                open_image(messy / "broken/ants" / name) as picture,
                pytest.raises(ImageError, match=name),
            ):
                picture.part((0, 0, *picture.size), at_least=(target, target))


def test_memory_follows_the_target(large):
    """A twelfth of the pixels is never decoded: measured in a process of its own."""
    code = (
        "import resource, sys; from vitcli.decode import open_image\n"
        "data = sys.stdin.buffer.read()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "with open_image(data) as p: p.part((0, 0, *p.size), at_least=(224, 224))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], input=large[1], capture_output=True, check=True
    )
    assert int(ran.stdout) < 12_000  # KiB; the whole is 20,000 as Pillow keeps it
