"""The whole of Mask2Former, `transformers`' and this package's, with the same weights: inference and training step.

Models, inputs and the parts whose forward passes are timed are those of `m2f bench` (`m2f_model/bench.py`).
Two benchmarks: `end_to_end` compares like with like, `whole_model` every model at its best.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import m2f_kernels
from benchmarks.cases import (
    Benchmark,
    Case,
    Data,
    Implementation,
    Levels,
    Row,
    Scale,
    Tensors,
    Verdict,
    missing,
    ratio,
)  # fmt: skip
from m2f_model import bench
from m2f_model.criterion import losses_of

OURS, TRANSFORMERS, OPENVINO = "m2f", "transformers", "OpenVINO"
AUTOCAST, HELD = "bf16 autocast", "bf16 weights"
CHECKPOINTING, COMPILED, GRAPH, ACCELERATED = "activation checkpointing", "compiled", "CUDA graph", "accelerated"


@dataclass(frozen=True)
class Way:
    """Whose model, its precision (float32, or one of `AUTOCAST` and `HELD`), and how it is run."""

    whose: str = OURS
    precision: str = ""
    how: str = ""

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.whose, self.precision, self.how)))

    @property
    def base(self) -> str:
        """Whose of the models of `m2f bench` it is."""
        return OURS if self.whose == OURS else TRANSFORMERS


CHECKPOINTED, BF16 = Way(how=CHECKPOINTING), Way(OURS, AUTOCAST)
TRANSFORMERS_BF16 = Way(TRANSFORMERS, AUTOCAST)
#: On a GPU only.
TRANSFORMERS_COMPILED = Way(TRANSFORMERS, AUTOCAST, COMPILED)
CAPTURED, BF16_CAPTURED = Way(how=GRAPH), Way(OURS, AUTOCAST, GRAPH)
INFERENCE, TRAINING = "inference", "training step"
TITLES = {"tiny": "tiny", "r50": "R50", "swin-tiny": "Swin-T"}
TARGETS = 10
#: On a GPU convolutions of the two models round differently, and a few logits next to zero change their sign: a bit of
#: an attention mask of random weights changes predictions by some percent. Tests of the operators are stricter.
GPU_TOLERANCE = 0.1
#: Of the masks of the last prediction, least mean intersection over union of bf16 with float32 for a row to have a
#: time. Random weights put many logits next to zero, where any rounding decides: it only tells masks from noise.
LEAST_IOU = 0.5
#: Calls in which the parts are timed, and calls before the first that counts of what is compiled or captured.
STAGE_CALLS, WARM_UPS = 3, 3


def title(case: bench.Case) -> str:
    """The name of a case."""
    what = f"{TITLES[case.backbone]} {TRAINING if case.training else INFERENCE} {case.size}²"
    return what + (f" N={case.batch}" if case.batch > 1 else "")


# ---------------------------------------------------------------- one call


class WithLosses(nn.Module):
    """This package's model by its graphs: in training matching and loss run between them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.graphs = model, m2f_kernels.CudaGraphs(model, training=True, clone=False)

    def forward(self, pixels: Tensor, targets: Any = None) -> Any:
        out = self.graphs(pixels)
        return (
            out if targets is None else out._replace(losses=losses_of(self.model.criterion, out.predictions, targets))
        )


@cache
def _model(backbone: str, way: Way, device: str) -> nn.Module:
    """Built once per process: the weights do not depend on the image's size, nor on autocast."""
    checkpointing = way.how == CHECKPOINTING
    model: Any = bench.build(bench.Case(backbone, device=device, activation_checkpointing=checkpointing), way.base)
    if way.how == ACCELERATED:
        m2f_kernels.accelerate(model)
    if way.precision == HELD:
        model = model.hold_in(torch.bfloat16) if way.base == OURS else model.to(torch.bfloat16)
    if way.how == COMPILED:
        model.compile(mode="reduce-overhead" if device == "cuda" else None)
    elif way.how == GRAPH and way.base == OURS:
        model = WithLosses(model)
    elif way.how == GRAPH:
        model.forward = m2f_kernels.CudaGraphs(model)
    return model


def _model_of(case: bench.Case, way: Way) -> nn.Module:
    return _model(case.backbone, way if way.precision == HELD else replace(way, precision=""), case.device)


