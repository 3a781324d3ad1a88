"""The benchmark suite measures what it says: checks reject, counters count, peers compute the same, figures exist."""

import subprocess
import sys
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import m2f_kernels

pytest.importorskip("rich", reason="the benchmark suite needs rich: `make bench` installs it")

import benchmarks
from benchmarks import inputs, measure, report
from benchmarks.cases import Case, Data, Implementation, Row, Scale, check_relative_l2, ratio
from benchmarks.ops import attention_mask, masked_attention
from m2f_kernels.masks import PackedMask

NEEDS_BENCH = "the benchmark's inputs need scikit-image and transformers: `make bench` installs them"
SCALES = [
    Scale(device, quick, full)
    for device in ("cpu", "cuda")
    for quick, full in ((True, False), (False, False), (False, True))
]


def _implementation(call, ours=True, **kwargs):
    return Implementation("one", call, lambda tensors, levels: dict(tensors), ours=ours, **kwargs)


# ---------------------------------------------------------------- the suite


@pytest.mark.parametrize("op", benchmarks.REGISTRY)
@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_figures_name_what_is_measured(op, scale):
    benchmark = benchmarks.load(op)
    cases = {case.name: case for case in benchmark.cases(scale)}
    assert len(cases) == len(benchmark.cases(scale)), "names of cases are not unique"
    assert {case.data for case in cases.values()} == set(benchmark.data(scale))
    selected = {case.name for case in benchmark.select(scale)}
    assert selected <= set(cases)
    assert selected == set(cases) or not scale.full
    for figure in () if scale.quick else benchmark.figures.get(scale.device, ()):
        case = cases[figure.case]
        names = {*figure.above, figure.below or figure.above[0]}
        assert names <= {one.name for one in case.implementations}
        assert figure.field in {f.name for f in fields(Row)}
        assert case.name in selected or not any(figure.target), "only --full judges it"
        assert not figure.field.startswith("memory") or case.memory


def _row(implementation, time, extra, setting="default"):
    row = Row("op", "case", implementation, setting, "forward", "", "fp32", 1)
    return replace(row, median_ms=time, memory_extra_mib=extra)


def test_of_several_peers_the_best_or_the_fastest_counts():
    rows = [_row("ours", 2.0, 4.0), _row("fast", 6.0, 80.0), _row("small", 9.0, 20.0), _row("broken", None, None)]
    best = ratio("case", "median_ms", ("fast", "small", "broken"), "ours", "")
    less = replace(best, field="memory_extra_mib")
    assert report.evaluate(best, rows, "default") == (3.0, False)
    assert report.evaluate(less, rows, "default") == (5.0, False)
    assert report.evaluate(replace(less, of_fastest=True), rows, "default") == (20.0, False)
    assert report.evaluate(best, rows, "another") is None
    assert report.evaluate(replace(best, below="broken"), rows, "default") is None
    rows[0].memory_extra_mib = 0.5
    assert report.evaluate(less, rows, "default") == (20.0, True), "no more than a lower bound"


RATES = {"bandwidth": 1e9, "l2": 1e9, "float32 matmul": 1e9, "bfloat16 matmul": 4e9}
GATHER = {"bandwidth": 4e9, "l2 bytes": 6e10, "l1 cycles": 1e9, "reductions": 2.2e8}
H200, A100 = ({"bandwidth": 4e12, "float32 matmul": 1e12} | measure.part_rates(f"NVIDIA {x}") for x in ("H200", "A100"))


@pytest.mark.parametrize(
    ("work", "rates", "expected"),
    [
        ({"bandwidth": 3e6, "float32 matmul": 2e6}, RATES, (3, "bandwidth")),
        ({"bandwidth": 1e6, "float32 matmul": 2e6}, RATES, (2, "float32 matmul")),
        ({"bandwidth": 1e6, "bfloat16 matmul": 8e6}, RATES, (2, "bfloat16 matmul")),
        ({"bandwidth": 1e6, "l2": 4e6}, RATES, (4, "l2 gather")),
        # On a GPU gathers are counted, where the part's rates are known.
        (GATHER, H200, (8, "l2 bytes")),
        (GATHER | {"reductions": 1.1e9}, H200, (10, "reductions")),
        (GATHER | {"l1 cycles": 2.6136e9}, H200, (10, "l1 cycles")),
        # 16 special functions a cycle on each of 132 multiprocessors at 1.98 GHz
        (GATHER | {"special functions": 4.18176e10}, H200, (10, "special functions")),
        (GATHER, A100, (1, "bandwidth")),
    ],
)
def test_the_floor_is_what_bounds_most(work, rates, expected):
    milliseconds, bound = measure.floor(work, rates)
    assert (pytest.approx(milliseconds), bound) == expected


