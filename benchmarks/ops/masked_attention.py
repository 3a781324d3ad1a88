"""Masked cross-attention: the core of a decoder layer, between its projections.

Peers take query, key and value by heads, [N, H, *, D], contiguous (on CPU SDPA is a sixth slower on heads cut out of
[N, *, H*D]), and the mask in the form that suits them best, made untimed:

- SDPA: bool [N, 1, Q, S]; expanded to the heads it would take three times as long on CPU.
- SDPA with a mask of 0 and -inf made before: SDPA makes it from a boolean mask in every call.
- nn.MultiheadAttention's core: the code between its projections as `transformers` calls it, with the boolean
  mask repeated over heads and the weights averaged over them. Its projections are the same work for all.
- FlexAttention, compiled, GPU only: with its block mask ready, and with the block mask built in every call as a mask
  that is new in every layer needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    Implementation,
    Levels,
    Scale,
    Tensors,
    Work,
    matmul,
    ratio,
    reference,
)  # fmt: skip
from benchmarks.measure import bytes_of

CHANNELS, HEADS = 256, 8
DIFFERENTIABLE = ("query", "key", "value")
#: Kinds of masks. Learned ones, which a trained model predicts, are as dense as they are, whatever the name's density.
OPEN, BLOBS, RANDOM, LEARNED = "open", "blobs", "random", "learned"
#: Keys of the level at stride 8, and in a quick run.
LARGE, SMALL = 16384, 4096
#: The data of the one case that has the projections too.
MODULE = "module"
SDPA, SDPA_ADDITIVE = "SDPA, boolean mask", "SDPA, additive mask made before"
MULTIHEAD = "nn.MultiheadAttention's core"
MULTIHEAD_MODULE, MULTIHEAD_NO_WEIGHTS = "nn.MultiheadAttention", "nn.MultiheadAttention, need_weights=False"
EAGER = "matmul, masked_fill, softmax, matmul"
FLEX, FLEX_REBUILT = "FlexAttention, block mask ready", "FlexAttention, block mask rebuilt"

# ---------------------------------------------------------------- implementations


def _inputs(given: Tensors, levels: Levels) -> dict[str, Any]:
    """Heads as views of [N, *, H*D], and the mask packed."""
    return {name: given[name] for name in DIFFERENTIABLE} | {"mask": m2f_kernels.pack_attention_mask(given["attend"])}


def _attention(a: dict[str, Any]) -> Tensor:
    return m2f_kernels.masked_attention(a["query"], a["key"], a["value"], a["mask"])


def _by_heads(mask: Callable[[Tensor, Tensor], Any], given: Tensors, levels: Levels) -> dict[str, Any]:
    """Contiguous heads, and what `mask` makes of the bits [N, Q, S] and the query."""
    return {x: given[x].contiguous() for x in DIFFERENTIABLE} | {"mask": mask(given["attend"], given["query"])}


def _sdpa(a: dict[str, Any]) -> Tensor:
    return F.scaled_dot_product_attention(a["query"], a["key"], a["value"], attn_mask=a["mask"])


def multihead_core(a: dict[str, Any]) -> Tensor:
    """`nn.MultiheadAttention` between its projections: additive mask, product, softmax, product, mean of weights."""
    n, heads, _, d = a["query"].shape
    query, key, value = (a[name].flatten(0, 1) for name in DIFFERENTIABLE)
    mask = torch.zeros_like(a["mask"], dtype=query.dtype).masked_fill_(a["mask"], -torch.inf)
    weights = torch.baddbmm(mask, query * d**-0.5, key.transpose(-2, -1)).softmax(-1)
    output = torch.bmm(weights, value)
    weights.unflatten(0, (n, heads)).mean(1)  # returned by the module, dropped by the decoder layer
    return output.unflatten(0, (n, heads))


def _eager(a: dict[str, Any]) -> Tensor:
    scores = (a["query"] * a["query"].shape[-1] ** -0.5) @ a["key"].transpose(-2, -1)
    return scores.masked_fill(a["mask"], -torch.inf).softmax(-1) @ a["value"]


def _block_mask(attend: Tensor, compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    n, queries, keys = attend.shape

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return attend[batch, query, key]

    return create_block_mask(allowed, n, None, queries, keys, device=str(attend.device), _compile=compiled)


@cache
def _flex_attention(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    if not compiled:
        return flex_attention
    # Each case has its own shapes. Beyond the limit PyTorch would run it uncompiled; with fullgraph it would say so.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def flex(rebuild: bool, compiled: bool = True) -> tuple[Callable[..., Any], Callable[..., dict[str, Any]]]:
    """Call and adapter of FlexAttention; the block mask is built in the call with `rebuild`, otherwise before."""

    def call(a: dict[str, Any]) -> Any:
        block_mask = _block_mask(a["mask"], compiled) if rebuild else a["mask"]
        return _flex_attention(compiled)(a["query"], a["key"], a["value"], block_mask=block_mask)

    return call, partial(_by_heads, lambda attend, _: attend if rebuild else _block_mask(attend, compiled))


def peers(device: str) -> list[Implementation]:
    """Peers of `masked_attention`: a call, and the mask that it takes, made of the bits [N, Q, S] and the query."""
    absent = None if device == "cuda" else "compared on a GPU only"
    with_masks: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
        SDPA: (_sdpa, lambda attend, _: attend.unsqueeze(1)),
        SDPA_ADDITIVE: (
            _sdpa,
            lambda attend, query: torch.zeros_like(attend.unsqueeze(1), dtype=query.dtype)
            .masked_fill_(~attend.unsqueeze(1), -torch.inf),
        ),
        MULTIHEAD: (multihead_core, lambda attend, query: (~attend).repeat_interleave(query.shape[1], 0)),
        EAGER: (_eager, lambda attend, _: ~attend.unsqueeze(1)),
    }  # fmt: skip
    return [
        *(Implementation(name, call, partial(_by_heads, mask)) for name, (call, mask) in with_masks.items()),
        *(
            Implementation(name, *flex(rebuild), unavailable=lambda: absent, counts_writes=False)
            for name, rebuild in ((FLEX, False), (FLEX_REBUILT, True))
        ),
    ]


# ---------------------------------------------------------------- the whole module


def _with_parameters(module: torch.nn.Module, given: Tensors) -> dict[str, Any]:
    """`module` with the parameters among the inputs, which have the names of `nn.MultiheadAttention`'s."""
    module.to(given["query"].device, given["query"].dtype)
    module.load_state_dict({name: given[name] for name in module.state_dict()})
    return given | {"module": module.eval()}


