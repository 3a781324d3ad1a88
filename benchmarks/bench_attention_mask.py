"""Attention masks: what the nine layers of Mask2Former's decoder attend to, from mask embeddings and mask features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import m2f_kernels
from benchmarks import inputs, peers_attention
from benchmarks.cases import (
    PEER_SLACK,
    Benchmark,
    Case,
    Data,
    Figure,
    Implementation,
    Levels,
    Scale,
    Tensors,
    Verdict,
    Work,
)
from benchmarks.memory import bytes_of
from m2f_kernels.masks import PackedMask

CHANNELS, QUERIES, LAYERS = 256, 100, 9
#: Of the levels a decoder attends, in its order, against the mask features' 4.
STRIDES = (32, 16, 8)

OURS = "m2f_kernels"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: Largest share of bits that may differ from the reference.
WRONG_BITS = {"fp32": 1e-6, "bf16": 1e-3}
#: An implementation's logit lies within this factor times sum_c |embed_c| |feature_c| of the exact one: in float32 the
#: rounding of C products and sums; in bfloat16 that of the resized features.
ROUNDING = {"fp32": (CHANNELS + 3) * 2.0**-24, "bf16": 2.0**-8}
#: The queries' masks cover shares of the image that fall with the query; the last ones are empty and attend everywhere.
EMPTY_QUERIES = 10
ALL, STRIDE_8 = "9 layers", "1 layer at stride 8,"


# ---------------------------------------------------------------- this package


def _masks(a: dict[str, Any]) -> Iterator[PackedMask]:
    resized = m2f_kernels.resize_mask_features(a["mask_features"], a["levels"])
    for embed, level in peers_attention.layers(a, a["levels"]):
        yield m2f_kernels.predict_attention_mask(embed, resized[level])


def _decode(results: Sequence[Tensor], data: Data) -> list[Tensor]:
    packed = zip(results[::2], results[1::2], data.outputs, strict=True)
    return [PackedMask(bits, row_any, data.truth[name].shape[-1]).to_bool() for bits, row_any, name in packed]


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
    magnitudes = {name: tensor.abs() for name, tensor in exact.items()}
    truth: Tensors = {}
    with m2f_kernels.use_backend("reference"):
        resized = m2f_kernels.resize_mask_features(exact["mask_features"], levels)
        magnitude = m2f_kernels.resize_mask_features(magnitudes["mask_features"], levels)
        for i, (embed, level) in enumerate(peers_attention.layers(exact, levels)):
            bound = ROUNDING[dtype] * (magnitudes["mask_embed"][i] @ magnitude[level].flatten(2))
            logits = embed @ resized[level].flatten(2)
            attend = m2f_kernels.predict_attention_mask(embed, resized[level]).to_bool()
            empty = (logits < -bound).all(-1)
            if not (empty | (logits > bound).any(-1)).all():
                raise RuntimeError(f"layer {i + 1}: rounding decides whether a query's mask is empty; choose others")
            truth[f"layer {i + 1}"] = attend.cpu()
            truth[f"doubtful {i + 1}"] = (logits.abs() <= bound).cpu()
    return truth


def _data(scale: Scale, size: int, dtype: str, whole: bool) -> Data:
    features, embed = _factors(size)
    if not whole:
        embed = embed[2:3]
    levels = [(size // stride, size // stride) for stride in (STRIDES if whole else STRIDES[-1:])]
    tensors = {"mask_features": features.to(DTYPES[dtype]), "mask_embed": embed.to(DTYPES[dtype])}
    outputs = tuple(f"layer {i + 1}" for i in range(len(embed)))
    return Data(tensors, _truth(tensors, levels, dtype, scale.device), levels, outputs)


def check(case: Case, implementation: Implementation, data: Data, results: Sequence[Tensor]) -> Verdict:
    """Few bits may differ from the truth, and only where the exact logit is within rounding of the threshold."""
    wrong = total = unjustified = 0
    for i, (name, attend) in enumerate(zip(data.outputs, results, strict=True)):
        truth = data.truth[name]
        if attend.shape != truth.shape:
            raise ValueError(f"{name}: expected shape {tuple(truth.shape)}; got {tuple(attend.shape)}")
        differs = attend != truth
        wrong += int(differs.sum())
        unjustified += int((differs & ~data.truth[f"doubtful {i + 1}"]).sum())
        total += truth.numel()
    share = wrong / total
    return Verdict(
        not unjustified and share <= WRONG_BITS[case.dtype] * (1 if implementation.ours else PEER_SLACK), share
    )


def data(scale: Scale) -> dict[str, Callable[[], Data]]:
    return {case.data: partial(_data, scale, *_parts(case)) for case in cases(scale)}


def shrink(data: Data) -> Data:
    """A sixteenth of the image."""
    features = data.inputs["mask_features"]
    h, w = features.shape[2] // 4, features.shape[3] // 4
    few = data.inputs | {"mask_features": features[:, :, :h, :w]}
    return replace(data, inputs=few, levels=[(h // 4, w // 4) for h, w in data.levels])


# ---------------------------------------------------------------- cases


def _name(what: str, size: int, dtype: str) -> str:
    return f"{what} {size}² {dtype}"


def _parts(case: Case) -> tuple[int, str, bool]:
    """Size of the image, dtype, and whether all layers are meant."""
    size = int(case.name.split("²")[0].rsplit(" ", 1)[1])
    return size, case.dtype, case.name.startswith(ALL)


def _sizes(scale: Scale) -> tuple[int, int]:
    return (256, 512) if scale.quick else (512, 1024)


def cases(scale: Scale) -> list[Case]:
    cuda = scale.device == "cuda"
    ours = Implementation(OURS, _masks, peers_attention.as_given, ours=True, decode=_decode)
    implementations = [ours, *peers_attention.attention_mask_peers()]
    small, large = _sizes(scale)

    def case(what: str, size: int, dtype: str, memory: bool = False) -> Case:
        name, headline = _name(what, size, dtype), dtype == ("bf16" if cuda else "fp32")
        return Case(name, name, "forward", implementations, dtype=dtype, memory=memory, headline=headline)

    found = [case(ALL, large, "fp32", memory=True), case(ALL, small, "fp32"), case(ALL, large, "bf16")]
    if cuda:
        found += [case(STRIDE_8, large, dtype, memory=True) for dtype in DTYPES]
    return found


def work(case: Case, data: Data) -> Work:
    """Features and embeddings read once, bits and row flags written once; one product per layer at its level's size."""
    words, pixels = 0, 0
    for _, level in peers_attention.layers(data.inputs, data.levels):
        h, w = data.levels[level]
        words += (h * w + 31) // 32
        pixels += h * w
    embed = data.inputs["mask_embed"]
    layers, n, queries, channels = embed.shape
    written = n * queries * (4 * words + layers)
    dtype = "bfloat16" if case.dtype == "bf16" else "float32"
    return Work(bytes_of(data.inputs.values()) + written, flops=2 * n * queries * channels * pixels, flop_dtype=dtype)


