"""PyTorch's headers: those of an installed torch, else the few necessary files from its wheel.

The libraries use PyTorch's stable ABI only: 84 headers, 0.7 MB, of a wheel of half a gigabyte that pulls in two more. A
wheel is a zip archive, whose table of contents stands at its end: two or three requests for parts of it are enough.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
import urllib.request
import zipfile
from pathlib import Path, PurePosixPath

OLDEST = (2, 11)
#: Pinned, so that a build is reproducible. What is built runs with every torch from `OLDEST` on.
FETCHED = "2.13.0"
FOLDERS = ("torch/csrc/stable", "torch/csrc/inductor/aoti_torch", "torch/headeronly")
_CHUNK = 1 << 18


def version(torch: Path) -> tuple[int, int] | None:
    """Major and minor version of an installed torch, which is not imported: that takes seconds and may want CUDA."""
    try:
        found = re.search(r"__version__ = '(\d+)\.(\d+)", (torch / "version.py").read_text())
    except OSError:
        return None
    return (int(found[1]), int(found[2])) if found else None


def installed() -> list[Path]:
    """The directories of torch for this interpreter. pip hides them from an isolated build."""
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec is not None and spec.origin is not None else []
    places += [Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib")]
    return [place for place in dict.fromkeys(places) if version(place) is not None]


def cache() -> Path:
    """The directory of fetched headers."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "m2f-kernels" / f"torch-{FETCHED}" / "include"


def find() -> tuple[Path, str] | None:
    """The include directory, and where it is from; None where there is none yet."""
    for torch in installed():
        found = version(torch)
        if found is not None and found >= OLDEST and (torch / "include/torch/csrc/stable/library.h").exists():
            return torch / "include", f"torch {found[0]}.{found[1]}, installed"
    if cache().exists():
        return cache(), f"torch {FETCHED}, fetched from its wheel"
    return None


def missing() -> str:
    """The message for a user for whom `find` returns None."""
    old = [f"{v[0]}.{v[1]} in {place.parent}" for place in installed() if (v := version(place)) is not None]
    found = f"found torch {', '.join(old)}" if old else "torch is not installed"
    return (
        f"building needs the headers of torch >= {'.'.join(map(str, OLDEST))}; {found}: install it, or let pip isolate"
    )


class Remote(io.RawIOBase):
    """A file on a server, read in parts."""

    def __init__(self, url: str, size: int) -> None:
        self.url, self.size, self.position, self.received = url, size, 0, 0
        self.parts: list[tuple[int, bytes]] = []

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        return self.position

    def read(self, size: int = -1) -> bytes:
        end = self.size if size < 0 else min(self.size, self.position + size)
        start, self.position = self.position, max(end, self.position)
        for first, data in self.parts:
            if first <= start and end <= first + len(data):
                return data[start - first : end - first]
        if end <= start:
            return b""
        last = min(self.size, max(end, start + _CHUNK))
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={start}-{last - 1}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            if answer.status != 206:
                raise OSError(f"{self.url}: the server does not send parts of files")
            data = answer.read()
        self.received += len(data)
        self.parts.append((start, data))
        return data[: end - start]


def wheel(index: str) -> tuple[str, int]:
    """Address and size of the wheel of torch `FETCHED` for this kind of machine on a package index (PEP 691)."""
    address = f"{index.rstrip('/')}/torch/"
    request = urllib.request.Request(address, headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        files = json.load(answer)["files"]
    tail = f"_{platform.machine()}.whl"
    names = [f for f in files if f["filename"].startswith(f"torch-{FETCHED}-") and f["filename"].endswith(tail)]
    chosen = next(f for f in names if "manylinux" in f["filename"] and f.get("size"))
    return chosen["url"], chosen["size"]


def fetch() -> None:
    """Put the headers of torch `FETCHED` into `cache()`.

    Raises:
        Exception: of many kinds, when the network, the index or the disk fails.
    """
    index = os.environ.get("PIP_INDEX_URL") or os.environ.get("UV_DEFAULT_INDEX") or "https://pypi.org/simple"
    target = cache()
    target.parent.mkdir(parents=True, exist_ok=True)
    remote = Remote(*wheel(index))
    remote.seek(-min(_CHUNK, remote.size), os.SEEK_END)
    remote.read()  # of its own, for zipfile takes a server's refusal for a broken archive
    wanted = tuple(f"torch/include/{folder}/" for folder in FOLDERS)
    with tempfile.TemporaryDirectory(dir=target.parent) as directory, zipfile.ZipFile(remote) as archive:
        for name in archive.namelist():
            if name.startswith(wanted) and ".." not in PurePosixPath(name).parts:
                archive.extract(name, directory)  # checks the CRC
        shutil.rmtree(target, ignore_errors=True)
        (Path(directory) / "torch/include").replace(target)
    print(f"m2f-kernels: fetched headers of torch {FETCHED}, {remote.received / 1e6:.1f} MB", file=sys.stderr)