def _module_inputs(given: Tensors, levels: Levels) -> dict[str, Any]:
    mask = {"mask": m2f_kernels.pack_attention_mask(given["attend"])}
    return _with_parameters(m2f_kernels.nn.MaskedCrossAttention(CHANNELS, HEADS), given) | mask


def _module(a: dict[str, Any]) -> Tensor:
    return a["module"](a["query"], a["pixels"], a["mask"], key_pos=a["key_pos"])


def _multihead_inputs(given: Tensors, levels: Levels) -> dict[str, Any]:
    """Sequence first and the mask repeated over heads, as `transformers` has them."""
    given = given | {name: given[name].transpose(0, 1).contiguous() for name in ("query", "pixels", "key_pos")}
    mask = {"mask": (~given["attend"]).repeat_interleave(HEADS, 0)}
    return _with_parameters(torch.nn.MultiheadAttention(CHANNELS, HEADS), given) | mask


def _multihead(a: dict[str, Any], need_weights: bool) -> Tensor:
    key = a["pixels"] + a["key_pos"]
    return a["module"](a["query"], key, a["pixels"], attn_mask=a["mask"], need_weights=need_weights)[0].transpose(0, 1)


#: `nn.MaskedCrossAttention`; the module as `transformers` calls it, and asked for no weights.
_MODULES = [
    Implementation(OURS, _module, _module_inputs, ours=True),
    Implementation(MULTIHEAD_MODULE, partial(_multihead, need_weights=True), _multihead_inputs),
    Implementation(MULTIHEAD_NO_WEIGHTS, partial(_multihead, need_weights=False), _multihead_inputs),
]


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class Shape:
    """Keys, queries, kind of mask, share of the keys that it attends to, dtype, images."""

    keys: int
    queries: int = 100
    kind: str = BLOBS
    density: float = 0.3
    dtype: str = "fp32"
    n: int = 1

    def __str__(self) -> str:
        text = f"S={self.keys} Q={self.queries} {self.kind} {self.density} {self.dtype}"
        return text + (f" N={self.n}" if self.n > 1 else "")

    def attend(self) -> Tensor:
        """The mask, bool [N, Q, S]."""
        side = (round(self.keys**0.5),) * 2
        kinds: dict[str, Callable[[], Tensor]] = {
            OPEN: lambda: torch.ones(self.n, self.queries, self.keys, dtype=torch.bool),
            BLOBS: lambda: inputs.blob_masks(side, self.n, self.queries, self.density),
            RANDOM: lambda: inputs.random_masks(self.keys, self.n, self.queries, self.density),
            LEARNED: lambda: inputs.learned_masks(side, self.n, self.queries),
        }
        return kinds[self.kind]()


