"""Runs functions in several processes."""

from __future__ import annotations

import gc
import pickle
import signal
from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from torch.distributed.launcher import LaunchConfig, elastic_launch
from transformers import logging


def run_processes(function: Callable[..., Any], processes: int, *args: Any) -> list[Any]:
    """
    What a function of a module returns in each of several processes that torchrun's launcher starts and watches. They
    are forked from a server that has imported everything (see tests/conftest.py).

    Raises:
        `ChildFailedError`: If one of them raises or is killed; names it.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="tests",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        start_method="forkserver",
    )
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    handlers = [signal.getsignal(number) for number in signals]  # which the launcher replaces
    try:
        returned = elastic_launch(config, _run)(function, args)
    finally:
        for number, handler in zip(signals, handlers, strict=True):
            signal.signal(number, handler)
    return [pickle.loads(returned[rank]) for rank in range(processes)]


def _run(function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    gc.freeze()  # as in tests/conftest.py
    logging.set_verbosity_error()
    PartialState(cpu=True)
    # As bytes: tensors themselves would be passed as open files.
    return pickle.dumps(function(*args))
