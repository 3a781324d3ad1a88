"""Caches of tensors that depend on sizes or parameters alone, so that the small kernels that make them run once.

For code that :class:`m2f_kernels.CudaGraphs`, streams and threads may share: a graph keeps what it reads alive.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from m2f_kernels._dtypes import without_autocast
from m2f_kernels.ops._autograd import transformed

__all__ = ["ConstantCache", "cacheable", "capturing", "derived", "forget", "hand_out", "holding", "replayable"]


def cacheable(tensor: Tensor) -> bool:
    """True if tensors like this one may be cached: nothing traces, transforms or wraps them."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or type(tensor) not in (Tensor, torch.nn.Parameter, FakeTensor)
        or transformed()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
        # What is made of a real tensor in such a mode is fake, and of no use later.
        or (not isinstance(tensor, FakeTensor) and _fake_mode_is_on())
    )


def _fake_mode_is_on() -> bool:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


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


def _made(make: Callable[[], Any], device: torch.device) -> Any:
    """The result of `make()`, without gradients or autocast, and no inference tensor: that could not be saved for a
    backward pass later."""
    with torch.inference_mode(False), torch.no_grad(), without_autocast(device):
        return make()


def _finish(device: torch.device) -> None:
    """Wait, once for each tensor that is kept: other streams may read it from now on."""
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.current_stream(device).synchronize()


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
        if not cacheable(like):
            return make()
        mode: Any = like.fake_mode if isinstance(like, FakeTensor) else None
        full = key, like.device, like.dtype, mode
        with self._lock:
            kept = self._kept.get(full)
            if kept is not None:
                self._kept.move_to_end(full)
        if kept is None:
            kept = _made(make, like.device)
            if capturing(like.device):
                return kept
            if mode is None:
                _finish(like.device)
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


#: For each module the tensors derived from its parameters, with a stamp. Not in the module, so that it is not saved.
_DERIVED: WeakKeyDictionary[nn.Module, dict[str, tuple[Any, Any]]] = WeakKeyDictionary()


def _stamp(sources: Sequence[Tensor]) -> list[Any]:
    return [(id(x), x._version, None if isinstance(x, FakeTensor) else x.data_ptr(), x.dtype) for x in sources]


def derived(module: nn.Module, name: str, sources: Sequence[Tensor], make: Callable[[], Any]) -> Any:
    """The cached result of `make()`, a tensor or a tuple; made anew once one of `sources` is changed or exchanged.

    Args:
        module: whose parameters it is made of; the cache ends with it.
        name: tells several results of one module apart.
        sources: the tensors that `make` reads.
    """
    device = sources[0].device
    if not cacheable(sources[0]) or any(x.is_inference() for x in sources):
        return make()
    stamp = _stamp(sources)
    found = _DERIVED.get(module, {}).get(name)
    if found is None or found[0] != stamp:
        made = _made(make, device)
        if capturing(device):
            return made
        _finish(device)
        found = stamp, made
        _DERIVED.setdefault(module, {})[name] = found
    for x in found[1] if isinstance(found[1], tuple) else (found[1],):
        hand_out(x, lambda: _stamp(sources) == stamp)
    return found[1]


def forget(module: nn.Module) -> None:
    """Free what :func:`derived` keeps for a module."""
    _DERIVED.pop(module, None)
