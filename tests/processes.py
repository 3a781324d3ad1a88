"""Python in a process of its own, as a user calls it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def python(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The result of Python with `arguments` at the repository's root. Triton's interpreter, which tests may have
    chosen for their own process, is off unless `environment` says otherwise."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True)