def build(device: str, shape: Shape, backward: bool) -> Data:
    """Unit normal heads, in memory [N, length, H*D] as a projection writes it."""
    generator, side = inputs.generator(8), round(shape.keys**0.5)
    tensors = {
        name: torch.randn(shape.n, length, CHANNELS, generator=generator).to(DTYPES[shape.dtype])
        .unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for name, length in zip(DIFFERENTIABLE, (shape.queries, shape.keys, shape.keys), strict=True)
    }  # fmt: skip
    grad_output = torch.randn(shape.n, HEADS, shape.queries, CHANNELS // HEADS, generator=generator)
    tensors["attend"] = shape.attend()
    wanted = DIFFERENTIABLE if backward else ()
    truth = reference(lambda a: _attention(a | {"mask": a["attend"]}), tensors, device, wanted, grad_output)
    return Data(tensors, truth, [(side, side)], grad_outputs=(grad_output,), differentiable=DIFFERENTIABLE)


def _build_module(device: str, shape: Shape) -> Data:
    """The module with its projections; only forward."""
    keys, generator, side = shape.keys, inputs.generator(9), round(shape.keys**0.5)
    shapes = {
        "query": (1, shape.queries, CHANNELS), "pixels": (1, keys, CHANNELS), "key_pos": (1, keys, CHANNELS),
        "in_proj_weight": (3 * CHANNELS, CHANNELS), "in_proj_bias": (3 * CHANNELS,),
        "out_proj.weight": (CHANNELS, CHANNELS), "out_proj.bias": (CHANNELS,),
    }  # fmt: skip
    scales = {name: CHANNELS**-0.5 if "proj" in name else 1.0 for name in shapes}
    tensors = {
        name: (torch.randn(of, generator=generator) * scales[name]).to(DTYPES[shape.dtype])
        for name, of in shapes.items()
    } | {"attend": shape.attend()}
    truth = reference(lambda a: _module(_module_inputs(a, [])), tensors, device)
    return Data(tensors, truth, [(side, side)])


# ---------------------------------------------------------------- cases


def cases(scale: Scale) -> list[Case]:
    cuda, large = scale.device == "cuda", SMALL if scale.quick else LARGE
    everybody = [Implementation(OURS, _attention, _inputs, ours=True), *peers(scale.device)]
    here = [one for one in everybody if one.name not in (FLEX, FLEX_REBUILT)]
    main, other = ("bf16", "fp32") if cuda else ("fp32", "bf16")

    def case(shape: Shape, way: str = "forward", suffix: str = "", **options: Any) -> Case:
        # On CPU one case is enough to say that FlexAttention is not compared there.
        chosen = everybody if cuda or shape.dtype == "bf16" else here
        made = partial(build, scale.device, shape, way != "forward")
        return Case(f"{shape} {way}{suffix}", str(shape), way, chosen, shape.kind, shape.dtype, build=made, **options)

    sizes = (1024, 4096) if scale.quick else (1024, 4096, 16384)
    masks = [(OPEN, 1.0), *((kind, density) for kind in (BLOBS, RANDOM) for density in (0.3, 0.05))]
    whole = Shape(large, dtype=main)
    found = [
        *(
            case(Shape(keys, 100, kind, density, main), headline=keys == large and kind != RANDOM,
                 memory=keys == large and (kind, density) == (BLOBS, 0.3),
                 full=keys != large or (kind, density) == (RANDOM, 0.3))
            for keys in sizes for kind, density in masks
        ),
        case(Shape(large, 100, LEARNED, 1.0, main), headline=True),
        *(case(Shape(keys, 200, dtype=main), full=True) for keys in sizes if not scale.quick),
        *(
            case(Shape(large, 100, kind, 0.3, main, 2 if cuda else 1), "forward+backward", memory=kind == BLOBS,
                 headline=kind == BLOBS)
            for kind in (BLOBS, RANDOM)
        ),
        case(Shape(large, dtype=other), full=not cuda),
        Case(f"module with projections {whole} forward", MODULE, "forward", _MODULES, BLOBS, main, memory=True,
             full=True, build=partial(_build_module, scale.device, whole)),
    ]  # fmt: skip
    return found if cuda or scale.quick else [*found, case(whole, suffix=" 1 thread", threads=1, full=True)]


def work(case: Case, data: Data) -> Work:
    """Queries, keys, values and bits read once, the output written once; 2 products over the attended pairs.

    Forward + backward: queries, keys, values, bits, the output and its gradient are read again, the gradients
    written; the backward has 4 products, without computing the weights again. One exponential for each attended pair
    and head, in each direction.
    """
    attend, output = data.inputs["attend"], data.inputs["query"].nbytes
    n, queries, keys = attend.shape
    pairs = int(attend.sum())
    product = 2 * CHANNELS * pairs
    special = {"special functions": (2 if case.backward else 1) * HEADS * pairs}
    if case.data == MODULE:  # queries and output, keys and values are projected
        projections = 2 * CHANNELS**2 * n * (2 * queries + 2 * keys)
        read = bytes_of(t for t in data.inputs.values() if t.is_floating_point())
        return special | {"bandwidth": read + output, matmul(case): projections + 2 * product}
    tensors = bytes_of(data.inputs[name] for name in DIFFERENTIABLE)
    moved = tensors + n * queries * (4 * ((keys + 31) // 32) + 1) + output
    if case.backward:
        moved, product = 2 * moved + output + tensors, 3 * product
    return special | {"bandwidth": moved, matmul(case): 2 * product}


_FASTEST, _FASTER = (SDPA, MULTIHEAD, EAGER), "the faster of SDPA (boolean mask) and the eager forms"
_AIMS_ON_A_GPU = {MULTIHEAD: 8.0, SDPA: 2.5, FLEX: 2.0, FLEX_REBUILT: 10.0}
FIGURES = {
    "cpu": [
        *(
            ratio(f"{Shape(LARGE, 100, kind, density)} forward", "median_ms", peer, OURS, f"faster than {peer}", aim,
                  aim)
            for kind, density, peer, aim in (
                (OPEN, 1.0, SDPA, 2.0), (BLOBS, 0.05, SDPA, 4.0), (BLOBS, 0.3, SDPA, None),
                (BLOBS, 0.3, MULTIHEAD, None),
            )
        ),
        *(
            ratio(f"{Shape(LARGE, kind=kind)} forward+backward", "median_ms", _FASTEST, OURS, f"faster than {_FASTER}",
                  2.0, 2.0)
            for kind in (BLOBS, RANDOM)
        ),
        ratio(f"{Shape(LARGE)} forward+backward", "memory_extra_mib", _FASTEST, OURS,
              f"less peak extra memory than {_FASTER}", 3.0, of_fastest=True),
    ],
    "cuda": [
        *(
            figure
            for kind, density in ((OPEN, 1.0), (BLOBS, 0.3), (BLOBS, 0.05))
            for case in (f"{Shape(LARGE, 100, kind, density, 'bf16')} forward",)
            for figure in (
                *(
                    ratio(case, "median_ms", peer, OURS, f"faster than {peer}", aim if density == 0.3 else None)
                    for peer, aim in _AIMS_ON_A_GPU.items()
                ),
                ratio(case, "floor_share", OURS, None, "share of the floor", 0.5),
            )
        ),
        *(
            ratio(f"{Shape(LARGE, 100, kind, 0.3, 'bf16', 2)} forward+backward", "median_ms", SDPA, OURS,
                  f"faster than {SDPA}", 2.0)
            for kind in (BLOBS, RANDOM)
        ),
    ],
}  # fmt: skip


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
    work=work,
    quarters={"attend": (1, 2), "pixels": (1,), "key_pos": (1,), "grad_output": (2,)}
    | dict.fromkeys(DIFFERENTIABLE, (-2,)),
    figures=FIGURES,
    budget_s=1.5,
)
