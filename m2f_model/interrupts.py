"""Ctrl-C and SIGTERM during training: the step is finished and written first."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """A context in which signals that would end this process are only recorded. Works in the main thread.

    A second Ctrl-C, a second or more after the first, ends the process at once; launchers send some signals twice.

    Attributes:
        number: of the first signal that came, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._when = 0.0
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._take) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self._when = number, time.monotonic()
            with contextlib.suppress(OSError):  # not print(), which may have been interrupted in the middle
                os.write(2, b"stopping after this step; Ctrl-C again: at once\n")
        elif number == signal.SIGINT and time.monotonic() - self._when > 1:
            raise KeyboardInterrupt

    def end(self) -> BaseException:
        """The exception that ends the process as the signal would have, with the exit code that a shell expects."""
        return KeyboardInterrupt() if self.number == signal.SIGINT else SystemExit(128 + int(self.number or 0))


class Interrupted(Exception):
    """Raised to abandon work that is no longer needed."""


def leave_signals_to_the_parent(worker: int) -> None:
    """In a process that prepares data: ignores signals to the whole group, such as Ctrl-C, since the parent ends it.
    The first SIGTERM is ignored, too; a second one is meant for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL) and None)
