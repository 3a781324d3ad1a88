"""Masked cross-attention: the core of a decoder layer, between its projections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import m2f_kernels
from benchmarks import inputs, peers_attention
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
from benchmarks.peers_attention import EAGER, FLEX, FLEX_REBUILT, HEADS, MULTIHEAD, SDPA

CHANNELS = 256
OURS = "m2f_kernels"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DIFFERENTIABLE = ("query", "key", "value")
OPEN, BLOBS, RANDOM = "open", "blobs", "random"
#: Masks that a trained model predicts: as dense as they are, whatever the name's density.
LEARNED = "learned"
#: The data of the one case that has the projections too.
MODULE = "module"


# ---------------------------------------------------------------- this package


def _inputs(inputs_: Tensors, levels: Levels) -> dict[str, Any]:
    """Heads as views of [N, *, H*D], and the mask packed."""
    return {name: inputs_[name] for name in DIFFERENTIABLE} | {
        "mask": m2f_kernels.pack_attention_mask(inputs_["attend"])
    }


def _attention(a: dict[str, Any]) -> Tensor:
    return m2f_kernels.masked_attention(a["query"], a["key"], a["value"], a["mask"])


def _module_inputs(inputs_: Tensors, levels: Levels) -> dict[str, Any]:
    module = m2f_kernels.nn.MaskedCrossAttention(CHANNELS, HEADS)
    return peers_attention.module_inputs(inputs_, module) | {"mask": m2f_kernels.pack_attention_mask(inputs_["attend"])}


def _module(a: dict[str, Any]) -> Tensor:
    output: Tensor = a["module"](a["query"], a["pixels"], a["mask"], key_pos=a["key_pos"])
    return output


# ---------------------------------------------------------------- data


def _heads(n: int, length: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Unit normal, [N, H, length, D], in memory [N, length, H*D] as a projection writes it."""
    flat = torch.randn(n, length, CHANNELS, generator=generator).to(dtype)
    return flat.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def _truth(tensors: Tensors, grad_output: Tensor, backward: bool, device: str) -> Tensors:
    """The reference in fp64; stored as float32, which adds 6e-8 to an error at most."""
    query, key, value = leaves = [
        tensors[name].to(device, torch.float64).requires_grad_(backward) for name in DIFFERENTIABLE
    ]
    with m2f_kernels.use_backend("reference"):
        output = m2f_kernels.masked_attention(query, key, value, tensors["attend"].to(device))
    truth = {"output": output.detach()}
    if backward:
        truth |= zip(DIFFERENTIABLE, torch.autograd.grad(output, leaves, grad_output.to(output)), strict=True)
    return {name: tensor.float().cpu() for name, tensor in truth.items()}


