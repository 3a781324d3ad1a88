"""Launch configurations of masked attention: heuristic defaults and what the tuner tries."""

from __future__ import annotations

from itertools import product

from m2f_kernels import _tuning
from m2f_kernels._tuning import Configuration

FORWARD = "masked_attention"
BACKWARD = "masked_attention_backward"

#: Tiles of keys that one program may own: their flags are the bits of one scalar.
MAX_TILES = 16


def padded(size: int, smallest: int = 16) -> int:
    """The power of two that holds `size`; matrix instructions want 16 at least."""
    return max(1 << max(size - 1, 0).bit_length(), smallest)


def key(element_size: int, num_queries: int, d: int) -> str:
    """What of the arguments a configuration depends on; sizes are padded."""
    return f"{8 * element_size} bit, Q {min(padded(num_queries), 128)}, D {padded(d)}"


def default_forward(element_size: int, num_queries: int, d: int) -> Configuration:
    """Heuristic.

    With 64 queries or more they are the rows of both products, and softmax stays inside a warp; with fewer the keys
    are the rows (KEYS_FIRST), so that the scores still fill the matrix instructions of sm_90, 64 rows each. float32 is
    multiplied without tensor cores and holds its operands in registers: smaller tiles.
    """
    queries, channels = min(padded(num_queries), 128), padded(d)
    if element_size == 4:
        tile = {"BLOCK_Q": min(queries, 64 if channels <= 32 else 32), "BLOCK_K": 32}
        return {**tile, "KEYS_FIRST": 0, "num_warps": 4 if channels <= 64 else 16, "num_stages": 1, "waves": 4}
    if channels >= 128:
        queries = min(queries, 64)
    return {
        "BLOCK_Q": queries,
        "BLOCK_K": 64 if channels <= 128 else 32,
        "KEYS_FIRST": int(queries < 64),
        "num_warps": 4,
        "num_stages": 2,
        "waves": 2,
    }


def default_backward(element_size: int, num_queries: int, d: int) -> Configuration:
    """Heuristic. Keys are the rows of every product but dQ's."""
    queries, channels = min(padded(num_queries), 128), padded(d)
    if element_size == 4:
        tile = {"BLOCK_Q": min(queries, 32), "BLOCK_K": 32}
        return {**tile, "num_warps": 4 if channels <= 32 else 8, "num_stages": 1, "waves": 4}
    if channels >= 64:
        queries = min(queries, 64)
    return {"BLOCK_Q": queries, "BLOCK_K": 64, "num_warps": 8 if queries * channels > 2048 else 4, "num_stages": 1,
            "waves": 2}  # fmt: skip


def forward(capability: int, element_size: int, num_queries: int, d: int) -> Configuration:
    """The configuration to launch with."""
    default = default_forward(element_size, num_queries, d)
    return _tuning.configuration(capability, FORWARD, key(element_size, num_queries, d), default)


def backward(capability: int, element_size: int, num_queries: int, d: int) -> Configuration:
    """The configuration to launch with."""
    default = default_backward(element_size, num_queries, d)
    return _tuning.configuration(capability, BACKWARD, key(element_size, num_queries, d), default)


def tiles_per_program(tiles: int, programs: int, multiprocessors: int, waves: int) -> int:
    """Tiles of keys that one program takes.

    Args:
        tiles: all tiles of keys.
        programs: how many programs there are for each of them (images x heads x blocks of queries).
        multiprocessors: of the device.
        waves: programs wanted per multiprocessor.

    Returns:
        a power of two, at most `MAX_TILES`: the nearest to what gives `waves` programs to each multiprocessor.
    """
    wanted = tiles * programs / max(multiprocessors * waves, 1)
    power = 1
    while power < MAX_TILES and power < tiles and wanted > power * 2**0.5:
        power *= 2
    return power


def candidates_forward(element_size: int, num_queries: int, d: int) -> list[Configuration]:
    """What the tuner measures, the default first."""
    queries, channels = min(padded(num_queries), 128), padded(d)
    found = [default_forward(element_size, num_queries, d)]
    blocks_q = sorted({min(queries, size) for size in (32, 64, 128)})
    stages = (1, 2) if element_size == 4 else (2, 3)
    for q, k, first, warps, depth, waves in product(blocks_q, (32, 64, 128), (0, 1), (4, 8), stages, (2, 4)):
        if _fits(element_size, q, k, channels, warps, depth):
            one = {"BLOCK_Q": q, "BLOCK_K": k, "KEYS_FIRST": first, "num_warps": warps, "num_stages": depth,
                   "waves": waves}  # fmt: skip
            if one not in found:
                found.append(one)
    return found


def candidates_backward(element_size: int, num_queries: int, d: int) -> list[Configuration]:
    """What the tuner measures, the default first."""
    queries, channels = min(padded(num_queries), 128), padded(d)
    found = [default_backward(element_size, num_queries, d)]
    blocks_q = sorted({min(queries, size) for size in (32, 64, 128)})
    for q, k, warps, depth, waves in product(blocks_q, (32, 64, 128), (4, 8), (1, 2), (1, 2, 4)):
        if _fits(element_size, q, k, channels, warps, depth):
            one = {"BLOCK_Q": q, "BLOCK_K": k, "num_warps": warps, "num_stages": depth, "waves": waves}
            if one not in found:
                found.append(one)
    return found


def _fits(element_size: int, block_q: int, block_k: int, channels: int, warps: int, stages: int) -> bool:
    """Whether a tile is worth compiling: its scores and sums in registers (float32 has its operands there too), and
    the stages of K and V in shared memory."""
    numbers = 32 * warps * (32 if element_size == 4 else 64)
    in_registers = max(block_q * block_k, max(block_q, block_k) * channels) <= numbers
    return in_registers and 2 * stages * block_k * channels * element_size <= 128 * 1024
