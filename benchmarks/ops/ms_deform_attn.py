"""Multi-scale deformable attention: the encoder of Mask2Former's pixel decoder, and a decoder's few queries.

Its peers, each in the configuration that suits it best; inputs are converted to it untimed:

- PyTorch grid_sample: the function `transformers` itself calls, given float32 inputs whatever the case's dtype
  (bfloat16 coordinates would be wrong by a quarter of a pixel) and the level sizes as a list: nothing synchronises.
- torch-ms-deform-attn: computes in float32 only, so it gets float32 inputs and pays for no cast.
- deformops: given the case's dtype, float32 locations. GPU only: its CPU backend is the PyTorch form.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
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
    reference,
)  # fmt: skip
from benchmarks.measure import bytes_of
from benchmarks.tools import time_model

HEADS, CHANNELS, POINTS = 8, 256, 4
DECODER_QUERIES = 300
#: Samples are given as offsets and logits; other operators get locations and weights from an eager prologue.
FROM_OFFSETS, PROLOGUE = "from offsets", "eager prologue + "
OURS_FLOAT32, OURS_EAGER = "m2f_kernels, float32 inputs", f"{PROLOGUE}{OURS}"
GRID_SAMPLE, TORCH_MS_DEFORM_ATTN = "PyTorch grid_sample", "torch-ms-deform-attn"
DEFORMOPS_TRITON, DEFORMOPS_CUDA = "deformops triton", "deformops cuda"
WAYS, KINDS = ("forward", "forward+backward"), ("local", "random")
_AS_EXTENSION = ("value", "spatial_shapes", "level_start_index", "sampling_locations", "attention_weights")
_BY_QUERY = ("sampling_locations", "attention_weights", "reference_points", "sampling_offsets", "attention_logits")

# ---------------------------------------------------------------- implementations


def own_dtype(inputs: Tensors, levels: Levels) -> dict[str, Any]:
    """Every input contiguous and in the dtype it came in; the levels as a list, and as `spatial_shapes` [L, 2] and
    `level_start_index` [L], as the Deformable DETR operators take them."""
    shapes = torch.tensor(levels, device=inputs["value"].device)
    given = {"levels": levels, "spatial_shapes": shapes, "level_start_index": shapes.prod(1).cumsum(0) - shapes.prod(1)}
    return {name: tensor.contiguous() for name, tensor in inputs.items()} | given


def as_float32(inputs: Tensors, levels: Levels) -> dict[str, Any]:
    """The same in float32."""
    return own_dtype({name: tensor.float() for name, tensor in inputs.items()}, levels)


def _deformops_inputs(inputs: Tensors, levels: Levels) -> dict[str, Any]:
    return own_dtype(inputs | {"attention_weights": inputs["attention_weights"].to(inputs["value"].dtype)}, levels)


def eager_prologue(a: dict[str, Any]) -> dict[str, Any]:
    """Sampling locations and attention weights from offsets and logits, as every published module computes them."""
    offsets, logits = a["sampling_offsets"], a["attention_logits"]
    sizes = a["spatial_shapes"].flip(-1).to(offsets.dtype)
    locations = a["reference_points"][:, :, None, :, None, :] + offsets / sizes[None, None, None, :, None, :]
    return {"sampling_locations": locations, "attention_weights": logits.flatten(3).softmax(-1).view_as(logits)}


def _ours(a: dict[str, Any]) -> Tensor:
    return m2f_kernels.ms_deform_attn(a["value"], a["levels"], None, a["sampling_locations"], a["attention_weights"])


def _from_offsets(a: dict[str, Any]) -> Tensor:
    names = ("value", "levels", "reference_points", "sampling_offsets", "attention_logits")
    return m2f_kernels.ms_deform_attn_from_offsets(*(a[name] for name in names))


def _pytorch(a: dict[str, Any]) -> Tensor:
    published = importlib.import_module("transformers.models.mask2former.modeling_mask2former")
    names = ("value", "levels", "sampling_locations", "attention_weights")
    return published.multi_scale_deformable_attention(*(a[name] for name in names))


def _compiled(a: dict[str, Any]) -> Tensor:
    return importlib.import_module("torch_ms_deform_attn").ms_deform_attn(*(a[name] for name in _AS_EXTENSION))


def _deformops(a: dict[str, Any], backend: str) -> Tensor:
    registry = importlib.import_module("deformops.registry")
    return registry.msda(*(a[name] for name in _AS_EXTENSION), backend=getattr(registry.Backend, backend))


def _peers(device: str) -> list[Implementation]:
    backends = {DEFORMOPS_TRITON: "TRITON", DEFORMOPS_CUDA: "CUDA"} if device == "cuda" else {}
    return [
        Implementation(GRID_SAMPLE, _pytorch, as_float32),
        Implementation(TORCH_MS_DEFORM_ATTN, _compiled, as_float32, unavailable=missing("torch_ms_deform_attn")),
        *(
            Implementation(name, partial(_deformops, backend=one), _deformops_inputs, unavailable=missing("deformops"))
            for name, one in backends.items()
        ),
    ]


def _behind_prologue(one: Implementation) -> Implementation:
    """An implementation of `ms_deform_attn` as one of `ms_deform_attn_from_offsets`."""
    return replace(one, name=f"{PROLOGUE}{one.name}", call=lambda a: one.call(a | eager_prologue(a)))


# ---------------------------------------------------------------- data


@cache
def _value(quick: bool, decoder: bool, batch: int) -> tuple[Tensor, Levels]:
    encoded, decoded = ((512, 512), (400, 533)) if quick else ((1024, 1024), (800, 1066))
    maps = inputs.projected_levels(*(decoded if decoder else encoded), CHANNELS, stride_64=decoder)
    return inputs.flatten_levels(maps if decoder else maps[::-1], HEADS, batch)


def _build(scale: Scale, what: str, where: str, dtype: str, backward: bool) -> Data:
    """Inputs of an encoder ("encoder", or "from offsets") or a decoder, samples "local" or "random"."""
    batch = 2 if scale.device == "cuda" else 1
    value, levels = _value(scale.quick, what == "decoder", batch)
    queries = DECODER_QUERIES if what == "decoder" else value.shape[1]
    logits = inputs.attention_logits(batch, queries, HEADS, len(levels), POINTS)
    locations = (
        inputs.local_locations(levels, batch, HEADS, POINTS)
        if where == "local"
        else inputs.random_locations(levels, batch, queries, HEADS, POINTS)
    )
    sampled = {
        "sampling_locations": locations, "attention_weights": logits.flatten(3).softmax(-1).view_as(logits),
    }  # fmt: skip
    if what == FROM_OFFSETS:
        centres = inputs.reference_grid(levels, batch)
        offsets = inputs.offsets_of(locations, centres, levels)
        sampled = {"reference_points": centres, "sampling_offsets": offsets, "attention_logits": logits}
    tensors = {"value": value.to(DTYPES[dtype]), **sampled}
    differentiable = ("value", *list(sampled)[-2:])
    grad_output = torch.randn(batch, queries, CHANNELS, generator=inputs.generator(4))
    operator, wanted = _from_offsets if what == FROM_OFFSETS else _ours, differentiable if backward else ()
    given = tensors, scale.device, wanted, grad_output, _BY_QUERY
    truth = reference(lambda a: operator(a | {"levels": levels}), *given)
    return Data(tensors, truth, levels, grad_outputs=(grad_output,), differentiable=differentiable)


# ---------------------------------------------------------------- cases


def cases(scale: Scale) -> list[Case]:
    cuda = scale.device == "cuda"
    ours, peers = Implementation(OURS, _ours, own_dtype, ours=True), _peers(scale.device)
    low_precision = [ours, Implementation(OURS_FLOAT32, _ours, as_float32, ours=True), *peers]
    prologue = [
        Implementation(OURS, _from_offsets, own_dtype, ours=True), *map(_behind_prologue, [ours, *_peers("cpu")]),
    ]  # fmt: skip

    def case(what: str, where: str, dtype: str, way: str, suffix: str = "", **options: Any) -> Case:
        data = f"{what} {where} {dtype}" if what == "encoder" else what
        chosen = prologue if what == FROM_OFFSETS else [ours, *peers] if dtype == "fp32" else low_precision
        build = partial(_build, scale, what, where, dtype, dtype == "fp32" or cuda)
        return Case(f"{data} {way}{suffix}", data, way, chosen, where, dtype, build=build, **options)

    def encoder(where: str, way: str, dtype: str, **options: Any) -> Case:
        memory, headline = where == "local" and (cuda or dtype == "fp32"), dtype == ("bf16" if cuda else "fp32")
        return case("encoder", where, dtype, way, **{"memory": memory, "headline": headline} | options)

    every = [(where, way) for way in WAYS for where in KINDS]
    found = [
        *(encoder(*one, "fp32") for one in every),
        *(case(FROM_OFFSETS, "local", "fp32", way, memory=True) for way in WAYS),
        *(encoder(*one, "bf16") for one in (every if cuda else every[:1])),
    ]
    if not scale.quick:
        found.append(encoder("local", "forward", "fp16", full=True, memory=False))
    found += [case("decoder", "random", "fp32", way, full=True) for way in WAYS]
    single = {"suffix": " 1 thread", "threads": 1, "full": True, "memory": False, "headline": False}
    return found if cuda else [*found, encoder("local", "forward", "fp32", **single)]


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
_DEFORMOPS = (DEFORMOPS_TRITON, DEFORMOPS_CUDA)
_OLD, _BEST = "faster than torch-ms-deform-attn in float32", "faster than deformops' best backend"


def _on_both(settings: int) -> list[Figure]:
    """Figures of both devices, with targets for so many allocator settings."""
    return [
        *(
            figure
            for case in (f"{FROM_OFFSETS} {way}" for way in WAYS)
            for figure in (
                ratio(case, _TIME, OURS_EAGER, OURS, f"faster {_PROLOGUE}", *[1.3] * settings),
                ratio(case, "memory_extra_mib", OURS_EAGER, OURS, f"less peak extra memory {_PROLOGUE}", 2.0),
            )
        ),
        ratio("encoder local bf16 forward", _TIME, OURS_FLOAT32, OURS, "faster than in float32", *[1.0] * settings),
    ]


FIGURES = {
    "cpu": [
        *(
            figure
            for case, *aims in (
                ("encoder local fp32 forward", 20.0, 10.0),
                ("encoder random fp32 forward", 14.0, 7.0),
                ("encoder local fp32 forward+backward", 12.0, 8.0),
                ("encoder random fp32 forward+backward", 10.0, 7.0),
            )
            for figure in (
                ratio(case, _TIME, GRID_SAMPLE, OURS, f"faster than {GRID_SAMPLE}", *aims),
                ratio(case, _TIME, TORCH_MS_DEFORM_ATTN, OURS, f"faster than {TORCH_MS_DEFORM_ATTN}", 3.0),
            )
        ),
        *_on_both(2),
    ],
    "cuda": [
        *(
            figure
            for where, share in (("local", 1 / 2), ("random", 1 / 1.3))
            for forward, both in ((f"encoder {where} bf16 forward", f"encoder {where} bf16 forward+backward"),)
            for figure in (
                ratio(forward, _TIME, TORCH_MS_DEFORM_ATTN, OURS, _OLD, 4.0),
                ratio(forward, _TIME, _DEFORMOPS, OURS, _BEST, 1.5),
                ratio(both, _TIME, TORCH_MS_DEFORM_ATTN, OURS, _OLD, 3.0),
                ratio(both, _TIME, _DEFORMOPS, OURS, _BEST, 1.3),
                ratio(forward, "floor_share", OURS, None, "share of the floor", share),
            )
        ),
        *_on_both(1),
    ],
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
    quarters=dict.fromkeys((*_BY_QUERY, "grad_output"), (1,)),
    figures=FIGURES,
)
