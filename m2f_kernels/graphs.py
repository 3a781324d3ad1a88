"""CUDA graphs for inference: the kernels of a forward pass, launched by one call."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from m2f_kernels._checks import describe

#: What an instance is made with besides the model.
_OPTIONS = ("entries", "max_bytes", "clone", "warmups")


class Captured:
    """One graph: static inputs and outputs, and what replays it."""

    def __init__(self, inputs: list[Tensor], outputs: list[Any], spec: Any, replay: Callable[[], None], size: int):
        self.inputs = inputs
        self.outputs = outputs
        self.spec = spec
        self.replay = replay
        self.bytes = size


class CudaDevice:
    """What :class:`CudaGraphs` asks of CUDA; tests give it another."""

    type = "cuda"

    def __init__(self) -> None:
        self._pool: Any = None
        self._last: Any = None

    def capturing(self) -> bool:
        """Whether somebody else captures."""
        return torch.cuda.is_current_stream_capturing()

    def capture(self, run: Callable[[], Any], warmups: int) -> tuple[Any, Callable[[], None], int]:
        """What `run` returned while it was captured, what replays it, and the bytes that the graph took."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warmups):  # compiles, tunes, and makes what is kept between calls
                run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        before = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            outputs = run()
        return outputs, graph.replay, max(0, torch.cuda.memory_reserved() - before)

    def begin(self) -> None:
        """Let the current stream wait for the last replay: graphs share their memory."""
        if self._last is not None:
            torch.cuda.current_stream().wait_event(self._last)

    def end(self) -> None:
        """What the current stream has been given is the last replay."""
        self._last = torch.cuda.Event()
        self._last.record(torch.cuda.current_stream())


