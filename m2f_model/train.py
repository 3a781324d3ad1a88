"""Training by the published recipe (Cheng et al. 2022, section 4.1), on one process or many.

`torchrun --nproc-per-node 8 -m m2f_model train ...` starts eight processes; each has its own data, all one model.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from m2f_model.data import Batches, Dataset, Steps
from m2f_model.evaluate import evaluate
from m2f_model.files import write_atomically
from m2f_model.model import Mask2Former
from m2f_model.parallel import PARALLEL, gather_state, parallelise, scatter_state, training_loss, whole
from m2f_model.weights import load_exactly

AUTOCAST = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Recipe:
    """How to train. Defaults are the published ones for COCO.

    Attributes:
        steps: of the optimiser; batch_size: images per step of each process.
        lr, weight_decay: AdamW's; norms, embeddings and position biases do not decay.
        backbone_lr: factor of the learning rate for the backbone.
        milestones: shares of the steps after which the learning rate is divided by 10.
        clip: largest norm of all gradients together.
        size: side of the square inputs that large-scale jitter makes; None for images as they are.
        scales: range of large-scale jitter.
        autocast: "none", "bf16" or "fp16".
        parallel: what several processes do with the model: "ddp", all have it, or "fsdp", each has a share (FSDP2).
        activation_checkpointing: keep only the inputs of the decoders' layers.
        seed: of everything random.
        log_every, save_every, evaluate_every: steps between; evaluation takes `evaluate_count` images.
        workers: processes that prepare data.

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
    autocast: str = "none"
    parallel: str = "ddp"
    activation_checkpointing: bool = False
    seed: int = 0
    log_every: int = 20
    save_every: int = 5000
    evaluate_every: int = 5000
    evaluate_count: int = 500
    workers: int = 4

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
        if self.size is not None and (self.size < 32 or self.size % 32):
            raise ValueError(f"size: expected a multiple of 32; got {self.size}")
        if not 0 < self.scales[0] <= self.scales[1]:
            raise ValueError(f"scales: expected 0 < smallest <= largest; got {self.scales}")

    @classmethod
    def shapes(cls, **changes: Any) -> Recipe:
        """For the tiny model on synthetic shapes: minutes on a CPU. Everything is new, so nothing learns slowly."""
        short = {"steps": 1500, "batch_size": 8, "lr": 5e-4, "backbone_lr": 1.0, "size": None, "workers": 0}
        return cls(**{**short, "save_every": 500, "evaluate_every": 500, "evaluate_count": 200, **changes})

    def learning_rate(self, step: int) -> float:
        """Factor of the learning rate at a step."""
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
            decays = name not in still and not name.endswith(("relative_position_bias_table", "level_embed"))
            groups.setdefault((name.startswith("backbone."), decays), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": (rate := recipe.lr * (recipe.backbone_lr if backbone else 1.0)),
                "initial_lr": rate,
                "weight_decay": recipe.weight_decay if decays else 0.0,
            }
            for (backbone, decays), parameters in groups.items()
        ]
    )


# ---------------------------------------------------------------- processes


@dataclass(frozen=True)
class Process:
    """Which of the training processes this is, and what it computes on."""

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
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        try:
            yield cls(dist.get_rank(), dist.get_world_size(), chosen)
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