def _data(scale: Scale, keys: int, queries: int, kind: str, density: float, dtype: str, n: int, backward: bool) -> Data:
    generator, side = inputs.generator(8), round(keys**0.5)
    tensors = {
        name: _heads(n, length, generator, DTYPES[dtype])
        for name, length in zip(DIFFERENTIABLE, (queries, keys, keys), strict=True)
    }
    grad_output = torch.randn(n, HEADS, queries, CHANNELS // HEADS, generator=generator)
    if kind == BLOBS:
        attend = inputs.blob_masks((side, side), n, queries, density)
    elif kind == RANDOM:
        attend = inputs.random_masks(keys, n, queries, density)
    elif kind == LEARNED:
        attend = inputs.learned_masks((side, side), n, queries)
    else:
        attend = torch.ones(n, queries, keys, dtype=torch.bool)
    tensors["attend"] = attend
    truth = _truth(tensors, grad_output, backward, scale.device)
    return Data(tensors, truth, [(side, side)], grad_outputs=(grad_output,), differentiable=DIFFERENTIABLE)


def _module_data(scale: Scale, dtype: str) -> Data:
    """The module with its projections at the largest level, regions of 0.3; only forward."""
    keys, generator = _large(scale), inputs.generator(9)
    side = round(keys**0.5)
    shapes = {
        "query": (1, 100, CHANNELS),
        "pixels": (1, keys, CHANNELS),
        "key_pos": (1, keys, CHANNELS),
        "in_proj_weight": (3 * CHANNELS, CHANNELS),
        "in_proj_bias": (3 * CHANNELS,),
        "out_proj.weight": (CHANNELS, CHANNELS),
        "out_proj.bias": (CHANNELS,),
    }
    tensors = {}
    for name, shape in shapes.items():
        factor = CHANNELS**-0.5 if "proj" in name else 1.0
        tensors[name] = (torch.randn(shape, generator=generator) * factor).to(DTYPES[dtype])
    tensors["attend"] = inputs.blob_masks((side, side), 1, 100, 0.3)
    exact = {
        name: t.to(scale.device, torch.float64 if t.is_floating_point() else t.dtype) for name, t in tensors.items()
    }
    with m2f_kernels.use_backend("reference"), torch.no_grad():
        truth = _module(_module_inputs(exact, []))
    return Data(tensors, {"output": truth.float().cpu()}, [(side, side)])


def data(scale: Scale) -> dict[str, Callable[[], Data]]:
    found: dict[str, Callable[[], Data]] = {}
    for case in sorted(cases(scale), key=lambda c: c.backward):  # with backward last: its truth serves both
        if case.data == MODULE:
            found[case.data] = partial(_module_data, scale, case.dtype)
        else:
            found[case.data] = partial(_data, scale, *_parts(case.data), case.backward)
    return found


def shrink(data: Data) -> Data:
    """The first 4 queries and 64 keys."""
    if "pixels" in data.inputs:
        few = data.inputs | {name: data.inputs[name][:, :64] for name in ("pixels", "key_pos")}
        few |= {"query": data.inputs["query"][:, :4]}
        few["attend"] = torch.ones(1, 4, 64, dtype=torch.bool)
        return replace(data, inputs=few)
    few = {name: data.inputs[name][:, :, : 4 if name == "query" else 64] for name in DIFFERENTIABLE}
    few["attend"] = data.inputs["attend"][:, :4, :64] | torch.ones(64, dtype=torch.bool)
    return replace(data, inputs=few, grad_outputs=(data.grad_outputs[0][:, :, :4],))


# ---------------------------------------------------------------- cases


def _name(keys: int, queries: int, kind: str, density: float, dtype: str, n: int) -> str:
    return f"S={keys} Q={queries} {kind} {density} {dtype}" + (f" N={n}" if n > 1 else "")


def _parts(name: str) -> tuple[int, int, str, float, str, int]:
    """The parts of a case's name: keys, queries, kind of mask, density, dtype, images; the inverse of `_name`."""
    keys, queries, kind, density, dtype, *batch = name.split(" ")
    n = int(batch[0].removeprefix("N=")) if batch else 1
    return int(keys.removeprefix("S=")), int(queries.removeprefix("Q=")), kind, float(density), dtype, n


def _large(scale: Scale) -> int:
    """Keys of the level at stride 8."""
    return 4096 if scale.quick else 16384


def cases(scale: Scale) -> list[Case]:
    cuda, large = scale.device == "cuda", _large(scale)
    ours = Implementation(OURS, _attention, _inputs, ours=True)
    everybody = [ours, *peers_attention.masked_attention_peers(scale.device)]
    here = [one for one in everybody if one.name not in (FLEX, FLEX_REBUILT)]

    def case(
        keys: int, queries: int, kind: str, density: float, dtype: str = "fp32", *, backward: bool = False, n: int = 1,
        memory: bool = False, headline: bool = False, full: bool = False,
    ) -> Case:  # fmt: skip
        name, direction = _name(keys, queries, kind, density, dtype, n), "forward+backward" if backward else "forward"
        # On CPU one case is enough to say that FlexAttention is not compared there.
        implementations = everybody if cuda or dtype == "bf16" else here
        return Case(
            f"{name} {direction}",
            name,
            direction,
            implementations,
            kind,
            dtype,
            memory=memory,
            headline=headline,
            full=full,
        )

    masks = [(OPEN, 1.0), *((kind, density) for kind in (BLOBS, RANDOM) for density in (0.3, 0.05))]
    main = "bf16" if cuda else "fp32"
    sizes = (1024, 4096) if scale.quick else (1024, 4096, 16384)
    found = [
        case(keys, 100, kind, density, main, headline=keys == large and kind != RANDOM,
             memory=keys == large and (kind, density) == (BLOBS, 0.3),
             full=keys != large or (kind, density) == (RANDOM, 0.3))
        for keys in sizes
        for kind, density in masks
    ]  # fmt: skip
    found.append(case(large, 100, LEARNED, 1.0, main, headline=True))
    if not scale.quick:
        found += [case(keys, 200, BLOBS, 0.3, main, full=True) for keys in sizes]
    batch = 2 if cuda else 1
    found += [
        case(large, 100, kind, 0.3, main, backward=True, n=batch, memory=kind == BLOBS, headline=kind == BLOBS)
        for kind in (BLOBS, RANDOM)
    ]
    other = "fp32" if cuda else "bf16"
    found.append(case(large, 100, BLOBS, 0.3, other, full=not cuda))
    module = [Implementation(OURS, _module, _module_inputs, ours=True), *peers_attention.module_peers()]
    name = f"module with projections S={large} Q=100 {BLOBS} 0.3 {main} forward"
    found.append(Case(name, MODULE, "forward", module, BLOBS, main, memory=True, full=True))
    if not cuda and not scale.quick:
        whole = case(large, 100, BLOBS, 0.3)
        found.append(replace(whole, name=f"{whole.name} 1 thread", threads=1, full=True))
    return found


def work(case: Case, data: Data) -> Work:
    """Queries, keys, values and bits read once, the output written once; 2 products over the attended pairs.

    Forward + backward: queries, keys, values, bits, the output and its gradient are read again, the gradients
    written; the backward has 4 products, without computing the weights again.
    """
    attend = data.inputs["attend"]
    n, queries, keys = attend.shape
    product = 2 * CHANNELS * int(attend.sum())
    dtype = "bfloat16" if case.dtype == "bf16" else "float32"
    output = data.inputs["query"].nbytes
    if case.data == MODULE:  # queries and output, keys and values are projected
        projections = 2 * CHANNELS**2 * n * (2 * queries + 2 * keys)
        read = bytes_of(t for t in data.inputs.values() if t.is_floating_point())
        return Work(read + output, flops=projections + 2 * product, flop_dtype=dtype)
    tensors = bytes_of(data.inputs[name] for name in DIFFERENTIABLE)
    read = tensors + n * queries * (4 * ((keys + 31) // 32) + 1)
    if not case.backward:
        return Work(read + output, flops=2 * product, flop_dtype=dtype)
    return Work(2 * read + 3 * output + tensors, flops=6 * product, flop_dtype=dtype)


# ---------------------------------------------------------------- required figures


def _faster(case: str, peers: Sequence[str], targets: dict[str, float | None], label: str) -> Figure:
    return Figure(
        f"{case}: faster than {label}", (case, tuple(peers), "median_ms"), (case, (OURS,), "median_ms"), targets
    )


def _cpu_figures(large: int) -> list[Figure]:
    def both(target: float | None) -> dict[str, float | None]:
        return dict.fromkeys(("default", "heap retained"), target)

    def forward(kind: str, density: float) -> str:
        return f"{_name(large, 100, kind, density, 'fp32', 1)} forward"

    found = [
        _faster(forward(OPEN, 1.0), [SDPA], both(2.0), SDPA),
        _faster(forward(BLOBS, 0.05), [SDPA], both(4.0), SDPA),
        _faster(forward(BLOBS, 0.3), [SDPA], both(None), SDPA),
        _faster(forward(BLOBS, 0.3), [MULTIHEAD], both(None), MULTIHEAD),
    ]
    fastest, label = (SDPA, MULTIHEAD, EAGER), "the faster of SDPA (boolean mask) and the eager forms"
    for kind in (BLOBS, RANDOM):
        case = f"{_name(large, 100, kind, 0.3, 'fp32', 1)} forward+backward"
        found.append(_faster(case, fastest, both(2.0), label))
    case, field = f"{_name(large, 100, BLOBS, 0.3, 'fp32', 1)} forward+backward", "memory_extra_mib"
    memory = Figure(
        f"{case}: less peak extra memory than {label}", (case, fastest, field), (case, (OURS,), field),
        {"default": 3.0}, of_fastest=True,
    )  # fmt: skip
    return [*found, memory]


def _cuda_figures(large: int) -> list[Figure]:
    found = []
    for kind, density in ((OPEN, 1.0), (BLOBS, 0.3), (BLOBS, 0.05)):
        case = f"{_name(large, 100, kind, density, 'bf16', 1)} forward"
        judged = kind == BLOBS and density == 0.3
        for peer, target in ((MULTIHEAD, 8.0), (SDPA, 2.5), (FLEX, 2.0), (FLEX_REBUILT, 10.0)):
            found.append(_faster(case, [peer], {"cuda": target if judged else None}, peer))
        ours = (case, (OURS,))
        share = Figure(f"{case}: share of the floor", (*ours, "floor_ms"), (*ours, "median_ms"), {"cuda": 0.5})
        found.append(share)
    for kind in (BLOBS, RANDOM):
        case = f"{_name(large, 100, kind, 0.3, 'bf16', 2)} forward+backward"
        found.append(_faster(case, [SDPA], {"cuda": 2.0}, SDPA))
    return found


def figures(scale: Scale) -> list[Figure]:
    large = _large(scale)
    return _cuda_figures(large) if scale.device == "cuda" else _cpu_figures(large)


BENCHMARK = Benchmark(
    op="masked_attention",
    title="Masked cross-attention",
    description=(
        "The core between the projections: 8 heads x 32 channels, N = 1 (backward on a GPU: 2), S keys of a square "
        "level, Q queries, each attending to a share of the keys that is named in the case. *Blobs*: each query's "
        "region is grown around a pixel of one of four photographs by colour and position; *random*: independent bits. "
        "This package takes heads as views of [N, *, H*D] and a packed mask; every peer takes contiguous heads and the "
        "mask in the form it likes best, made untimed. *nn.MultiheadAttention's core*: what that module does between "
        "its projections as `transformers` calls it, with the boolean mask repeated over heads. FlexAttention is "
        "compared on a GPU only. One case is the whole module, the position embedding of the keys and all projections "
        "included. The floor counts the products of attended pairs only, and no exponential."
    ),
    cases=cases,
    data=data,
    work=work,
    shrink=shrink,
    figures=figures,
    budget_s=1.5,
)
