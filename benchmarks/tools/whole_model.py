"""Compares whole models at their best, each run as its own documentation says.

    python -m benchmarks.whole_model                 # on a GPU the cells that count most; on a CPU one size
    python -m benchmarks.whole_model --full
    OMP_NUM_THREADS=1 python -m benchmarks.whole_model --cpu-time    # on a machine that others use, too

`transformers` eager, compiled by `torch.compile` (on a GPU with `mode="reduce-overhead"`) and in CUDA graphs, for
inference in bfloat16 under autocast and with weights held in it; this package's model eager, compiled and in CUDA
graphs, its weights held in bfloat16 there; `transformers`' model accelerated. On a CPU OpenVINO too, where it is
installed (`pip install openvino`), converted from `transformers`' model. The same random weights and input; no hooks;
gradients are freed (`zero_grad(set_to_none=True)`). Calls are timed in turn; each result is first compared with
`transformers` eager in float32, and a wrong one has no time.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import m2f_kernels
from benchmarks import timing
from benchmarks.ops import end_to_end
from m2f_model import bench
from m2f_model.criterion import losses_of

Run = Callable[[], tuple[Tensor, ...]]
EAGER, COMPILED, CAPTURED = "eager", "compiled", "CUDA graphs"
#: The same with weights held in bfloat16, in place of autocast.
HELD = "weights in bf16"
COMPILED_HELD, CAPTURED_HELD = f"{COMPILED}, {HELD}", f"{CAPTURED}, {HELD}"
TRANSFORMERS, ACCELERATED, OURS, OPENVINO = "transformers", "transformers, accelerated", "m2f", "OpenVINO"


class WithLosses(nn.Module):
    """This package's model by its graphs: in training matching and loss run between them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.graphs = m2f_kernels.CudaGraphs(model, training=True, clone=False)

    def forward(self, pixels: Tensor, targets: Any = None) -> Any:
        out = self.graphs(pixels)
        if targets is None:
            return out
        return out._replace(losses=losses_of(self.model.criterion, out.predictions, targets))


def build(case: bench.Case, whose: str, how: str) -> tuple[bench.Case, nn.Module, torch.dtype]:
    """The model, the case as it is called (without autocast where weights are in bfloat16), and its pixels' dtype."""
    model: Any = bench.build(case, "m2f" if whose == OURS else "transformers").train(case.training)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    if whose == ACCELERATED:
        m2f_kernels.accelerate(model)
    dtype = torch.float32
    if (whose == OURS and case.autocast == "bf16" and not case.training) or HELD in how:
        dtype = torch.bfloat16
        model = model.hold_in(dtype) if whose == OURS else model.to(dtype)
        case = replace(case, autocast="none")
    if COMPILED in how:
        model.compile(mode="reduce-overhead" if case.device == "cuda" else None)
    elif CAPTURED in how and whose == OURS:
        model = WithLosses(model)
    elif CAPTURED in how:
        model.forward = m2f_kernels.CudaGraphs(model)
    return case, model, dtype


def run_of(case: bench.Case, whose: str, how: str) -> Run:
    """A call without arguments that gives class and mask logits."""
    if whose == OPENVINO:
        return openvino(case)
    case, model, dtype = build(case, whose, how)
    return bench.call(case, model, free_gradients=True, pixel_dtype=dtype)


