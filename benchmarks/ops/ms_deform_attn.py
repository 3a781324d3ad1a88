"""Multi-scale deformable attention: the encoder of Mask2Former's pixel decoder, and a decoder's few queries.

Its peers, each in the configuration that suits it best; inputs are converted to it untimed:

- PyTorch grid_sample: the function `transformers` itself calls, given float32 inputs whatever the case's dtype
  (bfloat16 coordinates would be wrong by a quarter of a pixel) and the level sizes as a list: nothing synchronises.
- torch-ms-deform-attn: computes in float32 only, so it gets float32 inputs and pays for no cast.
- deformops: given the case's dtype, float32 locations. GPU only: its CPU backend is the PyTorch form.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import m2f_kernels
from benchmarks import inputs
from benchmarks.cases import (
    DTYPES,
    OURS,
    Benchmark,
    Case,
    Data,
    Figure,
    Implementation,
    Levels,
    Scale,
    Tensors,
    Work,
    missing,
    ratio,
)  # fmt: skip
from benchmarks.memory import bytes_of
from benchmarks.tools import time_model

HEADS, CHANNELS, POINTS = 8, 256, 4
DECODER_QUERIES = 300
#: Queries of the reference evaluated at once: its fp64 intermediates then stay small.
REFERENCE_CHUNK = 2048
OURS_FLOAT32, OURS_EAGER = "m2f_kernels, float32 inputs", "eager prologue + m2f_kernels"
GRID_SAMPLE, TORCH_MS_DEFORM_ATTN = "PyTorch grid_sample", "torch-ms-deform-attn"
DEFORMOPS_TRITON, DEFORMOPS_CUDA = "deformops triton", "deformops cuda"
WAYS = ("forward", "forward+backward")
_BY_QUERY = ("sampling_locations", "attention_weights", "reference_points", "sampling_offsets", "attention_logits")

# ---------------------------------------------------------------- implementations


def level_tensors(levels: Levels, device: torch.device) -> dict[str, Tensor]:
    """`spatial_shapes` [L, 2] and `level_start_index` [L] as the Deformable DETR operators take them."""
    shapes = torch.tensor(levels, dtype=torch.long)
    starts = shapes.prod(1).cumsum(0) - shapes.prod(1)
    return {"spatial_shapes": shapes.to(device), "level_start_index": starts.to(device)}


def own_dtype(inputs: Tensors, levels: Levels) -> dict[str, Any]:
    """Every input contiguous and in the dtype it came in, the levels as a list and as tensors."""
    arguments: dict[str, Any] = {name: tensor.contiguous() for name, tensor in inputs.items()}
    return arguments | {"levels": levels} | level_tensors(levels, inputs["value"].device)


def as_float32(inputs: Tensors, levels: Levels) -> dict[str, Any]:
    """The same in float32."""
    return own_dtype({name: tensor.float() for name, tensor in inputs.items()}, levels)


def _deformops_inputs(inputs: Tensors, levels: Levels) -> dict[str, Any]:
    return own_dtype(inputs | {"attention_weights": inputs["attention_weights"].to(inputs["value"].dtype)}, levels)


def grid_sample_form(value: Tensor, levels: Levels, locations: Tensor, weights: Tensor) -> Tensor:
    """Deformable DETR's `ms_deform_attn_core_pytorch`, as it is in transformers, detectron2's Mask2Former and mmcv."""
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


def eager_prologue(a: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Sampling locations and attention weights from offsets and logits, as every published module computes them."""
    offsets, logits = a["sampling_offsets"], a["attention_logits"]
    sizes = a["spatial_shapes"].flip(-1).to(offsets.dtype)
    locations = a["reference_points"][:, :, None, :, None, :] + offsets / sizes[None, None, None, :, None, :]
    return locations, logits.flatten(3).softmax(-1).view_as(logits)