def test_written_bytes_are_those_of_results_and_temporaries():
    x = torch.ones(1 << 18)  # 1 MiB

    def run():
        y = torch.empty_like(x).copy_(x)  # 1
        y.view(2, -1).t()  # views write nothing
        y.mul_(2)  # 1
        return ((y + 1).double(),)  # 1 + 2

    result, mib = measure.written(run)
    assert mib == 5
    assert result[0].dtype == torch.float64
    assert measure.written(run, count=False)[1] is None

    def gradient():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad((leaf * 2,), (leaf,), (x,))  # product and its gradient

    assert measure.written(gradient)[1] == 2


def test_what_a_call_yields_is_dropped_when_timed_and_kept_when_checked():
    alive = []

    class Result(torch.Tensor):
        def __del__(self):
            alive.remove(id(self))

    most = 0

    def call(arguments):
        nonlocal most
        for _ in range(3):
            result = arguments["x"].clone().as_subclass(Result)
            alive.append(id(result))
            most = max(most, len(alive))
            yield result
            del result

    case = Case("case", "data", "forward", [])
    run = case.bind(_implementation(call), Data({"x": torch.ones(2)}, {}))
    assert run() == ()
    assert most == 1
    assert len(run(collect=True)) == 3


def test_gradients_are_checked_after_the_outputs():
    x = torch.rand(5)
    data = Data(
        {"x": x},
        {"a": x * 2, "b": x * 3, "x": torch.full((5,), 5.0)},
        outputs=("a", "b"),
        grad_outputs=(torch.ones(5), torch.ones(5)),
        differentiable=("x",),
    )
    case = Case("case", "data", "forward+backward", [])
    right = _implementation(lambda a: (a["x"] * 2, a["x"] * 3))
    verdict = check_relative_l2(case, right, data, case.bind(right, data)())
    assert verdict.right
    assert verdict.gradients == pytest.approx(0, abs=1e-6)
    # The gradient alone is wrong.
    wrong = _implementation(lambda a: (a["x"] * 2, (a["x"] * 3).detach() + 0 * a["x"]))
    verdict = check_relative_l2(case, wrong, data, case.bind(wrong, data)())
    assert not verdict.right
    assert verdict.output < 1e-6 < verdict.gradients


@pytest.mark.parametrize(
    ("op", "data"), [("attention_mask", "9 layers 128² fp32"), ("masked_attention", masked_attention.MODULE)]
)
def test_every_form_is_right_and_runs_on_less(op, data, monkeypatch):
    for module in ("skimage", "transformers"):
        pytest.importorskip(module, reason=NEEDS_BENCH)
    monkeypatch.setattr(attention_mask, "_sizes", lambda scale: (64, 128))
    monkeypatch.setattr(masked_attention, "SMALL", 256)
    benchmark = benchmarks.load(op)
    case = next(case for case in benchmark.cases(Scale("cpu", True)) if case.data == data)
    made = case.build()
    assert len(case.implementations) >= 3
    for one in case.implementations:
        run = case.bind(one, made)
        assert benchmark.check(case, one, made, one.decode(run(collect=True), made)).right, one.name
        case.bind(one, benchmark.shrink(made))()


# ---------------------------------------------------------------- attention masks


@pytest.fixture(scope="module")
def masks():
    for module in ("skimage", "transformers"):
        pytest.importorskip(module, reason=NEEDS_BENCH)
    return attention_mask.build("cpu", 128, "fp32", True)


def test_a_wrong_bit_is_found(masks):
    case = Case("case", "data", "forward", [], dtype="fp32")
    bits = [masks.truth[name].clone() for name in masks.outputs]
    total = sum(b.numel() for b in bits)
    check = partial(attention_mask.check, case, _implementation(None), masks)
    assert check(bits).right
    bits[4].view(-1)[7] ^= True
    assert not masks.truth["doubtful 5"].view(-1)[7]
    verdict = check(bits)
    assert not verdict.right
    assert verdict.output == 1 / total
    # Where rounding may decide, a bit alone is no mistake; but it may not be one of few.
    doubtful = {f"doubtful {i + 1}": torch.ones_like(b) for i, b in enumerate(bits)}
    lenient = replace(masks, truth=masks.truth | doubtful)
    assert 1 / total > attention_mask.WRONG_BITS["fp32"]
    assert not attention_mask.check(case, _implementation(None), lenient, bits).right
    low = replace(case, dtype="bf16")
    assert 1 / total < attention_mask.WRONG_BITS["bf16"]
    assert attention_mask.check(low, _implementation(None), lenient, bits).right


