"""The whole of Mask2Former, `transformers`' and this package's, with the same weights: inference and training step.

Models, inputs and the parts whose forward passes are timed are those of `m2f bench` (`m2f_model/bench.py`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Benchmark, Case, Data, Figure, Implementation, Levels, Row, Scale, Tensors, Verdict
from m2f_model import bench

OURS, TRANSFORMERS = "m2f", "transformers"
CHECKPOINTED, BF16 = "m2f, activation checkpointing", "m2f, bf16 autocast"
TRANSFORMERS_BF16 = "transformers, bf16 autocast"
#: On a GPU only.
TRANSFORMERS_COMPILED = "transformers, bf16 autocast, compiled"
GRAPH, BF16_GRAPH = "m2f, CUDA graph", "m2f, bf16 autocast, CUDA graph"
LOW_PRECISION = (BF16, TRANSFORMERS_BF16, TRANSFORMERS_COMPILED, BF16_GRAPH)
#: Inference only: a training step waits for the GPU when it matches.
CAPTURED = (GRAPH, BF16_GRAPH)
INFERENCE, TRAINING = "inference", "training step"
TITLES = {"tiny": "tiny", "r50": "R50", "swin-tiny": "Swin-T"}
TARGETS = 10
#: On a GPU convolutions of the two models round differently, and a few logits next to zero change their sign: a bit of
#: an attention mask of random weights changes predictions by some percent. Tests of the operators are stricter.
GPU_TOLERANCE = 0.1
#: Of the masks of the last prediction, least mean intersection over union of bf16 with float32 for a row to have a
#: time. Random weights put many logits next to zero, where any rounding decides: it only tells masks from noise.
LEAST_IOU = 0.5
#: Calls in which the parts are timed.
STAGE_CALLS = 3


def title(case: bench.Case) -> str:
    """The name of a case."""
    what = f"{TITLES[case.backbone]} {TRAINING if case.training else INFERENCE} {case.size}²"
    return what + (f" N={case.batch}" if case.batch > 1 else "")


def _spec(case: bench.Case, implementation: str) -> bench.Case:
    autocast = "bf16" if implementation in LOW_PRECISION else "none"
    return replace(case, autocast=autocast, activation_checkpointing=implementation == CHECKPOINTED)


def _base(implementation: str) -> str:
    return "transformers" if implementation.startswith("transformers") else "m2f"


# ---------------------------------------------------------------- one call


@cache
def _model(backbone: str, base: str, checkpointing: bool, compiled: bool, device: str) -> nn.Module:
    """Built once per process: the weights do not depend on the image's size."""
    model = bench.build(bench.Case(backbone, device=device, activation_checkpointing=checkpointing), base)
    if compiled:
        model.compile()
    return model


def _model_of(case: bench.Case, implementation: str) -> nn.Module:
    compiled = implementation == TRANSFORMERS_COMPILED
    return _model(case.backbone, _base(implementation), implementation == CHECKPOINTED, compiled, case.device)


