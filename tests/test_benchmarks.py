"""The benchmark suite measures what it says: checks reject, counters count, peers compute the same, figures exist."""

import importlib
import runpy
import sys
import weakref
from dataclasses import fields, replace
from functools import partial

import pytest
import torch

pytest.importorskip("rich", reason="the benchmark suite needs rich: `make bench` installs it")

import benchmarks
from benchmarks import inputs, measure
from benchmarks.cases import Case, Data, Implementation, Row, Scale, Verdict, check_relative_l2
from benchmarks.ops import attention_mask, masked_attention

SCALES = [
    Scale(device, quick, full)
    for device in ("cpu", "cuda")
    for quick, full in ((True, False), (False, False), (False, True))
]


def _implementation(call, adapt=lambda tensors, levels: dict(tensors)):
    return Implementation("one", call, adapt, ours=True)


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

    leaf = x.detach().requires_grad_()
    gradient = measure.written(lambda: torch.autograd.grad((leaf * 2,), (leaf,), (x,)))
    assert gradient[1] == 2, "product and its gradient"


def test_what_a_call_yields_is_dropped_when_timed_and_kept_when_checked():
    made, alive = [], []

    def call(arguments):
        for _ in range(3):
            result = arguments["x"].clone()
            made.append(weakref.ref(result))
            yield result
            del result
            alive.append(sum(one() is not None for one in made))

    run = Case("case", "data", "forward", []).bind(_implementation(call), Data({"x": torch.ones(2)}, {}))
    assert run() == ()
    assert alive == [0, 0, 0]
    assert len(run(collect=True)) == 3


def test_gradients_are_checked_after_the_outputs():
    x, ones = torch.rand(5), torch.ones(5)
    truth = {"a": x * 2, "b": x * 3, "x": 5 * ones}
    data = Data({"x": x}, truth, outputs=("a", "b"), grad_outputs=(ones, ones), differentiable=("x",))
    case = Case("case", "data", "forward+backward", [])
    right = _implementation(lambda a: (a["x"] * 2, a["x"] * 3))
    verdict = check_relative_l2(case, right, data, case.bind(right, data)())
    assert verdict.right
    assert verdict.gradients == pytest.approx(0, abs=1e-6)
    wrong = _implementation(lambda a: (a["x"] * 2, (a["x"] * 3).detach() + 0 * a["x"]))  # its gradient alone
    verdict = check_relative_l2(case, wrong, data, case.bind(wrong, data)())
    assert not verdict.right
    assert verdict.output < 1e-6 < verdict.gradients


@pytest.fixture(scope="module")
def photographs():
    pytest.importorskip("skimage", reason="the benchmark's photographs are scikit-image's: `make bench` installs it")


@pytest.mark.usefixtures("photographs")
@pytest.mark.parametrize(
    ("op", "data"), [("attention_mask", "9 layers 128² fp32"), ("masked_attention", masked_attention.MODULE)]
)
def test_every_form_is_right_and_runs_on_less(op, data, monkeypatch):
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
def masks(photographs):
    return attention_mask.build("cpu", 128, "fp32", True)


def test_a_wrong_bit_is_found(masks):
    case = Case("case", "data", "forward", [], dtype="fp32")
    bits = [masks.truth[name].clone() for name in masks.outputs]
    check = partial(attention_mask.check, implementation=_implementation(None), results=bits)
    assert check(case, data=masks).right
    bits[4].view(-1)[7] ^= True
    assert not masks.truth["doubtful 5"].view(-1)[7]
    share = 1 / sum(b.numel() for b in bits)
    assert check(case, data=masks) == Verdict(False, share)
    # Where rounding may decide, a bit alone is no mistake; but it may not be one of few.
    assert attention_mask.WRONG_BITS["fp32"] < share < attention_mask.WRONG_BITS["bf16"]
    doubtful = {f"doubtful {i + 1}": torch.ones_like(b) for i, b in enumerate(bits)}
    lenient = replace(masks, truth=masks.truth | doubtful)
    assert not check(case, data=lenient).right
    assert check(replace(case, dtype="bf16"), data=lenient).right


def test_masks_of_the_benchmark_are_partly_open_and_some_rows_empty(masks):
    for name in masks.outputs:
        density = masks.truth[name].double().mean(-1)[0]
        assert (density[-attention_mask.EMPTY_QUERIES :] == 1).all()  # the row rule
        others = density[: -attention_mask.EMPTY_QUERIES]
        assert (others > 0).all()
        assert (others < 0.9).all()


# ---------------------------------------------------------------- masked attention


@pytest.mark.usefixtures("photographs")
@pytest.mark.parametrize("density", [0.05, 0.3])
def test_blobs_cover_their_share_in_few_pieces(density):
    attend = inputs.blob_masks((64, 64), 2, 5, density)
    assert attend.shape == (2, 5, 64 * 64)
    assert (attend.sum(-1) == round(density * 64 * 64)).all()
    assert len(attend.flatten(0, 1).unique(dim=0)) == 10, "queries share a region"
    grid = attend.view(10, 64, 64)
    borders = (grid[:, 1:] != grid[:, :-1]).double().mean()
    assert borders < 0.5 * 2 * density * (1 - density)  # independent bits differ that often


def test_learned_masks_are_those_of_a_trained_model():
    """Some queries see a region, others nothing and therefore everything; none sees nothing."""
    attend = inputs.learned_masks((32, 32), 1, 40)
    share = attend.float().mean(-1)[0]
    assert attend.shape == (1, 40, 1024)
    assert (share > 0).all()
    assert 0.2 < (share == 1).float().mean() < 0.9
    assert (share < 0.5).sum() >= 5


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_peers_of_masked_attention_are_right_for_several_images():
    """FlexAttention in its uncompiled form, which runs anywhere, forward."""
    ours = Implementation("ours", masked_attention._attention, masked_attention._inputs, ours=True)
    here = [peer for peer in masked_attention.peers("cpu") if peer.unavailable() is None]
    flex = [_implementation(*masked_attention.flex(rebuild, compiled=False)) for rebuild in (False, True)]
    data = masked_attention.build("cpu", masked_attention.Shape(81, 7, masked_attention.RANDOM, n=2), True)
    assert len(here) >= 4
    for way, implementations in (("forward+backward", [ours, *here]), ("forward", flex)):
        case = Case("case", "data", way, [])
        for one in implementations:
            assert check_relative_l2(case, one, data, case.bind(one, data)()).right, one.name


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


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize("name", ["fallbacks", "readme", "sass"])
def test_commands_without_arguments_have_help(name, monkeypatch, capsys):
    """And do nothing then: `readme` would write README."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(importlib.import_module(f"benchmarks.{name}").__file__, run_name="__main__")
    assert capsys.readouterr().out.startswith("usage:")
