"""Pixels of every kind of file, against arrays that no image library has touched."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from vitcli.decode import read_image

SMOOTH = np.stack(np.meshgrid(np.arange(0, 256, 4), np.arange(0, 256, 8)), -1)  # (32, 64, 2)
PHOTO = np.stack([SMOOTH[..., 0], SMOOTH[..., 1], 255 - SMOOTH[..., 0]], -1).astype(np.uint8)


def pixels(source, mode="RGB"):
    return np.asarray(read_image(source, mode)).astype(np.float64)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(upright, orientation):
    """How a camera stores `upright` under an EXIF orientation: the table of EXIF 2.3, 4.6.4."""
    stored = upright
    if orientation in {5, 6, 7, 8}:  # rows of the file are columns of the picture
        stored = stored.swapaxes(0, 1)
    flips = {2: (1,), 3: (0, 1), 4: (0,), 6: (0,), 7: (0, 1), 8: (1,)}.get(orientation, ())
    for axis in flips:
        stored = np.flip(stored, axis)
    return np.ascontiguousarray(stored)


def orientation_tag(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_every_orientation_to_the_pixel(kind, orientation):
    # 6: row 0 of the file is the right-hand side of the picture, column 0 its top.
    stored = Image.fromarray(turned(PHOTO, orientation))
    options = {"lossless": True} if kind == "WEBP" else {}
    file = encoded(stored, kind, exif=orientation_tag(orientation), **options)
    assert (pixels(file) == PHOTO).all()


def test_orientation_six_is_the_right_hand_side():
    """By the words of the standard, so that the table above is not its own witness."""
    stored = np.zeros((4, 6, 3), dtype=np.uint8)
    stored[0] = 255  # row 0 is the visual right-hand side
    upright = pixels(encoded(Image.fromarray(stored), "PNG", exif=orientation_tag(6)))
    assert upright.shape == (6, 4, 3)
    assert (upright[:, -1] == 255).all() and upright[:, :-1].max() == 0
    stored[0], stored[:, 0] = 0, 255  # column 0 is the visual top
    upright = pixels(encoded(Image.fromarray(stored), "PNG", exif=orientation_tag(6)))
    assert (upright[0] == 255).all() and upright[1:].max() == 0


def naive_rgb(cmyk):
    """(Y, X, 4) inks 0..255 -> light that is left, without a profile."""
    ink = cmyk / 255
    return 255 * (1 - ink[..., :3]) * (1 - ink[..., 3:])


def inks():
    cmyk = np.concatenate([PHOTO, (PHOTO[..., :1] // 3)], -1)
    return cmyk, naive_rgb(cmyk.astype(np.float64))


def test_cmyk_as_adobe_writes_it_inverted():
    cmyk, wanted = inks()
    file = encoded(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in file  # with this mark the stored bytes are 255 - ink
    assert np.abs(pixels(file) - wanted).max() <= 4


def test_ycck_as_adobe_writes_it_inverted():
    """Luma and chroma of the inks and 255 - K in four planes, marked as Adobe's transform 2."""
    cmyk, wanted = inks()
    c, m, y, k = np.moveaxis(cmyk.astype(np.float64), -1, 0)
    luma = 0.299 * c + 0.587 * m + 0.114 * y
    planes = [luma, 128 + (y - luma) / 1.772, 128 + (c - luma) / 1.402, 255 - k]
    planes = np.rint(np.stack(planes, -1)).clip(0, 255).astype(np.uint8)
    file = bytearray(encoded(Image.fromarray(255 - planes, "CMYK"), "JPEG", quality=100))
    mark = file.index(b"Adobe")
    assert file[mark + 11] == 0
    file[mark + 11] = 2
    assert np.abs(pixels(bytes(file)) - wanted).max() <= 8


def png(samples, colour_type):
    """(Y, X, C) uint16 as a PNG of 16 bits a sample, by the standard."""

    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    rows, columns = samples.shape[:2]
    head = struct.pack(">IIBBBBB", columns, rows, 16, colour_type, 0, 0, 0)
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


WIDE = np.random.default_rng(0).integers(0, 65536, (5, 7, 4), dtype=np.uint16)


