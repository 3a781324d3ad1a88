"""One model on several processes: whole on each of them (DDP), or each with its share of every parameter (FSDP2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from m2f_kernels import CudaGraphs
from m2f_model.criterion import Targets, losses_of

if TYPE_CHECKING:
    from m2f_model.model import Mask2Former

PARALLEL = ("ddp", "fsdp")
State = dict[str, Any]


def synchronise_batch_norm(model: Mask2Former, device: torch.device) -> None:
    """Makes trained batch norm use the statistics of all processes, as published (SyncBN); on CUDA only.

    Parameters and buffers stay the same, under their names.
    """
    if device.type == "cuda" and not model.config.frozen_batch_norm:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)


class Losses(nn.Module):
    """The weighted losses of `model` [number of losses]; with `graphs` its passes are replayed, and matching and loss
    run between.

    It returns nothing else: DistributedDataParallel copies each result of its module, and mask features are large.

    Attributes:
        names: those of the losses of the last call.
    """

    def __init__(self, model: Mask2Former, graphs: CudaGraphs | None = None) -> None:
        super().__init__()
        self.model, self.graphs = model, graphs
        self.names: list[str] = []

    def forward(self, pixels: Tensor, targets: Targets) -> Tensor:
        if self.graphs is None:
            losses: dict[str, Tensor] = self.model(pixels, targets).losses
        else:
            losses = losses_of(self.model.criterion, self.graphs(pixels).predictions, targets)
        self.names = list(losses)
        return torch.stack(list(losses.values()))


def parallelise(losses: Losses, kind: str, device: torch.device) -> nn.Module:
    """The module to call in training, on all processes with the first one's weights. "fsdp" changes the model itself.

    With "ddp" it returns the losses, with "fsdp" it is the model.
    """
    model = losses.model
    synchronise_batch_norm(model, device)
    if kind == "ddp":
        # A batch without targets leaves the mask head without gradients. Gradients are exchanged outside of graphs.
        parallel = DistributedDataParallel(losses, find_unused_parameters=True)
        # Frozen statistics are sent once. To write them in every step would make what is computed from them invalid.
        parallel.broadcast_buffers = not model.config.frozen_batch_norm
        return parallel
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, 0)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # Units that are gathered and freed as a whole. The transformer decoder projects all layers' keys at once: one unit.
    for part in (*model.pixel_decoder.layers, model.backbone):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def training_loss(losses: dict[str, Tensor], masks: tuple[Tensor, Tensor]) -> Tensor:
    """The sum of the losses. `masks` get a gradient even without any target: a sharded model needs all gradients."""
    nothing = 0.0 * (masks[0].sum() + masks[1].sum())
    return sum(losses.values(), start=nothing)


def whole(value: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded over the processes. All of them must call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gather_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[State, State]:
    """State of both for a checkpoint. All processes of a sharded model must call this, and the first one gets it."""
    if not isinstance(model, FSDPModule):
        return model.state_dict(), optimizer.state_dict()
    return get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def scatter_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: State, optimizer_state: State) -> None:
    """Loads both from a checkpoint of a sharded model, which all processes have read."""
    options = StateDictOptions(full_state_dict=True)
    set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=optimizer_state, options=options)


# ---------------------------------------------------------------- what processes tell each other


def local(tensor: Tensor) -> Tensor:
    """This process' shard of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def largest_of_processes(number: int) -> int:
    """The largest `number` of all processes. All of them must call this."""
    if not (dist.is_available() and dist.is_initialized()):
        return number
    # On the host if the processes can communicate there, which does not synchronise with a GPU.
    device = "cpu" if "cpu" in str(dist.get_backend_config()) else "cuda"
    value = torch.tensor([number], device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def any_process(flag: bool) -> bool:
    """True if `flag` is true in any of the processes. All of them must call this."""
    return bool(largest_of_processes(int(flag)))


def message_of_first(message: str) -> str:
    """The message of the first process. All of them must call this."""
    if not (dist.is_available() and dist.is_initialized()):
        return message
    said = [message]
    dist.broadcast_object_list(said)
    return said[0]
