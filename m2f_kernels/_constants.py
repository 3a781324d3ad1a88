"""A cache of tensors that depend on sizes alone, so that the many small kernels that make them run once per size."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from m2f_kernels.ops._autograd import transformed


def plain(tensor: Tensor) -> bool:
    """True if tensors like this one may be cached: nothing traces, transforms or wraps them."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or type(tensor) not in (Tensor, torch.nn.Parameter, FakeTensor)
        or transformed()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    )


def capturing(device: torch.device) -> bool:
    """True while a CUDA graph is being captured: tensors that are made then live in the graph's memory."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Held(NamedTuple):
    """A cached tensor that a CUDA graph reads; `valid()` is true while the cache would return the same."""

    tensor: Tensor
    valid: Callable[[], bool]


_holding = threading.local()
#: Tensors that graphs captured by other code read. They are kept for ever: nothing tells when such a graph is gone.
_read_by_others: dict[int, Tensor] = {}


@contextlib.contextmanager
def holding() -> Iterator[list[Held]]:
    """Collects the cached tensors that this thread receives: a CUDA graph that reads them must keep them alive."""
    before = getattr(_holding, "found", None)
    found: list[Held] = []
    _holding.found = found
    try:
        yield found
    finally:
        _holding.found = before


def replayable() -> bool:
    """True while this thread runs what will be replayed, and must not depend on values that the CPU has read."""
    return getattr(_holding, "found", None) is not None


def hand_out(kept: Tensor, valid: Callable[[], bool] = lambda: True) -> Tensor:
    """Returns `kept`, made safe to drop from its cache while a stream or a graph still reads it."""
    found = getattr(_holding, "found", None)
    if found is not None:
        found.append(Held(kept, valid))
    if kept.is_cuda and not isinstance(kept, FakeTensor) and torch.cuda.is_available():
        kept.record_stream(torch.cuda.current_stream(kept.device))
        if found is None and capturing(kept.device):
            _read_by_others[id(kept)] = kept
    return kept


class ConstantCache:
    """A cache of tensors that drops the least recently used first. Threads and streams may share it.

    Nothing is kept under `torch.compile`, export, tracing or `torch.func`, nor while a CUDA graph is captured.

    Args:
        entries: the largest number of tensors.
    """

    def __init__(self, entries: int) -> None:
        self.entries = entries
        self._kept: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, make: Callable[[], Tensor], key: Hashable, like: Tensor) -> Tensor:
        """The cached result of `make()` for `key` and the device and dtype of `like`. Never change it in place."""
        if not plain(like):
            return make()
        mode: Any = like.fake_mode if isinstance(like, FakeTensor) else None
        full = key, like.device, like.dtype, mode
        real_cuda = like.is_cuda and mode is None
        with self._lock:
            kept = self._kept.get(full)
            if kept is not None:
                self._kept.move_to_end(full)
        if kept is None:
            # An inference tensor could not be saved for a backward pass later.
            with torch.inference_mode(False), torch.no_grad():
                kept = make()
            if capturing(like.device):
                return kept
            if real_cuda:  # once for each size: other streams may read it from now on
                torch.cuda.current_stream(like.device).synchronize()
            with self._lock:
                self._kept[full] = kept
                while len(self._kept) > self.entries:
                    self._kept.popitem(last=False)
        return hand_out(kept)

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()