def test_sixteen_bit_png_is_scaled():
    scaled = WIDE / 257
    assert np.abs(pixels(png(WIDE[..., :1], 0), "L") - scaled[..., 0]).max() <= 1
    assert np.abs(pixels(png(WIDE[..., :3], 2)) - scaled[..., :3]).max() <= 1
    alpha = scaled[..., 3:] / 255
    white = scaled[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(pixels(png(WIDE, 6)) - white).max() <= 2
    alpha, grey = WIDE[..., 1] / 65535, scaled[..., 0]
    white = grey * alpha + 255 * (1 - alpha)
    assert np.abs(pixels(png(WIDE[..., :2], 4), "L") - white).max() <= 2


def tiff(samples, photometric):
    """(Y, X, C) uint8 or uint16 as an uncompressed TIFF of one strip, by the standard."""
    rows, columns, channels = samples.shape
    bits = samples.dtype.itemsize * 8
    data = samples.astype(samples.dtype.newbyteorder("<")).tobytes()
    tags = [(256, 4, columns), (257, 4, rows), (259, 3, 1), (262, 3, photometric)]
    tags += [(277, 3, channels), (278, 4, rows), (279, 4, len(data))]
    after = 8 + 2 + 12 * (len(tags) + 2) + 4
    many = struct.pack("<" + "H" * channels, *[bits] * channels)
    tags += [(273, 4, after + len(many))]
    entries = [(tag, struct.pack("<HHII", tag, kind, 1, value)) for tag, kind, value in tags]
    one = struct.pack("<HHIHH", 258, 3, 1, bits, 0)
    entries += [(258, one if channels == 1 else struct.pack("<HHII", 258, 3, channels, after))]
    body = b"".join(entry for _, entry in sorted(entries))
    directory = struct.pack("<H", len(entries)) + body + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8) + directory + many + data


def test_sixteen_bit_tiff_is_scaled():
    grey = WIDE[..., :1]
    assert np.abs(pixels(tiff(grey, 1), "L") - grey[..., 0] / 257).max() <= 1
    assert np.abs(pixels(tiff(WIDE[..., :3], 2)) - WIDE[..., :3] / 257).max() <= 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_whose_zero_is_white(dtype):
    grey = (WIDE[..., :1] >> (0 if dtype == np.uint16 else 8)).astype(dtype)
    wanted = 255 - grey[..., 0] / (257 if dtype == np.uint16 else 1)
    assert np.abs(pixels(tiff(grey, 0), "L") - wanted).max() <= 1


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_counts(kind):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ((200, 0, 0), (0, 0, 200))]
    options = {"lossless": True} if kind == "WEBP" else {}
    file = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(file)) as opened:
        assert opened.n_frames == 2
    assert (pixels(file) == [200, 0, 0]).all()


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
@pytest.mark.parametrize("orientation", [1, 6])
def test_avif(orientation):
    stored = Image.fromarray(turned(PHOTO, orientation))
    options = {"quality": 100, "subsampling": "4:4:4", "exif": orientation_tag(orientation)}
    assert np.abs(pixels(encoded(stored, "AVIF", **options)) - PHOTO).max() <= 3


def test_grey_has_three_equal_channels():
    grey = Image.fromarray(PHOTO[..., 0])
    assert (pixels(encoded(grey, "PNG")) == PHOTO[..., :1]).all()
    palette = Image.fromarray(PHOTO).quantize(16)
    wanted = np.array(palette.getpalette()).reshape(-1, 3)[np.asarray(palette)]
    assert (pixels(encoded(palette, "PNG")) == wanted).all()


def profile(space, tags):
    """An ICC profile of version 2.1 for a screen, by the standard (ICC.1:2001-04, section 6)."""
    described = {"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"Test\0" + b"\0" * 78}
    tags = described | tags | {"wtpt": xyz(0.9642, 1.0, 0.8249), "cprt": b"text\0\0\0\0none\0"}
    table, data = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name.encode() + struct.pack(">II", start + len(data), len(content))
        data += content + b"\0" * (-len(content) % 4)
    size = start + len(data)
    head = struct.pack(">I4xI4s4s4s12x4s28x", size, 0x02100000, b"mntr", space, b"XYZ ", b"acsp")
    head += xyz(0.9642, 1.0, 0.8249)[8:]
    return head.ljust(128, b"\0") + table + data


def xyz(*values):
    return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)


def gamma(value):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


def srgb_curve(linear):
    """Light 0..1 -> grey levels: IEC 61966-2-1."""
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_a_wide_gamut_becomes_srgb():
    """The primaries of Display P3 with a gamma of 2.2, to XYZ (D50), to linear sRGB."""
    p3 = np.array(
        [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]
    )
    srgb = [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
    tags = {f"{name}XYZ": xyz(*p3[:, i]) for i, name in enumerate("rgb")}
    tags |= {f"{name}TRC": gamma(2.2) for name in "rgb"}
    linear = (PHOTO / 255) ** 2.2 @ np.transpose(np.linalg.inv(srgb) @ p3)
    wanted = srgb_curve(linear)
    file = encoded(Image.fromarray(PHOTO), "PNG", icc_profile=profile(b"RGB ", tags))
    assert np.abs(pixels(file) - wanted).mean() < 1
    assert np.abs(PHOTO - wanted).mean() > 3  # ignoring the profile would be seen


def test_a_profile_of_greys():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    wanted = srgb_curve((ramp / 255) ** 1.8)
    file = encoded(Image.fromarray(ramp), "PNG", icc_profile=profile(b"GRAY", {"kTRC": gamma(1.8)}))
    assert np.abs(pixels(file) - wanted[..., None]).mean() < 1
    assert np.abs(ramp - wanted).mean() > 5
