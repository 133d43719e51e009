"""What can be a session's owner."""

from __future__ import annotations

from typing import Any, TypeGuard

_LIMIT = 1000  # characters


def is_owner(value: Any) -> TypeGuard[str]:
    """Tell whether something can be an owner."""
    return type(value) is str and 0 < len(value) <= _LIMIT


def check_owner(value: Any) -> None:
    """Refuse what can't be an owner.

    :raises TypeError: for something else than a str.
    :raises ValueError: for a str of the wrong length.
    """
    if not isinstance(value, str):
        raise TypeError(f"owner must be a str or None, not {type(value).__name__}")
    if not 0 < len(value) <= _LIMIT:
        raise ValueError(f"owner must have 1 to {_LIMIT} characters, not {len(value)}")
