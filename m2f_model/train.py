"""Training by the published recipe (Cheng et al. 2022, section 4.1), on one process or many.

`torchrun --nproc-per-node 8 -m m2f_model train ...` starts eight processes; each has its own data, all one model.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from m2f_kernels import CudaGraphs
from m2f_model.config import Mask2FormerConfig
from m2f_model.data import Batch, Batches, Dataset, Guarded, Relabelled, Steps, identity
from m2f_model.evaluate import evaluate, evaluate_semantic
from m2f_model.files import remove_leftovers, write_atomically
from m2f_model.interrupts import Interrupted, Interrupts, leave_signals_to_the_parent
from m2f_model.labels import same_labels
from m2f_model.model import Mask2Former
from m2f_model.parallel import (
    PARALLEL,
    Losses,
    any_process,
    gather_state,
    largest_of_processes,
    local,
    message_of_first,
    parallelise,
    scatter_state,
    training_loss,
    whole,
)
from m2f_model.samples import Sample
from m2f_model.weights import load_exactly, read_checkpoint

SCHEDULES = ("step", "poly")
AUTOCAST = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def _available_cpus() -> int:
    """The number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run. Defaults are the published ones for COCO.

    Attributes:
        steps: of the optimiser; batch_size: images per step of each process.
        lr, weight_decay: AdamW's; norms, embeddings and position biases do not decay.
        backbone_lr: factor of the learning rate for the backbone.
        milestones: shares of the steps after which the learning rate is divided by 10.
        clip: largest norm of all gradients together.
        size: side of the square inputs that large-scale jitter makes; None for images as they are.
        scales: range of large-scale jitter, or of the sizes before a crop.
        crop: (height, width) of the inputs in place of `size`, random crops as published for semantic data.
        colours: change colours at random.
        schedule: of the learning rate, "step" (milestones) or "poly" (the rest of the steps to the power of 0.9).
        autocast: "none", "bf16" or "fp16".
        parallel: what several processes do with the model: "ddp", all have it, or "fsdp", each has a share (FSDP2).
        activation_checkpointing: keep only the inputs of the decoders' layers.
        cuda_graphs: on a GPU, replay forward and backward pass of the model as graphs; for inputs of one size or a few.
        seed: of everything random.
        log_every, save_every, evaluate_every: steps between; evaluation takes `evaluate_count` images.
        workers: processes that load data; by default four, or fewer where there are fewer CPUs.

    Raises:
        ValueError: naming the field.
    """

    steps: int = 368750
    batch_size: int = 2
    lr: float = 1e-4
    weight_decay: float = 0.05
    backbone_lr: float = 0.1
    milestones: tuple[float, ...] = (0.889, 0.963)
    clip: float = 0.01
    size: int | None = 1024
    scales: tuple[float, float] = (0.1, 2.0)
    crop: tuple[int, int] | None = None
    colours: bool = False
    schedule: str = "step"
    autocast: str = "none"
    parallel: str = "ddp"
    activation_checkpointing: bool = False
    cuda_graphs: bool = False
    seed: int = 0
    log_every: int = 20
    save_every: int = 5000
    evaluate_every: int = 5000
    evaluate_count: int = 500
    workers: int = field(default_factory=lambda: min(4, _available_cpus()))

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "save_every", "evaluate_every", "evaluate_count"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1; got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number; got {getattr(self, name)}")
        if self.autocast not in AUTOCAST:
            raise ValueError(f"autocast: expected one of {', '.join(map(repr, AUTOCAST))}; got {self.autocast!r}")
        if self.parallel not in PARALLEL:
            raise ValueError(f"parallel: expected one of {', '.join(map(repr, PARALLEL))}; got {self.parallel!r}")
        if self.parallel == "fsdp" and self.autocast == "fp16":
            raise ValueError("autocast: expected none or bf16 with parallel='fsdp', whose gradients are not scaled")
        if self.cuda_graphs and self.activation_checkpointing:
            raise ValueError("cuda_graphs: expected False with activation_checkpointing, which runs layers twice")
        if self.cuda_graphs and self.parallel == "fsdp":
            raise ValueError("cuda_graphs: expected False with parallel='fsdp', which moves weights in every pass")
        if self.size is not None and (self.size < 32 or self.size % 32):
            raise ValueError(f"size: expected a multiple of 32; got {self.size}")
        if self.crop is not None and (self.size is not None or min(self.crop) < 32 or any(x % 32 for x in self.crop)):
            raise ValueError(f"crop: expected multiples of 32, and no size; got {self.crop}, size {self.size}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {', '.join(map(repr, SCHEDULES))}; got {self.schedule!r}")
        if not 0 < self.scales[0] <= self.scales[1]:
            raise ValueError(f"scales: expected 0 < smallest <= largest; got {self.scales}")

    @classmethod
    def shapes(cls, **changes: Any) -> Recipe:
        """For the tiny model on synthetic shapes: minutes on a CPU. Everything is new, so nothing learns slowly."""
        short = {"steps": 1500, "batch_size": 8, "lr": 5e-4, "backbone_lr": 1.0, "size": None, "workers": 0}
        return cls(**{**short, "save_every": 500, "evaluate_every": 500, "evaluate_count": 200, **changes})

    @classmethod
    def semantic(cls, **changes: Any) -> Recipe:
        """The published one for ADE20K's semantic data: random crops, colours, a polynomial schedule."""
        published = {"steps": 160000, "size": None, "crop": (512, 512), "scales": (0.5, 2.0), "colours": True}
        return cls(**{**published, "schedule": "poly", **changes})

    def learning_rate(self, step: int) -> float:
        """Factor of the learning rate at a step."""
        if self.schedule == "poly":
            return float(max(0.0, 1 - step / self.steps) ** 0.9)
        return float(0.1 ** sum(step >= share * self.steps for share in self.milestones))


