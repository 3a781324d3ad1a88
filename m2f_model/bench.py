"""End-to-end times and peak memory of this model and of `transformers`', with the same random weights and input.

Times are medians of interleaved runs (theirs, ours, theirs, ...), so that whatever else the machine does falls on both.
Peak memory is the growth over what a process holds with its weights (and, in training, gradients) before the call;
one fresh process each; on CPU the kernel's peak of the resident set, with glibc told to return freed memory at once.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from m2f_model.config import BACKBONES, Mask2FormerConfig
from m2f_model.criterion import total_loss
from m2f_model.model import Mask2Former
from m2f_model.weights import from_huggingface

IMPLEMENTATIONS = ("transformers", "m2f")
#: Largest error of the last prediction, relative to its largest value, above which a case has no times.
TOLERANCE = 1e-3
AUTOCAST = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
#: The names of the parts in both models.
STAGES = {
    "m2f": {
        "backbone": "backbone",
        "pixel decoder": "pixel_decoder",
        "transformer decoder": "transformer_decoder",
        "loss": "criterion",
    },
    "transformers": {
        "backbone": "model.pixel_level_module.encoder",
        "pixel decoder": "model.pixel_level_module.decoder",
        "transformer decoder": "model.transformer_module",
        "loss": "criterion",
    },
}


def stages(model: nn.Module, implementation: str) -> list[tuple[str, nn.Module]]:
    """The parts whose forward passes are timed, with their names."""
    return [(stage, model.get_submodule(path)) for stage, path in STAGES[implementation].items()]


class MeasurementError(RuntimeError):
    """A figure that could not be measured."""


class Disagreement(MeasurementError):
    """The two implementations predict different results."""


@dataclass(frozen=True)
class Case:
    """One comparison: `size` is the side of the square input, `targets` the number of masks in a training step."""

    backbone: str = "r50"
    size: int = 512
    training: bool = False
    batch: int = 1
    targets: int = 10
    device: str = "cpu"
    autocast: str = "none"
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name, right, expected in (
            ("backbone", self.backbone in BACKBONES, f"one of {', '.join(BACKBONES)}"),
            ("batch", self.batch >= 1, "at least 1"),
            ("targets", self.targets >= 1, "at least 1"),
            ("size", self.size >= 32 and self.size % 32 == 0, "a multiple of 32"),
            ("autocast", self.autocast in AUTOCAST, "none, bf16 or fp16"),
        ):
            if not right:
                raise ValueError(f"{name}: expected {expected}; got {getattr(self, name)!r}")

    @property
    def config(self) -> Mask2FormerConfig:
        if self.backbone == "tiny":
            return Mask2FormerConfig.tiny(5)
        return Mask2FormerConfig.preset(f"{self.backbone}-coco-panoptic")


def build(case: Case, implementation: str) -> nn.Module:
    """The model with random weights, the same for both implementations."""
    torch.manual_seed(0)
    config = case.config
    theirs: Any = transformers.Mask2FormerForUniversalSegmentation(config.to_transformers()).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "sampling_offsets" in name or "attention_weights" in name:  # otherwise all queries would be alike
                parameter += 0.05 * torch.randn_like(parameter)
    for module in theirs.modules():  # frozen, as published and as in ours: the same gradients are computed
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    if implementation == "transformers":
        return theirs.to(case.device)
    ours = Mask2Former(config).eval()
    ours.load_state_dict(from_huggingface(theirs.state_dict()))
    ours.set_activation_checkpointing(case.activation_checkpointing)
    return ours.to(case.device)


def pixels_of(case: Case, generator: torch.Generator | None = None) -> Tensor:
    """The input [N, 3, size, size] of a case, the same in every call."""
    generator = generator or torch.Generator().manual_seed(1)
    coarse = torch.randn(case.batch, 3, case.size // 16, case.size // 16, generator=generator, device="cpu")
    return nn.functional.interpolate(coarse, scale_factor=16.0, mode="bicubic").to(case.device)


def call(
    case: Case, model: nn.Module, *, free_gradients: bool = False, pixel_dtype: torch.dtype = torch.float32
) -> Callable[[], tuple[Tensor, Tensor]]:
    """A function without arguments: inference, or forward, loss and backward. Gives class and mask logits.

    Args:
        case: what to call.
        model: whose.
        free_gradients: as training does. By default they are set to zero and stay, so that a peak of memory is what a
            step needs besides them.
        pixel_dtype: of the input, for models whose weights are held in it.
    """
    generator = torch.Generator().manual_seed(1)
    pixels = pixels_of(case, generator).to(pixel_dtype)
    blobs = torch.randn(case.targets, 1, 8, 8, generator=generator, device="cpu")
    masks = (nn.functional.interpolate(blobs, (case.size, case.size), mode="bicubic")[:, 0] > 0.7).to(case.device)
    labels = torch.randint(case.config.num_labels, (case.targets,), generator=generator, device="cpu").to(case.device)
    dtype = AUTOCAST[case.autocast]
    theirs = isinstance(model, transformers.PreTrainedModel)

    def forward() -> tuple[Any, Any, Any]:
        if theirs:
            given = {}
            if case.training:
                given = {"mask_labels": [masks.float()] * case.batch, "class_labels": [labels] * case.batch}
            out = model(pixels, **given)
            return out.class_queries_logits, out.masks_queries_logits, out.loss
        if not case.training:
            out = model(pixels)
            return out.class_logits, out.masks.logits(), None
        out = model(pixels, [{"labels": labels, "masks": masks}] * case.batch)
        return out.class_logits, None, total_loss(out.losses)

    def run() -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(case.training), torch.autocast(case.device, dtype, enabled=dtype is not None):
            classes, logits, loss = forward()
        if loss is not None:
            model.zero_grad(set_to_none=free_gradients)
            loss.backward()
        return classes, logits

    return run


def error(case: Case) -> float:
    """Largest difference of the last prediction between both implementations, relative to its largest value."""
    case = replace(case, training=False, autocast="none")
    a, b = (call(case, build(case, name))() for name in IMPLEMENTATIONS)
    return max(((x - y).abs().max() / x.abs().max()).item() for x, y in zip(a, b, strict=True))


def mask_iou(case: Case, implementation: str = "m2f", model: nn.Module | None = None) -> float:
    """Mean intersection over union of the masks (logit > 0) under the case's autocast and in float32.

    Random weights put many logits next to zero, where any rounding decides; give a trained `model` for its own figure.
    """
    model = build(case, implementation) if model is None else model
    case = replace(case, training=False)
    return overlap(*(call(replace(case, autocast=a), model)()[1] > 0 for a in ("none", case.autocast)))


def overlap(one: Tensor, other: Tensor) -> float:
    """Mean intersection over union of masks [N, Q, h, w]; those empty in both do not count."""
    union, shared = ((one | other).flatten(2).sum(-1), (one & other).flatten(2).sum(-1))
    return (shared[union > 0] / union[union > 0]).double().mean().item()


def times(case: Case, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of a whole call ("total") and of the forward pass of each stage, by implementation."""
    runs: dict[str, Callable[[], object]] = {}
    samples: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        for name in IMPLEMENTATIONS:
            model = build(case, name)
            runs[name] = call(case, model)
            runs[name]()  # warms up
            samples[name] = stack.enter_context(watched(stages(model, name), case.device))
        for _ in range(rounds):
            for name, run in runs.items():
                start = _now(case.device)
                run()
                samples[name].setdefault("total", []).append(_now(case.device) - start)
    return {
        name: {stage: statistics.median(taken) for stage, taken in found.items() if taken}
        for name, found in samples.items()
    }


