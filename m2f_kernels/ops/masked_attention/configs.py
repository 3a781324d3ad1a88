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


def default_backward(capability: int, element_size: int, num_queries: int, d: int) -> Configuration:
    """Heuristic, from ahead-of-time compilation: the largest tiles without spills.

    Keys are the rows of every product but dQ's, 16 of them per warp. With one block of queries a program owns several
    tiles of keys; with more it owns one and goes through the blocks.
    """
    queries, channels = min(padded(num_queries), 64), padded(d)
    if element_size == 4:
        if channels <= 32:
            block_q, block_k, warps = queries, 32, 8
        elif channels <= 64:
            block_q, block_k, warps = min(queries, 32), 32, 16 if queries > 32 else 8
        else:
            block_q, block_k, warps = 16, 32, 16
        waves = 4
    else:
        if channels <= 32 or (channels <= 64 and capability >= 90):
            block_q, block_k, warps = queries, 128, 8
        elif channels <= 64:
            block_q, block_k, warps = min(queries, 32), 32, 4
        elif capability == 90:
            block_q, block_k, warps = queries, 32, 8
        else:
            block_q, block_k, warps = 16, 32, 4
        waves = 2
    return {"BLOCK_Q": block_q, "BLOCK_K": block_k, "num_warps": warps, "num_stages": 1, "waves": waves}


def forward(capability: int, element_size: int, num_queries: int, d: int) -> Configuration:
    """The configuration to launch with."""
    default = default_forward(element_size, num_queries, d)
    return _tuning.configuration(capability, FORWARD, key(element_size, num_queries, d), default)


def backward(capability: int, element_size: int, num_queries: int, d: int) -> Configuration:
    """The configuration to launch with."""
    default = default_backward(capability, element_size, num_queries, d)
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