def build_optimizer(model: Mask2Former, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with the published groups: the backbone learns slower; norms, embeddings, position biases do not decay."""
    still: set[str] = set()
    for module_name, module in model.named_modules():
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, nn.SyncBatchNorm, nn.Embedding)):
            still |= {f"{module_name}.{name}" for name, _ in module.named_parameters(recurse=False)}
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = name not in still and not name.endswith("relative_position_bias_table")
            groups.setdefault((name.startswith("backbone."), decays), []).append(parameter)
    cuda = all(p.device.type == "cuda" for parameters in groups.values() for p in parameters)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": (rate := recipe.lr * (recipe.backbone_lr if backbone else 1.0)),
                "initial_lr": rate,
                "weight_decay": recipe.weight_decay if decays else 0.0,
            }
            for (backbone, decays), parameters in groups.items()
        ],
        fused=cuda or None,
    )


# ---------------------------------------------------------------- processes


@dataclass(frozen=True)
class Process:
    """This training process: its rank, the number of processes, and its device."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    @contextlib.contextmanager
    def joined(cls, device: str) -> Iterator[Process]:
        """As torchrun says; alone where it says nothing. `device` is "cpu" or "cuda"."""
        if "RANK" not in os.environ:
            yield cls(device=torch.device(device))
            return
        chosen = torch.device(device)
        if chosen.type == "cuda":
            chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(chosen)
        # What is agreed on between steps are numbers on the host: no waiting for the GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
        try:
            yield cls(dist.get_rank(), dist.get_world_size(), chosen)
            if chosen.type == "cpu":
                # After it gloo's thread holds no gradients. To free one it takes the interpreter's lock, which this
                # thread holds while it ends the group and waits for that thread: for ever.
                dist.barrier()
        finally:
            dist.destroy_process_group()


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    return {**state, "cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# ---------------------------------------------------------------- the loop


def _check_labels(data: Dataset, config: Mask2FormerConfig) -> None:
    names = config.label_names
    if len(data.label_names) != config.num_labels:
        raise ValueError(f"data: expected {config.num_labels} labels, the model's; got {data.label_names}")
    if names is not None and not same_labels(names, data.label_names):
        pairs = zip(names, data.label_names, strict=True)
        i, (theirs, ours) = next((i, pair) for i, pair in enumerate(pairs) if not same_labels(*([x] for x in pair)))
        raise ValueError(
            f"data: expected the labels that the model was trained for, in their order; label {i} is {ours!r} here and "
            f"{theirs!r} there"
        )


def of_data(config: Mask2FormerConfig, data: Dataset, recipe: Recipe) -> Mask2FormerConfig:
    """`config` with what a model trained on `data` has: its names and stuff, and the size at which it saw images.

    That is the published proportion: 800 and 1333 for large-scale jitter to 1024, 512 and 2048 for crops of 512. Else
    the median short side of some images, and the longest side or twice the short one.
    """
    if recipe.crop is not None:
        size: tuple[int, ...] = (max(recipe.crop), 4 * max(recipe.crop))
    elif recipe.size is not None:
        size = tuple(max(1, round(recipe.size * side / 1024)) for side in (800, 1333))
    else:
        step = max(1, len(data) // 16)
        shapes = [data[i]["image"].shape[1:] for i in range(0, len(data), step)]
        short = int(statistics.median(min(shape) for shape in shapes))
        size = (short, max(2 * short, *(max(shape) for shape in shapes)))
    return replace(
        config,
        label_names=tuple(data.label_names),
        stuff_labels=tuple(data.stuff_labels),
        image_size=(size[0], size[1]),
        keep_aspect_ratio=True,
        semantic_only=getattr(data, "semantic", False),
    )


class Trainer:
    """One training run in the directory `out`, which goes on where a former one was stopped.

    Args:
        model: what to train, on the process' device. Its configuration gets the names and stuff of the data, and the
            size of the images that it sees.
        data: training samples, of the model's labels in their order.
        recipe: how.
        out: directory of checkpoints, TensorBoard's events and, at the end, the model in Hugging Face's format.
        process: which process this is.
        validation: samples to measure panoptic quality on, or mean intersection over union where data are semantic; of
            the same categories in any order.
        log: takes a line of text now and then.
        progress: wraps the iteration over what is checked at the start, for a progress bar.
        callback: is given the step and what TensorBoard gets, figures by name ("train/loss", "validation/pq", ...), for
            other loggers; called by the first process alone.

    Attributes:
        best: the best figure of a validation so far, panoptic quality or mean intersection over union, and its step;
            the model of that step is in `out`/best.

    Raises:
        ValueError: if there are no data, their labels are not the model's, the validation's categories are others,
            annotations cannot be used, or `out` holds another run, one on other data, or a damaged checkpoint.
    """

    def __init__(
        self,
        model: Mask2Former,
        data: Dataset,
        recipe: Recipe,
        out: str | Path,
        *,
        process: Process | None = None,
        validation: Dataset | None = None,
        log: Any = print,
        progress: Callable[[list[Any]], Iterable[Any]] = iter,
        callback: Callable[[int, dict[str, float]], object] | None = None,
    ) -> None:
        if len(data) == 0:
            raise ValueError("data: expected at least one sample; got none")
        _check_labels(data, model.config)
        self.model, self.data, self.recipe = model, data, recipe
        self.validation = None if validation is None else Relabelled(validation, data)
        self.process = process or Process()
        self.out, self.log, self.callback = Path(out), log, callback
        self.step = 0
        self.best: tuple[float, int] | None = None
        self._check(data, progress)
        model.config = of_data(model.config, data, recipe)
        model.to(self.process.device).train()
        model.set_activation_checkpointing(recipe.activation_checkpointing)
        self.graphs = CudaGraphs(model, training=True, clone=False) if recipe.cuda_graphs else None
        self._losses = Losses(model, self.graphs)
        self.parallel: nn.Module = self._losses
        if self.process.world_size > 1:
            self.parallel = parallelise(self._losses, recipe.parallel, self.process.device)
        self.sharded = self.process.world_size > 1 and recipe.parallel == "fsdp"
        self.optimizer = build_optimizer(model, recipe)
        self.dtype = AUTOCAST[recipe.autocast]
        self.scaler = torch.amp.GradScaler(self.process.device.type, enabled=recipe.autocast == "fp16")
        # Nothing of these waits for the device until a step logs or saves.
        self._bad_step = torch.zeros((), dtype=torch.int64, device=self.process.device)
        self._skipped, self._skipped_in_a_row = (torch.zeros_like(self._bad_step) for _ in range(2))
        self._said = False
        self.out.mkdir(parents=True, exist_ok=True)
        if self.process.rank == 0:
            self._remove_leftovers()
        # Each process draws its own points and drops its own paths.
        torch.manual_seed(recipe.seed * 1000003 + self.process.rank)
        if self.checkpoint.exists():
            self.load()

    def run(self, stop: int | None = None) -> None:
        """Train until the recipe's last step, or until `stop`.

        Ctrl-C and SIGTERM finish the step, write the checkpoint, and say how to go on.

        Raises:
            FloatingPointError: where losses or gradients of a step are not finite (float16: where many steps in a row
                had to be skipped) or weights are not; found at the steps that log or save, before anything is written.
            KeyboardInterrupt, SystemExit: after Ctrl-C and after SIGTERM.
        """
        last = min(self.recipe.steps, stop or self.recipe.steps)
        done = self.step == self.recipe.steps and self._model_is_written
        if done:
            self.log(
                f"{self.checkpoint}: this run is at its end, step {self.step} of {self.recipe.steps}; the model is in "
                f"{self.out}. With more steps it goes on from there"
            )
            return
        # A former run may have written events of steps after its last checkpoint: those are to be forgotten.
        purge = self.step + 1 if self.step else None
        writer = SummaryWriter(str(self.out / "tensorboard"), purge_step=purge) if self.process.rank == 0 else None
        batches = self._batches(last)
        try:
            with Interrupts() as interrupts:
                self._run(batches, last, writer, interrupts)
        finally:
            batches.close()
            if writer is not None:
                writer.close()
        if interrupts.number is not None and self.step < last:
            self.log(
                f"stopped by {signal.Signals(interrupts.number).name} after step {self.step} of {self.recipe.steps}, "
                f"which is written to {self.checkpoint}: the same command goes on from there"
            )
            raise interrupts.end()

    def _run(self, batches: Iterator[Any], last: int, writer: SummaryWriter | None, interrupts: Interrupts) -> None:
        began, first = time.monotonic(), self.step
        if self.step == self.recipe.steps:  # stopped after its last step
            self._evaluate(writer, interrupts)
        for pixels, targets in batches:
            losses, norm = self.update(pixels, targets)
            logs, evaluates, saves = (
                self.step % every == 0 or self.step == last
                for every in (self.recipe.log_every, self.recipe.evaluate_every, self.recipe.save_every)
            )
            # Whatever becomes of a validation, the steps before it are not lost.
            saves = saves or (evaluates and self.validation is not None)
            if logs or saves:
                self._check_finite(losses)
            if logs:
                seconds = (time.monotonic() - began) / (self.step - first)
                self._report(writer, losses, norm, seconds)
            number = largest_of_processes(interrupts.number or 0)
            if saves or number:
                self.save()
            if number:
                interrupts.number = number  # which may have come to another process
                return
            if evaluates:
                self._evaluate(writer, interrupts)
            # The others of several processes have gone on.
            if saves and interrupts.number is not None and self.process.world_size == 1:
                return
        if self.step == self.recipe.steps:
            self._save_model()

    def dry_run(self) -> str:
        """The time and memory of a batch, in one line: runs two steps on the first batch, which spoil the model.

        The second step has the optimiser's moments in memory, too. Nothing is written.
        """
        device, batches = self.process.device, self._batches(1)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            pixels, targets = next(batches)
        finally:
            batches.close()
        for _ in range(2):
            began = time.monotonic()
            losses, _norm = self.update(pixels, targets)
            total = sum(value.item() for value in losses.values())  # waits for the device
        self._check_finite(losses)
        count = sum(len(target["labels"]) for target in targets)
        return (
            f"one batch: {' x '.join(map(str, pixels.shape))} pixels, {count} targets, loss {total:.3f}, "
            f"{time.monotonic() - began:.2f} s for a step, peak memory {_peak_memory(device)}"
        )

    def update(self, pixels: Tensor, targets: list[dict[str, Any]]) -> tuple[dict[str, Tensor], Tensor]:
        """One step of the optimiser: its losses, and the norm of its gradients before clipping."""
        device = self.process.device
        pixels = pixels.to(device, non_blocking=True)
        targets = [{k: v.to(device, non_blocking=True) for k, v in target.items()} for target in targets]
        statistics = self._statistics()
        with torch.autocast(device.type, self.dtype, enabled=self.dtype is not None):
            out = self.parallel(pixels, targets)
        if self.sharded:
            losses, total = out.losses, training_loss(out.losses, out.masks)
        else:
            losses, total = dict(zip(self._losses.names, out.detach().unbind(), strict=True)), out.sum()
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.recipe.learning_rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()
        self.scaler.unscale_(self.optimizer)
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        losses = {k: v.detach() for k, v in losses.items()}
        self._note_finite(losses, norm.detach(), statistics)
        return losses, norm

    def _batches(self, last: int) -> Generator[Batch, None, None]:
        recipe, process = self.recipe, self.process
        batches = Batches(
            self.data,
            recipe.batch_size,
            seed=recipe.seed,
            size=recipe.size,
            scales=recipe.scales,
            crop=recipe.crop,
            colours=recipe.colours,
            rank=process.rank,
            world_size=process.world_size,
            mean=self.model.config.pixel_mean,
            std=self.model.config.pixel_std,
        )
        # A loader seeds its workers; from a generator of its own, so that the model's random numbers stay the same.
        loader = DataLoader(
            Guarded(batches),
            batch_size=None,
            sampler=Steps(self.step, last),
            num_workers=recipe.workers,
            pin_memory=process.device.type == "cuda",
            generator=torch.Generator(),
            worker_init_fn=leave_signals_to_the_parent,
        )
        try:
            for batch in loader:
                if isinstance(batch, Exception):
                    raise batch
                yield batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            raise ChildProcessError(
                f"step {self.step}: a process that prepares data has died, which is often for want of memory "
                f"(fewer workers take less); {reason}"
            ) from error

    # ------------------------------------------------------------ what is not finite

    def _statistics(self) -> list[tuple[Tensor, Tensor]]:
        """Running statistics of batch norms, and copies of them where a step may be skipped."""
        if not self.scaler.is_enabled():
            return []
        norms = (m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training)
        return [(b, b.clone()) for m in norms for b in m.buffers() if b.is_floating_point()]

    def _note_finite(self, losses: dict[str, Tensor], norm: Tensor, statistics: list[tuple[Tensor, Tensor]]) -> None:
        """Note, on the device, whether the step was skipped (float16), or is the first that is not finite."""
        finite = norm.isfinite()
        if self.scaler.is_enabled():
            self._skipped += ~finite
            self._skipped_in_a_row = torch.where(finite, 0, self._skipped_in_a_row + 1)
            for now, before in statistics:
                now.copy_(torch.where(finite, now, before))
        else:
            bad = ~(finite & torch.stack(list(losses.values())).isfinite().all()) & (self._bad_step == 0)
            self._bad_step = torch.where(bad, self.step, self._bad_step)

    def _check_finite(self, losses: dict[str, Tensor]) -> None:
        """Before anything of this step is written: a checkpoint of such a model would replace a good one."""
        if self.scaler.is_enabled():
            skipped, in_a_row = int(self._skipped), int(self._skipped_in_a_row)
            if in_a_row >= _SKIPPED_IN_A_ROW:
                raise FloatingPointError(
                    f"step {self.step}: expected finite gradients; those of the last {in_a_row} steps were not, in "
                    f"float16 at a scale of {self.scaler.get_scale():.1g}: the run has diverged"
                )
            if skipped and not self._said:
                self._said = True
                self.log(
                    f"step {self.step}: {skipped} steps skipped so far, whose gradients were not finite in float16; "
                    "the loss is scaled down (TensorBoard's train/skipped_steps counts on)"
                )
            return
        bad_step = largest_of_processes(int(self._bad_step))
        if not bad_step:
            return
        bad = [name for name, value in losses.items() if not math.isfinite(value.item())]
        if bad and bad_step == self.step:
            raise FloatingPointError(f"step {self.step}: expected finite losses; not finite: {', '.join(bad)}")
        raise FloatingPointError(
            f"step {bad_step}: expected finite losses and gradients; some were not, and nothing is written since"
        )

    def _check_finite_state(self) -> None:
        """The same for what is about to be written: weights, statistics, and the optimiser's moments."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        moments = (
            (f"{key} of {names[id(p)]}", value)
            for p, state in self.optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor) and value.dim()
        )
        found = [(name, local(x)) for name, x in (*self.model.state_dict().items(), *moments) if x.is_floating_point()]
        finite = torch.stack([x.isfinite().all() for _, x in found]).tolist()
        bad = [name for (name, _), good in zip(found, finite, strict=True) if not good]
        if any_process(bool(bad)):
            which = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
            raise FloatingPointError(
                f"step {self.step}: expected finite weights; not finite: {which or 'some of another process'}; "
                "nothing is written"
            )

    def _report(self, writer: SummaryWriter | None, losses: dict[str, Tensor], norm: Tensor, seconds: float) -> None:
        if writer is None:
            return
        total = sum(v.item() for v in losses.values())
        rate = self.optimizer.param_groups[-1]["lr"]
        left = timedelta(seconds=round(seconds * (self.recipe.steps - self.step)))
        self.log(
            f"step {self.step}/{self.recipe.steps}  loss {total:.3f}  lr {rate:.2g}  {seconds:.3f} s/step  {left} left"
        )
        scalars = {"loss": total, "gradient_norm": norm, "lr": rate, **losses}
        if self.scaler.is_enabled():
            scalars["skipped_steps"] = self._skipped
        self._publish(writer, "train", {name: float(value) for name, value in scalars.items()})

    def _publish(self, writer: SummaryWriter, kind: str, values: dict[str, float]) -> None:
        named = {f"{kind}/{name}": value for name, value in values.items()}
        for name, value in named.items():
            writer.add_scalar(name, value, self.step)
        if self.callback is not None:
            self.callback(self.step, named)

    def _evaluate(self, writer: SummaryWriter | None, interrupts: Interrupts) -> None:
        if self.validation is None or (writer is None and not self.sharded):  # a sharded model needs all processes
            return
        # A sharded model's processes must do the same until they have agreed to stop.
        validation = self.validation if self.sharded else _UntilInterrupted(self.validation, interrupts)
        cuda = [self.process.device] if self.process.device.type == "cuda" else []
        try:
            # The checkpoint of this step is written: a run that goes on from it has the same random numbers.
            with torch.random.fork_rng(cuda):
                measure: Any = evaluate_semantic if getattr(self.data, "semantic", False) else evaluate
                quality = measure(self.model, validation, self.recipe.evaluate_count)
        except Interrupted:
            return
        finally:
            self.model.train()
        values = quality._asdict()
        if writer is not None:
            self._report_quality(writer, values)
        better = self.best is None or next(iter(values.values())) > self.best[0]
        if self.sharded:  # all of them write
            better = any_process(better and self.process.rank == 0)
        if better:
            name, value = next(iter(values.items()))
            self.best = (value, self.step)
            content = json.dumps({name: value, "step": self.step})
            self._save_model(self.out / "best", {_BEST: content})
            if writer is not None:
                self.log(f"step {self.step}  best {_TITLES[name]} so far: this model is in {self.out / 'best'}")

    def _report_quality(self, writer: SummaryWriter, values: dict[str, float]) -> None:
        self.log(f"step {self.step}  " + "  ".join(f"{_TITLES.get(k, k)} {v:.3f}" for k, v in values.items()))
        self._publish(writer, "validation", values)

    # ------------------------------------------------------------ checkpoints

    @property
    def checkpoint(self) -> Path:
        """The file that a stopped run goes on from."""
        return self.out / "checkpoint.pth"

    def save(self) -> None:
        """Write the checkpoint, on all processes at once; a former one stays whole until the new one is.

        Raises:
            FloatingPointError: if weights, statistics or the optimiser's moments are not finite.
        """
        self._check_finite_state()
        random = [_random_state()] * self.process.world_size
        if self.process.world_size > 1:
            dist.all_gather_object(random, random[0])
        model, optimizer = gather_state(self.model, self.optimizer)
        state = {
            "recipe": asdict(self.recipe),
            "config": asdict(self.model.config),
            "data": identity(self.data),
            "step": self.step,
            "model": model,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "skipped": int(self._skipped),
            "random": random,
        }
        if self.process.rank == 0:
            write_atomically(self.checkpoint, lambda file: torch.save(state, file))

    def _save_model(self, out: Path | None = None, beside: Mapping[str, str] | None = None) -> None:
        """Write the model beside what is there, then put its files in place one by one; and other files of text."""
        out = self.out if out is None else out
        model = self.model
        if self.sharded:
            state, _ = gather_state(model, self.optimizer)
            if self.process.rank == 0:
                model = Mask2Former(model.config)
                load_exactly(model, state, "the trained model")
        if self.process.rank == 0:
            with tempfile.TemporaryDirectory(dir=self.out, prefix=_UNFINISHED) as directory:
                model.save_pretrained(directory)
                for name, text in (beside or {}).items():
                    (Path(directory) / name).write_text(text + "\n")
                out.mkdir(exist_ok=True)
                for path in sorted(Path(directory).iterdir(), key=lambda p: p.name == "config.json"):
                    os.replace(path, out / path.name)

    def _read_best(self) -> None:
        """Reads the metric and step of a former run's best model, unless it is of a later step than the checkpoint."""
        try:
            content = json.loads((self.out / "best" / _BEST).read_text())
            value, step = float(next(v for k, v in content.items() if k != "step")), int(content["step"])
        except (OSError, ValueError, KeyError, StopIteration, AttributeError, TypeError):
            return
        if step <= self.step:
            self.best = (value, step)

    @property
    def _model_is_written(self) -> bool:
        """True if the model in `out` is that of the checkpoint; config.json is the last file to be written."""
        config = self.out / "config.json"
        return config.exists() and config.stat().st_mtime >= self.checkpoint.stat().st_mtime

    def _remove_leftovers(self) -> None:
        """Removes the unfinished files of a killed process."""
        remove_leftovers(self.checkpoint)
        for directory in self.out.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(directory, ignore_errors=True)

    def load(self) -> None:
        """Go on from the checkpoint, exactly: the sequence of batches is a function of the step.

        Raises:
            ValueError: if it is damaged, or of another recipe, number of processes, model or data.
        """
        where = "cpu" if self.sharded else self.process.device
        try:
            state = read_checkpoint(self.checkpoint, where, needs_config=False)
        except ValueError as error:
            raise ValueError(f"{error}. Move it away to begin anew") from error
        # What a former version did not have was as by default.
        found, wanted = {**asdict(Recipe()), **state["recipe"], "processes": len(state["random"])}, asdict(self.recipe)
        wanted["processes"] = self.process.world_size
        different = [k for k in wanted if k not in _FREE and _plain(found.get(k)) != _plain(wanted[k])]
        if different:
            lines = "; ".join(f"{k}: {found.get(k)} there, {wanted[k]} here" for k in different)
            raise ValueError(f"{self.checkpoint}: expected a checkpoint of this recipe; {lines}")
        here, there = identity(self.data), state.get("data", {})
        different = [k for k in here if k in there and _plain(there[k]) != _plain(here[k])]
        if different:
            lines = "; ".join(f"{k}: {_short(there[k])} there, {_short(here[k])} here" for k in different)
            raise ValueError(f"{self.checkpoint}: expected a checkpoint of a run on these data; {lines}")
        if self.sharded:
            scatter_state(self.model, self.optimizer, state["model"], state["optimizer"])
        else:
            load_exactly(self.model, state["model"], str(self.checkpoint))
            self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self._skipped.fill_(state.get("skipped", 0))
        self.step = state["step"]
        if self.recipe.steps < self.step:
            raise ValueError(
                f"steps: expected at least {self.step}, which {self.checkpoint} has; got {self.recipe.steps}"
            )
        if found["steps"] != self.recipe.steps:
            self.log(
                f"steps: {found['steps']} there, {self.recipe.steps} here; after step {self.step} the learning rate is "
                "that of the new number"
            )
        self._read_best()
        _set_random_state({k: v.cpu() for k, v in state["random"][self.process.rank].items()})
        if self.step < self.recipe.steps:
            self.log(f"going on from step {self.step} of {self.checkpoint}")

    # ------------------------------------------------------------ data

    def check_validation(self, progress: Callable[[list[Any]], Iterable[Any]] = iter) -> None:
        """Look at the validation data before training, as is done with the training data.

        Raises:
            ValueError: naming what cannot be used; without this call the first validation that meets it says so, after
                the checkpoint of its step is written.
        """
        self._check(self.validation, progress)

    def _check(self, data: Dataset | None, progress: Callable[[list[Any]], Iterable[Any]]) -> None:
        """Of several processes the first one looks at the files, and all raise what it finds."""
        message = ""
        check = getattr(data, "check", None)
        if self.process.rank == 0 and check is not None:
            try:
                check(progress)
            except (ValueError, OSError) as error:
                if self.process.world_size == 1:
                    raise
                message = str(error)
        message = message_of_first(message)
        if message:
            raise ValueError(message)


class _UntilInterrupted:
    """A data set that gives no more samples once a signal has come."""

    def __init__(self, data: Dataset, interrupts: Interrupts) -> None:
        self._data, self._interrupts = data, interrupts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Sample:
        if self._interrupts.number is not None:
            raise Interrupted
        return self._data[index]


#: The file beside the best model that says how good it is.
_BEST = "validation.json"
#: What figures are called in the log.
_TITLES = {"pq": "PQ", "sq": "SQ", "rq": "RQ", "miou": "mIoU", "macc": "mean accuracy", "pacc": "pixel accuracy"}
#: Steps of float16 that are skipped one after the other before a run counts as diverged. The scale, 65536 at first, is
#: halved each time.
_SKIPPED_IN_A_ROW = 50
#: Beginning of the names of directories that hold a model until it is whole.
_UNFINISHED = ".model."
#: Fields of a recipe that may change when a run goes on.
_FREE = (
    *("log_every", "save_every", "evaluate_every", "evaluate_count", "workers"),
    *("activation_checkpointing", "cuda_graphs", "steps"),
)


def _peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        used, held = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return f"{used / 2**20:.0f} MiB on the GPU ({held / 2**20:.0f} MiB with the allocator's reserve)"
    try:
        import resource
    except ImportError:  # Windows
        return "unknown on this system"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20:.0f} MiB of the process"


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _short(value: Any) -> str:
    """For one line: of a long sequence its beginning."""
    if isinstance(value, (tuple, list)) and len(value) > 6:
        return f"({', '.join(map(repr, value[:5]))}, ... {len(value)} in all)"
    return str(_plain(value))