class Trainer:
    """One training run in the directory `out`, which goes on where a former one was stopped.

    Args:
        model: what to train, on the process' device.
        data: training samples.
        recipe: how.
        out: directory of checkpoints, TensorBoard's events and, at the end, the model in Hugging Face's format.
        process: which process this is.
        validation: samples to measure panoptic quality on.
        log: takes a line of text now and then.

    Raises:
        ValueError: if there are no data, their labels are not the model's, or `out` holds another run.
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
    ) -> None:
        if len(data) == 0:
            raise ValueError("data: expected at least one sample; got none")
        if len(data.label_names) != model.config.num_labels:
            raise ValueError(f"data: expected {model.config.num_labels} labels, the model's; got {data.label_names}")
        self.model, self.data, self.recipe, self.validation = model, data, recipe, validation
        self.process = process or Process()
        self.out, self.log = Path(out), log
        self.step = 0
        model.to(self.process.device).train()
        model.set_activation_checkpointing(recipe.activation_checkpointing)
        self.parallel: nn.Module = model
        if self.process.world_size > 1:
            self.parallel = parallelise(model, recipe.parallel, self.process.device)
        self.sharded = self.process.world_size > 1 and recipe.parallel == "fsdp"
        self.optimizer = build_optimizer(model, recipe)
        self.dtype = AUTOCAST[recipe.autocast]
        self.scaler = torch.amp.GradScaler(self.process.device.type, enabled=recipe.autocast == "fp16")
        self.out.mkdir(parents=True, exist_ok=True)
        # Each process draws its own points and drops its own paths.
        torch.manual_seed(recipe.seed * 1000003 + self.process.rank)
        if self.checkpoint.exists():
            self.load()

    def run(self, stop: int | None = None) -> None:
        """Train until the recipe's last step, or until `stop`.

        Raises:
            FloatingPointError: where a loss is not finite, at the steps that log or save.
        """
        last = min(self.recipe.steps, stop or self.recipe.steps)
        writer = SummaryWriter(str(self.out / "tensorboard")) if self.process.rank == 0 else None
        began, first = time.monotonic(), self.step
        for pixels, targets in self._batches(last):
            losses, norm = self.update(pixels, targets)
            logs, evaluates, saves = (
                self.step % every == 0 or self.step == last
                for every in (self.recipe.log_every, self.recipe.evaluate_every, self.recipe.save_every)
            )
            if logs or saves:
                self._check_finite(losses)
            if logs:
                seconds = (time.monotonic() - began) / (self.step - first)
                self._report(writer, losses, norm, seconds)
            if evaluates:
                self._evaluate(writer)
            if saves:
                self.save()
        if writer is not None:
            writer.close()
        if self.step == self.recipe.steps:
            self._save_model()

    def update(self, pixels: Tensor, targets: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
        """One step of the optimiser: its losses, and the norm of its gradients before clipping."""
        device = self.process.device
        pixels = pixels.to(device, non_blocking=True)
        targets = [{k: v.to(device, non_blocking=True) for k, v in target.items()} for target in targets]
        with torch.autocast(device.type, self.dtype, enabled=self.dtype is not None):
            out = self.parallel(pixels, targets)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.recipe.learning_rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        losses = out.losses
        self.scaler.scale(training_loss(losses, out.masks) if self.sharded else sum(losses.values())).backward()
        self.scaler.unscale_(self.optimizer)
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        return {k: v.detach() for k, v in losses.items()}, norm

    def _batches(self, last: int) -> Iterator[tuple[Tensor, list[dict[str, Tensor]]]]:
        recipe, process = self.recipe, self.process
        batches = Batches(
            self.data,
            recipe.batch_size,
            seed=recipe.seed,
            size=recipe.size,
            scales=recipe.scales,
            rank=process.rank,
            world_size=process.world_size,
        )
        # A loader seeds its workers; from a generator of its own, so that the model's random numbers stay the same.
        loader = DataLoader(
            batches,
            batch_size=None,
            sampler=Steps(self.step, last),
            num_workers=recipe.workers,
            pin_memory=process.device.type == "cuda",
            generator=torch.Generator(),
        )
        return iter(loader)

    def _check_finite(self, losses: dict[str, Tensor]) -> None:
        """Before anything of this step is written: a checkpoint of such a model would replace a good one."""
        bad = [name for name, value in losses.items() if not math.isfinite(value.item())]
        if bad:
            raise FloatingPointError(f"step {self.step}: expected finite losses; not finite: {', '.join(bad)}")

    def _report(self, writer: SummaryWriter | None, losses: dict[str, Tensor], norm: Tensor, seconds: float) -> None:
        if writer is None:
            return
        total = sum(v.item() for v in losses.values())
        rate = self.optimizer.param_groups[-1]["lr"]
        self.log(f"step {self.step}/{self.recipe.steps}  loss {total:.3f}  lr {rate:.2g}  {seconds:.3f} s/step")
        for name, value in {"loss": total, "gradient_norm": norm, "lr": rate, **losses}.items():
            writer.add_scalar(f"train/{name}", float(value), self.step)

    def _evaluate(self, writer: SummaryWriter | None) -> None:
        if self.validation is None or (writer is None and not self.sharded):  # a sharded model needs all processes
            return
        quality = evaluate(self.model, self.validation, self.recipe.evaluate_count)
        if writer is None:
            return
        self.log(f"step {self.step}  PQ {quality.pq:.3f}  SQ {quality.sq:.3f}  RQ {quality.rq:.3f}")
        for name, value in quality._asdict().items():
            writer.add_scalar(f"validation/{name}", value, self.step)

    # ------------------------------------------------------------ checkpoints

    @property
    def checkpoint(self) -> Path:
        """The file that a stopped run goes on from."""
        return self.out / "checkpoint.pth"

    def save(self) -> None:
        """Write the checkpoint, on all processes at once; a former one stays whole until the new one is."""
        random = [_random_state()] * self.process.world_size
        if self.process.world_size > 1:
            dist.all_gather_object(random, random[0])
        model, optimizer = gather_state(self.model, self.optimizer)
        state = {
            "recipe": asdict(self.recipe),
            "step": self.step,
            "model": model,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "random": random,
        }
        if self.process.rank == 0:
            write_atomically(self.checkpoint, lambda file: torch.save(state, file))

    def _save_model(self) -> None:
        model = self.model
        if self.sharded:
            state, _ = gather_state(model, self.optimizer)
            if self.process.rank == 0:
                model = Mask2Former(model.config)
                load_exactly(model, state, "the trained model")
        if self.process.rank == 0:
            model.save_pretrained(self.out)

    def load(self) -> None:
        """Go on from the checkpoint, exactly: the sequence of batches is a function of the step."""
        where = "cpu" if self.sharded else self.process.device
        state = torch.load(self.checkpoint, map_location=where, weights_only=True)
        found, wanted = {**state["recipe"], "processes": len(state["random"])}, asdict(self.recipe)
        wanted["processes"] = self.process.world_size
        different = [k for k in wanted if k not in _FREE and _plain(found.get(k)) != _plain(wanted[k])]
        if different:
            lines = "; ".join(f"{k}: {found.get(k)} there, {wanted[k]} here" for k in different)
            raise ValueError(f"{self.checkpoint}: expected a checkpoint of this recipe; {lines}")
        if self.sharded:
            scatter_state(self.model, self.optimizer, state["model"], state["optimizer"])
        else:
            load_exactly(self.model, state["model"], str(self.checkpoint))
            self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        _set_random_state({k: v.cpu() for k, v in state["random"][self.process.rank].items()})
        self.log(f"going on from step {self.step} of {self.checkpoint}")


#: Fields of a recipe that may change when a run goes on.
_FREE = ("log_every", "save_every", "evaluate_every", "evaluate_count", "workers", "activation_checkpointing")


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
