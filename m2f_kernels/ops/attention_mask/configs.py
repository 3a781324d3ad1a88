"""Launch configurations of predict_attention_mask: heuristic default and what the tuner tries."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

from m2f_kernels import _tuning
from m2f_kernels._tuning import Configuration

if TYPE_CHECKING:
    from m2f_kernels._triton import Architecture

PREDICT = "predict_attention_mask"


def key(element_size: int, num_queries: int) -> str:
    """The key of a configuration: the element size and the padded number of queries, on which it depends."""
    padded = min(max(1 << (num_queries - 1).bit_length(), 16), 256)
    return f"{_tuning.bits(element_size)}, Q {padded}"


def padded_queries(num_queries: int) -> int:
    """Queries of a program: a power of two from 16 (the narrowest matrix instruction) to 128."""
    return min(max(1 << (num_queries - 1).bit_length(), 16), 128)


#: With no more keys, tiles of 64 of them are too few programs for a large GPU.
_FEW_KEYS = 4096


def default(element_size: int, num_queries: int, num_keys: int = _FEW_KEYS + 1) -> Configuration:
    """Keys are the rows of the product: 64 of them are one warp group's matrix instruction from sm_90 on.

    float32 is multiplied without tensor cores and holds its operands in registers: smaller tiles, more warps. As three
    products of TF32 parts it holds keys in registers: few queries, and chunks of channels ahead in shared memory.
    """
    queries = padded_queries(num_queries)
    if element_size == 4 and _tuning.TF32X3:
        if num_keys <= _FEW_KEYS:
            return {"BLOCK_S": 32, "BLOCK_Q": min(queries, 32), "BLOCK_C": 32, "num_warps": 2, "num_stages": 4}
        return {"BLOCK_S": 64, "BLOCK_Q": min(queries, 32), "BLOCK_C": 32, "num_warps": 4, "num_stages": 4}
    if element_size == 4:
        return {"BLOCK_S": 64, "BLOCK_Q": min(queries, 64), "BLOCK_C": 16, "num_warps": 4, "num_stages": 2}
    warps = 8 if queries == 128 else 4
    return {"BLOCK_S": 64, "BLOCK_Q": queries, "BLOCK_C": 64, "num_warps": warps, "num_stages": 3}


def predict(device: Architecture, element_size: int, num_queries: int, num_keys: int) -> Configuration:
    """The configuration to launch with: smaller tiles on sm_75 and gfx11, which multiply with operands in registers."""
    config = default(element_size, num_queries, num_keys)
    if device.capability == 75 or device.gfx.startswith("gfx11"):
        queries = min(config["BLOCK_Q"], 64)
        config = {"BLOCK_S": 32, "BLOCK_Q": queries, "BLOCK_C": 16, "num_warps": 8, "num_stages": 1}
    return _tuning.configuration(device.capability, PREDICT, key(element_size, num_queries), config)


def candidates(element_size: int, num_queries: int) -> list[Configuration]:
    """The configurations that the tuner measures, the default first."""
    queries = padded_queries(num_queries)
    found = [default(element_size, num_queries)]
    for s, q, c, warps, stages in product((32, 64, 128), {queries, min(queries, 64)}, (16, 32, 64), (4, 8), (2, 3, 4)):
        # Sums of one block stay in registers: at most 128 per thread. float32 holds its operands there too.
        if s * q > warps * 32 * 128 or (element_size == 4 and (c > 32 or s * q > warps * 32 * 64)):
            continue
        one = {"BLOCK_S": s, "BLOCK_Q": q, "BLOCK_C": c, "num_warps": warps, "num_stages": stages}
        if one not in found:
            found.append(one)
    return found
