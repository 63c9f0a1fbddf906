"""Tokens and passwords are left out of all that is written."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any


# Names of options whose values are secrets.
_SECRET = re.compile(r"(token|password|secret|api_?key)$", re.IGNORECASE)
# Secrets wherever they stand: user and password of a URL, secret parts of its query, tokens of the Hub.
_SECRETS_IN_TEXT = re.compile(
    r"(?<=://)[^/\s@]+(?=@)|\bhf_[A-Za-z0-9]{20,}|(?<=[?&#])[\w.-]*(token|secret|password|signature|key)=[^&#\s]+",
    re.IGNORECASE,
)


def find_secrets(options: Mapping[str, Any]) -> set[str]:
    """Values of tokens and passwords, by the names of the options that were parsed; also in mappings among them."""
    secrets: set[str] = set()
    for name, value in options.items():
        if isinstance(value, Mapping):
            secrets |= find_secrets(value)
        elif isinstance(value, str) and value and _SECRET.search(name):
            secrets.add(value)
    return secrets


def without_secrets(value: Any, secrets: Collection[str] = ()) -> Any:
    """A text, or all texts in lists and mappings, with `...` in place of secrets: those given, and those of a URL."""
    if isinstance(value, Mapping):
        return {name: without_secrets(item, secrets) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item, secrets) for item in value]
    if isinstance(value, str):
        for secret in sorted(secrets, key=len, reverse=True):
            value = value.replace(secret, "...")
        return _SECRETS_IN_TEXT.sub("...", value)
    return value


__all__ = ["find_secrets", "without_secrets"]
