"""Several processes that compute together."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing


def _start(rank: int, function: Callable[..., None], count: int, port: int, arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    function(rank, *arguments)
    if dist.is_initialized():
        dist.destroy_process_group()


def in_processes(function: Callable[..., None], *arguments: Any, count: int = 2) -> None:
    """`function(rank, *arguments)` in each of `count` processes, whose environment is that of a launcher.

    They are forked from one that has imported what takes longest, and has computed nothing.
    """
    multiprocessing.set_forkserver_preload(["tests.model.peers", "tests.integrations.families"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        _start, (function, count, port, arguments), nprocs=count, start_method="forkserver"
    )
