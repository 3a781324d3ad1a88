"""Reads image files of many kinds, and writes files atomically."""

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
    """A context with an image file, whose pixels are not read yet; errors within it name the file.

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
    """The same for an image in memory; errors call it `name`."""
    if image.mode in _SIXTEEN_BIT:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode not in _CONVERTIBLE:
        raise ValueError(f"{name}: expected an image of 8 or 16 bits; got Pillow's mode {image.mode!r}")
    return image.convert("RGB")


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Lets `write` fill a file beside `path`, which then replaces `path`.

    Even after a full disk or a killed process, `path` has either the old content or the new. The next write removes the
    file that a killed process left. The file's mode is that of the umask.
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
    """Removes the files of processes that were killed while they wrote `path`, not those of running ones."""
    path = Path(path)
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}")
    for name in os.listdir(path.parent):
        if pattern.fullmatch(name):
            with contextlib.suppress(OSError):  # another process has removed it, or has the right to
                _remove_unused(path.parent / name)


def _open_beside(path: Path) -> tuple[IO[bytes], Path]:
    """A new file, locked as long as it is open: if it is unlocked, its writer is dead."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        file = temporary.open("xb")
        _lock(file)
        if os.fstat(file.fileno()).st_nlink:
            return file, temporary
        file.close()  # another process removed it as a leftover before it was locked


def _remove_unused(temporary: Path) -> None:
    with temporary.open("rb") as file:
        locked = _lock(file)
        # Where files cannot be locked, files older than an hour are leftovers.
        if locked or (locked is None and time.time() - temporary.stat().st_mtime > 3600):
            temporary.unlink()


def _lock(file: IO[bytes]) -> bool | None:
    """True if this process now holds the lock of `file`, False if another does; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