class _Pair(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(pixels)
        return out.class_queries_logits, out.masks_queries_logits


def openvino(case: bench.Case) -> Run:
    """`transformers`' model converted, on as many threads as PyTorch has."""
    import openvino as ov

    model = bench.build(case, "transformers")
    pixels = bench.pixels_of(case)
    with torch.no_grad():
        converted = ov.convert_model(_Pair(model), example_input=pixels)
    converted.reshape(list(pixels.shape))
    precision = {"none": "f32", "bf16": "bf16"}[case.autocast]
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = ov.Core().compile_model(converted, "CPU", options).create_infer_request()

    def run() -> tuple[Tensor, ...]:
        found = request.infer([pixels.numpy()])
        return tuple(torch.from_numpy(found[i]) for i in range(2))

    return run


def ways(case: bench.Case, full: bool) -> list[tuple[str, str]]:
    """Whose model, and how it is run; the first is what the others are compared with."""
    cuda = case.device == "cuda"
    low = case.autocast == "bf16" and not case.training
    found = [(TRANSFORMERS, EAGER), (TRANSFORMERS, COMPILED), *([(TRANSFORMERS, COMPILED_HELD)] if low else [])]
    if cuda and not full:
        return [*found, (OURS, CAPTURED)]
    found += [(ACCELERATED, EAGER), (OURS, EAGER)]
    if not case.training:
        found.append((OURS, COMPILED))
    if cuda:
        found.append((OURS, CAPTURED))
        if not case.training:
            found += [(TRANSFORMERS, CAPTURED), *([(TRANSFORMERS, CAPTURED_HELD)] if low else [])]
    elif not case.training and importlib.util.find_spec("openvino"):
        found.append((OPENVINO, ""))
    return found


def cases(device: str, full: bool, backbone: str = "r50") -> list[bench.Case]:
    one = bench.Case(backbone, 1024, device=device)
    if device == "cuda":
        small = [replace(one, size=512, autocast=x) for x in ("bf16", "none")] if full else []
        return [replace(one, autocast="bf16"), replace(one, training=True, batch=2, autocast="bf16"), *small]
    sizes = (1024, 512) if full else (512,)
    found = [replace(one, size=size, autocast=x) for size in sizes for x in ("none", "bf16")]
    return [*found, replace(one, size=512, training=True)] if full else found


def problem(case: bench.Case, found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> tuple[float, str | None]:
    """The error, and why the result is wrong. Of bf16 one minus the masks' mean intersection over union."""
    results, exact = ([x.float().cpu() for x in tensors if x is not None] for tensors in (found, truth))
    tolerance = bench.TOLERANCE if case.device == "cpu" else end_to_end.GPU_TOLERANCE
    verdict = end_to_end.compared(results, exact, case.autocast != "none", tolerance)
    return verdict.output, None if verdict.right else f"wrong: {verdict.output:.2g}"


def measure(case: bench.Case, full: bool, seconds: float, skip: str | None = None, cpu_time: bool = False) -> list[str]:
    """Lines of the table."""
    title = f"{case.backbone} {'training' if case.training else 'inference'} {case.size}² N={case.batch} "
    title += "bf16" if case.autocast == "bf16" else "fp32"
    precise = replace(case, training=False, autocast="none")
    truth = tuple(x.cpu() for x in bench.call(precise, bench.build(precise, "transformers"))())
    runs: dict[str, Run] = {}
    errors: dict[str, float] = {}
    lines = []
    for whose, how in ways(case, full):
        name = ", ".join(filter(None, [whose, how]))
        if skip and skip in name:
            continue
        try:
            run = run_of(case, whose, how)
            for _ in range(3):  # compiles, captures
                found = run()
            errors[name], wrong = problem(case, found, truth)
        except Exception as error:  # a peer that fails is a line of the table, too
            wrong = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
        if wrong is None:
            runs[name] = run
        else:
            lines.append(f"| {title} | {name} | {wrong} | | | |")
    gc.collect()
    clock = time.process_time if cpu_time else time.perf_counter  # of all threads of this process
    timings = timing.interleaved(list(runs.values()), case.device, seconds * len(runs), 3, clock=clock)
    medians = [x.median_ms for x in timings]
    first = medians[0] if medians else float("nan")
    for name, milliseconds in zip(runs, medians, strict=True):
        cells = [f"{milliseconds:.1f}", f"{case.batch * 1e3 / milliseconds:.2f}", f"{first / milliseconds:.2f}"]
        lines.append(f"| {' | '.join([title, name, *cells, f'{errors[name]:.1e}'])} |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.whole_model", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--backbone", default="r50", help="r50, swin-t, tiny, ... (default: r50)")
    parser.add_argument("--full", action="store_true", help="every size, precision and way to run")
    parser.add_argument("--size", type=int, help="only this side")
    parser.add_argument("--skip", metavar="TEXT", help="leave out what has this in its name, for example compiled")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each cell (default: 5)")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of one thread in place of wall time")
    options = parser.parse_args(arguments)
    if options.cpu_time and (options.device != "cpu" or torch.get_num_threads() > 1):
        parser.error(
            "--cpu-time: expected --device cpu and OMP_NUM_THREADS=1: threads that wait for others use CPU time"
        )
    print("| | implementation | ms | images/s | times as fast | error |\n|---|---|---:|---:|---:|---:|", flush=True)
    for case in cases(options.device, options.full, options.backbone):
        chosen = case if options.size is None else replace(case, size=options.size)
        print("\n".join(measure(chosen, options.full, options.seconds, options.skip, options.cpu_time)), flush=True)


if __name__ == "__main__":
    main()
