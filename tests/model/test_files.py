"""Images from anywhere; files that are whole or not there."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from m2f_model.files import read_image, write_atomically

GRADIENT = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20


def test_grey_and_transparent(tmp_path):
    Image.fromarray(GRADIENT).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([GRADIENT] * 4)).save(tmp_path / "rgba.png")
    Image.fromarray(np.dstack([GRADIENT] * 3)).convert("P").save(tmp_path / "palette.gif")
    for name in ("grey.png", "rgba.png"):
        image = read_image(tmp_path / name)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), np.dstack([GRADIENT] * 3))
    assert read_image(tmp_path / "palette.gif").mode == "RGB"


def test_sixteen_bits(tmp_path):
    Image.fromarray(GRADIENT.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "deep.png"))[..., 0], GRADIENT)


def test_thirty_two_bits_are_refused(tmp_path):
    Image.fromarray(GRADIENT.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"float\.tif: expected an image of 8 or 16 bits; got Pillow's mode 'F'"):
        read_image(tmp_path / "float.tif")


def test_exif_rotation(tmp_path):
    image = Image.fromarray(np.dstack([GRADIENT] * 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "turned.png"))[..., 0], np.rot90(GRADIENT, -1))


@pytest.mark.parametrize("content", [b"", b"no image", "truncated"])
def test_damaged(content, tmp_path):
    path = tmp_path / "bad.png"
    if content == "truncated":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
        content = path.read_bytes()[:5000]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.png: expected an image; "):
        read_image(path)


def test_too_many_pixels(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((100, 100), np.uint8)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"bomb\.png: expected an image; .*exceeds limit"):
        read_image(tmp_path / "bomb.png")


def test_absent(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "absent.png")


def test_a_failed_write_changes_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full_disk(file):
        file.write(b"half of the ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, full_disk)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_the_umask_gives_the_mode(umask, tmp_path):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file", lambda file: file.write(b"x"))
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask


def test_two_writers_of_one_file(tmp_path):
    """One that begins while another writes does not take the other's file for a leftover."""
    path = tmp_path / "file"

    def slow(file):
        file.write(b"slow")
        write_atomically(path, lambda file: file.write(b"quick"))
        assert path.read_bytes() == b"quick"

    write_atomically(path, slow)
    assert path.read_bytes() == b"slow"
    assert os.listdir(tmp_path) == ["file"]


def test_a_process_killed_while_writing_changes_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    (tmp_path / ".file.txt").touch()
    (tmp_path / ".files.0a1b2c3d").touch()
    program = (
        "import os, signal, sys\n"
        "from m2f_model.files import write_atomically\n"
        "def write(file):\n"
        "    file.write(b'x' * 100000)\n"
        "    file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomically(sys.argv[1], write)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, path], check=False).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert len(os.listdir(tmp_path)) == 4
    # The next write removes what is left over of this file, and nothing else.
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == [".file.txt", ".files.0a1b2c3d", "file"]
