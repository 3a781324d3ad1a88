"""The model of a kernel's time, and a bar that keeps modelled times from growing."""

from __future__ import annotations

import re

import pytest

from benchmarks import sass, static_cuda, time_model
from tests.processes import python


def line(code: str, wait: str = "--", write: str = "-", stall: int = 1) -> sass.Instruction:
    (found,) = sass.instructions(f"{wait}:-:{write}:-:{stall:x}\t{code};")
    return found


def test_a_warp_waits_for_the_results_that_it_names() -> None:
    load, use = line("LDG.E.128 R4, [R2.64]", write="0"), line("FADD R4, R4, R5", wait="01", stall=4)
    walked = time_model.walk([load, use], 480)
    assert (walked.cycles, walked.instructions) == (480 + 4, 2)
    assert walked.requested == 16 * 32
    # The barriers are the bits of a decimal number, as Triton prints it: 10 names 1 and 3, not 4.
    for barrier, cycles in ((1, 480), (3, 480), (4, 1)):
        first, then = line("LDG.E.128 R4, [R2.64]", write=f"{barrier}"), line("FADD R4, R4, R5", wait="10", stall=4)
        assert time_model.walk([first, then], 480).cycles == cycles + 4
    # Two loads ahead of their uses wait once; one after the other, twice.
    assert time_model.walk([load, load, use, use], 480).cycles == 1 + 480 + 8
    assert time_model.walk([load, use, load, use], 480).cycles == 2 * 484


def test_copies_are_waited_for_by_group() -> None:
    copy, group = line("LDGSTS.E.128 [R1], [R2.64]"), line("LDGDEPBAR")

    def wait(pending: int) -> sass.Instruction:
        return line(f"DEPBAR.LE SB0, 0x{pending}")

    assert time_model.walk([copy, group, wait(0)], 500).cycles >= 500
    assert time_model.walk([copy, group, wait(1)], 500).cycles < 100


def test_products_by_shape() -> None:
    products = time_model.walk([line("HGMMA.64x128x16.F32.BF16 R4, R2"), line("HMMA.1688.F32.TF32 R4, R2, R3")])
    synchronous = 16 * 8 * 8 / (time_model.MATRIX_RATE * time_model.SYNCHRONOUS / 2)
    assert products.units["matrix"] == pytest.approx(16 * 128 * 16 / time_model.MATRIX_RATE + synchronous)


def test_warps_queue_for_what_they_share() -> None:
    """Alone, a warp takes the sum; many take what the busiest unit needs, and never less."""
    assert time_model.cycles_together(100, [50, 20], 1) == 170
    many = time_model.cycles_together(100, [50, 20], 64)
    assert 64 * 50 <= many <= 64 * 50 * 1.05
    times = [time_model.cycles_together(100, [50, 20], n) for n in range(1, 20)]
    assert times == sorted(times)


def test_rows_that_tiles_share_are_counted_once() -> None:
    small = time_model.gather("random", heads=1, points=1, size=128, images=1)
    assert 0 < small.tile_rows < small.corners
    assert small.corners / 2 < small.pair_rows <= small.corners
    assert time_model.gather("random", heads=1, points=1, size=128).corners == 2 * small.corners
    near = time_model.gather("local", heads=1, points=4, size=256)
    far = time_model.gather("random", heads=1, points=4, size=256)
    assert near.tile_rows / near.corners < 0.5 * far.tile_rows / far.corners


def test_control_codes_are_decoded() -> None:
    """Wait for barriers 0 and 2, result to barrier 1, stall of 4; a jump's address becomes a label."""
    control = (4 | 1 << 4 | 1 << 5 | 7 << 8 | 0b101 << 11) << 41
    dump = (
        f"        /*0000*/   LDG.E R4, [R2.64] ;   /* 0x0000000000000001 */\n   /* 0x{control:016x} */\n"
        f"        /*0010*/   @P0 BRA 0x0 ;         /* 0x0000000000000001 */\n   /* 0x{control:016x} */\n"
    )
    decoded = "LBB0:\n05:-:1:-:4\tLDG.E R4, [R2.64] ;\nLBB16:\n05:-:1:-:4\t@P0 BRA LBB0 ;\n"
    assert static_cuda.control_codes(dump) == decoded


def test_how_far_to_believe_it() -> None:
    assert "rank correlation 1.00, modelled / measured 0.10" in time_model.verdict("x", [(1, 10), (2, 20), (3, 30)])
    assert "rank correlation -1.00" in time_model.verdict("x", [(1, 30), (2, 20), (3, 10)])


#: Microseconds, modelled; a little above what the kernels are at. Whoever makes one faster lowers its bar.
BARS = {
    "masks of 9 layers, 1024², bf16": 99,
    "masks of 9 layers, 1024², bf16, flags at once": 81,
    "ms_deform_attn bf16, local": 134,
    "ms_deform_attn fp32, local": 165,
    "ms_deform_attn bf16, local, lean": 87,
    "ms_deform_attn fp32, local, lean": 90,
}
SLOW_BARS = {
    "masked_attention bf16, N=1 Q=100, (64, 64, 4, 3, 2)": 25,
    "masked_attention bf16, N=1 Q=100, lean": 18.5,
    "masks of 9 layers, 512², fp32": 193,
    "masks of 9 layers, 1024², fp32": 325,
    "masked_attention fp32": 148,
    "uncertain_points, 100 masks": 137,
    "point_sample backward": 120,
    "point_sample backward, tiles": 56,
}


@pytest.mark.parametrize("bars", [BARS, pytest.param(SLOW_BARS, marks=pytest.mark.slow)], ids=["", "slow"])
def test_modelled_times_do_not_grow(bars: dict[str, float]) -> None:
    if static_cuda.compiler() is None:
        bars = {name: bar for name, bar in bars.items() if "deform" not in name}
    done = python("-m", "benchmarks.time_model", "--select", "|".join(f"^{re.escape(name)}$" for name in bars))
    assert done.returncode == 0, done.stderr
    table = re.findall(r"^\| ([^|]+) \| ([\d.]+) \|", done.stdout, re.MULTILINE)
    found = {name: float(time) for name, time in table}
    assert found.keys() == bars.keys()
    assert {name: time for name, time in found.items() if time > bars[name]} == {}
