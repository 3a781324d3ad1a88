"""Registers this package's deformable attention with Hugging Face kernels (`use_kernels=True`), without a download.

`transformers` marks its layers with names ("MultiScaleDeformableAttention") and asks the `kernels` package for a
repository that implements the name on a model's device. :func:`patch` names this package for it, on CPU and CUDA.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from m2f_kernels._moved import forwarder
from m2f_kernels.ops.ms_deform_attn import ms_deform_attn

__all__ = ["patch", "unpatch"]

LAYER = "MultiScaleDeformableAttention"
DEVICES = ("cpu", "cuda")

#: For one more release.
__getattr__ = forwarder(__name__, {"register": f"{__name__}.patch", "unregister": f"{__name__}.unpatch"})


class MultiScaleDeformableAttention(nn.Module):
    """The layer, stateless and with the signature of `transformers`' classes of this name, as `kernels` requires."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """:func:`m2f_kernels.ms_deform_attn`; the sizes are read from the list, `im2col_step` has no effect."""
        # Levels follow each other in every model that has such a layer: its own code splits value by these sizes.
        return ms_deform_attn(value, value_spatial_shapes_list, None, sampling_locations, attention_weights)


@dataclass(frozen=True)
class _Repository:
    """A repository of layers as `kernels` expects it: it loads a class, can be a dictionary's key, and has a name.

    Its own `LocalLayerRepository` wants a directory with built variants for every torch and CUDA version, which it
    imports as a package apart: a second copy of this one.
    """

    layer_name: str = LAYER

    def load(self) -> type[nn.Module]:
        return MultiScaleDeformableAttention

    def __str__(self) -> str:
        return f"m2f_kernels, layer `{self.layer_name}`"


#: transformers' own entries by device, put aside by patch(). None: not patched.
_before: dict[str, Any] | None = None


def _mapping() -> dict[str, Any]:
    """`transformers`' table of layers, which it registers anew on every use of kernels."""
    try:
        integration: Any = importlib.import_module("transformers.integrations.hub_kernels")
        imports: Any = importlib.import_module("transformers.utils.import_utils")
    except ImportError as error:
        raise ImportError(
            "expected transformers (with integrations.hub_kernels) to be installed; pip install transformers kernels"
        ) from error
    # Older versions only check whether it can be imported, and store that in a flag.
    if not (imports.is_kernels_available() and getattr(integration, "_kernels_available", True)):
        low, high = getattr(imports, "KERNELS_MIN_VERSION", None), getattr(imports, "KERNELS_MAX_VERSION", None)
        wanted = "kernels" + (f" >= {low}" if low else "") + (f", < {high}" if high else "")
        version = importlib.import_module("transformers").__version__
        raise ImportError(f"expected {wanted}, which transformers {version} asks for; found {_found('kernels')}")
    if hasattr(integration, "get_kernel_mapping_transformers"):
        return integration.get_kernel_mapping_transformers()
    return integration._KERNEL_MAPPING


def _found(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {package}"


def patch() -> None:
    """Let `use_kernels=True`, `model.set_use_kernels(True)` and `kernels.kernelize(model)` use this package.

    It serves every model of `transformers` whose deformable attention is marked as replaceable, on CPU and CUDA, in
    training, inference and under `torch.compile`. It acts on models that are kernelized afterwards. A second call does
    nothing.

    Raises:
        ImportError: transformers is not installed, or `kernels` not in a version that it accepts.
    """
    global _before
    if _before is not None:
        return
    table = _mapping().setdefault(LAYER, {})
    _before = dict(table)
    for device in DEVICES:
        table[device] = _Repository()
    _tell_kernels(table)


def unpatch() -> None:
    """Put `transformers`' own entry back. Models that are kernelized already keep what they have.

    Raises:
        RuntimeError: nothing is patched.
    """
    global _before
    if _before is None:
        raise RuntimeError("nothing to undo: patch() has not been called")
    table = _mapping()[LAYER]
    table.clear()
    table.update(_before)
    _before = None
    _forget()
    _tell_kernels(table)


def _tell_kernels(table: dict[str, Any]) -> None:
    """Registers the layer in `kernels`' own table too, for code that calls `kernels` directly."""
    kernels: Any = importlib.import_module("kernels")
    kernels.register_kernel_mapping({LAYER: table})


def _forget() -> None:
    """Remove the layer from `kernels`' own table, where entries are only ever added."""
    state: Any = importlib.import_module("kernels.layer.globals")
    state._KERNEL_MAPPING.get().pop(LAYER, None)
