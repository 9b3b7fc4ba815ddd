"""Pictures damaged at random: each is read or refused, soon, and within a bound of memory."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, features

KINDS = {
    "JPEG": {"quality": 85},
    "progressive JPEG": {"quality": 85, "progressive": True},
    "CMYK JPEG": {"quality": 85},
    "PNG": {},
    "palette PNG": {},
    "16-bit PNG": {},
    "animated PNG": {"save_all": True},
    "GIF": {},
    "animated GIF": {"save_all": True},
    "WEBP": {"quality": 80},
    "lossless WEBP": {"lossless": True},
    "TIFF": {},
    "LZW TIFF": {"compression": "tiff_lzw"},
    "JPEG TIFF": {"compression": "jpeg"},
    "BMP": {},
    "PPM": {},
    "TGA": {"compression": "tga_rle"},
    "ICO": {},
    "JPEG2000": {},
}
if features.check("avif"):
    KINDS["AVIF"] = {"quality": 70, "speed": 10}
SECONDS = 5.0  # for one file; whole ones take milliseconds
MEBIBYTES = 700  # beside what the interpreter, Pillow and numpy reserve

# Reads files from stdin, each behind its length, and says of each what came of it and how long it
# took. A limit of the address space turns a wild allocation into a MemoryError, and an alarm ends a
# reader that hangs; both would be seen here, as would a crash.
READER = f"""
import json, resource, signal, struct, sys, time, warnings
from PIL import Image
from vitcli.decode import ImageError, open_image, read_image
warnings.simplefilter("error")
Image.init()
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
limit = used + {MEBIBYTES} * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
while head := sys.stdin.buffer.read(4):
    data = sys.stdin.buffer.read(struct.unpack("<I", head)[0])
    signal.alarm({int(2 * SECONDS)})
    start = time.perf_counter()
    try:
        size = read_image(data, max_pixels=16_000_000).size
        with open_image(data, max_pixels=16_000_000) as picture:
            part = picture.part((0, 0, *picture.size), at_least=(16, 16))
        outcome = "read" if size == picture.size and part.mode == "RGB" else "wrong size"
    except ImageError as error:
        outcome = "refused" if error.reason and error.name else "no reason"
    except Exception as error:
        outcome = f"{{type(error).__name__}}: {{error}}"
    print(json.dumps([outcome, time.perf_counter() - start]), flush=True)
"""


def whole_files():
    """One file of each kind: a smooth picture with some noise, 96 x 72."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    photo = np.asarray(small.resize((96, 72), Image.Resampling.BICUBIC)).astype(int)
    photo = Image.fromarray(
        (photo + rng.integers(-9, 9, photo.shape)).clip(0, 255).astype(np.uint8)
    )
    for name, options in KINDS.items():
        image, options = photo, dict(options)
        if name == "CMYK JPEG":
            image = photo.convert("CMYK")
        elif name == "palette PNG":
            image = photo.quantize(64)
            options["transparency"] = 3
        elif name == "16-bit PNG":
            image = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
        if options.get("save_all"):
            options["append_images"] = [photo.rotate(90 * i) for i in (1, 2)]
        if name.endswith("JPEG"):
            exif = Image.Exif()
            exif[0x0112], exif[0x010E] = 6, "a picture"
            options["exif"] = exif
        file = io.BytesIO()
        image.save(file, name.split()[-1], **options)
        yield name, np.frombuffer(file.getvalue(), dtype=np.uint8)


def flip_bytes(data, other, rng):
    """A few bytes anywhere."""
    data[rng.integers(0, len(data), rng.integers(1, 20))] = rng.integers(0, 256)
    return data


def flip_head(data, other, rng):
    """Bytes where sizes and types stand."""
    where = rng.integers(0, min(len(data), 200), rng.integers(1, 6))
    data[where] = rng.choice([0, 1, 127, 128, 255, rng.integers(0, 256)], len(where))
    return data


def flip_bits(data, other, rng):
    """One bit in some bytes."""
    where = rng.integers(0, len(data), rng.integers(1, 30))
    data[where] ^= np.uint8(1) << rng.integers(0, 8, len(where)).astype(np.uint8)
    return data


def cut(data, other, rng):
    """The end is missing."""
    return data[: rng.integers(1, len(data))]


def hole(data, other, rng):
    """Something in the middle is missing."""
    a, b = sorted(rng.integers(0, len(data), 2))
    return np.concatenate([data[:a], data[b:]])


def swap_head(data, other, rng):
    """The beginning of a file of another kind."""
    length = rng.integers(2, 64)
    return np.concatenate([other[:length], data[length:]])


def repeat(data, other, rng):
    """A stretch comes again, up to a hundred times."""
    a, b = sorted(rng.integers(0, len(data), 2))
    b = min(b, a + 2000)
    return np.concatenate([data[:b], *[data[a:b]] * int(rng.integers(1, 100)), data[b:]])


def append(data, other, rng):
    """Another file behind it."""
    return np.concatenate([data, other])


def zeros(data, other, rng):
    """A stretch of zeros, as a download leaves them."""
    a, b = sorted(rng.integers(0, len(data), 2))
    data[a:b] = 0
    return data


DAMAGES = [flip_bytes, flip_head, flip_bits, cut, hole, swap_head, repeat, append, zeros]


def damaged(count, seed):
    """(what was done, file) of `count` files: every kind with every damage in turn."""
    files = list(whole_files())
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        name, data = files[number % len(files)]
        damage = DAMAGES[number // len(files) % len(DAMAGES)]
        other = files[rng.integers(len(files))][1]
        yield f"{name}, {damage.__name__}", damage(data.copy(), other, rng).tobytes()


def outcomes(files):
    """What the reader says of each."""
    stream = b"".join(len(data).to_bytes(4, "little") + data for data in files)
    done = subprocess.run([sys.executable, "-c", READER], input=stream, capture_output=True)
    lines = done.stdout.decode().splitlines()
    assert done.returncode == 0, (done.returncode, f"file {len(lines)}", done.stderr[-2000:])
    assert len(lines) == len(files)
    return [json.loads(line) for line in lines]


def check(count, seed):
    made = list(damaged(count, seed))
    found = outcomes([data for _, data in made])
    wrong = [
        (name, number, outcome, seconds)
        for number, ((name, _), (outcome, seconds)) in enumerate(zip(made, found, strict=True))
        if outcome not in ("read", "refused") or seconds > SECONDS
    ]
    assert not wrong
    counted = [outcome for outcome, _ in found]
    assert min(counted.count("read"), counted.count("refused")) > count / 10


@pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux knows them")
def test_whole_files_are_read():
    files = [data.tobytes() for _, data in whole_files()]
    assert {outcome for outcome, _ in outcomes(files)} == {"read"}


@pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux knows them")
def test_damaged_files_are_read_or_refused():
    check(180, seed=0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux knows them")
def test_two_thousand_damaged_files_are_read_or_refused():
    check(2000, seed=1)