def _captured(run: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    """`run` as a CUDA graph: a replay launches all its kernels at once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles and warms up, which a graph cannot hold
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return outputs

    return replay


#: The model and the call of each case's implementation that was last bound.
_bound: dict[tuple[bench.Case, str], tuple[nn.Module, Callable[[], object]]] = {}


def _adapt(case: bench.Case, implementation: str, inputs: Tensors, levels: Levels) -> dict[str, Any]:
    model = _model_of(case, implementation)
    run: Callable[[], tuple[Tensor, ...]]
    run = bench.call(_spec(case, implementation), model, free_gradients=True)
    _bound[case, implementation] = model, run
    return {"run": _captured(run) if implementation in CAPTURED else run}


def _call(arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    return tuple(t.detach() for t in arguments["run"]() if t is not None)


def stages(case: Case, implementation: Implementation) -> dict[str, float]:
    """Median milliseconds of the parts' forward passes, in calls of their own: the hooks that time them wait for the
    GPU, so that the calls which are timed as a whole have none. A compiled or captured call has no parts."""
    if implementation.name in (TRANSFORMERS_COMPILED, *CAPTURED):
        return {}
    model, run = _bound[case.spec, implementation.name]
    device = next(model.parameters()).device.type
    samples: dict[str, list[float]] = {}
    handles = []
    for part, path in bench.STAGES[_base(implementation.name)].items():
        handles += bench.watch(model.get_submodule(path), samples.setdefault(part, []), device)
    try:
        for _ in range(STAGE_CALLS):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return {part: statistics.median(taken) * 1e3 for part, taken in samples.items() if taken}


def peak(case: Case, implementation: Implementation) -> float:
    """Peak MiB above weights and, in training, gradients; in a process that has only just been started."""
    return bench.measure_peak(_spec(case.spec, implementation.name), _base(implementation.name))


# ---------------------------------------------------------------- cases


def _truth(case: bench.Case) -> Data:
    """The last prediction of `transformers` in float32."""
    call = bench.call(replace(case, training=False), _model_of(case, TRANSFORMERS))
    classes, logits = (x.detach().cpu() for x in call())
    return Data({}, {"classes": classes, "masks": logits}, [], ("classes", "masks"))


def compared(found: Sequence[Tensor], truth: Sequence[Tensor], low_precision: bool, tolerance: float) -> Verdict:
    """float32: largest difference of class and mask logits relative to the largest value. bf16: one minus the mean
    intersection over union of the predicted masks; a training step gives none, and must be finite."""
    if low_precision and len(found) < 2:
        return Verdict(bool(found[0].isfinite().all()), math.nan)
    if low_precision:
        # Random weights may have no logit above zero; then masks are the logits above the mean.
        threshold = 0 if (truth[1] > 0).any() else truth[1].mean()
        ours, theirs = (x[1] > threshold for x in (found, truth))
        union, shared = ((ours | theirs).flatten(2).sum(-1), (ours & theirs).flatten(2).sum(-1))
        iou = (shared[union > 0] / union[union > 0]).double().mean().item()
        return Verdict(iou >= LEAST_IOU, 1 - iou)
    # Training gives no mask logits here.
    error = max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(found, truth, strict=False))
    return Verdict(error <= tolerance, error)


def check(case: Case, implementation: Implementation, data: Data, results: Sequence[Tensor]) -> Verdict:
    truth = list(data.truth.values())
    found, tolerance = [x.to(truth[0].device) for x in results], bench.TOLERANCE
    if truth[0].device.type != "cpu":
        tolerance = GPU_TOLERANCE
    return compared(found, truth, implementation.name in LOW_PRECISION, tolerance)


def cases(scale: Scale) -> list[Case]:
    cuda = scale.device == "cuda"
    backbone = "tiny" if scale.quick else "r50"
    largest, small = (128, 64) if scale.quick else (1024, 512)

    def case(backbone: str, what: str, size: int, *more: str, batch: int = 1, **options: Any) -> Case:
        spec = bench.Case(backbone, size, what == TRAINING, batch, TARGETS, scale.device)

        def one(implementation: str) -> Implementation:
            # What a replay needs was allocated when it was captured.
            return Implementation(
                implementation, _call, partial(_adapt, spec, implementation), ours=_base(implementation) == "m2f",
                counts_writes=False, counts_memory=implementation not in CAPTURED, one_setting=implementation in more,
            )  # fmt: skip

        implementations = [one(name) for name in (OURS, TRANSFORMERS, *more)]
        direction, made = "forward+backward" if spec.training else "forward", partial(_truth, spec)
        name = title(spec)
        return Case(name, name, direction, implementations, build=made, spec=spec, images=batch, **options)

    low = LOW_PRECISION[: 3 if cuda else 2 if scale.full else 1]
    graphs = CAPTURED if cuda else ()
    found = [
        case(backbone, INFERENCE, largest, *graphs, *low, memory=True, headline=True),
        case(backbone, INFERENCE, small, *graphs[:1], memory=True, headline=True),
        case(backbone, TRAINING, small, CHECKPOINTED, memory=True, headline=True),
    ]
    if scale.quick:
        return found
    found += [
        case(backbone, INFERENCE, size, *graphs[:1], one_setting=True, full=size == 768 and not cuda)
        for size in (256, 768)
    ]
    found.append(case(backbone, TRAINING, 1024, memory=True, full=not cuda))
    for size in (512, 1024):
        found.append(case("swin-tiny", INFERENCE, size, memory=True, full=True))
    found.append(case("swin-tiny", TRAINING, 512, memory=True, full=True))
    if cuda:
        found.append(case(backbone, TRAINING, 1024, *low, batch=2, memory=True, headline=True))
    return found


# ---------------------------------------------------------------- required figures


def figures(scale: Scale) -> list[Figure]:
    backbone, side, other = ("tiny", 128, 64) if scale.quick else ("r50", 1024, 512)
    large, small, training, both = (
        title(bench.Case(backbone, size, train, batch))
        for size, train, batch in ((side, False, 1), (other, False, 1), (other, True, 1), (1024, True, 2))
    )
    time, memory = "median_ms", "memory_extra_mib"

    def ratio(case: str, field_: str, ours: str, label: str, *target: float | None) -> Figure:
        targets = dict(zip(("default", "heap retained"), target, strict=False))
        if scale.device == "cuda":
            targets = {"cuda": None}
        return Figure(f"{case}: {label}", (case, (TRANSFORMERS,), field_), (case, (ours,), field_), targets)

    if scale.device == "cuda" and not scale.quick:
        return [
            *(
                Figure(f"{case}: {label}", (case, (peer,), time), (case, (BF16,), time), {"cuda": target})
                for case, aim in ((large, 2.0), (both, 1.5))
                for peer, label, target in (
                    (TRANSFORMERS_COMPILED, "bf16, faster than transformers compiled", aim),
                    (TRANSFORMERS_BF16, "bf16, faster than transformers", None),
                )
            ),
            Figure(
                f"{both}: bf16, less peak memory than transformers",
                (both, (TRANSFORMERS_BF16,), memory), (both, (BF16,), memory), {"cuda": 1.4},
            ),
        ]  # fmt: skip
    first = {"default": 1.2} if scale.device == "cpu" else {"cuda": 1.2}
    iou: dict[str, float | None] = dict.fromkeys(first)
    return [
        ratio(large, time, OURS, "faster than transformers", 1.8, 1.6),
        ratio(large, memory, OURS, "less peak memory above weights", 2.0),
        ratio(small, time, OURS, "faster than transformers", 1.6, 1.5),
        ratio(small, memory, OURS, "less peak memory above weights", None),
        ratio(training, time, OURS, "faster than transformers", 1.6, None),
        ratio(training, memory, OURS, "less peak memory above weights and gradients", 1.6),
        ratio(training, memory, CHECKPOINTED, "less peak memory, with activation checkpointing", 2.5),
        Figure(
            f"{training}: time with activation checkpointing over time without",
            (training, (CHECKPOINTED,), time), (training, (OURS,), time), first, at_most=True,
        ),
        ratio(large, time, BF16, "bf16 autocast, faster than transformers in float32", 2.5),
        Figure(
            f"{large}: bf16 autocast, 1 - IoU of the masks with float32, random weights",
            (large, (BF16,), "error_output"), None, iou, at_most=True,
        ),
    ]  # fmt: skip


def draw(directory: Path, rows: Sequence[Row]) -> list[str]:
    """Inference over the side of the image, for the backbone that was run at most sizes, and the stages of a call."""
    from benchmarks import plot

    specs = {name: case.spec for name, case in BENCHMARK.named().items()}
    curves: dict[str, list[Row]] = {}
    for row in rows:
        spec = specs.get(row.case)
        if spec and not spec.training and spec.batch == 1 and row.implementation in (OURS, TRANSFORMERS):
            curves.setdefault(TITLES[spec.backbone], []).append(row)
    name, curve = max(curves.items(), key=lambda one: len({row.case for row in one[1]}), default=("", []))
    drawn = plot.draw_sizes(directory, curve, lambda row: specs[row.case].size, f"{name} {INFERENCE}, one image")
    return [*drawn, *plot.draw_stages(directory, rows)]


BENCHMARK = Benchmark(
    op="end_to_end",
    title="Mask2Former, end to end",
    description=(
        "`transformers`' Mask2Former and this package's with the same random weights (non-trivial sampling offsets), "
        "one image per batch, 100 queries, 9 decoder layers. Training step: forward, loss at K = 12544 points with "
        f"{TARGETS} targets, and backward. Peak memory is what a call needs above weights and, in training, gradients, "
        "its outputs included. Error: largest difference of the last prediction's logits relative to the largest; of "
        "bf16, one minus the mean intersection over union of the masks with those of float32. Random weights do not "
        "segment anything: attention masks are noisier than those of a trained model, and many logits lie next to "
        "zero, where any rounding decides. Gradients are freed before each backward pass. Stages are forward passes, "
        "timed in calls of their own; what they leave of a training step is its backward pass. A pass of few images is "
        "launch-bound on a GPU: the CPU launches a thousand kernels. "
        "*CUDA graph* is this package's inference captured once and replayed, whose times are the GPU's alone."
    ),
    cases=cases,
    figures=figures,
    check=check,
    operators=(
        "ms_deform_attn_from_offsets", "resize_mask_features", "predict_attention_mask", "masked_attention",
        "point_mask_loss",
    ),
    pictures=draw,
    long_ms=60_000.0,  # the first call of a model is slower than the others
    stages=stages,
    peak=peak,
)  # fmt: skip
