"""What processes of a training do about SIGTERM."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading


def heed_only_parent(worker: int) -> None:
    r"""
    Start of a data loader's worker: SIGTERM ends it only if the training process sends it.

    Schedulers send SIGTERM to all processes of a job. Workers that ended then would stop the training with an error
    before it could write its checkpoint; this way they end with the training. Linux only; elsewhere nothing happens.

    Args:
        worker (`int`): Number of the worker, which plays no role.
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


__all__ = ["heed_only_parent"]
