"""The arguments of a command."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any


def arguments(
    description: str | None, declared: Mapping[str, Mapping[str, Any]], given: Sequence[str] | None = None
) -> argparse.Namespace:
    """The values of a command's arguments; `refuse(message)` of it ends the command with a message.

    Args:
        description: for `--help`, a module's docstring.
        declared: by name ("--old" or "old"), what `ArgumentParser.add_argument` takes.
        given: in place of the command line.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, about in declared.items():
        parser.add_argument(name, **about)
    return parser.parse_args(given, argparse.Namespace(refuse=parser.error))
