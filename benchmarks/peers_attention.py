"""The peers of attention masks and of masked attention, each in the configuration that suits it best.

Attention masks: `transformers`' own mask predictor with its embedding already computed, and the best that plain
PyTorch does by the same rearrangement as this package.

Masked attention takes query, key and value by heads, [N, H, *, D], contiguous (on CPU SDPA is a sixth slower on heads
cut out of [N, *, H*D]), and the mask in the form that suits a peer best, made untimed:

- SDPA: bool [N, 1, Q, S]; expanded to the heads it would take three times as long on CPU.
- SDPA with a mask of 0 and -inf made before: SDPA makes it from a boolean mask in every call.
- nn.MultiheadAttention's core: the code between its projections as `transformers` calls it, with the boolean
  mask repeated over heads and the weights averaged over them. Its projections are the same work for all.
- FlexAttention, compiled, GPU only: with its block mask ready, and with the block mask built in every call as a mask
  that is new in every layer needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Data, Implementation, Levels, Tensors
from benchmarks.peers import missing

HEADS = 8

TRANSFORMERS = "transformers"
TRANSFORMERS_DROPPED = "transformers, logits dropped"
STRIDED = "PyTorch, strided slices"

SDPA, SDPA_ADDITIVE = "SDPA, boolean mask", "SDPA, additive mask made before"
MULTIHEAD = "nn.MultiheadAttention's core"
MULTIHEAD_MODULE, MULTIHEAD_NO_WEIGHTS = "nn.MultiheadAttention", "nn.MultiheadAttention, need_weights=False"
EAGER = "matmul, masked_fill, softmax, matmul"
FLEX, FLEX_REBUILT = "FlexAttention, block mask ready", "FlexAttention, block mask rebuilt"

# ---------------------------------------------------------------- attention masks


def as_given(inputs: Tensors, levels: Levels) -> dict[str, Any]:
    """The inputs as they are, and the levels."""
    return inputs | {"levels": levels}


def layers(inputs: Tensors, levels: Levels) -> Iterator[tuple[Tensor, int]]:
    """The mask embedding [N, Q, C] of each decoder layer and the index of the level it attends."""
    for i, embed in enumerate(inputs["mask_embed"]):
        yield embed, i % len(levels)


def _transformers_inputs(inputs: Tensors, levels: Levels) -> dict[str, Any]:
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerMaskPredictor

    channels = inputs["mask_embed"].shape[-1]
    predictor = Mask2FormerMaskPredictor(channels, HEADS, channels)
    predictor.mask_embedder = torch.nn.Identity()
    return as_given(inputs, levels) | {"predictor": predictor}


def _transformers(keep: bool) -> Callable[[dict[str, Any]], Iterator[Tensor]]:
    """Predictor and row rule as the decoder applies them; with `keep` it also keeps the logits of every layer."""

    def masks(a: dict[str, Any]) -> Iterator[Tensor]:
        kept = []
        for embed, level in layers(a, a["levels"]):
            logits, blocked = a["predictor"](embed.transpose(0, 1), a["mask_features"], a["levels"][level])
            if keep:
                kept.append(logits)
            some_open = (blocked.sum(-1) != blocked.shape[-1]).to(blocked.dtype)
            yield blocked * some_open.unsqueeze(-1)

    return masks


def _attend_of_heads(results: Any, data: Data) -> list[Tensor]:
    """Bool [N, Q, S], True = attend, of blocking masks [N * H, Q, S] that are the same for all heads."""
    decoded = []
    for blocked in results:
        by_head = blocked.unflatten(0, (-1, HEADS))
        if not (by_head == by_head[:, :1]).all():
            raise ValueError("the heads' masks differ")
        decoded.append(~by_head[:, 0])
    return decoded


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


def attention_mask_peers() -> list[Implementation]:
    """Peers of `resize_mask_features` with `predict_attention_mask`."""
    return [
        *(
            Implementation(
                name,
                _transformers(keep),
                _transformers_inputs,
                unavailable=missing("transformers"),
                decode=_attend_of_heads,
            )
            for name, keep in ((TRANSFORMERS, True), (TRANSFORMERS_DROPPED, False))
        ),
        Implementation(STRIDED, _strided, as_given, decode=lambda results, data: [~blocked for blocked in results]),
    ]


# ---------------------------------------------------------------- masked attention


def _by_heads(inputs: Tensors) -> dict[str, Any]:
    return {name: inputs[name].contiguous() for name in ("query", "key", "value")}


def _sdpa_inputs(inputs: Tensors, levels: Levels) -> dict[str, Any]:
    return _by_heads(inputs) | {"mask": inputs["attend"].unsqueeze(1)}


def _additive_inputs(inputs: Tensors, levels: Levels) -> dict[str, Any]:
    blocked = ~inputs["attend"].unsqueeze(1)
    mask = torch.zeros(blocked.shape, dtype=inputs["query"].dtype, device=blocked.device)
    return _by_heads(inputs) | {"mask": mask.masked_fill_(blocked, -torch.inf)}


def _blocked_inputs(inputs: Tensors, levels: Levels) -> dict[str, Any]:
    return _by_heads(inputs) | {"blocked": ~inputs["attend"].unsqueeze(1)}


def _repeated_inputs(inputs: Tensors, levels: Levels) -> dict[str, Any]:
    return _by_heads(inputs) | {"blocked": (~inputs["attend"]).repeat_interleave(inputs["query"].shape[1], 0)}


def _sdpa(a: dict[str, Any]) -> Tensor:
    return F.scaled_dot_product_attention(a["query"], a["key"], a["value"], attn_mask=a["mask"])


def multihead_core(a: dict[str, Any]) -> Tensor:
    """`nn.MultiheadAttention` between its projections: additive mask, product, softmax, product, mean of weights."""
    n, heads, _, d = a["query"].shape
    query, key, value = (a[name].flatten(0, 1) for name in ("query", "key", "value"))
    mask = torch.zeros_like(a["blocked"], dtype=query.dtype).masked_fill_(a["blocked"], -torch.inf)
    weights = torch.baddbmm(mask, query * d**-0.5, key.transpose(-2, -1)).softmax(-1)
    output = torch.bmm(weights, value)
    weights.unflatten(0, (n, heads)).mean(1)  # returned by the module, dropped by the decoder layer
    return output.unflatten(0, (n, heads))


def _eager(a: dict[str, Any]) -> Tensor:
    scores = (a["query"] * a["query"].shape[-1] ** -0.5) @ a["key"].transpose(-2, -1)
    return scores.masked_fill(a["blocked"], -torch.inf).softmax(-1) @ a["value"]


def _block_mask(attend: Tensor, compile_: bool) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    n, queries, keys = attend.shape

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return attend[batch, query, key]

    return create_block_mask(allowed, n, None, queries, keys, device=str(attend.device), _compile=compile_)


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

    def adapt(inputs: Tensors, levels: Levels) -> dict[str, Any]:
        arguments = _by_heads(inputs)
        attend = inputs["attend"]
        return arguments | {"attend": attend, "block_mask": None if rebuild else _block_mask(attend, compiled)}

    def call(a: dict[str, Any]) -> Any:
        block_mask = _block_mask(a["attend"], compiled) if rebuild else a["block_mask"]
        return _flex_attention(compiled)(a["query"], a["key"], a["value"], block_mask=block_mask)

    return call, adapt


def module_inputs(inputs: Tensors, module: torch.nn.Module) -> dict[str, Any]:
    """`module` with the parameters among the inputs, which have the names of `nn.MultiheadAttention`'s."""
    module.to(inputs["query"].device, inputs["query"].dtype)
    module.load_state_dict({name: inputs[name] for name in module.state_dict()})
    return inputs | {"module": module.eval()}