def _spec(case: bench.Case, way: Way) -> bench.Case:
    autocast = "bf16" if way.precision == AUTOCAST else "none"
    return replace(case, autocast=autocast, activation_checkpointing=way.how == CHECKPOINTING)


def openvino(case: bench.Case) -> Callable[[], tuple[Tensor, ...]]:
    """`transformers`' model converted, on as many threads as PyTorch has."""
    import openvino as ov

    pixels = bench.pixels_of(case)
    with torch.no_grad():
        whole = ov.convert_model(_model_of(case, Way(TRANSFORMERS)), example_input=pixels)
    logits = [whole.output(name) for name in ("class_queries_logits", "masks_queries_logits")]
    converted = ov.Model(logits, whole.get_parameters())
    converted.reshape(list(pixels.shape))
    precision = {"none": "f32", "bf16": "bf16"}[case.autocast]
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = ov.Core().compile_model(converted, "CPU", options).create_infer_request()

    def run() -> tuple[Tensor, ...]:
        found = request.infer([pixels.numpy()])
        return tuple(torch.from_numpy(found[i]) for i in range(2))

    return run


def _adapt(case: bench.Case, way: Way, inputs: Tensors, levels: Levels) -> dict[str, Any]:
    if way.whose == OPENVINO:
        return {"run": openvino(_spec(case, way))}
    dtype = torch.bfloat16 if way.precision == HELD else torch.float32
    run = bench.call(_spec(case, way), _model_of(case, way), free_gradients=True, pixel_dtype=dtype)
    for _ in range(WARM_UPS if way.how in (COMPILED, GRAPH) else 0):
        run()
    return {"run": run}


def _call(arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    return tuple(t.detach() for t in arguments["run"]() if t is not None)


def implementation(case: bench.Case, way: Way, one_setting: bool = False) -> Implementation:
    # What a replay needs was allocated when it was captured.
    return Implementation(
        str(way), _call, partial(_adapt, case, way), ours=way.whose == OURS or way.how == ACCELERATED,
        unavailable=missing("openvino") if way.whose == OPENVINO else lambda: None, counts_writes=False,
        counts_memory=way.how != GRAPH, one_setting=one_setting, spec=way,
    )  # fmt: skip


def stages(case: Case, implementation: Implementation) -> dict[str, float]:
    """Median milliseconds of the parts' forward passes, in calls of their own: the hooks that time them wait for the
    GPU, so that the calls which are timed as a whole have none. A compiled or captured call has no parts."""
    way = implementation.spec
    if way.how in (COMPILED, GRAPH):
        return {}
    model, run = _model_of(case.spec, way), _adapt(case.spec, way, {}, [])["run"]
    with bench.watched(bench.stages(model, way.base), case.spec.device) as samples:
        for _ in range(STAGE_CALLS):
            run()
    return {part: statistics.median(taken) * 1e3 for part, taken in samples.items() if taken}


def peak(case: Case, implementation: Implementation) -> float:
    """Peak MiB above weights and, in training, gradients; in a process that has only just been started."""
    return bench.measure_peak(_spec(case.spec, implementation.spec), implementation.spec.base)


# ---------------------------------------------------------------- the truth


def _truth(case: bench.Case) -> Data:
    """The last prediction of `transformers` in float32."""
    call = bench.call(replace(case, training=False, autocast="none"), _model_of(case, Way(TRANSFORMERS)))
    classes, logits = (x.detach().cpu() for x in call())
    return Data({}, {"classes": classes, "masks": logits}, [], ("classes", "masks"))


def check(case: Case, implementation: Implementation, data: Data, results: Sequence[Tensor]) -> Verdict:
    """float32: largest difference of class and mask logits relative to the largest value. bf16: one minus the mean
    intersection over union of the predicted masks; a training step gives none, and must be finite."""
    truth = list(data.truth.values())
    found = [x.to(truth[0].device).float() for x in results]
    low_precision = bool(implementation.spec.precision)
    if low_precision and len(found) < 2:
        return Verdict(bool(found[0].isfinite().all()), math.nan)
    if low_precision:
        # Random weights may have no logit above zero; then masks are the logits above the mean.
        threshold = 0 if (truth[1] > 0).any() else truth[1].mean()
        iou = bench.overlap(found[1] > threshold, truth[1] > threshold)
        return Verdict(iou >= LEAST_IOU, 1 - iou)
    # Training gives no mask logits here.
    error = max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(found, truth, strict=False))
    return Verdict(error <= (bench.TOLERANCE if truth[0].device.type == "cpu" else GPU_TOLERANCE), error)