# ---------------------------------------------------------------- required figures


def figures(scale: Scale) -> list[Figure]:
    small, large = _sizes(scale)
    cuda = scale.device == "cuda"
    settings = ("cuda",) if cuda else ("default", "heap retained")
    both = (peers_attention.TRANSFORMERS, peers_attention.TRANSFORMERS_DROPPED)

    def ratio(case: str, field: str, peers: tuple[str, ...], target: float | None, label: str) -> Figure:
        where = settings[:1] if field.startswith("memory") else settings
        targets: dict[str, float | None] = dict.fromkeys(where, target)
        return Figure(f"{case}: {label}", (case, peers, field), (case, (OURS,), field), targets)

    if cuda:
        case = _name(STRIDE_8, large, "bf16")
        return [
            ratio(case, "median_ms", both, 8.0, "faster than transformers"),
            ratio(case, "written_mib", both, 10.0, "fewer bytes written than transformers"),
        ]
    at_large, at_small = _name(ALL, large, "fp32"), _name(ALL, small, "fp32")
    kept, dropped = (both[:1], "its decoder keeps every layer's logits"), (both[1:], "with the logits dropped")
    return [
        ratio(at_large, "median_ms", both, 15.0, "faster than transformers"),
        ratio(at_small, "median_ms", both, 12.0, "faster than transformers"),
        ratio(at_large, "memory_extra_mib", kept[0], 10.0, f"less peak memory than transformers ({kept[1]})"),
        ratio(at_large, "memory_extra_mib", dropped[0], None, f"less peak memory than transformers {dropped[1]}"),
        ratio(at_large, "written_mib", both, None, "fewer bytes written than transformers"),
        *(
            ratio(case, "median_ms", (peers_attention.STRIDED,), 2.0, "faster than strided slices in plain PyTorch")
            for case in (at_large, at_small)
        ),
        *(
            Figure(
                f"{_name(ALL, large, dtype)}: share of the bits that differ from float64",
                (_name(ALL, large, dtype), (OURS,), "error_output"), None, {"default": WRONG_BITS[dtype]}, at_most=True,
            )
            for dtype in DTYPES
        ),
    ]  # fmt: skip


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
    data=data,
    work=work,
    shrink=shrink,
    figures=figures,
    check=check,
    operators=("resize_mask_features", "predict_attention_mask"),
    budget_s=2.0,
)