def _multihead_inputs(inputs: Tensors, levels: Levels) -> dict[str, Any]:
    """Sequence first and the mask repeated over heads, as `transformers` has them."""
    arguments = module_inputs(inputs, torch.nn.MultiheadAttention(inputs["query"].shape[-1], HEADS))
    arguments |= {name: inputs[name].transpose(0, 1).contiguous() for name in ("query", "pixels", "key_pos")}
    return arguments | {"blocked": (~inputs["attend"]).repeat_interleave(HEADS, 0)}


def _multihead(need_weights: bool) -> Callable[[dict[str, Any]], Tensor]:
    def call(a: dict[str, Any]) -> Tensor:
        key = a["pixels"] + a["key_pos"]
        mask = a["blocked"]
        output: Tensor = a["module"](a["query"], key, a["pixels"], attn_mask=mask, need_weights=need_weights)[0]
        return output

    return call


def module_peers() -> list[Implementation]:
    """Peers of `nn.MaskedCrossAttention`: the module as `transformers` calls it, and asked for no weights."""

    def batch_first(results: Any, data: Data) -> list[Tensor]:
        return [output.transpose(0, 1) for output in results]

    return [
        Implementation(name, _multihead(need_weights), _multihead_inputs, decode=batch_first)
        for name, need_weights in ((MULTIHEAD_MODULE, True), (MULTIHEAD_NO_WEIGHTS, False))
    ]


def masked_attention_peers(device: str) -> list[Implementation]:
    """Peers of `masked_attention`."""

    def gpu_only() -> str | None:
        return None if device == "cuda" else "compared on a GPU only"

    return [
        Implementation(SDPA, _sdpa, _sdpa_inputs),
        Implementation(SDPA_ADDITIVE, _sdpa, _additive_inputs),
        Implementation(MULTIHEAD, multihead_core, _repeated_inputs),
        Implementation(EAGER, _eager, _blocked_inputs),
        *(
            Implementation(name, *flex(rebuild), unavailable=gpu_only, counts_writes=False)
            for name, rebuild in ((FLEX, False), (FLEX_REBUILT, True))
        ),
    ]
