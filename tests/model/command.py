"""The command `m2f` in this process."""

import contextlib
import io
from typing import NamedTuple

from m2f_model.cli import main


class Result(NamedTuple):
    """Exit code, and all that was printed."""

    exit_code: int
    output: str


def m2f(*arguments):
    """The exit code and the output of `m2f ARGUMENTS`."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as error:
            return Result(error.code, printed.getvalue())
