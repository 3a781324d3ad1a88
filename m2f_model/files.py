"""Reading images that come from anywhere, and writing files that are either whole or not there."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: Modes that Pillow turns into RGB without losing the image. Its 32-bit ones have no agreed range.
_CONVERTIBLE = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
_SIXTEEN_BIT = {"I;16", "I;16L", "I;16B", "I;16N"}


def read_image(path: str | Path) -> Image.Image:
    """An RGB image, upright: turned as its EXIF data say, grey tripled, transparency dropped, 16 bits made 8.

    Raises:
        ValueError: naming the file, if it is no image, damaged, too large for Pillow to trust, or of 32-bit pixels.
        OSError: if it cannot be read at all.
    """
    with open_image(path) as file:
        image = ImageOps.exif_transpose(file)
        image.load()
    return to_rgb(image, str(path))


@contextlib.contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """An image file whose pixels are not read yet; what goes wrong within is said with the file's name.

    Raises:
        ValueError, OSError: see :func:`read_image`.
    """
    Path(path).stat()
    try:
        with Image.open(path) as file:
            yield file
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise ValueError(f"{path}: expected an image; {error}") from error


def image_size(path: str | Path) -> tuple[int, int]:
    """Height and width of the upright image, from the head of its file alone."""
    with open_image(path) as file:
        turned = file.getexif().get(0x0112, 1) >= 5
        return (file.width, file.height) if turned else (file.height, file.width)


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
    What a killed process left beside it is removed by the next write. The file has the mode that the umask gives.
    """
    path = Path(path)
    remove_leftovers(path)
    file, temporary = _open_beside(path)
    try:
        with file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def give_mode_of_umask(path: str | Path) -> None:
    """Let `path` have the mode of any new file: safetensors writes files that nobody else can read."""
    path = Path(path)
    probe = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    probe.touch()
    path.chmod(probe.stat().st_mode & 0o777)
    probe.unlink()


def remove_leftovers(path: str | Path) -> None:
    """Remove what processes that were killed while they wrote `path` have left; those that still write keep theirs."""
    path = Path(path)
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}")
    for name in os.listdir(path.parent):
        if pattern.fullmatch(name):
            with contextlib.suppress(OSError):  # somebody else was faster, or may remove it where we may not
                _remove_unused(path.parent / name)


def _open_beside(path: Path) -> tuple[IO[bytes], Path]:
    """A new file, locked as long as it is open: who finds it unlocked knows that its writer is dead."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        file = temporary.open("xb")
        _lock(file)
        if os.fstat(file.fileno()).st_nlink:
            return file, temporary
        file.close()  # taken for a leftover in the moment before it was locked


def _remove_unused(temporary: Path) -> None:
    with temporary.open("rb") as file:
        locked = _lock(file)
        # Where files cannot be locked, nothing that is written now is older than an hour.
        if locked or (locked is None and time.time() - temporary.stat().st_mtime > 3600):
            temporary.unlink()


def _lock(file: IO[bytes]) -> bool | None:
    """True if nobody else holds the lock of `file`, which is ours then; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
