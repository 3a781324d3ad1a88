"""float32 factors as three products of TF32 parts, which `M2F_TF32X3=1` asks for: how exact, what is compiled, results.

The interpreter multiplies float32 as it is, so the rounding is emulated here, as Triton's lowering defines it: each
factor is the sum of its TF32 rounding and the TF32 rounding of the rest; the product of the two rests is left out.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]


def tf32(x: Tensor) -> Tensor:
    """Rounded to 10 bits of fraction."""
    bits = x.view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def three_products(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; products of TF32 numbers are exact in float32, sums are kept in float32."""
    large_a, large_b = tf32(a), tf32(b)
    small_a, small_b = tf32(a - large_a), tf32(b - large_b)
    return (small_a @ large_b + large_a @ small_b) + large_a @ large_b


def error(x: Tensor, truth: Tensor, magnitude: Tensor) -> float:
    return ((x.double() - truth).abs() / magnitude).max().item()


@pytest.mark.parametrize("spread", [1.0, 1e3])
def test_three_products_are_nearly_as_exact_as_one(spread: float) -> None:
    """Relative to the sum of the products' magnitudes, over 256 channels; and bits of masks stay those of float32, but
    where the logit is within rounding of 0."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.exp(torch.randn(256, generator=generator) * torch.tensor(spread).log())
    embed = torch.randn(100, 256, generator=generator) * scale
    features = torch.randn(256, 4096, generator=generator) / scale[:, None]
    truth = embed.double() @ features.double()
    magnitude = embed.double().abs() @ features.double().abs()
    single, three = error(embed @ features, truth, magnitude), error(three_products(embed, features), truth, magnitude)
    one = error(tf32(embed) @ tf32(features), truth, magnitude)
    flipped = [((x < 0) != (truth < 0)).sum().item() for x in (embed @ features, three_products(embed, features))]
    print(f"float32 {single:.1e}, three products {three:.1e}, one {one:.1e}; bits that differ {flipped} of 409600")
    assert three < 5e-7  # 2^-21: what the three products leave out
    assert one > 50 * three
    differs = (three_products(embed, features) < 0) != (truth < 0)
    assert not (differs & (truth.abs() > 1e-6 * magnitude)).any()
    assert flipped[1] <= 40


def run(code: str, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "M2F_TF32X3")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=clean | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


COMPILE = """
from benchmarks import sass, static, time_model
given = static.given("x[1,100,256] x[1,256,16384]")
case = static.Case("m2f_kernels.ops.attention_mask.triton", "predict_attention_mask", given)
(kernel,) = time_model.triton_kernels(case)
mix = sass.mix(kernel.code)
print(mix.counts.get("matrix", 0), mix.counts.get("local", 0), time_model.estimate(kernel).seconds)
"""


def test_masks_take_tensor_cores_and_half_the_modelled_time() -> None:
    """100 queries, 256 channels, 16384 keys; the default has no matrix instruction."""
    matrix, spills, seconds = run(COMPILE).split()
    assert (int(matrix), int(spills)) == (0, 0)
    matrix, spills, faster = run(COMPILE, M2F_TF32X3="1").split()
    assert int(matrix) > 0
    assert int(spills) == 0
    assert float(faster) <= 0.45 * float(seconds)


@pytest.mark.slow
def test_results_in_the_interpreter() -> None:
    """Other tiles are launched: the tests of masks and masked attention in float32, again."""
    if torch.cuda.is_available():
        pytest.skip("on a GPU run the suite with M2F_TF32X3=1")
    tests = ["tests/triton/test_attention_mask.py", "tests/triton/test_masked_attention.py", "-k", "predict or dtype0"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-m", "not slow", *tests], cwd=ROOT,
        env=os.environ | {"M2F_TF32X3": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) > 20
