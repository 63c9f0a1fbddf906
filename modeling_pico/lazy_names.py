"""Names of a package that are imported when they are first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def import_on_use(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    r"""
    The `__getattr__` of a package (PEP 562).

    Args:
        package (`str`): Its `__name__`.
        modules (`Mapping[str, str]`): Its names, and of each the module in it that has it.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{modules[name]}", package), name)

    return get


__all__ = ["import_on_use"]