def _given(a: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return a["sampling_locations"], a["attention_weights"]


def _ours(a: dict[str, Any], samples: Callable[..., tuple[Tensor, Tensor]] = _given) -> Tensor:
    return m2f_kernels.ms_deform_attn(a["value"], a["levels"], None, *samples(a))


def _from_offsets(a: dict[str, Any]) -> Tensor:
    names = ("reference_points", "sampling_offsets", "attention_logits")
    return m2f_kernels.ms_deform_attn_from_offsets(a["value"], a["levels"], *(a[name] for name in names))


def _pytorch(a: dict[str, Any], samples: Callable[..., tuple[Tensor, Tensor]] = _given) -> Tensor:
    published = importlib.import_module("transformers.models.mask2former.modeling_mask2former")
    output: Tensor = published.multi_scale_deformable_attention(a["value"], a["levels"], *samples(a))
    return output


def _compiled(a: dict[str, Any], samples: Callable[..., tuple[Tensor, Tensor]] = _given) -> Tensor:
    module = importlib.import_module("torch_ms_deform_attn")
    output: Tensor = module.ms_deform_attn(a["value"], a["spatial_shapes"], a["level_start_index"], *samples(a))
    return output


def _deformops(a: dict[str, Any], backend: str) -> Tensor:
    registry = importlib.import_module("deformops.registry")
    shapes, backend = (a["spatial_shapes"], a["level_start_index"]), getattr(registry.Backend, backend)
    output: Tensor = registry.msda(a["value"], *shapes, *_given(a), backend=backend)
    return output


def _peers(device: str, samples: Callable[..., tuple[Tensor, Tensor]] = _given) -> list[Implementation]:
    """Peers of `ms_deform_attn`; with the eager prologue in front, of `ms_deform_attn_from_offsets`."""
    front, absent = "" if samples is _given else "eager prologue + ", missing("torch_ms_deform_attn")
    compiled = partial(_compiled, samples=samples)
    found = [
        Implementation(f"{front}{GRID_SAMPLE}", partial(_pytorch, samples=samples), as_float32),
        Implementation(f"{front}{TORCH_MS_DEFORM_ATTN}", compiled, as_float32, unavailable=absent),
    ]
    backends = ((DEFORMOPS_TRITON, "TRITON"), (DEFORMOPS_CUDA, "CUDA")) if device == "cuda" and not front else ()
    return found + [
        Implementation(name, partial(_deformops, backend=one), _deformops_inputs, unavailable=missing("deformops"))
        for name, one in backends
    ]


# ---------------------------------------------------------------- data


@cache
def _value(quick: bool, decoder: bool, batch: int) -> tuple[Tensor, Levels]:
    size = (400, 533) if quick else (800, 1066)
    if decoder:
        return inputs.flatten_levels(inputs.projected_levels(*size, CHANNELS, stride_64=True), HEADS, batch)
    side = 512 if quick else 1024
    return inputs.flatten_levels(inputs.projected_levels(side, side, CHANNELS)[::-1], HEADS, batch)


def _truth(tensors: Tensors, levels: Levels, grad_output: Tensor, leaves_of: tuple[str, ...], device: str) -> Tensors:
    """The reference in fp64, in chunks of queries; stored as float32, which adds 6e-8 to an error at most."""
    exact = {name: tensor.to(device, torch.float64) for name, tensor in tensors.items()}
    operator = _from_offsets if "sampling_offsets" in tensors else _ours
    truth: dict[str, list[Tensor]] = {name: [] for name in ("output", *leaves_of)}
    for start in range(0, grad_output.shape[1], REFERENCE_CHUNK):
        part = slice(start, start + REFERENCE_CHUNK)
        chunk: dict[str, Any] = {k: t[:, part] if k in _BY_QUERY else t for k, t in exact.items()}
        leaves = {name: chunk[name].detach().requires_grad_() for name in leaves_of}
        with m2f_kernels.use_backend("reference"), torch.set_grad_enabled(bool(leaves)):
            output = operator(chunk | leaves | {"levels": levels})
        truth["output"].append(output.detach())
        found = torch.autograd.grad(output, list(leaves.values()), grad_output[:, part].to(output)) if leaves else ()
        for name, gradient in zip(leaves, found, strict=True):
            if name in _BY_QUERY or not truth[name]:
                truth[name].append(gradient)
            else:
                truth[name][0] += gradient
    return {name: torch.cat(parts, 1).float().cpu() for name, parts in truth.items()}


def _build(scale: Scale, what: str, where: str, dtype: str, backward: bool) -> Data:
    """Inputs of an encoder ("encoder", or "from offsets") or a decoder, samples "local" or "random"."""
    batch = 2 if scale.device == "cuda" else 1
    value, levels = _value(scale.quick, what == "decoder", batch)
    queries = DECODER_QUERIES if what == "decoder" else value.shape[1]
    local = where == "local"
    locations = (
        inputs.local_locations(levels, batch, HEADS, POINTS)
        if local
        else inputs.random_locations(levels, batch, queries, HEADS, POINTS)
    )
    logits = inputs.attention_logits(batch, queries, HEADS, len(levels), POINTS)
    sampled = {
        "sampling_locations": locations, "attention_weights": logits.flatten(3).softmax(-1).view_as(logits),
    }  # fmt: skip
    if what == "from offsets":
        reference = inputs.reference_grid(levels, batch)
        offsets = inputs.offsets_of(locations, reference, levels)
        sampled = {"reference_points": reference, "sampling_offsets": offsets, "attention_logits": logits}
    tensors = {"value": value.to(DTYPES[dtype]), **sampled}
    differentiable = ("value", *list(sampled)[-2:])
    grad_output = torch.randn(batch, queries, CHANNELS, generator=inputs.generator(4))
    truth = _truth(tensors, levels, grad_output, differentiable if backward else (), scale.device)
    return Data(tensors, truth, levels, grad_outputs=(grad_output,), differentiable=differentiable)


def shrink(data: Data) -> Data:
    """The first 64 queries."""
    few = {name: tensor[:, :64] if name in _BY_QUERY else tensor for name, tensor in data.inputs.items()}
    return replace(data, inputs=few, grad_outputs=(data.grad_outputs[0][:, :64],))


# ---------------------------------------------------------------- cases


def cases(scale: Scale) -> list[Case]:
    cuda = scale.device == "cuda"
    ours, peers = Implementation(OURS, _ours, own_dtype, ours=True), _peers(scale.device)
    low_precision = [ours, Implementation(OURS_FLOAT32, _ours, as_float32, ours=True), *peers]
    prologue = [
        Implementation(OURS, _from_offsets, own_dtype, ours=True),
        Implementation(OURS_EAGER, partial(_ours, samples=eager_prologue), own_dtype, ours=True),
        *_peers(scale.device, eager_prologue),
    ]

    def case(
        what: str, where: str, dtype: str, way: str, implementations: list[Implementation], **options: Any
    ) -> Case:
        name, data = f"{what} {way}", what.replace(" ", "-")
        if what == "encoder":
            name, data = f"encoder {where} {dtype} {way}", f"encoder-{where}-{dtype}"
        build = partial(_build, scale, what, where, dtype, dtype == "fp32" or cuda)
        return Case(name, data, way, implementations, where, dtype, build=build, **options)

    def encoder(where: str, way: str, dtype: str, **options: Any) -> Case:
        usual = {
            "memory": where == "local" and (cuda or dtype == "fp32"),
            "headline": dtype == ("bf16" if cuda else "fp32"),
        }
        chosen = [ours, *peers] if dtype == "fp32" else low_precision
        return case("encoder", where, dtype, way, chosen, **usual | options)

    found = [encoder(where, way, "fp32") for way in WAYS for where in ("local", "random")]
    found += [case("from offsets", "local", "fp32", way, prologue, memory=True) for way in WAYS]
    if cuda:
        found += [encoder(where, way, "bf16") for way in WAYS for where in ("local", "random")]
    else:
        found.append(encoder("local", "forward", "bf16"))
    if not scale.quick:
        found.append(encoder("local", "forward", "fp16", full=True, memory=False))
    found += [case("decoder", "random", "fp32", way, [ours, *peers], full=True) for way in WAYS]
    if not cuda:
        single = encoder("local", "forward", "fp32", memory=False, headline=False, full=True)
        found.append(replace(single, name=f"{single.name} 1 thread", threads=1))
    return found


def work(case: Case, data: Data) -> Work:
    """Inputs read and outputs written once, of the value no more than is gathered; four rows of D per sample gathered.

    Forward + backward: the backward reads the inputs and the output's gradient and writes gradients, gathers
    every row again and adds to every row of the value's gradient (counted as a load and a store). On a GPU the rows
    of a tile of 8 x 8 queries count once, in L2 and in the gradient, since a block can keep them.
    """
    value, samples = data.inputs["value"], data.inputs[data.differentiable[-1]]
    rows = 4 * samples.numel() * value.shape[-1] * value.element_size()
    read = bytes_of(data.inputs.values()) - max(0, bytes_of([value]) - rows)
    output = data.grad_outputs[0].numel() * value.element_size()
    level = "l1" if case.distribution == "local" else "l2"
    gradients = bytes_of(data.inputs[name] for name in data.differentiable) if case.backward else 0
    passes = 2 if case.backward else 1
    moved = passes * (read + output) + gradients
    if value.device.type == "cpu":
        return {"bandwidth": moved, level: passes**2 * rows}
    if "sampling_locations" not in data.inputs or samples.shape[1] != value.shape[1]:
        return {"bandwidth": moved}  # the others are not counted
    found = time_model.touched(data.inputs["sampling_locations"][0].cpu(), data.levels, value.shape[0])
    row = value.shape[-1] * value.element_size()
    return {
        "bandwidth": moved,
        "l2 bytes": passes * (found.tile_rows * row + read + output - bytes_of([value])),
        # A quarter of a warp reads 128 bytes: a row of float32, two rows of 16 bits.
        "l1 cycles": passes * (found.corners if value.element_size() == 4 else found.pair_rows),
        "reductions": found.tile_rows * value.shape[-1] * 4 // 32 if case.backward else 0,
    }


_TIME, _PROLOGUE = "median_ms", "than ms_deform_attn after its eager prologue"
_OLD, _BEST = "faster than torch-ms-deform-attn in float32", "faster than deformops' best backend"


def _on_both(settings: int) -> list[Figure]:
    """Figures of both devices, with targets for so many allocator settings."""
    return [
        *(
            figure
            for case in ("from offsets forward", "from offsets forward+backward")
            for figure in (
                ratio(case, _TIME, OURS_EAGER, OURS, f"faster {_PROLOGUE}", *[1.3] * settings),
                ratio(case, "memory_extra_mib", OURS_EAGER, OURS, f"less peak extra memory {_PROLOGUE}", 2.0),
            )
        ),
        ratio("encoder local bf16 forward", _TIME, OURS_FLOAT32, OURS, "faster than in float32", *[1.0] * settings),
    ]


def _on_gpu(where: str, share: float) -> list[Figure]:
    forward, both, deformops = f"encoder {where} bf16 forward", WAYS[1], (DEFORMOPS_TRITON, DEFORMOPS_CUDA)
    return [
        ratio(forward, _TIME, TORCH_MS_DEFORM_ATTN, OURS, _OLD, 4.0),
        ratio(forward, _TIME, deformops, OURS, _BEST, 1.5),
        ratio(f"encoder {where} bf16 {both}", _TIME, TORCH_MS_DEFORM_ATTN, OURS, _OLD, 3.0),
        ratio(f"encoder {where} bf16 {both}", _TIME, deformops, OURS, _BEST, 1.3),
        ratio(forward, "floor_share", OURS, None, "share of the floor", share),
    ]


def _on_cpu(case: str, *targets: float) -> list[Figure]:
    compiled = ratio(case, _TIME, TORCH_MS_DEFORM_ATTN, OURS, f"faster than {TORCH_MS_DEFORM_ATTN}", 3.0)
    return [ratio(case, _TIME, GRID_SAMPLE, OURS, f"faster than {GRID_SAMPLE}", *targets), compiled]


FIGURES = {
    "cpu": [
        *_on_cpu("encoder local fp32 forward", 20.0, 10.0),
        *_on_cpu("encoder random fp32 forward", 14.0, 7.0),
        *_on_cpu("encoder local fp32 forward+backward", 12.0, 8.0),
        *_on_cpu("encoder random fp32 forward+backward", 10.0, 7.0),
        *_on_both(2),
    ],
    "cuda": [*_on_gpu("local", 1 / 2), *_on_gpu("random", 1 / 1.3), *_on_both(1)],
}


BENCHMARK = Benchmark(
    op="ms_deform_attn",
    title="Multi-scale deformable attention",
    description=(
        "Encoder: levels 32², 64², 128² of a 1024² photograph, one query per position (21504), 8 heads x 32 channels, "
        "4 points per level. Decoder: 300 queries anywhere on four levels (strides 8 to 64), 800 x 1066 photograph. "
        "Local: each query samples within a few pixels of its own position, as a trained encoder does; "
        "random: uniformly over the image. N = 1 on CPU, 2 on a GPU. `--quick` halves the image's sides."
    ),
    cases=cases,
    work=work,
    shrink=shrink,
    figures=FIGURES,
)
