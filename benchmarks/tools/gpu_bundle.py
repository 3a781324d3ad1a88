"""`make gpu-bundle`: pack into `build/gpu` what a bare machine with a GPU and no network needs for `make gpu`.

    make gpu-bundle ARGS="--base COMMIT"        # COMMIT: what the last run on a GPU measured, old against new

Writes
    lib/        this tree's two libraries, CUDA for one architecture
    old/        packages, benchmarks and libraries of the base commit
    wheels/     from the package index, for --python on x86-64 Linux
    plan.json   commit, base, and the paths changed between them
and fails where all of it is more than 60 MiB. Copy the tree with this folder to the machine, and call `make gpu`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import arguments
from benchmarks.tools.gpu import BUNDLE, ROOT

#: What the tests and benchmarks need beyond what images with PyTorch usually hold.
WHEELS = ("transformers>=5.23,<6", "pycocotools>=2.0.8", "kernels>=0.16", "deformops", "pytest-xdist", "execnet")
_LIMIT_MIB = 60
_PLATFORMS = [f"--platform=manylinux{version}_x86_64" for version in ("_2_34", "_2_28", "_2_17", "2014")]
_OLD = ("m2f_kernels", "m2f_model", "benchmarks", "csrc", "CMakeLists.txt")


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True).stdout


def build(source: Path, output: Path, architecture: str) -> None:
    """Compile a tree's libraries into `output`."""
    import torch

    configure = ["cmake", "-S", str(source), "-G", "Ninja", f"-DM2F_OUTPUT={output}", "-DM2F_CUDA=on"]
    configure += [f"-DM2F_CUDA_ARCHS={architecture}", f"-DM2F_TORCH_INCLUDE={Path(torch.__path__[0]) / 'include'}"]
    with tempfile.TemporaryDirectory() as work:
        for command in ([*configure, "-B", work], ["cmake", "--build", work]):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode != 0:
                sys.exit(f"make gpu-bundle: {' '.join(command)}\n{done.stdout[-3000:]}")


def unpack(commit: str, target: Path) -> None:
    """The parts of a commit that `benchmarks.kernels` needs."""
    present = [name for name in _OLD if _git("ls-tree", "--name-only", commit, "--", name)]
    content = _git("archive", "--format=tar", commit, "--", *present)
    subprocess.run(["tar", "-x", "-C", str(target), "--exclude=benchmarks/results"], input=content, check=True)


def download(python: str, target: Path) -> list[str]:
    """Download wheels without their dependencies; returns those that are not served."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(target)]
    command += ["--python-version", python, "--implementation", "cp", *_PLATFORMS]
    return [wheel for wheel in WHEELS if subprocess.run([*command, wheel], capture_output=True).returncode != 0]


def size_mib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def main() -> None:
    options = arguments(
        __doc__,
        {
            "--base": {"required": True, "help": "commit to measure against"},
            "--architecture": {"default": "90", "help": "compute capability of the GPU; default: 90 (H100, H200)"},
            "--python": {"default": "3.12", "help": "Python of that machine"},
        },
    )
    try:
        commit, base = (
            _git("rev-parse", "--verify", f"{c}^{{commit}}").decode().strip() for c in ("HEAD", options.base)
        )
    except subprocess.CalledProcessError:
        options.refuse(f"--base: expected a commit of this checkout; got {options.base!r}")
    changed = _git("diff", "--name-only", base, commit).decode().split()
    shutil.rmtree(BUNDLE, ignore_errors=True)
    (BUNDLE / "old").mkdir(parents=True)
    unpack(base, BUNDLE / "old")
    build(ROOT, BUNDLE / "lib", options.architecture)
    build(BUNDLE / "old", BUNDLE / "old" / "m2f_kernels" / "lib", options.architecture)
    missing = download(options.python, BUNDLE / "wheels")
    plan = {"commit": commit, "base": base, "changed": changed, "not served": missing}
    (BUNDLE / "plan.json").write_text(json.dumps(plan, indent=1) + "\n")
    for folder in ("lib", "old", "wheels"):
        print(f"{folder:8} {size_mib(BUNDLE / folder):6.1f} MiB")
    size = size_mib(BUNDLE)
    print(f"{BUNDLE}: {size:.1f} MiB; {len(changed)} paths changed since {base[:12]}")
    if missing:
        print(f"not served as wheels, left out: {', '.join(missing)}")
    if size > _LIMIT_MIB:
        sys.exit(f"make gpu-bundle: expected at most {_LIMIT_MIB} MiB; got {size:.1f}")


if __name__ == "__main__":
    main()
