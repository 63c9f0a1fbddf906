"""What the processes of a training do about SIGTERM."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


# What a shell reports of a process that SIGTERM ended.
TERMINATED = 128 + signal.SIGTERM


@contextmanager
def noting_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, where it would end the process; a handler that the program has set stays."""
    asked = threading.Event()
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield asked
        return
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def end_with_training_only(worker: int) -> None:
    """
    Start of a data loader's `worker` (`worker_init_fn`): SIGTERM ends it only if the training process sends it.

    Schedulers send SIGTERM to all processes of a job. Workers that ended then would stop the training with an error
    before it could write its checkpoint; this way they end with the training. Linux only; elsewhere nothing happens.
    """
    if sys.platform != "linux":
        return
    process = multiprocessing.parent_process()  # not `getppid`: that may be a fork server
    parent = os.getppid() if process is None else process.pid
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


__all__ = ["TERMINATED", "end_with_training_only", "noting_sigterm"]
