"""Attention masks: what the nine layers of Mask2Former's decoder attend to, from mask embeddings and mask features.

Peers: `transformers`' own mask predictor with its embedding already computed, and the best that plain PyTorch does by
the same rearrangement as this package.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    PEER_SLACK,
    Benchmark,
    Case,
    Data,
    Implementation,
    Levels,
    Scale,
    Tensors,
    Verdict,
    Work,
    as_given,
    matmul,
    missing,
    ratio,
)  # fmt: skip
from benchmarks.measure import bytes_of
from m2f_kernels.masks import PackedMask

CHANNELS, QUERIES, LAYERS, HEADS = 256, 100, 9, 8
#: Of the levels a decoder attends, in its order, against the mask features' 4.
STRIDES = (32, 16, 8)
TRANSFORMERS, TRANSFORMERS_DROPPED = "transformers", "transformers, logits dropped"
STRIDED = "PyTorch, strided slices"
#: Largest share of bits that may differ from the reference.
WRONG_BITS = {"fp32": 1e-6, "bf16": 1e-3}
#: An implementation's logit lies within this factor times sum_c |embed_c| |feature_c| of the exact one: in float32 the
#: rounding of C products and sums; in bfloat16 that of the resized features.
ROUNDING = {"fp32": (CHANNELS + 3) * 2.0**-24, "bf16": 2.0**-8}
#: The queries' masks cover shares of the image that fall with the query; the last ones are empty and attend everywhere.
EMPTY_QUERIES = 10
ALL, STRIDE_8 = "9 layers", "1 layer at stride 8,"

# ---------------------------------------------------------------- implementations


def layers(inputs: Tensors, levels: Levels) -> Iterator[tuple[Tensor, int]]:
    """The mask embedding [N, Q, C] of each decoder layer and the index of the level it attends."""
    for i, embed in enumerate(inputs["mask_embed"]):
        yield embed, i % len(levels)


def _masks(a: dict[str, Any]) -> Iterator[PackedMask]:
    count, _, queries, _ = a["mask_embed"].shape
    resized, flags = m2f_kernels.attention_mask_levels(a["mask_features"], a["levels"], count, queries)
    for (embed, level), row_any in zip(layers(a, a["levels"]), flags, strict=True):
        yield m2f_kernels.predict_attention_mask(embed, resized[level], row_any)


def _decode(results: Sequence[Tensor], data: Data) -> list[Tensor]:
    packed = zip(results[::2], results[1::2], data.outputs, strict=True)
    return [PackedMask(bits, row_any, data.truth[name].shape[-1]).to_bool() for bits, row_any, name in packed]


def _predictor(inputs: Tensors, levels: Levels) -> dict[str, Any]:
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerMaskPredictor

    channels = inputs["mask_embed"].shape[-1]
    predictor = Mask2FormerMaskPredictor(channels, HEADS, channels)
    predictor.mask_embedder = torch.nn.Identity()
    return as_given(inputs, levels) | {"predictor": predictor}


def _transformers(a: dict[str, Any], keep: bool) -> Iterator[Tensor]:
    """Predictor and row rule as the decoder applies them; with `keep` it also keeps the logits of every layer."""
    kept = []
    for embed, level in layers(a, a["levels"]):
        logits, blocked = a["predictor"](embed.transpose(0, 1), a["mask_features"], a["levels"][level])
        if keep:
            kept.append(logits)
        some_open = (blocked.sum(-1) != blocked.shape[-1]).to(blocked.dtype)
        yield blocked * some_open.unsqueeze(-1)


def _attend_of_heads(results: Any, data: Data) -> list[Tensor]:
    """Bool [N, Q, S], True = attend, of blocking masks [N * H, Q, S], which should be the same for all heads."""
    return [(~blocked).unflatten(0, (-1, HEADS)).all(1) for blocked in results]


def _centre_mean(features: Tensor, size: tuple[int, int]) -> Tensor:
    """The mean of the four centre pixels: bilinear resizing by an even integer ratio."""
    ratio = features.shape[-1] // size[1]
    a, b = slice(ratio // 2 - 1, None, ratio), slice(ratio // 2, None, ratio)
    return (features[..., a, a] + features[..., a, b] + features[..., b, a] + features[..., b, b]) * 0.25


def _strided(a: dict[str, Any]) -> Iterator[Tensor]:
    resized = [_centre_mean(a["mask_features"], size).flatten(2) for size in a["levels"]]
    for embed, level in layers(a, a["levels"]):
        blocked = torch.matmul(embed, resized[level]) < 0
        yield blocked.logical_and_(~blocked.all(-1, keepdim=True))


_THEIRS: dict[str, Any] = {"unavailable": missing("transformers"), "decode": _attend_of_heads}
#: This package's and its peers of `resize_mask_features` with `predict_attention_mask`.
IMPLEMENTATIONS = [
    Implementation(OURS, _masks, as_given, ours=True, decode=_decode),
    Implementation(TRANSFORMERS, partial(_transformers, keep=True), _predictor, **_THEIRS),
    Implementation(TRANSFORMERS_DROPPED, partial(_transformers, keep=False), _predictor, **_THEIRS),
    Implementation(STRIDED, _strided, as_given, decode=lambda results, data: [~blocked for blocked in results]),
]

# ---------------------------------------------------------------- data


@cache
def _factors(size: int) -> tuple[Tensor, Tensor]:
    """Mask features [1, C, size/4, size/4], channel 0 of which is 1, and embeddings [layers, 1, Q, C], of which
    channel 0 is the bias that makes masks small: by ever more of the way from the mean logit to the largest."""
    features = inputs.mask_features(size, size, CHANNELS)
    features[:, 0] = 1
    embed = torch.randn(LAYERS, 1, QUERIES, CHANNELS, generator=inputs.generator(7))
    embed[..., 0] = 0
    coarsest = F.interpolate(features, size=(size // STRIDES[0],) * 2, mode="bilinear", align_corners=False)
    logits = embed @ coarsest.flatten(2)
    share = torch.linspace(0, 0.7, QUERIES)
    share[-EMPTY_QUERIES:] = 20
    embed[..., 0] = -torch.lerp(logits.mean(-1), logits.amax(-1), share)
    return features, embed


def _truth(tensors: Tensors, levels: Levels, dtype: str, device: str) -> Tensors:
    """Each layer's bits by the reference in fp64, the row rule applied; and which of them rounding may turn."""
    exact = {name: tensor.to(device, torch.float64) for name, tensor in tensors.items()}
    truth: Tensors = {}
    with m2f_kernels.use_backend("reference"):
        resized = m2f_kernels.resize_mask_features(exact["mask_features"], levels)
        magnitude = m2f_kernels.resize_mask_features(exact["mask_features"].abs(), levels)
        for i, (embed, level) in enumerate(layers(exact, levels)):
            bound = ROUNDING[dtype] * (embed.abs() @ magnitude[level].flatten(2))
            logits = embed @ resized[level].flatten(2)
            attend = m2f_kernels.predict_attention_mask(embed, resized[level]).to_bool()
            empty = (logits < -bound).all(-1)
            if not (empty | (logits > bound).any(-1)).all():
                raise RuntimeError(f"layer {i + 1}: rounding decides whether a query's mask is empty; choose others")
            truth |= {f"layer {i + 1}": attend.cpu(), f"doubtful {i + 1}": (logits.abs() <= bound).cpu()}
    return truth


