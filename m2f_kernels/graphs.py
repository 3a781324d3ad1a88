"""CUDA graphs for inference and training: the kernels of a pass, launched by one call."""

from __future__ import annotations

import contextlib
import inspect
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten

from m2f_kernels import constants, dispatch
from m2f_kernels._checks import describe
from m2f_kernels._dtypes import without_autocast
from m2f_kernels.ops._autograd import transformed

#: The constructor's arguments besides the model, and whether it is the model's `forward`.
_OPTIONS = ("entries", "max_bytes", "clone", "warmups", "training", "attached")
#: The attribute of a model that names the instance which is its `forward`, also where other code has wrapped that.
ATTACHED = "_m2f_graphs"
#: Inputs whose failed captures are remembered.
_FAILURES = 64
#: Leaves of arguments and results besides tensors.
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
#: The reason of a call with targets of a model that has no part which `captured` marks.
_NO_PART = "targets are given, which losses read on the CPU, and m2f_kernels knows no part of this model without them"

#: `graphs`: the instance whose model's own code runs in this thread.
_running = threading.local()


def captured(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method`, bound to a module, or a function that replays it where :class:`CudaGraphs` runs a model around it.

    For the part of a model between its inputs and a loss that reads results on the CPU.
    """
    graphs: CudaGraphs | None = None if torch.compiler.is_compiling() else getattr(_running, "graphs", None)
    return method if graphs is None else graphs._part(method)


class CudaDevice:
    """CUDA as :class:`CudaGraphs` uses it: one pool of memory, one stream to capture on. Tests replace it."""

    type = "cuda"

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Makes the next capture begin a new pool; the old one is freed with the last graph in it."""
        self._pool: Any = None
        self._stream: Any = None
        self._last: Any = None

    def on(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """A context in which `device`, that of the tensors, is the current one."""
        return torch.cuda.device(device)

    def capturing(self, device: torch.device) -> bool:
        """True while other code captures a graph."""
        return constants.capturing(device)

    def warm_up(self, run: Callable[[], Any], times: int) -> None:
        """Calls `run` before a capture, so that kernels are compiled and caches filled. Restores the random state."""
        if self._pool is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        random = torch.cuda.get_rng_state()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(times):
                run()
        torch.cuda.current_stream().wait_stream(self._stream)
        torch.cuda.synchronize()
        torch.cuda.set_rng_state(random)

    def capture(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """The result of `run` as it was captured, and the function that replays it."""
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads may use CUDA meanwhile: those of a loader that pins memory, for example.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = run()
        finally:  # a capture that fails leaves its own stream current
            torch.cuda.set_stream(before)
        return result, graph.replay

    def bytes(self) -> int:
        """The size of the pool, in bytes."""
        segments = torch.cuda.memory_snapshot()
        return sum(x["total_size"] for x in segments if tuple(x["segment_pool_id"]) == tuple(self._pool))

    def begin(self) -> None:
        """Makes the current stream wait for the last replay, since graphs share their memory."""
        if self._last is not None:
            torch.cuda.current_stream().wait_event(self._last)

    def end(self) -> None:
        """Records that the last replay is the work which the current stream has now."""
        self._last = torch.cuda.Event()
        self._last.record(torch.cuda.current_stream())


class Graph:
    """The graph of one input shape: static inputs and outputs, and the function that replays it.

    Args:
        result: of the model, as `tree_flatten` gives it.

    Attributes:
        inputs: tensors that the graph reads.
        outputs: different tensors that it writes.
        held: the cached tensors that it reads.
        stamp, versions: those of the weights at its capture, see :class:`_Seen`; a graph with a backward pass reads
            the current weights, and has no versions.
        backward: its backward pass, if it has one.
    """

    def __init__(
        self, inputs: list[Tensor], result: tuple[list[Any], Any], replay: Callable[[], None] = lambda: None
    ) -> None:
        self.inputs, self.replay = inputs, replay
        leaves, self._spec = result
        if unknown := [x for x in leaves if not isinstance(x, (Tensor, *_PLAIN))]:
            raise RuntimeError(f"its result contains {describe(unknown[0])}")
        found: dict[int, int] = {}  # what several leaves share is one tensor
        self.outputs: list[Tensor] = []
        self._leaves: list[tuple[Any, int | None]] = []
        for x in leaves:
            if isinstance(x, Tensor):
                if id(x) not in found:
                    found[id(x)] = len(self.outputs)
                    self.outputs.append(x)
                self._leaves.append((None, found[id(x)]))
            else:
                self._leaves.append((x, None))
        self.held: list[constants.Held] = []
        self.stamp: Any = None
        self.versions: Any = None
        self.backward: Backward | None = None

    def result(self, tensors: Sequence[Tensor]) -> Any:
        """The model's result with `tensors` in place of `outputs`."""
        return tree_unflatten([x if place is None else tensors[place] for x, place in self._leaves], self._spec)


class Backward:
    """The backward pass of a graph.

    Attributes:
        wanted: the inputs and weights that get gradients.
        taken: for each output the tensor that its gradient is read from; None where it has none.
        given: for each of `wanted` the gradient that is written; None where it has none.
    """

    def __init__(self, graph: Graph, wanted: list[Tensor]) -> None:
        self._outputs = [x for x in graph.outputs if x.requires_grad]
        self.wanted = wanted
        self.taken = [torch.zeros_like(x) if x.requires_grad else None for x in graph.outputs]
        self.given: list[Tensor | None] = [None] * len(wanted)
        self.replay: Callable[[], None] = lambda: None

    def run(self) -> Sequence[Tensor | None]:
        """The gradients of `wanted`, computed outside of autocast."""
        taken = [x for x in self.taken if x is not None]
        if not taken:
            return self.given
        with without_autocast(taken[0].device):
            return torch.autograd.grad(self._outputs, self.wanted, taken, allow_unused=True)

    def capture(self, device: Any) -> None:
        found, self.replay = device.capture(self.run)
        self.given = list(found)
        self._outputs = []  # frees them and their autograd graph


class _Seen:
    """The modules and weights of a model at one call.

    Attributes:
        modules: the model first.
        weights: parameters and buffers, each once.
        stamp: a value that changes when a weight is exchanged, moved or frozen, or a module gets another class.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules: list[nn.Module] = []
        weights: dict[int, Tensor] = {}
        stack: list[nn.Module | None] = [model]
        known: set[int] = set()
        while stack:
            module = stack.pop()
            if module is None or id(module) in known:
                continue
            known.add(id(module))
            self.modules.append(module)
            for x in (*module._parameters.values(), *module._buffers.values()):
                if x is not None:
                    weights[id(x)] = x
            stack.extend(module._modules.values())
        self.weights = list(weights.values())

    @cached_property
    def stamp(self) -> tuple[list[Any], list[type]]:
        weights = [(id(x), x.data_ptr(), x.dtype, x.requires_grad) for x in self.weights]
        return weights, [type(x) for x in self.modules]

    @cached_property
    def versions(self) -> list[int]:
        """The number of in-place changes of each weight so far."""
        return [0 if x.is_inference() else x._version for x in self.weights]

    def training_problem(self) -> str | None:
        """The reason why its backward pass cannot be captured, or None."""
        globally = nn.modules.module
        for x in self.modules:
            if x._backward_hooks or x._backward_pre_hooks or globally._global_backward_hooks:
                return "a hook is registered on the backward pass of a module"
            if isinstance(x, DistributedDataParallel):
                return "the processes of DistributedDataParallel exchange gradients; graphs are for one process"
            if isinstance(x, nn.SyncBatchNorm) and x.training:
                return "batch norm is synchronised between processes"
            own = vars(x)
            if own.get("activation_checkpointing") or own.get("gradient_checkpointing"):
                return "activation checkpointing runs layers again in the backward pass"
            if x.training and own.get("layerdrop"):
                return "layers are skipped at random (layerdrop)"
        if any(x._backward_hooks for x in self.weights):
            return "a hook is registered on the gradient of a weight"
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            return "hooks are set on what the forward pass saves"
        return None


def _hooked(module: nn.Module) -> bool:
    """True if a module has hooks besides those by which `transformers` collects hidden states: results of the model,
    which a graph returns as all others."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks)


@contextlib.contextmanager
def _no_cast_is_kept() -> Iterator[None]:
    """A context without autocast's cache of cast weights, which ends with the autocast region: a graph would read freed
    memory."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextlib.contextmanager
def _buffers_stay(seen: _Seen) -> Iterator[None]:
    """A context that restores changed buffers at its end, so that warm-up calls leave running statistics as they were.

    The others are not written: what is computed from them stays valid. Versions do not tell: batch norm changes its
    statistics without counting.
    """
    before = [(x, x.clone()) for x in seen.weights if not isinstance(x, nn.Parameter)]
    try:
        yield
    finally:
        with torch.no_grad():
            for x, kept in before:
                if not torch.equal(x, kept):
                    x.copy_(kept)


class _Replay(torch.autograd.Function):
    """The autograd function that replays a model's forward and backward graphs."""

    @staticmethod
    def forward(ctx: Any, owner: CudaGraphs, graph: Graph, inputs: list[Tensor], *wanted: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.owner, ctx.graph = owner, graph
        outputs = owner._forward(graph, inputs)
        assert graph.backward is not None
        still = [x for x, taken in zip(outputs, graph.backward.taken, strict=True) if taken is None]
        ctx.mark_non_differentiable(*still)
        owner._pending = weakref.ref(ctx)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if ctx.owner._pending is None or ctx.owner._pending() is not ctx:
            raise RuntimeError(
                "CudaGraphs: expected one backward pass of a forward pass, before its graph is dropped; the "
                "activations are gone"
            )
        with ctx.owner._device.on(ctx.graph.outputs[0].device):
            given = ctx.owner._backward(ctx.graph.backward, grads)
        ctx.owner._pending = None
        return None, None, None, *given


class CudaGraphs:
    """A model whose passes run as CUDA graphs: captured at the first input of each shape, replayed afterwards.

        fast = m2f_kernels.CudaGraphs(model)
        with torch.inference_mode():
            output = fast(pixels)

    Inputs are copied to the graph's own tensors and never padded. Graphs share one pool of memory; the least recently
    used are dropped first. A call captures anew after weights were changed in place, exchanged, loaded or moved, after
    `accelerate` or `restore`, and under another dtype of autocast. Threads and streams take turns. A call that cannot
    be captured runs eagerly: `reason` says why, and so does one warning for each reason.

    With `training` the forward and the backward pass of the model are two graphs, replayed where gradients are wanted;
    the loss between them runs eagerly. An optimiser may change the weights in place. Each forward pass has at most one
    backward pass, and no other call is replayed between the two.

    Args:
        model: on one CUDA device; without `training` in eval mode.
        entries: the largest number of graphs that are kept.
        max_bytes: the largest size of the pool; if a new graph exceeds it, all others are dropped. None for no limit.
        clone: return copies of the outputs. False returns the graph's own, which the next call with that shape
            overwrites.
        warmups: eager calls before a capture.
        training: capture also where gradients are wanted.

    Raises:
        TypeError, ValueError: bad input; the message names the argument.

    Attributes:
        reason: the reason why the last call was not replayed; None if it was.
        captures: the number of graphs captured so far.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        entries: int = 8,
        max_bytes: int | None = None,
        clone: bool = True,
        warmups: int = 2,
        training: bool = False,
        device: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module; got {describe(model)}")
        for name, value, least in (("entries", entries, 1), ("warmups", warmups, 1), ("max_bytes", max_bytes, 1)):
            allowed = value is None and name == "max_bytes"
            if not allowed and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name}: expected an integer of at least {least}; got {value!r}")
        options = (entries, max_bytes, bool(clone), warmups, bool(training), False)
        self._start(model, CudaDevice() if device is None else device, *options)

    def __len__(self) -> int:
        return len(self._kept)

    def __getstate__(self) -> dict[str, Any]:
        """The model and the options: a copied or pickled instance captures its graphs anew."""
        return {name: getattr(self, name) for name in ("model", *_OPTIONS)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._start(state["model"], CudaDevice(), *(state[name] for name in _OPTIONS))

    def _start(
        self,
        model: nn.Module,
        device: Any,
        entries: int,
        max_bytes: int | None,
        clone: bool,
        warmups: int,
        training: bool,
        attached: bool,
    ) -> None:
        self.model = model
        self.entries, self.max_bytes, self.clone, self.warmups = entries, max_bytes, clone, warmups
        self.training = training
        self.attached = False
        if attached:
            self._is_attached()
        self.reason: str | None = None
        self.captures = 0
        self._device = device
        self._kept: OrderedDict[Hashable, Graph] = OrderedDict()
        self._failed: dict[Hashable, tuple[Any, str]] = {}
        self._pending: weakref.ref[Any] | None = None
        self._said: set[str] = set()
        self._detached = self._capturing = False
        self._lock = threading.RLock()

    def attach(self) -> None:
        """Makes this the `forward` of its model, until :meth:`detach`.

        Calls with targets, which are lists, run the model's own code, whose parts that :func:`captured` marks are
        replayed. Passes with gradients are captured only in training mode.
        """
        self._is_attached()
        vars(self.model).update({"forward": self, ATTACHED: self})

    def _is_attached(self) -> None:
        self.attached = True
        # Trainers ask for the names of a model's inputs.
        self.__signature__ = inspect.signature(type(self.model).forward.__get__(self.model))

    def detach(self) -> None:
        """Gives the model its own `forward` back. Where other code has wrapped this one, it only runs that."""
        self.attached, self._detached = False, True
        vars(self.model).pop(ATTACHED, None)
        if vars(self.model).get("forward") is self:
            del vars(self.model)["forward"]
        self.clear()

    @property
    def _is_forward(self) -> bool:
        return self.attached or self._detached or vars(self.model).get("forward") is self

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """The model itself, with this instance as the one that replays its parts."""
        before = getattr(_running, "graphs", None)
        _running.graphs = self if self.attached else None
        try:
            return self._run_alone(*args, **kwargs)
        finally:
            _running.graphs = before

    def _run_alone(self, *args: Any, **kwargs: Any) -> Any:
        """The model itself, whose `forward` this may be."""
        if self._is_forward:
            return type(self.model).forward(self.model, *args, **kwargs)
        return self.model(*args, **kwargs)

    def clear(self) -> None:
        """Drop all graphs and their memory."""
        with self._lock:
            self._drop()
            self._failed.clear()

    def _drop(self) -> None:
        self._kept.clear()
        self._pending = None
        self._device.reset()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or self._detached:
            return self._run_alone(*args, **kwargs)
        if self.attached and any(isinstance(x, (list, tuple, dict)) for x in (*args, *kwargs.values())):
            return self._run_in_parts(args, kwargs)
        return self._call(self._run, None, args, kwargs)

    def _run_in_parts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's own code, which has parts that are replayed."""
        self.reason = _NO_PART
        out = self._run(*args, **kwargs)
        if self.reason == _NO_PART:
            self._say(_NO_PART)
        return out

    def _part(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """A function that replays `method` of a module of the model."""
        module, name = getattr(method, "__self__", None), getattr(method, "__name__", "")

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._call(method, (id(module), name), args, kwargs)

        return call

    def _call(self, run: Callable[..., Any], part: Hashable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replays `run`; `part` tells it from other parts of the model."""
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        with self._lock:
            if part is not None and self._capturing:  # within a graph of the whole
                return run(*args, **kwargs)
            seen = _Seen(self.model)
            differentiates = torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, *seen.weights))
            reason = self._refusal(seen, leaves, tensors, differentiates)
            if reason is None:
                with self._device.on(tensors[0].device):
                    key = part, *self._key(seen, leaves, spec, differentiates)
                    reason = self._capture(key, run, seen, leaves, spec, differentiates)
                    if reason is None:
                        self.reason = None
                        return self._replay(self._kept[key], tensors)
            self.reason = reason
        self._say(reason)
        return run(*args, **kwargs)

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"CudaGraphs: {type(self.model).__name__} runs without a graph: {reason}", stacklevel=4)

    def _refusal(self, seen: _Seen, leaves: list[Any], tensors: list[Tensor], differentiates: bool) -> str | None:
        """The reason why this call cannot be replayed, or None."""
        kind = self._device.type
        if not tensors:
            return "no input is a tensor"
        if any(type(x) is not Tensor for x in tensors):
            return "an input is a subclass of torch.Tensor"
        device = tensors[0].device
        for x in (*tensors, *seen.weights):
            if x.device != device or device.type != kind:
                if x.device.type != kind:
                    return f"a tensor is on '{x.device}', and graphs are of '{kind}' devices"
                return f"tensors are on '{device}' and '{x.device}'"
            if type(x) not in (Tensor, nn.Parameter):
                return f"a weight is a {type(x).__name__}"
        training = any(x.training for x in seen.modules)
        # Who differentiates a model that is not in training mode has most likely forgotten to switch gradients off.
        if not (differentiates and self.training and (training or not self.attached)):
            if training:
                return "the model is in training mode"
            if differentiates:
                return "gradients are wanted; call it under torch.no_grad() or torch.inference_mode()"
        # Hooks of a model whose forward this is run around it.
        inner = seen.modules[1:] if self._is_forward else seen.modules
        globally = nn.modules.module
        if (
            any(_hooked(x) for x in inner if x._forward_hooks or x._forward_pre_hooks)
            or globally._global_forward_hooks
            or globally._global_forward_pre_hooks
        ):
            return "a hook is registered on a module"
        if differentiates and (reason := seen.training_problem()) is not None:
            return reason
        if torch._C._len_torch_dispatch_stack() or transformed() or torch._C._get_tracing_state() is not None:
            return "something looks at every operator, or transforms it"
        if self._device.capturing(device):
            return "a graph is being captured already"
        if self._pending is not None and self._pending() is not None:
            return "the backward pass of the last replay is still to come"
        unhashable = [x for x in leaves if not isinstance(x, (Tensor, *_PLAIN))]
        return f"an argument is {describe(unhashable[0])}" if unhashable else None

    def _key(self, seen: _Seen, leaves: list[Any], spec: Any, differentiates: bool) -> tuple[Hashable, ...]:
        """Everything besides the weights that determines the kernels of a call."""
        shown = tuple(
            (tuple(x.shape), x.stride(), x.dtype, x.device, differentiates and x.requires_grad)
            if isinstance(x, Tensor)
            else (type(x), x)
            for x in leaves
        )
        kind = self._device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        modes = (
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_float32_matmul_precision(),
            torch.backends.cudnn.allow_tf32, torch.are_deterministic_algorithms_enabled(), dispatch.forced(),
        )  # fmt: skip
        # Without gradients no module is in training mode.
        return shown, str(spec), cast, modes, tuple(x.training for x in seen.modules) if differentiates else None

    def _capture(
        self,
        key: Hashable,
        run: Callable[..., Any],
        seen: _Seen,
        leaves: list[Any],
        spec: Any,
        differentiates: bool,
    ) -> str | None:
        """Makes sure that there is a valid graph for `key`; returns the reason if there cannot be one."""
        for other, graph in list(self._kept.items()):
            # With gradients the graph reads the current weights; only unchanged ones are cached in another form.
            valid = all(x.valid() for x in graph.held) if graph.backward else graph.versions == seen.versions
            if not valid or graph.stamp != seen.stamp:
                del self._kept[other]
        if key in self._kept:
            self._kept.move_to_end(key)
            return None
        failed = self._failed.get(key)
        if failed is not None and failed[0] == seen.stamp:
            return failed[1]
        while len(self._kept) >= self.entries:
            self._kept.popitem(last=False)
        if not self._kept:
            self._drop()
        try:
            graph = self._captured(run, seen, leaves, spec, differentiates)
            if self.max_bytes is not None and self._kept and self._device.bytes() > self.max_bytes:
                self._drop()  # a pool does not shrink while a graph is in it
                del graph
                graph = self._captured(run, seen, leaves, spec, differentiates)
        except RuntimeError as error:
            reason = f"its capture failed: {str(error).splitlines()[0]}"
            if len(self._failed) >= _FAILURES:
                self._failed.clear()
            self._failed[key] = seen.stamp, reason
            return reason
        graph.stamp, graph.versions = seen.stamp, seen.versions
        self._kept[key] = graph
        return None

    def _captured(
        self, call: Callable[..., Any], seen: _Seen, leaves: list[Any], spec: Any, differentiates: bool
    ) -> Graph:
        static = [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves]
        inputs = [x for x in static if isinstance(x, Tensor)]
        wanted: list[Tensor] = []
        if differentiates:
            for x, given in zip(inputs, (x for x in leaves if isinstance(x, Tensor)), strict=True):
                x.requires_grad_(given.requires_grad)
            wanted = [x for x in (*inputs, *seen.weights) if x.requires_grad]
        args, kwargs = tree_unflatten(static, spec)

        def run() -> Any:
            # Flattened here: what is computed on access belongs to the graph.
            return tree_flatten(call(*args, **kwargs))

        def run_both() -> None:
            Backward(Graph(inputs, run()), wanted).run()

        with _no_cast_is_kept(), constants.holding() as held, contextlib.ExitStack() as stack:
            stack.enter_context(self._capturing_one())
            if differentiates:
                stack.enter_context(_buffers_stay(seen))
            self._device.warm_up(run_both if differentiates else run, self.warmups)
            held.clear()
            result, replay = self._device.capture(run)
            graph = Graph(inputs, result, replay)
            if differentiates:
                graph.backward = Backward(graph, wanted)
                graph.backward.capture(self._device)
                graph.outputs = [x.detach() for x in graph.outputs]
            graph.held = list(held)
        self.captures += 1
        return graph

    @contextlib.contextmanager
    def _capturing_one(self) -> Iterator[None]:
        self._capturing = True
        try:
            yield
        finally:
            self._capturing = False

    def _replay(self, graph: Graph, tensors: list[Tensor]) -> Any:
        if graph.backward is None:
            return graph.result(self._forward(graph, tensors))
        by_place = {id(static): given for static, given in zip(graph.inputs, tensors, strict=True)}
        wanted = [by_place.get(id(x), x) for x in graph.backward.wanted]
        return graph.result(_Replay.apply(self, graph, tensors, *wanted))

    def _forward(self, graph: Graph, tensors: list[Tensor]) -> list[Tensor]:
        self._device.begin()
        for static, given in zip(graph.inputs, tensors, strict=True):
            static.copy_(given)
        graph.replay()
        outputs = [x.clone() for x in graph.outputs] if self.clone else list(graph.outputs)
        self._device.end()
        return outputs

    def _backward(self, backward: Backward, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        self._device.begin()
        for taken, grad in zip(backward.taken, grads, strict=True):
            if taken is not None and grad is None:
                taken.zero_()
            elif taken is not None and grad is not None:
                taken.copy_(grad)
        backward.replay()
        given: list[Tensor | None] = [None] * len(backward.given)
        by_dtype: dict[torch.dtype, list[tuple[int, Tensor]]] = {}
        for i, x in enumerate(backward.given):
            if x is not None:
                by_dtype.setdefault(x.dtype, []).append((i, x))
        for found in by_dtype.values():  # copies of all in a few kernels: gradients may be added to, and kept
            for (i, _), copy in zip(found, torch._foreach_mul([x for _, x in found], 1), strict=True):
                given[i] = copy
        self._device.end()
        return given
