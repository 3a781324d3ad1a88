"""Multi-scale deformable attention: the encoder of Mask2Former's pixel decoder, and a decoder's few queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import m2f_kernels
from benchmarks import inputs, peers
from benchmarks.cases import (
    Benchmark,
    Case,
    Data,
    Figure,
    Implementation,
    Levels,
    Scale,
    Tensors,
    Work,
)
from benchmarks.memory import bytes_of

HEADS, CHANNELS, POINTS = 8, 256, 4
DECODER_QUERIES = 300
#: Queries of the reference evaluated at once: its fp64 intermediates then stay small.
REFERENCE_CHUNK = 2048

OURS = "m2f_kernels"
OURS_FLOAT32 = "m2f_kernels, float32 inputs"
OURS_EAGER = "eager prologue + m2f_kernels"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BY_QUERY = ("sampling_locations", "attention_weights", "reference_points", "sampling_offsets", "attention_logits")
_ATTENTION = ("value", "sampling_locations", "attention_weights")
_FROM_OFFSETS = ("value", "sampling_offsets", "attention_logits")


# ---------------------------------------------------------------- implementations


def _attention(a: dict[str, Any]) -> Tensor:
    return m2f_kernels.ms_deform_attn(a["value"], a["levels"], None, a["sampling_locations"], a["attention_weights"])


def _from_offsets(a: dict[str, Any]) -> Tensor:
    return m2f_kernels.ms_deform_attn_from_offsets(
        a["value"], a["levels"], a["reference_points"], a["sampling_offsets"], a["attention_logits"]
    )


def _eager_prologue(a: dict[str, Any]) -> Tensor:
    locations, weights = peers.eager_prologue(a)
    return m2f_kernels.ms_deform_attn(a["value"], a["levels"], None, locations, weights)


def _operator(inputs_: Tensors) -> Callable[[dict[str, Any]], Tensor]:
    return _from_offsets if "sampling_offsets" in inputs_ else _attention


# ---------------------------------------------------------------- data


def _batch(scale: Scale) -> int:
    return 2 if scale.device == "cuda" else 1


@cache
def _encoder_value(quick: bool, batch: int) -> tuple[Tensor, Levels]:
    size = 512 if quick else 1024
    coarse_to_fine = inputs.projected_levels(size, size, CHANNELS)[::-1]
    return inputs.flatten_levels(coarse_to_fine, HEADS, batch)


def _truth(
    tensors: Tensors, levels: Levels, grad_output: Tensor, differentiable: Sequence[str], backward: bool, device: str
) -> Tensors:
    """The reference in fp64, in chunks of queries; stored as float32, which adds 6e-8 to an error at most."""
    exact = {name: tensor.to(device, torch.float64) for name, tensor in tensors.items()}
    operator, queries = _operator(tensors), grad_output.shape[1]
    outputs: list[Tensor] = []
    gradients: dict[str, list[Tensor]] = {name: [] for name in differentiable}
    for start in range(0, queries, REFERENCE_CHUNK):
        part = slice(start, start + REFERENCE_CHUNK)
        chunk: dict[str, Any] = {k: t[:, part] if k in _BY_QUERY else t for k, t in exact.items()}
        leaves = {name: chunk[name].detach().requires_grad_(backward) for name in differentiable}
        with m2f_kernels.use_backend("reference"):
            output = operator(chunk | leaves | {"levels": levels})
        outputs.append(output.detach())
        if backward:
            found = torch.autograd.grad(output, list(leaves.values()), grad_output[:, part].to(output))
            for name, gradient in zip(leaves, found, strict=True):
                if name in _BY_QUERY or not gradients[name]:
                    gradients[name].append(gradient)
                else:
                    gradients[name][0] += gradient
    truth = {"output": outputs} | gradients
    return {name: torch.cat(parts, 1).float().cpu() for name, parts in truth.items() if parts}


def _data(scale: Scale, tensors: Tensors, levels: Levels, differentiable: tuple[str, ...], backward: bool) -> Data:
    n, queries = tensors[differentiable[1]].shape[:2]
    grad_output = torch.randn(n, queries, CHANNELS, generator=inputs.generator(4))
    truth = _truth(tensors, levels, grad_output, differentiable, backward, scale.device)
    return Data(tensors, truth, levels, grad_outputs=(grad_output,), differentiable=differentiable)


def _encoder(scale: Scale, distribution: str, dtype: torch.dtype, backward: bool) -> Data:
    batch = _batch(scale)
    value, levels = _encoder_value(scale.quick, batch)
    queries = value.shape[1]
    if distribution == "local":
        locations = inputs.local_locations(levels, batch, HEADS, POINTS)
    else:
        locations = inputs.random_locations(levels, batch, queries, HEADS, POINTS)
    logits = inputs.attention_logits(batch, queries, HEADS, len(levels), POINTS)
    weights = logits.flatten(3).softmax(-1).view_as(logits)
    tensors = {"value": value.to(dtype), "sampling_locations": locations, "attention_weights": weights}
    return _data(scale, tensors, levels, _ATTENTION, backward)


def _encoder_from_offsets(scale: Scale) -> Data:
    batch = _batch(scale)
    value, levels = _encoder_value(scale.quick, batch)
    reference = inputs.reference_grid(levels, batch)
    locations = inputs.local_locations(levels, batch, HEADS, POINTS)
    tensors = {
        "value": value,
        "reference_points": reference,
        "sampling_offsets": inputs.offsets_of(locations, reference, levels),
        "attention_logits": inputs.attention_logits(batch, value.shape[1], HEADS, len(levels), POINTS),
    }
    return _data(scale, tensors, levels, _FROM_OFFSETS, True)


def _decoder(scale: Scale) -> Data:
    batch = _batch(scale)
    height, width = (400, 533) if scale.quick else (800, 1066)
    fine_to_coarse = inputs.projected_levels(height, width, CHANNELS, stride_64=True)
    value, levels = inputs.flatten_levels(fine_to_coarse, HEADS, batch)
    logits = inputs.attention_logits(batch, DECODER_QUERIES, HEADS, len(levels), POINTS)
    tensors = {
        "value": value,
        "sampling_locations": inputs.random_locations(levels, batch, DECODER_QUERIES, HEADS, POINTS),
        "attention_weights": logits.flatten(3).softmax(-1).view_as(logits),
    }
    return _data(scale, tensors, levels, _ATTENTION, True)


def data(scale: Scale) -> dict[str, Callable[[], Data]]:
    cuda = scale.device == "cuda"
    builders: dict[str, Callable[[], Data]] = {
        f"encoder-{distribution}-{name}": partial(_encoder, scale, distribution, dtype, name == "fp32" or cuda)
        for distribution in ("local", "random")
        for name, dtype in DTYPES.items()
    }
    builders["encoder-from-offsets"] = partial(_encoder_from_offsets, scale)
    builders["decoder"] = partial(_decoder, scale)
    needed = {case.data for case in cases(scale)}
    return {name: build for name, build in builders.items() if name in needed}


def shrink(data: Data) -> Data:
    """The first 64 queries."""
    few = {name: tensor[:, :64] if name in _BY_QUERY else tensor for name, tensor in data.inputs.items()}
    return replace(data, inputs=few, grad_outputs=(data.grad_outputs[0][:, :64],))


# ---------------------------------------------------------------- cases


def cases(scale: Scale) -> list[Case]:
    cuda = scale.device == "cuda"
    ours = Implementation(OURS, _attention, peers.own_dtype, ours=True)
    attention = [ours, *peers.attention_peers(scale.device)]
    low_precision = [ours, Implementation(OURS_FLOAT32, _attention, peers.as_float32, ours=True), *attention[1:]]
    from_offsets = [
        Implementation(OURS, _from_offsets, peers.own_dtype, ours=True),
        Implementation(OURS_EAGER, _eager_prologue, peers.own_dtype, ours=True),
        *peers.prologue_peers(),
    ]
    directions = ("forward", "forward+backward")

    def encoder(distribution: str, direction: str, dtype: str, memory: bool = False) -> Case:
        return Case(
            f"encoder {distribution} {dtype} {direction}",
            f"encoder-{distribution}-{dtype}",
            direction,
            attention if dtype == "fp32" else low_precision,
            distribution,
            dtype,
            memory=memory,
            headline=dtype == ("bf16" if cuda else "fp32"),
            full=dtype == "fp16",
        )

    found = [encoder(where, way, "fp32", where == "local") for way in directions for where in ("local", "random")]
    found += [
        Case(f"from offsets {way}", "encoder-from-offsets", way, from_offsets, "local", "fp32", memory=True)
        for way in directions
    ]
    if cuda:
        found += [encoder(where, way, "bf16", where == "local") for way in directions for where in ("local", "random")]
    else:
        found.append(encoder("local", "forward", "bf16"))
    if not scale.quick:
        found.append(encoder("local", "forward", "fp16"))
    found += [Case(f"decoder {way}", "decoder", way, attention, "random", "fp32", full=True) for way in directions]
    if not cuda:
        single = encoder("local", "forward", "fp32")
        found.append(replace(single, name=f"{single.name} 1 thread", threads=1, headline=False, full=True))
    return found


def work(case: Case, data: Data) -> Work:
    """Inputs read and outputs written once, of the value no more than is gathered; four rows of D per sample gathered.

    Forward + backward: the backward reads the inputs and the output's gradient and writes gradients, gathers
    every row again and adds to every row of the value's gradient (counted as a load and a store).
    """
    value = data.inputs["value"]
    per_query = data.inputs.get("attention_weights", data.inputs.get("attention_logits"))
    assert per_query is not None
    rows = 4 * per_query.numel() * value.shape[-1] * value.element_size()
    read = bytes_of(data.inputs.values()) - max(0, bytes_of([value]) - rows)
    output = data.grad_outputs[0].numel() * value.element_size()
    level = "l1" if case.distribution == "local" else "l2"
    if not case.backward:
        return Work(read + output, rows, level)
    gradients = bytes_of(data.inputs[name] for name in data.differentiable)
    return Work(2 * read + 2 * output + gradients, 4 * rows, level)


# ---------------------------------------------------------------- required figures


def _faster(case: str, peer: Sequence[str] | str, target: dict[str, float | None], label: str = "") -> Figure:
    """Time of a peer (of several, the best) over this package's."""
    names = (peer,) if isinstance(peer, str) else tuple(peer)
    label = f"{case}: faster than {label or names[0]}"
    return Figure(label, (case, names, "median_ms"), (case, (OURS,), "median_ms"), target)


