"""Export to ONNX: the operators as standard ones, such as GridSample, for onnxruntime and other runtimes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from m2f_kernels._checks import describe
from m2f_kernels._library import NAMESPACE
from m2f_kernels.integrations.decompositions import decompositions

__all__ = ["decompositions", "export"]

#: What PyTorch's exporter writes; GridSample with bilinear samples exists from 16 on, named as here from 20 on.
MIN_OPSET = 18
DEFAULT_OPSET = 20


def export(
    model: nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    path: str | Path | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    opset_version: int = DEFAULT_OPSET,
    **options: Any,
) -> torch.onnx.ONNXProgram:
    """`torch.onnx.export(..., dynamo=True)` of a model with this package's operators in it, for inference.

    The model is exported with its operators as single nodes (`torch.export`), these are decomposed
    (:func:`decompositions`), and the rest is PyTorch's exporter. float32 and float16.

    Args:
        model: in evaluation mode; or an exported program.
        args: example inputs, positional.
        path: file to write; None to write none.
        kwargs: example inputs, by name.
        dynamic_shapes: as in `torch.export.export`: which axes may vary. Tracing takes an axis of size 1 for a
            constant, so examples should have at least 2 of everything that varies, levels' sizes among it.
        opset_version: at least 18.
        options: of `torch.onnx.export`, for example `input_names` and `output_names`.

    Returns:
        PyTorch's ONNXProgram.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        ValueError, TypeError: bad input; the message names the argument. Also a model with an operator that only
            training needs.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"expected onnx and onnxscript to be installed; pip install {' '.join(missing)}")
    if isinstance(opset_version, bool) or not isinstance(opset_version, int):
        raise TypeError(f"opset_version: expected an integer of at least {MIN_OPSET}; got {describe(opset_version)}")
    if opset_version < MIN_OPSET:
        raise ValueError(
            f"opset_version: expected at least {MIN_OPSET}, which has GridSample and all other operators needed; "
            f"got {opset_version}"
        )
    if isinstance(model, ExportedProgram):
        if args or kwargs or dynamic_shapes is not None:
            raise ValueError("args, kwargs, dynamic_shapes: expected none with an exported program, which has its own")
        program = model
    elif isinstance(model, nn.Module):
        if model.training:
            raise ValueError("model: expected evaluation mode; call model.eval() first")
        if not isinstance(args, Sequence):
            raise TypeError(f"args: expected a tuple of example inputs; got {describe(args)}")
        with torch.no_grad():
            program = torch.export.export(model, tuple(args), dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
    else:
        raise TypeError(f"model: expected a module or an exported program; got {describe(model)}")
    ours = {node.target for node in program.graph.nodes if str(node.target).startswith(f"{NAMESPACE}.")}
    table = decompositions()
    if not ours <= table.keys():
        names = ", ".join(sorted(str(op) for op in ours - table.keys()))
        raise ValueError(f"model: expected inference only; {names} cannot be written as ONNX")
    # With gradients PyTorch's attention may be taken apart into other strides than it was traced with, and Swin fails.
    with torch.no_grad(), _known_to_the_exporter(table):
        exported = torch.onnx.export(
            program, (), None if path is None else str(path), dynamo=True, opset_version=opset_version, **options
        )
    assert exported is not None
    return exported


@contextmanager
def _known_to_the_exporter(table: Mapping[Any, Any]) -> Iterator[None]:
    """A context in which the exporter decomposes these operators with all others, in one pass.

    A separate pass before would fix the strides of operators that the exporter then decomposes to other strides, such
    as PyTorch's attention; and tracing twice takes twice as long.
    """
    known: dict[Any, Any] = torch._decomp.decomposition_table
    known.update(table)
    try:
        yield
    finally:
        for op in table:
            del known[op]
