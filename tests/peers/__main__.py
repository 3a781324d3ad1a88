"""`make test-peers`: transformers' tests of accelerated families, untouched and patched; any difference fails.

The tests come from a checkout of transformers with `tests/models/<family>` in it, PEERS=DIR, made by
`git clone --depth 1 --branch v5.24.0 https://github.com/huggingface/transformers DIR` (the installed version);
or from the source distribution of the installed version that pip serves. That one has the tests of any model alone, and
:mod:`tests.peers.common` runs them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from m2f_kernels.integrations.transformers import registry
from tests.integrations.families import FAMILIES

COMMON = Path(__file__).with_name("common.py")
ROOT = Path(__file__).parents[2]


def fetch(folder: Path) -> Path:
    """The unpacked source distribution of the installed transformers."""
    import transformers

    name = f"transformers-{transformers.__version__}"
    if not (folder / name).is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download", "--no-deps"]
        options = ["--no-binary", ":all:", "--no-build-isolation", "-d", str(folder)]
        subprocess.run([*pip, *options, name.replace("-", "==")], check=True)
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    if not (folder / name / "tests" / "test_modeling_common.py").exists():
        raise SystemExit(
            f"{name}: expected tests/test_modeling_common.py in the source distribution; PEERS=DIR names one"
        )
    return folder / name


def run(tests: list[str], peers: Path, patched: bool, extra: list[str]) -> dict[str, str]:
    """The outcome of every test."""
    environment = {
        **os.environ,
        "M2F_PEERS_TESTS": str(peers / "tests"),
        "M2F_PEERS_PATCHED": str(int(patched)),
        # transformers' folder of tests is named as this project's: the plugin is found beside this file.
        "PYTHONPATH": os.pathsep.join([str(COMMON.parent), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    own = tests == [str(COMMON)]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        plugin = ["-p", "m2f_patched"] if patched and not own else []
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-W", "ignore", "--tb=line", *plugin]
        where = ROOT if own else peers
        done = subprocess.run(
            [*command, f"--junitxml={report}", *tests, *extra],
            cwd=where,
            env=environment,
            capture_output=True,
            text=True,
        )
        if not report.exists():
            raise SystemExit(f"pytest did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        found = {}
        for case in ElementTree.parse(report).iter("testcase"):
            kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
            found[f"{case.get('classname')}.{case.get('name')}"] = min(kinds, default="passed")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.peers", description=__doc__.partition("\n")[0])
    parser.add_argument("--peers", type=Path, help="a checkout of transformers; else pip's source distribution")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "m2f-peers", help="for the latter")
    known = {family.name for family in registry.families()}
    parser.add_argument("--family", action="append", choices=sorted(known), help="default: all")
    parser.epilog = "All other arguments are pytest's, for example -k EXPRESSION."
    options, extra = parser.parse_known_args()
    peers = options.peers or fetch(options.folder)
    tests = [str(COMMON)]
    if options.family and not options.peers:
        if absent := set(options.family) - {name for name, family in FAMILIES.items() if family.installed}:
            parser.error(f"--family: expected families with a small model here; got {', '.join(sorted(absent))}")
        extra += ["-k", " or ".join(f"Test_{name}" for name in options.family)]
    if options.peers:
        here = registry.installed()
        names = options.family or sorted(known & here[1] if here else known)
        paths = [peers / "tests" / "models" / name / f"test_modeling_{name}.py" for name in names]
        tests = [str(path) for path in paths if path.exists()]
        if not tests:
            raise SystemExit(
                f"--peers: expected tests/models/<family>/test_modeling_<family>.py in it; none in {peers}"
            )
    untouched, patched = (run(tests, peers, state, extra) for state in (False, True))
    for state, found in (("untouched", untouched), ("patched", patched)):
        print(f"{state}: " + ", ".join(f"{list(found.values()).count(k)} {k}" for k in sorted(set(found.values()))))
    different = sorted(k for k in untouched.keys() | patched.keys() if untouched.get(k) != patched.get(k))
    for name in different:
        print(f"{name}: {untouched.get(name, 'absent')} untouched, {patched.get(name, 'absent')} patched")
    if "passed" not in untouched.values():
        print("no test passed untouched: nothing was compared")
        return 1
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
