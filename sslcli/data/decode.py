"""An image file as upright 8-bit RGB, or the reason why not: never half an image, never a warning, never a crash."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from sslcli.data.source import U8, UnreadableImage

try:
    import simplejpeg
except ImportError:  # there is no wheel for every machine, and Pillow gives the same pixels
    simplejpeg = None

SUFFIXES = frozenset(
    b".jpg .jpeg .jpe .jfif .mpo .png .gif .webp .bmp .tif .tiff .ppm .pgm .pbm .pnm .jp2 .avif".split()
)
"""File names that promise an image, in lower case."""

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What a file may be, whatever its name (MPO counts as JPEG). Pillow knows more, and starts programs for some."""

ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation; other values mean upright."""

PADDING = 64
ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";", "WEBP": b""}
"""How whole compressed files end; WEBP has no mark, and no reason to end in zeros."""


def read_image(path: bytes, name: str) -> U8:
    """The first frame of an image file as (H, W, 3) RGB, EXIF orientation applied.

    Transparency is dropped, as `convert("RGB")` and torchvision do; 16 bits are scaled to 8; colour profiles are
    ignored. Raises `UnreadableImage`, which calls the file `name`.
    """
    with _explained(path, name), open(path, "rb") as file:
        return decoded(file)


def kind_of(path: bytes, name: str) -> str:
    """Format and mode of an image file, e.g. `JPEG, CMYK`, from its beginning; raises `UnreadableImage`."""
    with _explained(path, name), open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
        return f"{image.format}, {image.mode}"


@contextmanager
def _explained(path: bytes, name: str) -> Iterator[None]:
    """Context without warnings in which whatever Pillow raises becomes `UnreadableImage`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of damaged metadata, which say nothing about the pixels
            yield
            return
    except UnidentifiedImageError:
        reason = "an empty file" if os.path.getsize(path) == 0 else "not an image, or of a kind that is not supported"
    except OSError as error:
        reason = error.strerror or str(error)
    except Image.DecompressionBombError as error:
        reason = str(error).partition(",")[0]
    except Exception as error:  # damaged files make Pillow raise almost anything: SyntaxError, struct.error, KeyError
        reason = str(error) or type(error).__name__
    raise UnreadableImage(name, " ".join(reason.split()))


def decoded(file: IO[bytes]) -> U8:
    """The first frame of an open image file as (H, W, 3) RGB, upright; raises whatever the decoders raise."""
    with Image.open(file, formats=FORMATS) as image:
        _whole(file, image.format or "")
        if image.format == "JPEG" and image.mode in ("RGB", "L") and (pixels := _turbo(file)) is not None:
            turn = UPRIGHT.get(_orientation(image))
            return pixels if turn is None else np.array(Image.fromarray(pixels).transpose(turn))
        image.load()
        turn = UPRIGHT.get(_orientation(image))
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            grey = _eight_bits(np.asarray(image), image.mode)
            upright: Image.Image = Image.fromarray(grey)
        else:
            upright = image
        if upright.mode != "RGB":
            upright = upright.convert("RGB")
        if turn is not None:
            upright = upright.transpose(turn)
        return np.array(upright)  # a copy: Pillow's own memory is read-only


def _turbo(file: IO[bytes]) -> U8 | None:
    """A whole JPEG by simplejpeg: the pixels that Pillow gives, in three quarters of the time.

    None where that is not installed, the file does not end as it should, or any fault is found with it: Pillow then
    says what is wrong.
    """
    if simplejpeg is None:
        return None
    here = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(here)
    if not data[-PADDING:].rstrip(b"\0").endswith(ENDS["JPEG"]):
        return None
    try:
        return np.asarray(simplejpeg.decode_jpeg(data, "RGB"), dtype=np.uint8)
    except ValueError:
        return None


def _whole(file: IO[bytes], kind: str) -> None:
    """Raise OSError if a compressed file ends in zeros, as interrupted copies do; decoders would make grey of them."""
    if kind not in ENDS:
        return
    here = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - PADDING))
    if not file.read().strip(b"\0"):
        file.seek(0)
        if not ENDS[kind] or not file.read().rstrip(b"\0").endswith(ENDS[kind]):
            raise OSError("the file ends in zeros: an incomplete copy")
    file.seek(here)


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # whatever is wrong with the metadata, the picture is there
        return None


def _eight_bits(values: npt.NDArray[Any], mode: str) -> U8:
    """Grey values (H, W) of 16 or 32 bits, or real ones in [0, 1], as 8 bits."""
    low, high = values.min(), values.max()
    if mode == "F":
        if not (low >= 0 and high <= 1):
            raise ValueError("real pixel values outside 0..1; convert it to 8 or 16 bits")
        return np.asarray(np.rint(values * 255), dtype=np.uint8)
    if low < 0 or high > 65535:
        raise ValueError("pixel values of more than 16 bits; convert it to 8 or 16 bits")
    return np.asarray(np.rint(values / 257), dtype=np.uint8)
