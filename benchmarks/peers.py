"""The peers of multi-scale deformable attention, each in the configuration that suits it best.

An adapter takes float inputs (value, sampling_locations, attention_weights) and the levels, and converts them, untimed,
to the form that suits its implementation: contiguous, its own dtype, index tensors on the right device.

- PyTorch grid_sample: the function `transformers` itself calls, given float32 inputs whatever the case's dtype
  (bfloat16 coordinates would be wrong by a quarter of a pixel) and the level sizes as a list: nothing synchronises.
- torch-ms-deform-attn: computes in float32 only, so it gets float32 inputs and pays for no cast.
- deformops: given the case's dtype, float32 locations. GPU only: its CPU backend is the PyTorch form.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Implementation, Levels, Tensors

GRID_SAMPLE, TORCH_MS_DEFORM_ATTN = "PyTorch grid_sample", "torch-ms-deform-attn"
DEFORMOPS_TRITON, DEFORMOPS_CUDA = "deformops triton", "deformops cuda"

Attention = Callable[[Tensor, Levels, Tensor, Tensor], Tensor]


def version(distribution: str) -> str | None:
    """Installed version of a distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing(module: str) -> Callable[[], str | None]:
    """Says "not installed" where `module` cannot be found."""
    return lambda: None if importlib.util.find_spec(module) else "not installed"


def level_tensors(levels: Levels, device: torch.device) -> dict[str, Tensor]:
    """`spatial_shapes` [L, 2] and `level_start_index` [L] as the Deformable DETR operators take them."""
    shapes = torch.tensor(levels, dtype=torch.long)
    starts = shapes.prod(1).cumsum(0) - shapes.prod(1)
    return {"spatial_shapes": shapes.to(device), "level_start_index": starts.to(device)}


def as_float32(inputs: Tensors, levels: Levels) -> dict[str, Any]:
    """Every input contiguous and in float32, the levels as a list and as tensors."""
    arguments: dict[str, Any] = {name: tensor.float().contiguous() for name, tensor in inputs.items()}
    return arguments | {"levels": levels} | level_tensors(levels, inputs["value"].device)


def own_dtype(inputs: Tensors, levels: Levels) -> dict[str, Any]:
    """Every input contiguous and in the dtype it came in."""
    arguments: dict[str, Any] = {name: tensor.contiguous() for name, tensor in inputs.items()}
    return arguments | {"levels": levels} | level_tensors(levels, inputs["value"].device)


def _grid_sample_form(value: Tensor, levels: Levels, locations: Tensor, weights: Tensor) -> Tensor:
    """The same computation as in `transformers`, for when it is not installed."""
    n, _, heads, channels = value.shape
    queries, count, points = locations.shape[1], locations.shape[3], locations.shape[4]
    grids = 2 * locations - 1
    samples = []
    for i, (level, (h, w)) in enumerate(zip(value.split([h * w for h, w in levels], dim=1), levels, strict=True)):
        image = level.flatten(2).transpose(1, 2).reshape(n * heads, channels, h, w)
        grid = grids[:, :, :, i].transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = weights.transpose(1, 2).reshape(n * heads, 1, queries, count * points)
    output = (torch.stack(samples, dim=-2).flatten(-2) * weights).sum(-1).view(n, heads * channels, queries)
    return output.transpose(1, 2).contiguous()


_grid_sample: Attention | None = None


def grid_sample(value: Tensor, levels: Levels, locations: Tensor, weights: Tensor) -> Tensor:
    """The PyTorch form: `transformers`' own function where it is installed."""
    global _grid_sample
    if _grid_sample is None:
        try:
            module = importlib.import_module("transformers.models.mask2former.modeling_mask2former")
            _grid_sample = module.multi_scale_deformable_attention
        except (ImportError, AttributeError):
            _grid_sample = _grid_sample_form
    return _grid_sample(value, levels, locations, weights)


def grid_sample_source() -> str:
    """The source of the PyTorch form, in words for the report."""
    installed = version("transformers")
    return f"transformers {installed}, mask2former" if installed else "this repository's copy of transformers' form"


def eager_prologue(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Sampling locations and attention weights from offsets and logits, as every published module computes them."""
    offsets, logits = arguments["sampling_offsets"], arguments["attention_logits"]
    sizes = arguments["spatial_shapes"].flip(-1).to(offsets.dtype)
    weights = logits.flatten(3).softmax(-1).view_as(logits)
    reference = arguments["reference_points"][:, :, None, :, None, :]
    return reference + offsets / sizes[None, None, None, :, None, :], weights


def _torch_ms_deform_attn(a: dict[str, Any], locations: Tensor, weights: Tensor) -> Tensor:
    module = importlib.import_module("torch_ms_deform_attn")
    output: Tensor = module.ms_deform_attn(a["value"], a["spatial_shapes"], a["level_start_index"], locations, weights)
    return output


def _deformops(backend: str) -> Callable[[dict[str, Any]], Tensor]:
    def call(a: dict[str, Any]) -> Tensor:
        registry = importlib.import_module("deformops.registry")
        output: Tensor = registry.msda(
            a["value"],
            a["spatial_shapes"],
            a["level_start_index"],
            a["sampling_locations"],
            a["attention_weights"],
            backend=getattr(registry.Backend, backend),
        )
        return output

    return call


def _deformops_inputs(inputs: Tensors, levels: Levels) -> dict[str, Any]:
    arguments = own_dtype(inputs, levels)
    arguments["attention_weights"] = arguments["attention_weights"].to(inputs["value"].dtype)
    return arguments


def attention_peers(device: str) -> list[Implementation]:
    """Peers of `ms_deform_attn`."""
    peers = [
        Implementation(
            GRID_SAMPLE,
            lambda a: grid_sample(a["value"], a["levels"], a["sampling_locations"], a["attention_weights"]),
            as_float32,
        ),
        Implementation(
            TORCH_MS_DEFORM_ATTN,
            lambda a: _torch_ms_deform_attn(a, a["sampling_locations"], a["attention_weights"]),
            as_float32,
            unavailable=missing("torch_ms_deform_attn"),
        ),
    ]
    if device == "cuda":
        peers += [
            Implementation(name, _deformops(backend), _deformops_inputs, unavailable=missing("deformops"))
            for name, backend in ((DEFORMOPS_TRITON, "TRITON"), (DEFORMOPS_CUDA, "CUDA"))
        ]
    return peers


def prologue_peers() -> list[Implementation]:
    """Peers of `ms_deform_attn_from_offsets`: the eager prologue in front of peers of `ms_deform_attn`."""

    def pytorch(a: dict[str, Any]) -> Tensor:
        locations, weights = eager_prologue(a)
        return grid_sample(a["value"], a["levels"], locations, weights)

    return [
        Implementation(f"eager prologue + {GRID_SAMPLE}", pytorch, as_float32),
        Implementation(
            f"eager prologue + {TORCH_MS_DEFORM_ATTN}",
            lambda a: _torch_ms_deform_attn(a, *eager_prologue(a)),
            as_float32,
            unavailable=missing("torch_ms_deform_attn"),
        ),
    ]