# ---------------------------------------------------------------- cases


def _case(spec: bench.Case, suffix: str, implementations: Sequence[Implementation], **options: Any) -> Case:
    name, direction = title(spec) + suffix, "forward+backward" if spec.training else "forward"
    made = partial(_truth, spec)
    return Case(name, name, direction, implementations, build=made, spec=spec, images=spec.batch, **options)


def _like_with_like(spec: bench.Case, *more: Way, **options: Any) -> Case:
    """Both models in float32, and `more` beside them."""
    return _case(spec, "", [implementation(spec, x, x in more) for x in (Way(), Way(TRANSFORMERS), *more)], **options)


def cases(scale: Scale) -> list[Case]:
    cuda = scale.device == "cuda"
    one = bench.Case("tiny" if scale.quick else "r50", targets=TARGETS, device=scale.device)
    largest, small = (128, 64) if scale.quick else (1024, 512)
    low = (BF16, TRANSFORMERS_BF16, TRANSFORMERS_COMPILED)[: 3 if cuda else 2 if scale.full else 1]
    graphs = (CAPTURED, BF16_CAPTURED) if cuda else ()
    shown: dict[str, Any] = {"memory": True, "headline": True}
    found = [
        _like_with_like(replace(one, size=largest), *graphs, *low, **shown),
        _like_with_like(replace(one, size=small), *graphs[:1], **shown),
        _like_with_like(replace(one, size=small, training=True), CHECKPOINTED, **shown),
    ]
    if scale.quick:
        return found
    swin = replace(one, backbone="swin-tiny")
    found += [
        *(
            _like_with_like(replace(one, size=x), *graphs[:1], one_setting=True, full=x == 768 and not cuda)
            for x in (256, 768)
        ),
        _like_with_like(replace(one, size=1024, training=True), memory=True, full=not cuda),
        *(
            _like_with_like(replace(swin, size=size, training=training), memory=True, full=True)
            for size, training in ((512, False), (1024, False), (512, True))
        ),
    ]
    return [*found, _like_with_like(replace(one, size=1024, training=True, batch=2), *low, **shown)] if cuda else found


def ways(case: bench.Case, full: bool) -> list[Way]:
    """Every model at its best in a case's precision, this package's first; on a GPU without `full` the fastest only."""
    cuda, inference, theirs = case.device == "cuda", not case.training, AUTOCAST if case.autocast == "bf16" else ""
    every, weights = full or not cuda, [HELD] if theirs and inference else []
    best = weights[0] if weights else theirs
    wanted = {
        Way(OURS, best): every,
        Way(OURS, best, GRAPH): cuda,
        Way(OURS, best, COMPILED): every and inference,
        Way(TRANSFORMERS, theirs): True,
        **{Way(TRANSFORMERS, x, COMPILED): True for x in (theirs, *weights)},
        Way(TRANSFORMERS, theirs, ACCELERATED): every,
        **{Way(TRANSFORMERS, x, GRAPH): cuda and every and inference for x in (theirs, *weights)},
        Way(OPENVINO, theirs): inference and not cuda,
    }
    return [way for way, is_wanted in wanted.items() if is_wanted]


def whole_cases(scale: Scale) -> list[Case]:
    cuda, full = scale.device == "cuda", scale.full
    one = bench.Case("tiny" if scale.quick else "r50", 128 if scale.quick else 1024, device=scale.device)
    if cuda:
        specs = [replace(one, autocast="bf16"), replace(one, training=True, batch=2, autocast="bf16")]
        specs += [replace(one, size=512, autocast=x) for x in ("bf16", "none") if full]
    else:
        sizes = (128,) if scale.quick else (1024, 512) if full else (512,)
        specs = [replace(one, size=size, autocast=x) for size in sizes for x in ("none", "bf16")]
        specs += [replace(one, size=512, training=True)] if full else []
    return [
        _case(spec, " fp32" if spec.autocast == "none" else " bf16",
              [implementation(spec, way) for way in ways(spec, full)], headline=True, one_setting=True)
        for spec in specs
    ]  # fmt: skip


