"""The benchmark of whole models: what is run where, and that a wrong result has no time."""

import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip("rich", reason="the benchmark suite needs rich: `make bench` installs it")

from benchmarks import measure
from benchmarks.cases import Data, Scale
from benchmarks.ops import end_to_end
from benchmarks.ops.end_to_end import ACCELERATED, AUTOCAST, COMPILED, GRAPH, HELD, OURS, TRANSFORMERS, Way
from m2f_model import bench

TINY = bench.Case("tiny", 64)


def test_cells_on_a_gpu():
    cases = end_to_end.whole_cases(Scale("cuda", False))
    assert [case.name for case in cases] == ["R50 inference 1024² bf16", "R50 training step 1024² N=2 bf16"]
    inference, training = ([one.spec for one in case.implementations] for case in cases)
    peers = [Way(TRANSFORMERS, AUTOCAST), Way(TRANSFORMERS, AUTOCAST, COMPILED)]
    assert training == [Way(OURS, AUTOCAST, GRAPH), *peers]
    # The peer holds its weights in bfloat16 as well.
    assert inference == [Way(OURS, HELD, GRAPH), *peers, Way(TRANSFORMERS, HELD, COMPILED)]
    everything = end_to_end.whole_cases(Scale("cuda", False, True))
    assert len(everything) > 2
    assert Way(TRANSFORMERS, AUTOCAST, GRAPH) in [one.spec for one in everything[0].implementations]


@pytest.mark.parametrize(("training", "autocast"), [(False, "none"), (False, "bf16"), (True, "none")])
def test_eager_models_are_right_and_their_parts_are_timed_apart(training, autocast):
    spec = replace(TINY, training=training, autocast=autocast)
    data = end_to_end._truth(replace(spec, autocast="none"))
    case = replace(end_to_end.whole_cases(Scale("cpu", True))[0], spec=spec)
    found = [way for way in end_to_end.ways(spec, False) if way.how in ("", ACCELERATED) and way.whose != "OpenVINO"]
    assert [way.whose for way in found] == [OURS, TRANSFORMERS, TRANSFORMERS]
    for way in found:
        one = end_to_end.implementation(spec, way)
        results = case.bind(one, data)(collect=True)
        assert end_to_end.check(case, one, data, results).right
        if not way.precision:
            wrong = [x + 0.01 * x.abs().max() for x in results]
            assert not end_to_end.check(case, one, data, wrong).right
        parts = {"backbone", "pixel decoder", "transformer decoder"} | ({"loss"} if training else set())
        assert end_to_end.stages(case, one).keys() == parts
        # Hooks wait for a GPU: none while a call is timed.
        modules = () if way.how else end_to_end._model_of(spec, way).modules()
        assert not any(x._forward_hooks or x._forward_pre_hooks for x in modules)


def test_cpu_time_leaves_out_waiting():
    runs = [lambda: time.sleep(0.05), lambda: sum(range(10**6))]
    sleeping, working = measure.interleaved(runs, "cpu", measure.Plan(0.01, 3), clock=time.process_time)
    assert sleeping.median_ms < 5 < working.median_ms


def test_errors_are_told_from_rounding():
    def verdict(way, found, truth):
        data = Data({}, dict(zip(("classes", "masks"), truth, strict=True)))
        return end_to_end.check(None, end_to_end.implementation(TINY, way), data, found)

    truth = (torch.ones(1, 2, 3), torch.tensor([[[[1.0, -1.0]]]]))
    assert verdict(Way(), truth, truth).output == 0
    assert not verdict(Way(), (truth[0], truth[1] + 0.1), truth).right
    low = Way(OURS, AUTOCAST)
    logits = torch.rand(1, 2, 10, 10, generator=torch.Generator().manual_seed(0)) - 5  # no mask is above zero
    close = verdict(low, (truth[0], logits + 0.02), (truth[0], logits))
    assert close.right
    assert 0 < close.output < 0.1
    assert not verdict(low, (truth[0], logits.flip(2)), (truth[0], logits)).right
    assert verdict(low, (truth[0], truth[1] + 0.1), truth).right
    assert not verdict(low, (truth[0], -truth[1]), truth).right


@pytest.mark.parametrize("whose", [OURS, TRANSFORMERS])
def test_weights_held_in_bfloat16(whose):
    """Of both packages, without autocast; the pixels are cast, too."""
    for way, dtype in ((Way(whose, HELD), torch.bfloat16), (Way(whose, AUTOCAST), torch.float32)):
        assert (
            torch.bfloat16 in {p.dtype for p in end_to_end._model_of(TINY, way).parameters()} or dtype == torch.float32
        )
        assert end_to_end._spec(TINY, way).autocast == ("none" if way.precision == HELD else "bf16")
        classes, masks = end_to_end._call(end_to_end._adapt(TINY, way, {}, []))
        assert classes.dtype == masks.dtype == torch.bfloat16
