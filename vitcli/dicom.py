"""Read the first frame of a DICOM file; `pip install 'vitcli[medical]'` installs pydicom.

Grey samples become those of the modality, such as Hounsfield units (PS3.3, C.11.1). The window of
the file (C.11.2.1.2) is kept beside them, for a reader without a window of the dataset.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitcli.errors import VitcliError
from vitcli.pixels import FILE_WINDOW, INVERTED, Window

MARK, MARK_AT = b"DICM", 128
SUFFIXES = (".dic", ".dicom", ".ima")  # of scanners; `.dcm` is an image suffix everywhere


def is_dicom(head: bytes) -> bool:
    """True if the first bytes of a file have DICOM's mark (PS3.10, 7.1)."""
    return head[MARK_AT : MARK_AT + len(MARK)] == MARK


def is_dicom_file(path: str | os.PathLike[str]) -> bool:
    """True for a DICOM file without an image suffix, such as `IM000001` or `1.2.840.113619.1`.

    Only such names are opened, and `DICOMDIR` is a list of files.
    """
    name = os.path.basename(path)  # noqa: PTH119  # a folder can hold millions of names
    suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122
    if suffix[1:].isdecimal() or suffix in ("", *SUFFIXES):
        with suppress(OSError, ValueError), open(path, "rb") as file:
            return name.upper() != "DICOMDIR" and is_dicom(file.read(MARK_AT + len(MARK)))
    return False


def can_read_dicom() -> bool:
    """True if pydicom is installed."""
    return find_spec("pydicom") is not None


def read_dicom(file: BinaryIO, check_size: Callable[[int, int], None]) -> Image.Image:
    """Return the first frame: grey in mode L (8 bits), I or F, or RGB.

    Args:
        file: positioned at the start.
        check_size: raises an error for a (width, height) that is too large, before the decoding.

    Raises:
        VitcliError: pydicom or a decoder is missing, or the file has no pixels.
    """
    try:
        import pydicom
        from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array
    except ImportError:
        raise VitcliError(
            "it is a DICOM file, and pydicom is not installed", "`pip install 'vitcli[medical]'`"
        ) from None
    data = pydicom.dcmread(file)
    if "Rows" not in data or "Columns" not in data:
        raise VitcliError("the DICOM file has no pixels", "remove reports and plans from the data")
    check_size(int(data.Columns), int(data.Rows))
    try:
        stored: NDArray[Any] = pixel_array(data, index=0)  # YBR becomes RGB
    except (RuntimeError, NotImplementedError):
        name = data.file_meta.TransferSyntaxUID.name
        raise VitcliError(
            f"no installed package decompresses its `{name}`", "`pip install python-gdcm`"
        ) from None
    kind = data.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        colours = apply_color_lut(stored, data)
        return Image.fromarray(_to_bytes(colours, 8 * colours.dtype.itemsize))
    if stored.ndim == 3:
        return Image.fromarray(_to_bytes(stored, int(data.BitsStored)))
    return _grey(data, stored, apply_modality_lut, inverted=kind == "MONOCHROME1")


def _grey(data: Any, stored: NDArray[Any], to_modality: Any, inverted: bool) -> Image.Image:
    if stored.dtype == np.uint8 and not {"RescaleSlope", "ModalityLUTSequence"} & set(data.dir()):
        return Image.fromarray(255 - stored if inverted else stored)
    samples = to_modality(stored, data)
    whole = samples.dtype.kind in "iu" or bool((samples == np.rint(samples)).all())
    image = Image.fromarray(samples.astype(np.int32 if whole else np.float32))
    image.info = {FILE_WINDOW: _window(data, to_modality), INVERTED: inverted}
    return image


def _to_bytes(colours: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """(Y, X, 3) of `bits` bits -> uint8."""
    return (colours >> max(0, bits - 8)).astype(np.uint8)


def _window(data: Any, to_modality: Any) -> Window | None:
    """The first window of the file, else all values that its bits can store; None for floats."""
    if "WindowCenter" in data and "WindowWidth" in data:
        centre, width = (_first(data[key].value) for key in ("WindowCenter", "WindowWidth"))
        # C.11.2.1.2.1: the linear function reaches its ends half a sample further in.
        exact = data.get("VOILUTFunction", "LINEAR") != "LINEAR"
        if width > (0 if exact else 1):
            centre, half = (centre, width / 2) if exact else (centre - 0.5, (width - 1) / 2)
            return centre - half, centre + half
    if "PixelData" not in data:
        return None
    bits, signed = int(data.BitsStored), int(data.PixelRepresentation)
    first = -(2 ** (bits - 1)) if signed else 0
    ends = to_modality(np.array([first, first + 2**bits - 1]), data)
    return float(ends.min()), float(ends.max())


def _first(value: Any) -> float:
    return float(value if isinstance(value, int | float | str) else value[0])