# ---------------------------------------------------------------- required figures

_LARGE, _SMALL = f"R50 {INFERENCE} 1024²", f"R50 {INFERENCE} 512²"
_STEP, _BOTH = f"R50 {TRAINING} 512²", f"R50 {TRAINING} 1024² N=2"
_TIME, _MEMORY = "median_ms", "memory_extra_mib"
FIGURES = {
    "cpu": [
        ratio(_LARGE, _TIME, TRANSFORMERS, OURS, "faster than transformers", 1.8, 1.6),
        ratio(_LARGE, _MEMORY, TRANSFORMERS, OURS, "less peak memory above weights", 2.0),
        ratio(_SMALL, _TIME, TRANSFORMERS, OURS, "faster than transformers", 1.6, 1.5),
        ratio(_SMALL, _MEMORY, TRANSFORMERS, OURS, "less peak memory above weights", None),
        ratio(_STEP, _TIME, TRANSFORMERS, OURS, "faster than transformers", 1.6, None),
        ratio(_STEP, _MEMORY, TRANSFORMERS, OURS, "less peak memory above weights and gradients", 1.6),
        ratio(
            _STEP, _MEMORY, TRANSFORMERS, str(CHECKPOINTED), "less peak memory, with activation checkpointing", 2.5
        ),
        ratio(
            _STEP, _TIME, str(CHECKPOINTED), OURS, "time with activation checkpointing over time without", 1.2,
            at_most=True,
        ),
        ratio(_LARGE, _TIME, TRANSFORMERS, str(BF16), "bf16 autocast, faster than transformers in float32", 2.5),
        ratio(
            _LARGE, "error_output", str(BF16), None,
            "bf16 autocast, 1 - IoU of the masks with float32, random weights", None, at_most=True,
        ),
    ],
    "cuda": [
        *(
            ratio(case, _TIME, str(peer), str(BF16), label, target)
            for case, aim in ((_LARGE, 2.0), (_BOTH, 1.5))
            for peer, label, target in (
                (TRANSFORMERS_COMPILED, "bf16, faster than transformers compiled", aim),
                (TRANSFORMERS_BF16, "bf16, faster than transformers", None),
            )
        ),
        ratio(_BOTH, _MEMORY, str(TRANSFORMERS_BF16), str(BF16), "bf16, less peak memory than transformers", 1.4),
    ],
}  # fmt: skip


def draw(directory: Path, rows: Sequence[Row]) -> list[str]:
    """Inference over the side of the image, and the stages of a call."""
    from benchmarks import plot

    sides = {f"R50 {INFERENCE} {side}²": side for side in (256, 512, 768, 1024)}
    curve = [row for row in rows if row.case in sides and row.implementation in (OURS, TRANSFORMERS)]
    path, title = directory / "end_to_end_sizes.png", f"R50 {INFERENCE}, one image"
    drawn = plot.draw_curves(
        path, curve, lambda row: sides[row.case], "side of the image, pixels", {"median_ms": title}
    )
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
    figures=FIGURES,
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

WHOLE_MODEL = Benchmark(
    op="whole_model",
    title="Whole models at their best",
    description=(
        "Each model as its own documentation says: `transformers` eager, compiled by `torch.compile` (on a GPU with "
        '`mode="reduce-overhead"`) and in CUDA graphs, in bf16 under autocast and, for inference, with its weights in '
        "it; its model accelerated; this package's model eager, compiled and in CUDA graphs; on a CPU OpenVINO, "
        "converted from `transformers`' model, where it is installed (`pip install openvino`). The same random weights "
        "and input. Error: as of the whole model end to end. With `OMP_NUM_THREADS=1` times on a CPU are CPU time, "
        "which other programs of the machine disturb less."
    ),
    cases=whole_cases,
    check=check,
    operators=BENCHMARK.operators,
    budget_s=20.0,
    long_ms=60_000.0,
    cpu_time=True,
)
