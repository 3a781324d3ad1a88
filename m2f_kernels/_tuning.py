"""Launch configurations of the Triton kernels: a table per architecture, written by `python -m m2f_kernels.tune`.

Nothing is tuned at a first call. A kernel calls :func:`configuration` with a heuristic default, which an entry of the
architecture's table, written by the tuner, overrides.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

#: Named integers: block sizes, num_warps, num_stages.
Configuration = dict[str, int]
#: Kernel -> key (what of the arguments matters, for example "16 bit, D 32") -> configuration.
Table = dict[str, dict[str, Configuration]]

#: The directory of the tables, `<directory>/sm_90.json`. The environment variable names another.
DIRECTORY = Path(os.environ.get("M2F_TUNED", Path(__file__).parent / "tuned"))

#: Whether kernels multiply float32 factors by tensor cores, as three products of TF32 parts (sm_80 and later), not
#: one by one. No GPU has timed it, so it has to be asked for before the import.
TF32X3 = os.environ.get("M2F_TF32X3") == "1"

#: The kernels that compute sums and weights around matching and loss on a GPU: "separate", many of PyTorch, or "fused",
#: a few of this package. No GPU has timed the latter, so they have to be asked for before the import.
CRITERION = os.environ.get("M2F_CRITERION", "separate")
if CRITERION not in ("separate", "fused"):
    raise ValueError(f"M2F_CRITERION: expected 'separate' or 'fused'; got {CRITERION!r}")


def bits(element_size: int) -> str:
    """The name of an element size in keys. Entries tuned for one kind of product do not serve the other."""
    return f"{8 * element_size} bit" + (" TF32x3" if TF32X3 and element_size == 4 else "")


_forced: dict[tuple[str, str], Configuration] = {}


def read_table(path: Path) -> Table:
    """A table, or an empty one where there is no file.

    Raises:
        ValueError: the file is not a table, with its path and what is wrong.
    """
    if not path.exists():
        return {}
    try:
        table = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected a JSON table of launch configurations; {error}") from None
    expected = "kernel -> key -> named integers"
    if not isinstance(table, dict) or not all(isinstance(keys, dict) for keys in table.values()):
        raise ValueError(f"{path}: expected {expected}; got {table!r}")
    for kernel, keys in table.items():
        for key, configuration in keys.items():
            if not isinstance(configuration, dict) or not all(type(v) is int for v in configuration.values()):
                raise ValueError(f"{path}: expected {expected}; got {configuration!r} at {kernel!r}, {key!r}")
    return table


def write_table(path: Path, table: Table) -> None:
    """Write `table` into `path`, keeping the lines of kernels and keys that it does not name."""
    merged = read_table(path)
    for kernel, keys in table.items():
        merged.setdefault(kernel, {}).update(keys)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(merged, indent=2, sort_keys=True) + "\n")


@cache
def _table(capability: int) -> Table:
    return read_table(DIRECTORY / f"sm_{capability}.json")


@contextmanager
def forced(kernel: str, key: str, configuration: Configuration) -> Iterator[None]:
    """Let `kernel` use `configuration` inside a `with` block, whatever the table says (the tuner, tests)."""
    before = _forced.get((kernel, key))
    _forced[kernel, key] = configuration
    try:
        yield
    finally:
        del _forced[kernel, key]
        if before is not None:
            _forced[kernel, key] = before


def configuration(capability: int, kernel: str, key: str, default: Configuration) -> Configuration:
    """The configuration to launch `kernel` with: forced, from the table, or `default`.

    Args:
        capability: compute capability, 90 for sm_90.
        kernel, key: the table's.
        default: the heuristic's choice.

    Raises:
        ValueError: the table has a line whose names are not those of `default`.
    """
    found = _forced.get((kernel, key)) or _table(capability).get(kernel, {}).get(key)
    if found is None:
        return default
    if found.keys() != default.keys():
        raise ValueError(
            f"{DIRECTORY / f'sm_{capability}.json'}: expected {sorted(default)} for {kernel!r}, {key!r}; "
            f"got {sorted(found)}; run `python -m m2f_kernels.tune` again"
        )
    return found