def _cpu_figures() -> list[Figure]:
    required = {
        "encoder local fp32 forward": (20.0, 10.0),
        "encoder random fp32 forward": (14.0, 7.0),
        "encoder local fp32 forward+backward": (12.0, 8.0),
        "encoder random fp32 forward+backward": (10.0, 7.0),
    }
    found = []
    for case, (default, retained) in required.items():
        found.append(_faster(case, peers.GRID_SAMPLE, {"default": default, "heap retained": retained}))
        found.append(_faster(case, peers.TORCH_MS_DEFORM_ATTN, {"default": 3.0}))
    return found


def _cuda_figures() -> list[Figure]:
    deformops = (peers.DEFORMOPS_TRITON, peers.DEFORMOPS_CUDA)
    found = []
    for where, share in (("local", 1 / 2), ("random", 1 / 1.3)):
        for way, old, best in (("forward", 4.0, 1.5), ("forward+backward", 3.0, 1.3)):
            case = f"encoder {where} bf16 {way}"
            found.append(_faster(case, peers.TORCH_MS_DEFORM_ATTN, {"cuda": old}, "torch-ms-deform-attn in float32"))
            found.append(_faster(case, deformops, {"cuda": best}, "deformops' best backend"))
        case = f"encoder {where} bf16 forward"
        ours = (case, (OURS,))
        found.append(Figure(f"{case}: share of the floor", (*ours, "floor_ms"), (*ours, "median_ms"), {"cuda": share}))
    return found


def figures(scale: Scale) -> list[Figure]:
    settings = ("cuda",) if scale.device == "cuda" else ("default", "heap retained")
    found = _cuda_figures() if scale.device == "cuda" else _cpu_figures()
    for way in ("forward", "forward+backward"):
        case, field = f"from offsets {way}", "memory_extra_mib"
        found.append(_faster(case, OURS_EAGER, dict.fromkeys(settings, 1.3), "ms_deform_attn after its eager prologue"))
        label = f"{case}: less peak extra memory than ms_deform_attn after its eager prologue"
        found.append(Figure(label, (case, (OURS_EAGER,), field), (case, (OURS,), field), {settings[0]: 2.0}))
    found.append(_faster("encoder local bf16 forward", OURS_FLOAT32, dict.fromkeys(settings, 1.0), "in float32"))
    return found


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
    data=data,
    work=work,
    shrink=shrink,
    figures=figures,
)
