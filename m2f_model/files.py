"""Reading images that come from anywhere, and writing files that are either whole or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

#: Modes that Pillow turns into RGB without losing the image. Its 32-bit ones have no agreed range.
_CONVERTIBLE = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
_SIXTEEN_BIT = {"I;16", "I;16L", "I;16B", "I;16N"}


def read_image(path: str | Path) -> Image.Image:
    """An RGB image, upright: turned as its EXIF data say, grey tripled, transparency dropped, 16 bits made 8.

    Raises:
        ValueError: naming the file, if it is no image, damaged, too large for Pillow to trust, or of 32-bit pixels.
        OSError: if it cannot be read at all.
    """
    Path(path).stat()
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: expected an image; {error}") from error
    return to_rgb(image, str(path))


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """The same for an image in memory; `name` is what errors call it."""
    if image.mode in _SIXTEEN_BIT:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode not in _CONVERTIBLE:
        raise ValueError(f"{name}: expected an image of 8 or 16 bits; got Pillow's mode {image.mode!r}")
    return image.convert("RGB")


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in path's place.

    Whatever happens meanwhile, a full disk or a killed process, `path` holds all of the old content or all of the new.
    """
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
