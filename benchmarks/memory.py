"""Peak memory of one call.

CPU: the kernel's own peak of the resident set (`VmHWM` in /proc/self/status). One fresh process per measurement;
a small call first starts threads and loads code; `malloc_trim` returns what is free; writing 5 to
/proc/self/clear_refs resets the peak to the present; then the call runs once. glibc's mmap threshold is fixed
(`m2f_model.bench.ENVIRONMENT`), so that a freed tensor leaves the resident set at once and the peak is that of live
memory, not of the allocator's cache. `calibration` measures a known temporary by the same steps.

CUDA: `torch.cuda.max_memory_allocated`, the peak of live tensors in the caching allocator.

Both give: extra = peak - memory before the call - outputs, and total = inputs + outputs + extra. The outputs of
forward + backward are the output and the gradients. A call that yields its results and has them dropped one by one
has no outputs: its extra memory is all that it needs above its inputs.

Written: bytes of every tensor that an operator called through PyTorch's dispatcher writes, outputs and temporaries
alike; what an operator writes within itself is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 1 << 20
#: MiB that the kernel's page accounting and newly touched code pages may add.
RESOLUTION_MIB = 1.0


def bytes_of(tensors: Iterable[Any]) -> int:
    """Bytes of the tensors among `tensors`."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def peak_mib(run: Callable[[], Any], device: str) -> tuple[float, float]:
    """Peak growth over the memory in use before `run()`, and the size of what it returned, in MiB.

    Raises:
        OSError: on CPU, where the system has no resettable peak (anything but Linux).
    """
    from m2f_model import bench  # which needs more than those do who count bytes

    peak, result = bench.peak_mib(run, device)
    return peak, bytes_of(result) / MIB


def measure(run: Callable[[], Any], inputs: Iterable[Any], device: str) -> tuple[float, float]:
    """(extra, total) in MiB of one call; see the module's docstring."""
    peak, outputs = peak_mib(run, device)
    extra = max(0.0, peak - outputs)
    return extra, bytes_of(inputs) / MIB + outputs + extra


class Operations(TorchDispatchMode):
    """Counts, under `with`, operations that neither make a view nor leave memory uninitialised, and bytes they write.

    Attributes:
        names: of the operations, in order.
        written: bytes of their results.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        schema, name = func._schema, func.overloadpacket.__name__
        view = not schema.is_mutable and any(a.alias_info is not None for a in schema.arguments)
        if not (view or "empty" in name or name in ("detach", "_unsafe_view")):
            self.names.append(schema.name)
            self.written += bytes_of(tree_leaves(result))
        return result


def written(run: Callable[[], tuple[Tensor, ...]], count: bool = True) -> tuple[tuple[Tensor, ...], float | None]:
    """The result of `run()` and the MiB that it wrote; None in place of these if `count` is False."""
    with Operations() if count else nullcontext() as operations:
        result = run()
    return result, operations and operations.written / MIB


def calibration() -> float:
    """The extra memory measured, in MiB, of a call that needs exactly 64 MiB beside its 16 MiB output."""

    def known() -> tuple[Tensor, ...]:
        temporary = torch.ones(64 * MIB // 4)
        output = temporary[: 16 * MIB // 4] + 1
        return (output,)

    torch.ones(1 << 16).add(1)
    extra, _ = measure(known, (), "cpu")
    return extra
