"""How several processes build one index: all encode, one writes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar


T = TypeVar("T")


class Processes:
    """
    The processes of this launch. Every method is called by all of them in the same order, and an error in one of them
    is raised in all. Alone, which a search always is, none of it needs PyTorch.

    Args:
        alone (`bool`, *optional*, defaults to `False`): Whether this process acts for itself, whatever the launch.
    """

    def __init__(self, alone: bool = False) -> None:
        self.count, self.rank = 1, 0
        if not alone and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from accelerate import PartialState

            state = PartialState()
            self.count, self.rank = state.num_processes, state.process_index

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def gather(self, function: Callable[[], list[T]]) -> list[T]:
        """What the function returns in every process, in the order of the processes."""
        if self.count == 1:
            return function()
        from ..distributed import gather_object, raise_together

        found: list[T] = []
        error = None
        try:
            found = function()
        except Exception as raised:
            error = raised
        raise_together(error)
        return gather_object(found)

    def from_main(self, function: Callable[[], list[T]]) -> list[T]:
        """What the function returns in the main process, which alone runs it."""
        return self.gather(lambda: function() if self.is_main else [])

    def on_main(self, function: Callable[[], Any]) -> None:
        """Runs a function in the main process; the others wait."""

        def run() -> list[Any]:
            function()
            return []

        self.from_main(run)


__all__ = ["Processes"]
