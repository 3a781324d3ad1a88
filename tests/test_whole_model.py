"""Benchmarks of whole models, this package's and others': what is run where, and that a wrong result has no time."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("rich", reason="the benchmark suite needs rich: `make bench` installs it")

from benchmarks import models
from benchmarks.cases import Data, Scale
from benchmarks.ops import end_to_end
from benchmarks.ops.end_to_end import ACCELERATED, AUTOCAST, BF16, COMPILED, GRAPH, HELD, OURS, TRANSFORMERS, Way
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


CLASSES, MASKS = torch.ones(1, 2, 3), torch.tensor([[[[1.0, -1.0]]]])
#: No mask is above zero.
NEGATIVE = torch.rand(1, 2, 10, 10, generator=torch.Generator().manual_seed(0)) - 5


@pytest.mark.parametrize(
    ("way", "found", "truth", "right", "errors"),
    [
        (Way(), MASKS, MASKS, True, (0, 0)),
        (Way(), MASKS + 0.1, MASKS, False, (0.09, 0.11)),
        (BF16, MASKS + 0.1, MASKS, True, (0, 0)),
        (BF16, -MASKS, MASKS, False, (1, 1)),
        (BF16, NEGATIVE + 0.02, NEGATIVE, True, (1e-6, 0.1)),
        (BF16, NEGATIVE.flip(2), NEGATIVE, False, (0.5, 1)),
    ],
)
def test_errors_are_told_from_rounding(way, found, truth, right, errors):
    data = Data({}, {"classes": CLASSES, "masks": truth})
    verdict = end_to_end.check(None, end_to_end.implementation(TINY, way), data, (CLASSES, found))
    assert verdict.right == right
    assert errors[0] <= verdict.output <= errors[1]


@pytest.mark.parametrize("whose", [OURS, TRANSFORMERS])
def test_weights_held_in_bfloat16(whose):
    """Of both packages, without autocast; the pixels are cast, too."""
    for precision, autocast in ((HELD, "none"), (AUTOCAST, "bf16")):
        way = Way(whose, precision)
        weights = {parameter.dtype for parameter in end_to_end._model_of(TINY, way).parameters()}
        assert (torch.bfloat16 in weights) == (precision == HELD)
        assert end_to_end._spec(TINY, way).autocast == autocast
        classes, masks = end_to_end._call(end_to_end._adapt(TINY, way, {}, []))
        assert classes.dtype == masks.dtype == torch.bfloat16


# ---------------------------------------------------------------- other people's models


def test_difference():
    scores = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(1))
    wrong, absent = scores.clone(), scores.clone()
    wrong[0, 2, 1] += 0.25
    absent[..., 2] = -torch.inf
    nan = absent.nan_to_num(neginf=torch.nan)
    assert models.difference_of([scores], [scores]) == (0, scores.abs().max())
    for before, after, difference in (
        ([scores, scores], [scores, wrong], 0.25),
        ([absent], [absent], 0),
        ([scores], [absent], torch.inf),
        ([scores], [nan], torch.inf),
    ):
        assert models.difference_of(before, after)[0] == pytest.approx(difference)


def test_choices_are_made_again_if_they_are_choices():
    """Scores within rounding of each other may change places; a choice by wrong scores is refused."""
    scores = torch.tensor([[1.0, 3.0, 3.0001, 2.0]])
    recorded = []
    with models.choices(recorded):
        assert torch.topk(scores, 2, dim=1)[1].tolist() == [[2, 1]]
    with models.choices(list(recorded), replay=True):
        assert torch.topk(torch.tensor([[1.0, 3.0001, 3.0, 2.0]]), 2, dim=1)[1].tolist() == [[2, 1]]
    with pytest.raises(RuntimeError, match="other queries"), models.choices(list(recorded), replay=True):
        torch.topk(torch.tensor([[3.0, 1.0, 1.0, 2.0]]), 2, dim=1)
    assert torch.topk(scores, 1, dim=1)[1].tolist() == [[2]]


def test_aims_are_those_of_every_model():
    assert len({model.name for model in models.MODELS}) == len(models.MODELS)
    assert all(model.aim >= 1.3 for model in models.MODELS)
