"""Counts the kernels that a call launches on a GPU: with `torch.profiler` on one, with the dispatcher without one.

`python -m benchmarks.launches` counts a Mask2Former R50 in eager mode on any machine and prints tables. The rule:

- Inference runs on fake CUDA tensors (`FakeTensorMode`, and a device guard that does nothing), so that autocast's rules
  for CUDA apply; a training step runs on the meta device, whose backward pass stays in the calling thread. Nothing is
  computed but what lives on the CPU, for example the assignment, of random costs.
- Every operator that PyTorch's dispatcher sees is one kernel, unless it only makes a view, allocates or reads metadata;
  `KERNELS` lists the operators that are several on CUDA. A convolution with a bias is two: cuDNN's, and an addition.
- One whose outputs are all empty is none.
- An operator of this package that Triton serves is opened: its own Python code runs, and what it launches is counted,
  together with the operators of PyTorch around it. One of compiled CUDA is what its code launches (`NATIVE`).
- Copies between the host and the device are no kernels and counted by direction, and so are calls that wait for the
  device (`.item()`, `.cpu()`, `bool(tensor)`, `nonzero`). A copy from memory that is not pinned waits, too.

What this leaves out: kernels that cuBLAS and cuDNN add (split-K reductions, layout changes), fills of workspaces. On an
H200 the profiler counted 11-13 % more than this rule in inference, 8-13 % fewer in the loss.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import shutil
import subprocess
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import m2f_kernels
from benchmarks import arguments, old_new, static
from benchmarks.formats import markdown
from m2f_kernels import _transfer, dispatch
from m2f_model import bench
from m2f_model.criterion import total_loss

# ---------------------------------------------------------------- with a GPU


def kernels(events: Iterable[dict[str, Any]]) -> int:
    """The kernels among the events of a trace; copies and fills by the driver have categories of their own."""
    return sum(event.get("cat") == "kernel" for event in events)


def count(run: Callable[[], Any]) -> int:
    """Kernels that one call launches, the call being warm."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return kernels(json.loads(path.read_text())["traceEvents"])


# ---------------------------------------------------------------- without one

#: Views, allocations and metadata: no kernel.
FREE = {
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "view", "_unsafe_view", "reshape",
    "expand", "permute", "transpose", "t", "select", "slice", "unbind", "split", "split_with_sizes", "chunk",
    "unsqueeze", "squeeze", "detach", "detach_", "alias", "as_strided", "unfold", "diagonal", "lift_fresh",
    "_reshape_alias", "view_as", "set_", "resize_", "is_same_size", "record_stream", "tensor_split", "is_pinned",
    "device",
}  # fmt: skip
#: Operators of PyTorch that are not one kernel on CUDA.
KERNELS = {
    "native_layer_norm_backward": 3, "native_group_norm": 3, "native_group_norm_backward": 4, "convolution_backward": 2,
    "_scaled_dot_product_flash_attention_backward": 3, "_scaled_dot_product_efficient_attention_backward": 2,
    "sort": 4, "nonzero": 3,
}  # fmt: skip
#: Compiled CUDA: what an operator of this package launches; the backward pass fills a buffer with zeros first.
NATIVE = {
    "ms_deform_attn": 1, "ms_deform_attn_from_offsets": 1,
    "ms_deform_attn_backward": 2, "ms_deform_attn_from_offsets_backward": 2,
}  # fmt: skip
#: Compute capability whose launch configurations are counted.
CAPABILITY = 90


_ATTENTION = F.scaled_dot_product_attention