def _now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def watched(parts: Iterable[tuple[str, nn.Module]], device: str) -> Iterator[dict[str, list[float]]]:
    """Seconds of every forward pass of modules inside a `with` block, by the names that come with them."""
    found: dict[str, list[float]] = {}
    starts: list[float] = []  # of passes that have not ended: they are nested
    with ExitStack() as stack:
        for name, module in parts:
            end = partial(_end, found.setdefault(name, []), starts, device)
            stack.enter_context(module.register_forward_pre_hook(lambda *_: starts.append(_now(device))))
            stack.enter_context(module.register_forward_hook(end))
        yield found


def _end(taken: list[float], starts: list[float], device: str, *_: Any) -> None:
    taken.append(_now(device) - starts.pop())


# ---------------------------------------------------------------- memory


#: glibc's thresholds, fixed: a freed tensor leaves a process at once, and the peak is that of live memory.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def peak_memory(case: Case, implementation: str) -> float:
    """MiB that a call needs above what the model holds, measured in a fresh process.

    Raises:
        MeasurementError: if that process fails; on CPU anywhere but on Linux.
    """
    command = [sys.executable, "-m", "m2f_model.bench", json.dumps(asdict(case)), implementation]
    command.append(str(torch.get_num_threads()))
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MeasurementError(f"measuring the memory of {implementation} failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def measure_peak(case: Case, implementation: str) -> float:
    """MiB that a call needs above what the model holds, in this process, which should only just have started."""
    model = build(case, implementation)
    call(replace(case, size=64), model)()  # loads code, starts threads, makes gradients
    return peak_mib(call(case, model), case.device)[0]


def peak_mib(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Peak growth over the memory in use before `run()`, in MiB, and its result.

    Raises:
        OSError: on CPU, where the system has no resettable peak (anything but Linux).
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20, result
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at the present
    resident = _status_mib("VmRSS")
    result = run()
    return _status_mib("VmHWM") - resident, result


def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


# ---------------------------------------------------------------- a row


def measure(case: Case, rounds: int = 5, memory: bool = True) -> dict[str, Any]:
    """Everything about a case: its error, seconds by stage and peak MiB by implementation.

    Raises:
        ValueError: where `rounds` is less than 1.
        Disagreement: where both implementations disagree: such a case has no times.
        MeasurementError: where measuring memory fails.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1; got {rounds}")
    found = error(case)
    if not found < TOLERANCE:
        raise Disagreement(f"{case}: expected the same predictions up to {TOLERANCE}; they differ by {found:.2g}")
    peaks = {name: peak_memory(case, name) for name in IMPLEMENTATIONS} if memory else {}
    row = {"case": asdict(case), "error": found, "seconds": times(case, rounds), "peak_mib": peaks}
    if case.autocast != "none":
        row["mask_iou"] = {name: mask_iou(case, name) for name in IMPLEMENTATIONS}
    return row


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(measure_peak(Case(**json.loads(sys.argv[1])), sys.argv[2]))
