"""A function on several processes at once, joined by gloo as a launcher's ranks are."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

import launch


def together(function: Callable[..., Any], *arguments: Any, folder: Path, processes: int = 2) -> list[Any]:
    """What `function(*arguments)` returns on each rank."""
    os.environ.update(launch.SINGLE)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(launch.PACKAGES)
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        waiting = [pool.submit(as_rank, rank, processes, str(folder / "meet"), function, arguments) for rank in range(processes)]
        return [one.result(timeout=120) for one in waiting]


def as_rank(rank: int, processes: int, meet: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=processes)
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()
