"""Runs a function in several processes that are connected by gloo, as ``torchrun`` would start them."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed


def run_processes(body: Callable[..., None], world: int, *args: Any, seconds: float = 240) -> None:
    """Call ``body(rank, world, *args)`` in processes of their own; what one raises, an AssertionError says.

    Args:
        body: a function of a module in this folder, which new processes can import.
        seconds: after which all are ended, and the test fails. When one fails, the others are ended at once.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        errors = context.Queue()
        processes = [
            context.Process(target=_run, args=(body, rank, world, folder, errors, args), daemon=True)
            for rank in range(world)
        ]
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        try:
            for process in processes:
                process.start()
            deadline = time.monotonic() + seconds
            while any(process.is_alive() for process in processes):
                failed = any(process.exitcode not in (None, 0) for process in processes)
                if failed or time.monotonic() > deadline:
                    break
                time.sleep(0.02)
            problem = errors.get(timeout=5) if any(p.exitcode not in (None, 0) for p in processes) else ""
            late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        finally:
            for process in processes:
                process.kill()
                process.join()
            os.environ.pop("OMP_NUM_THREADS")
            if threads is not None:
                os.environ["OMP_NUM_THREADS"] = threads
    assert not problem, problem
    assert not late, f"processes {late} did not end within {seconds} s"


def _run(body: Callable[..., None], rank: int, world: int, folder: str, errors: Any, args: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), INT8COMPILE_IGNORE_TUNED="1")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        distributed.init_process_group(
            "gloo",
            store=distributed.FileStore(f"{folder}/store", world),  # type: ignore[attr-defined]
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=60),
        )
        body(rank, world, *args)
        distributed.barrier()
        distributed.destroy_process_group()
    except BaseException:
        errors.put(f"process {rank} of {world}:\n{traceback.format_exc()}")
        errors.close()
        errors.join_thread()
        os._exit(1)  # the others may wait for this one in a collective, and so would its end