class CudaGraphs:
    """A model whose forward pass without gradients is captured at the first input of each shape, and replayed after.

        fast = m2f_kernels.CudaGraphs(model)
        with torch.inference_mode():
            output = fast(pixels)

    Inputs are copied to where the graph reads them, so that no size is padded. Graphs share one pool of memory; the
    least recently used go first. Weights changed in place, exchanged, loaded or moved make the next call capture anew,
    and so do other classes of modules (`accelerate`, `restore`) and another dtype of autocast. Threads and streams take
    turns. Where a call cannot be captured it runs as ever: `reason` says why, and a warning does so once for each.

    Args:
        model: in eval mode, on one CUDA device.
        entries: how many graphs to keep.
        max_bytes: how much memory they may take together; the newest is always kept. None: as much as they need.
        clone: give outputs of one's own. False gives the graph's: the next call with that shape overwrites them.
        warmups: calls before a capture.

    Raises:
        TypeError, ValueError: naming the argument.

    Attributes:
        reason: why the last call was not replayed; None where it was.
        captures: how many graphs were captured so far.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        entries: int = 8,
        max_bytes: int | None = None,
        clone: bool = True,
        warmups: int = 2,
        device: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module; got {describe(model)}")
        for name, value, least in (("entries", entries, 1), ("warmups", warmups, 1), ("max_bytes", max_bytes, 1)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name}: expected an integer of at least {least}; got {value!r}")
        self._start(model, CudaDevice() if device is None else device, entries, max_bytes, clone, warmups)

    def __len__(self) -> int:
        return len(self._kept)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files hold the model and the options; graphs are captured anew."""
        return {name: getattr(self, name) for name in ("model", *_OPTIONS)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._start(state["model"], CudaDevice(), *(state[name] for name in _OPTIONS))

    def _start(
        self, model: nn.Module, device: Any, entries: int, max_bytes: int | None, clone: bool, warmups: int
    ) -> None:
        self.model = model
        self.entries, self.max_bytes, self.clone, self.warmups = entries, max_bytes, clone, warmups
        self.reason: str | None = None
        self.captures = 0
        self._device = device
        self._kept: OrderedDict[Hashable, Captured] = OrderedDict()
        self._failed: dict[Hashable, str] = {}
        self._stamp: Any = None
        self._said: set[str] = set()
        self._lock = threading.RLock()

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """The model itself, whose `forward` this may be."""
        if vars(self.model).get("forward") is self:
            return type(self.model).forward(self.model, *args, **kwargs)
        return self.model(*args, **kwargs)

    def clear(self) -> None:
        """Drop all graphs and their memory."""
        with self._lock:
            self._kept.clear()
            self._failed.clear()
            self._stamp = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        with self._lock:
            reason = self._refusal(leaves, tensors)
            key = None if reason else self._key(leaves, spec)
            if key is not None:
                reason = self._failed.get(key)
            if reason is None:
                reason = self._capture(key, leaves, spec)
            self.reason = reason
            if reason is None:
                return self._replay(self._kept[key], tensors)
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"CudaGraphs: {type(self.model).__name__} runs without a graph: {reason}", stacklevel=2)
        return self._run(*args, **kwargs)

    def _refusal(self, leaves: list[Any], tensors: list[Tensor]) -> str | None:
        """Why this call cannot be replayed."""
        type_ = self._device.type
        if not tensors:
            return "no input is a tensor"
        if any(type(x) is not Tensor for x in tensors):
            return "an input is a subclass of torch.Tensor"
        for x in (*tensors, *self.model.parameters(), *self.model.buffers()):
            if x.device.type != type_:
                return f"a tensor is on '{x.device}', and graphs are of '{type_}' devices"
            if x.device != tensors[0].device:
                return f"tensors are on '{tensors[0].device}' and '{x.device}'"
        modules = list(self.model.modules())
        if any(x.training for x in modules):
            return "the model is in training mode"
        if torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, *self.model.parameters())):
            return "gradients are wanted; call it under torch.no_grad() or torch.inference_mode()"
        # Hooks of a model whose forward this is run around it.
        inner = modules[1:] if vars(self.model).get("forward") is self else modules
        if any(x._forward_hooks or x._forward_pre_hooks for x in inner):
            return "a hook is registered on a module"
        if torch.compiler.is_compiling():
            return "torch.compile is tracing"
        if self._device.capturing():
            return "a graph is being captured already"
        unhashable = [x for x in leaves if not isinstance(x, (Tensor, bool, int, float, str, type(None), torch.dtype))]
        return f"an argument is {describe(unhashable[0])}" if unhashable else None

    def _key(self, leaves: list[Any], spec: Any) -> Hashable:
        shown = tuple(
            (tuple(x.shape), x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else (type(x), x) for x in leaves
        )
        kind = self._device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return shown, str(spec), cast, torch.is_inference_mode_enabled()

    def _weights(self) -> Any:
        """What changes where a graph is not valid any more."""
        weights = (*self.model.parameters(), *self.model.buffers())
        versions = tuple(0 if x.is_inference() else x._version for x in weights)
        return (
            tuple(x.data_ptr() for x in weights),
            tuple((x.dtype, x.shape) for x in weights),
            versions,
            tuple(type(x) for x in self.model.modules()),
        )

    def _capture(self, key: Hashable, leaves: list[Any], spec: Any) -> str | None:
        """Make sure that there is a valid graph for `key`; why there can be none."""
        stamp = self._weights()
        if stamp != self._stamp:
            self._kept.clear()
            self._failed.clear()
            self._stamp = stamp
        if key in self._kept:
            self._kept.move_to_end(key)
            return None
        while len(self._kept) >= self.entries:
            self._kept.popitem(last=False)
        static = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        args, kwargs = tree_unflatten(static, spec)
        try:
            output, replay, size = self._device.capture(lambda: self._run(*args, **kwargs), self.warmups)
        except RuntimeError as error:
            self._failed[key] = reason = f"its capture failed: {str(error).splitlines()[0]}"
            return reason
        flat, out_spec = tree_flatten(output)
        inputs = [x for x in static if isinstance(x, Tensor)]
        self._kept[key] = Captured(inputs, flat, out_spec, replay, size)
        self.captures += 1
        while self.max_bytes is not None and len(self._kept) > 1 and self._bytes() > self.max_bytes:
            self._kept.popitem(last=False)
        return None

    def _bytes(self) -> int:
        return sum(x.bytes for x in self._kept.values())

    def _replay(self, graph: Captured, tensors: list[Tensor]) -> Any:
        self._device.begin()
        for static, given in zip(graph.inputs, tensors, strict=True):
            static.copy_(given)
        graph.replay()
        copies: dict[int, Tensor] = {}  # what several outputs share is copied once
        outputs = [
            copies.setdefault(id(x), x.clone()) if self.clone and isinstance(x, Tensor) and id(x) not in copies
            else copies.get(id(x), x)
            for x in graph.outputs
        ]  # fmt: skip
        self._device.end()
        return tree_unflatten(outputs, graph.spec)