class Launches(TorchDispatchMode):
    """Counts under `with`; what runs in it lives on fake CUDA tensors or on the meta device.

    Attributes:
        kernels: by stage and operator.
        copies: "down" (device to host), "up" (host to device), "up, pinned".
        waits: calls that wait for the device.
        casts: the kernels that convert a parameter's dtype, by stage.
        stages: what is being counted is the last of them.
    """

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.kernels: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.copies, self.waits, self.casts = Counter[str](), Counter[str](), Counter[str]()
        self.stages = ["other"]
        self._parameters = {id(x) for x in parameters}
        self._inside_attention = False

    @contextlib.contextmanager
    def counting(self) -> Iterator[Launches]:
        """Count operators that run under `with`."""
        with (
            mock.patch.object(F, "scaled_dot_product_attention", self._attention),
            mock.patch.object(torch, "tensor", partial(self._from_numbers, torch.tensor)),
            mock.patch.object(torch, "as_tensor", partial(self._from_numbers, torch.as_tensor)),
            self,
        ):
            yield self

    def _attention(self, *args: Any, **kwargs: Any) -> Tensor:
        """Fused attention is one kernel, though fake tensors decompose it."""
        self._add("scaled_dot_product_attention")
        self._inside_attention = True
        found = _ATTENTION(*args, **kwargs)
        self._inside_attention = False
        return found

    def _from_numbers(self, make: Callable[..., Tensor], data: Any, *args: Any, **kwargs: Any) -> Tensor:
        """`torch.tensor` or `torch.as_tensor`: of numbers on a GPU it copies, which the meta device does not show."""
        found = make(data, *args, **kwargs)
        if found.device.type == "meta" and not isinstance(data, Tensor):
            self._copy(torch.empty(0, device="cpu"))
        return found

    @property
    def total(self) -> int:
        return sum(found.total() for found in self.kernels.values())

    def watch(self, module: nn.Module, stage: str) -> None:
        """Count what `module` launches as `stage`; the innermost watched module decides."""

        def leave(*_: Any) -> None:
            self.stages.pop()

        module.register_forward_pre_hook(lambda *_: self.stages.append(stage))
        module.register_forward_hook(leave)

    def _add(self, name: str, kernels: int = 1) -> None:
        self.kernels[self.stages[-1]][name] += kernels

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside_attention:
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if func.namespace == "m2f":
            return self._operator(func, name, args, kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name == "_local_scalar_dense" and _on_device(given[0]):
            self.waits[name] += 1
            # A value with which the code continues: everything is finite, present and one.
            return given[0].dtype == torch.bool or (1.0 if given[0].dtype.is_floating_point else 1)
        if name == "_to_copy" and _on_device(args[0]) and torch.device(kwargs.get("device") or "meta").type == "cpu":
            self._copy(args[0])
            return _host_values(args[0], kwargs.get("dtype"))
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        there = [_on_device(x) for x in (*given, *made)]
        if name in ("_to_copy", "copy_") and any(there) and not all(there):
            self._copy(args[name == "copy_"])
        elif any(there) and not _is_free(func, name, args, made):
            if name == "nonzero":
                self.waits[name] += 1
            if name == "_to_copy" and {id(args[0]), id(args[0]._base)} & self._parameters:
                self.casts[self.stages[-1]] += 1
            biased = name == "convolution" and args[2] is not None
            self._add(name, KERNELS.get(name, 1) + biased)
        return out

    def _copy(self, source: Tensor) -> None:
        if _on_device(source):
            self.copies["down"] += 1
            self.waits["copy to the host"] += 1
        elif getattr(source, "pinned_here", False):
            self.copies["up, pinned"] += 1
        else:
            self.copies["up"] += 1
            self.waits["copy from memory that is not pinned"] += 1

    def _operator(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        implementation = _triton_implementations().get(name)
        if implementation is None:
            self._add(name, NATIVE[name])
            return func(*args, **kwargs)
        from m2f_kernels import _triton

        with self, _triton.recording(_triton.ARCHITECTURES[CAPABILITY]) as launches:
            out = implementation(*args, **kwargs)
        for launch in launches:
            self._add(launch.kernel.fn.__name__)
        return out


def _on_device(tensor: Tensor) -> bool:
    return tensor.device.type in ("cuda", "meta")


def _is_free(func: Any, name: str, args: Any, made: list[Tensor]) -> bool:
    """No kernel: a view, an allocation, metadata, or nothing but empty tensors. `to`, `contiguous` and `reshape` count
    as views, but copy where they must."""
    if made and not any(x.numel() for x in made):
        return True
    shares = func.is_view and (not made or made[0].untyped_storage()._cdata == args[0].untyped_storage()._cdata)
    return shares or (name in FREE and not func.is_view)


def _host_values(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Random costs between 0 and 1, which count as class 0 when they are read as labels."""
    generator = torch.Generator().manual_seed(0)
    costs = torch.rand(tensor.shape, generator=generator, dtype=torch.float32).mul_(0.99)
    return costs.to(dtype or tensor.dtype)


@contextlib.contextmanager
def _meta_as_device() -> Iterator[None]:
    """Gives tensors on the meta device a `pin_memory`: it returns a copy that remembers that it is pinned."""

    def pin(tensor: Tensor, *_: Any) -> Tensor:
        copy = tensor.clone()
        copy.pinned_here = True
        return copy

    with (
        mock.patch.object(Tensor, "pin_memory", pin),
        mock.patch.object(_transfer, "PINNED", {"meta"}),
    ):
        yield


@cache
def _triton_implementations() -> dict[str, Callable[..., Any]]:
    """Every operator that Triton serves: functions of its modules named as the operator."""
    modules = [vars(import_module(name)) for name in {op.triton for op in dispatch.OPERATORS.values()} - {None}]
    return {k: v for found in modules for k, v in found.items() if callable(v) and hasattr(torch.ops.m2f, k)}


_GUARD = """
#include <c10/core/impl/FakeGuardImpl.h>
static c10::impl::DeviceGuardImplRegistrar registrar(
    c10::DeviceType::CUDA, new c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>());
"""


@torch.library.register_fake("aten::cudnn_convolution_relu")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    stride, padding, dilation, groups = geometry
    return torch.ops.aten.convolution(x, weight, None, stride, padding, dilation, False, [0, 0], groups)


@torch.library.register_fake("aten::cudnn_convolution_add_relu")
def _(x: Tensor, weight: Tensor, z: Tensor, alpha: float | None, bias: Tensor | None, *geometry: Any) -> Tensor:
    return torch.empty_like(z)


@cache
def fake_cuda() -> None:
    """Register a device guard for CUDA that does nothing, for this process: fake CUDA tensors then need no CUDA, but
    g++ to compile it."""
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as directory:
        library = str(Path(directory) / "guard.so")
        command = ["g++", "-std=c++20", "-shared", "-fPIC", "-x", "c++", "-", "-o", library, f"-I{root / 'include'}"]
        command += [f"-L{root / 'lib'}", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
        subprocess.run(command, input=_GUARD, text=True, check=True)
        ctypes.CDLL(library)


@contextlib.contextmanager
def cuda_autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """CUDA's autocast, which `torch.autocast` switches on only where it sees a GPU; nothing for None."""
    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        torch.autocast("cuda", dtype, enabled=dtype is not None),
    ):
        yield


# ---------------------------------------------------------------- the model

#: Configuration of a count of inference -> implementation, dtype of the weights, autocast.
INFERENCE = {
    "ours, fp32": ("m2f", None, None),
    "ours, weights in bf16": ("m2f", torch.bfloat16, None),
    "ours, bf16 autocast": ("m2f", None, torch.bfloat16),
    "transformers, fp32": ("transformers", None, None),
    "accelerated, fp32": ("accelerated", None, None),
}
#: Stage -> the module of this package's model whose children are counted apart.
_LAYERS = {"encoder layers": "pixel_decoder.layers", "decoder layers": "transformer_decoder.layers"}


def inference(what: str, size: int = 512, backbone: str = "r50") -> Launches:
    """The kernels of one forward pass without gradients, the second of its kind: what is computed once is left out.

    Args:
        what: a key of `INFERENCE`.
        size: side of the image.
        backbone: as in `m2f bench`.
    """
    implementation, dtype, autocast = INFERENCE[what]
    fake_cuda()
    model = _build(backbone, implementation).to(dtype=dtype)
    ours = implementation == "m2f"
    stages = bench.stages(model, "m2f" if ours else "transformers")
    for stage, path in _LAYERS.items() if ours else ():
        stages += [(stage, layer) for layer in model.get_submodule(path).children()]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model.to_empty(device="cuda:0")
        pixels = torch.empty(1, 3, size, size, device="cuda:0", dtype=dtype)
        with cuda_autocast(autocast):
            model(pixels)
        # A new region of autocast: the old one keeps the parameters that it has cast.
        with Launches(model.parameters()).counting() as launches, cuda_autocast(autocast):
            for stage, module in stages:
                launches.watch(module, stage)
            model(pixels)
    return launches


def _build(backbone: str, implementation: str) -> Any:
    """A model on the meta device."""
    whose = "m2f" if implementation == "m2f" else "transformers"
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there, weights are not copied
        model = bench.build(bench.Case(backbone, device="meta"), whose)
    return m2f_kernels.accelerate(model).model if implementation == "accelerated" else model


def loss(size: int, batch: int, targets: int, backbone: str = "r50") -> Launches:
    """The kernels of matching, loss and their gradients for given predictions, on the meta device."""
    losses = old_new.loss_part(size, batch, targets, "meta", backbone)
    launches = Launches()
    with _meta_as_device():
        _step(launches, lambda: total_loss(losses()), "forward")
    return launches


def _step(launches: Launches, forward: Callable[[], Tensor], stage: str) -> None:
    """Count a forward pass as `stage`, where nothing that is watched runs, and its backward pass."""
    with launches.counting():
        launches.stages = [stage]
        total = forward()
        launches.stages = ["backward"]
        total.backward()


def training(implementation: str = "m2f", size: int = 512) -> Launches:
    """The kernels of a training step of R50 in fp32, one image with 10 targets, without the optimiser's, on the meta
    device: forward passes of model and loss, and the backward pass of both."""
    model = _build("r50", implementation).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    pixels, masks, labels = static.tensors(f"f32[1,3,{size},{size}] bool[10,{size},{size}] i64[10]")
    launches = Launches()
    launches.watch(model, "model")
    launches.watch(model.criterion, "loss")

    def forward() -> Tensor:
        if implementation == "m2f":
            return total_loss(model(pixels, [{"labels": labels, "masks": masks}]).losses)
        loss: Tensor = model(pixels, mask_labels=[masks], class_labels=[labels]).loss
        return loss

    with _meta_as_device():
        with Launches().counting():
            forward()  # what is computed once is left out
        _step(launches, forward, "loss")  # of which the sum is outside the model
    return launches


# ---------------------------------------------------------------- the command


def main() -> None:
    """Print the tables."""
    options = arguments(
        __doc__.partition("\n")[0],
        {
            "--size": {"type": int, "default": 512, "help": "side of the image in inference (default: 512)"},
            "--backbone": {"default": "r50", "help": "r50, swin-t, ... (default: r50)"},
            "--top": {"type": int, "default": 0, "metavar": "N", "help": "the N most frequent operators of each count"},
        },
    )
    if shutil.which("g++") is None:
        options.refuse("g++: expected on PATH, to compile a guard for fake CUDA tensors; got none")
    counts = {what: inference(what, options.size, options.backbone) for what in INFERENCE}
    stages = list(dict.fromkeys(stage for found in counts.values() for stage in found.kernels))
    print(f"Kernels of one forward pass, {options.backbone}, {options.size}²\n")
    print(_table(counts, stages, casts=True), "\n")
    losses = {f"{size}² N={n} T={t}": loss(size, n, t, options.backbone) for size, n, t in old_new.LOSSES.values()}
    print("Kernels of matching, loss and their gradients\n")
    print(_table(losses, ["forward", "backward"]), "\n")
    steps = {what: training(what, options.size) for what in ("m2f", "accelerated")}
    print(f"Kernels of a training step, r50, {options.size}², 10 targets, fp32, without the optimiser's\n")
    print(_table(steps, ["model", "loss", "backward"]))
    for what, found in (counts | losses | steps).items():
        for stage, names in found.kernels.items() if options.top else ():
            print(f"\n{what}, {stage}: " + ", ".join(f"{n} {name}" for name, n in names.most_common(options.top)))


def _table(counts: dict[str, Launches], stages: list[str], casts: bool = False) -> str:
    lines = []
    for what, found in counts.items():
        copies = ", ".join(f"{n} {way}" for way, n in found.copies.items()) or "0"
        cells = [found.total, *(found.kernels.get(stage, Counter()).total() for stage in stages)]
        lines.append([what, *cells, *[found.casts.total()] * casts, f"{copies}; {found.waits.total()}"])
    return markdown(["", "all", *stages, *["casts of parameters"] * casts, "copies; waits"], lines)


if __name__ == "__main__":
    main()