def test_masks_of_the_benchmark_are_partly_open_and_some_rows_empty(masks):
    for name in masks.outputs:
        density = masks.truth[name].double().mean(-1)[0]
        assert (density[-attention_mask.EMPTY_QUERIES :] == 1).all()  # the row rule
        others = density[: -attention_mask.EMPTY_QUERIES]
        assert (others > 0).all()
        assert (others < 0.9).all()


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_strided_slices_resize_as_interpolation_does(ratio, generator):
    features = torch.randn(1, 3, 16, 24, dtype=torch.float64, generator=generator)
    size = (16 // ratio, 24 // ratio)
    expected = F.interpolate(features, size=size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(attention_mask._centre_mean(features, size), expected)


# ---------------------------------------------------------------- masked attention


@pytest.mark.parametrize("density", [0.05, 0.3])
def test_blobs_cover_their_share_in_few_pieces(density):
    pytest.importorskip("skimage", reason=NEEDS_BENCH)
    attend = inputs.blob_masks((64, 64), 2, 5, density)
    assert attend.shape == (2, 5, 64 * 64)
    assert (attend.sum(-1) == round(density * 64 * 64)).all()
    assert len(attend.flatten(0, 1).unique(dim=0)) == 10, "queries share a region"
    grid = attend.view(10, 64, 64)
    borders = (grid[:, 1:] != grid[:, :-1]).double().mean()
    assert borders < 0.5 * 2 * density * (1 - density)  # independent bits differ that often


@pytest.fixture
def attention(generator):
    q, k, v = (torch.randn(2, 8, n, 32, dtype=torch.float64, generator=generator) for n in (7, 70, 70))
    attend = torch.rand(2, 7, 70, generator=generator) < 0.3
    attend[..., 0] = True
    return {"query": q, "key": k, "value": v, "attend": attend}


def _sdpa(attention):
    mask = attention["attend"].unsqueeze(1)
    return F.scaled_dot_product_attention(attention["query"], attention["key"], attention["value"], attn_mask=mask)


def test_peers_of_masked_attention_agree(attention):
    for peer in masked_attention.peers("cpu"):
        if peer.unavailable() is None:
            torch.testing.assert_close(peer.call(peer.adapt(attention, [])), _sdpa(attention), msg=peer.name)
    ours = masked_attention._attention(masked_attention._inputs(attention, []))
    torch.testing.assert_close(ours, _sdpa(attention))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("rebuild", [False, True])
def test_flex_attention_adapter_agrees(attention, rebuild):
    """Its uncompiled form, which runs anywhere."""
    call, adapt = masked_attention.flex(rebuild, compiled=False)
    tensors = {name: t if name == "attend" else t.float() for name, t in attention.items()}
    output = call(adapt(tensors, []))
    torch.testing.assert_close(output.double(), _sdpa(attention), rtol=1e-4, atol=1e-5)


def test_multihead_core_is_what_the_module_does_between_its_projections(attention):
    """With projections that change nothing, the whole module gives the same."""
    module = torch.nn.MultiheadAttention(256, 8, bias=False, dtype=torch.float64)
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.eye(256).repeat(3, 1))
        module.out_proj.weight.copy_(torch.eye(256))

    def merged(x):  # [N, H, L, D] -> [L, N, H * D]
        return x.permute(2, 0, 1, 3).flatten(2)

    blocked = (~attention["attend"]).repeat_interleave(8, 0)
    query, key, value = (merged(attention[name]) for name in ("query", "key", "value"))
    expected, _ = module(query, key, value, attn_mask=blocked)
    actual = masked_attention.multihead_core(attention | {"mask": blocked})
    torch.testing.assert_close(merged(actual), expected)


def test_work_counts_attended_pairs_only():
    case = next(c for c in masked_attention.cases(Scale("cpu", True)) if not c.backward)
    data = masked_attention.build("cpu", masked_attention.Shape(64, 3, "random", 0.5), True)
    pairs = int(data.inputs["attend"].sum())
    assert 0 < pairs < 3 * 64
    forward = masked_attention.work(case, data)
    assert forward["float32 matmul"] == 4 * 256 * pairs
    assert forward["bandwidth"] == 4 * 256 * (2 * 3 + 2 * 64) + 3 * (2 * 4 + 1)
    both = masked_attention.work(replace(case, direction="forward+backward"), data)
    assert both["float32 matmul"] == 12 * 256 * pairs


def test_packed_results_decode_to_bits():
    attend = torch.rand(1, 2, 40) < 0.5
    packed = PackedMask(*m2f_kernels.pack_attention_mask(attend))
    data = Data({}, {"layer 1": attend}, outputs=("layer 1",))
    (decoded,) = attention_mask._decode([packed.bits, packed.row_any], data)
    assert torch.equal(decoded, packed.to_bool())


@pytest.mark.parametrize("command", ["fallbacks", "readme", "sass"])
def test_commands_without_arguments_have_help(command):
    """And do nothing then: `readme` would write README."""
    run = [sys.executable, "-m", f"benchmarks.{command}", "--help"]
    shown = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert shown.startswith("usage:")