def build(device: str, size: int, dtype: str, whole: bool) -> Data:
    """The inputs of all layers (`whole`), or of one at stride 8."""
    features, embed = _factors(size)
    embed = embed if whole else embed[2:3]
    levels = [(size // stride, size // stride) for stride in (STRIDES if whole else STRIDES[-1:])]
    tensors = {"mask_features": features.to(DTYPES[dtype]), "mask_embed": embed.to(DTYPES[dtype])}
    outputs = tuple(f"layer {i + 1}" for i in range(len(embed)))
    return Data(tensors, _truth(tensors, levels, dtype, device), levels, outputs)


def check(case: Case, implementation: Implementation, data: Data, results: Sequence[Tensor]) -> Verdict:
    """Few bits may differ from the truth, and only where the exact logit is within rounding of the threshold."""
    differs = [attend != data.truth[name] for name, attend in zip(data.outputs, results, strict=True)]
    share = sum(int(d.sum()) for d in differs) / sum(d.numel() for d in differs)
    justified = all((data.truth[f"doubtful {i + 1}"] | ~d).all() for i, d in enumerate(differs))
    limit = WRONG_BITS[case.dtype] * (1 if implementation.ours else PEER_SLACK)
    return Verdict(justified and share <= limit, share)


# ---------------------------------------------------------------- cases


def _sizes(scale: Scale) -> tuple[int, int]:
    return (256, 512) if scale.quick else (512, 1024)


def cases(scale: Scale) -> list[Case]:
    cuda, (small, large) = scale.device == "cuda", _sizes(scale)

    def case(what: str, size: int, dtype: str, memory: bool = False) -> Case:
        name, headline = f"{what} {size}² {dtype}", dtype == ("bf16" if cuda else "fp32")
        made = partial(build, scale.device, size, dtype, what == ALL)
        return Case(name, name, "forward", IMPLEMENTATIONS, "", dtype, memory=memory, headline=headline, build=made)

    found = [case(ALL, large, "fp32", memory=True), case(ALL, small, "fp32"), case(ALL, large, "bf16")]
    return found + [case(STRIDE_8, large, dtype, memory=True) for dtype in ("fp32", "bf16") if cuda]


def work(case: Case, data: Data) -> Work:
    """Features and embeddings read once, bits and row flags written once; one product per layer at its level's size.

    Multiprocessors keep nothing from one layer to the next: on a GPU each layer gets its level's features from L2.
    """
    sizes = [data.levels[level] for _, level in layers(data.inputs, data.levels)]
    layers_, n, queries, channels = data.inputs["mask_embed"].shape
    written = n * queries * (4 * sum((h * w + 31) // 32 for h, w in sizes) + layers_)
    flops = 2 * n * queries * channels * sum(h * w for h, w in sizes)
    moved, element = bytes_of(data.inputs.values()) + written, data.inputs["mask_features"].element_size()
    resized = n * channels * element * (sum(h * w for h, w in data.levels) + sum(h * w for h, w in sizes))
    return {"bandwidth": moved, "l2 bytes": moved + resized, matmul(case): flops}


_BOTH, _FASTER = (TRANSFORMERS, TRANSFORMERS_DROPPED), "faster than transformers"
_LARGE, _SMALL, _LAYER = f"{ALL} 1024² fp32", f"{ALL} 512² fp32", f"{STRIDE_8} 1024² bf16"
_STRIDED, _LESS = "faster than strided slices in plain PyTorch", "less peak memory than transformers"
FIGURES = {
    "cpu": [
        ratio(_LARGE, "median_ms", _BOTH, OURS, _FASTER, 15.0, 15.0),
        ratio(_SMALL, "median_ms", _BOTH, OURS, _FASTER, 12.0, 12.0),
        ratio(
            _LARGE, "memory_extra_mib", TRANSFORMERS, OURS, f"{_LESS} (its decoder keeps every layer's logits)", 10.0
        ),
        ratio(_LARGE, "memory_extra_mib", TRANSFORMERS_DROPPED, OURS, f"{_LESS} with the logits dropped", None),
        ratio(_LARGE, "written_mib", _BOTH, OURS, "fewer bytes written than transformers", None, None),
        *(ratio(case, "median_ms", STRIDED, OURS, _STRIDED, 2.0, 2.0) for case in (_LARGE, _SMALL)),
        *(
            ratio(f"{ALL} 1024² {dtype}", "error_output", OURS, None, "share of the bits that differ from float64",
                  limit, at_most=True)
            for dtype, limit in WRONG_BITS.items()
        ),
    ],
    "cuda": [
        ratio(_LAYER, "median_ms", _BOTH, OURS, _FASTER, 8.0),
        ratio(_LAYER, "written_mib", _BOTH, OURS, "fewer bytes written than transformers", 10.0),
    ],
}  # fmt: skip


BENCHMARK = Benchmark(
    op="attention_mask",
    title="Attention masks",
    description=(
        "The masks that nine decoder layers attend with, of one photograph: mask features at stride 4 with C = 256, "
        "Q = 100 queries, levels of strides 32, 16, 8 with three layers each and every layer with its own embeddings; "
        "resizing included. A tenth of the queries has an empty mask, which attends everywhere. A mask is dropped when "
        "the next is made, so extra memory is all that is needed above features and embeddings. *transformers* also "
        "keeps every layer's full-resolution logits, as its decoder does; *logits dropped* is the same without. "
        "Error: share of the bits that differ from float64; a row with a differing bit whose logit is not within "
        "rounding of the threshold is wrong."
    ),
    cases=cases,
    work=work,
    quarters={"mask_features": (2, 3), "levels": ()},
    figures=FIGURES,
    check=check,
    operators=("resize_mask_features", "predict_attention_mask"),
    budget_s=2.0,
)
