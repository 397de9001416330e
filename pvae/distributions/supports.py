"""Supports of distributions."""

from __future__ import annotations

from typing import Any


def base_constraint(support: Any) -> Any:
    """Return the constraint on a single entry, without the wrappers for events."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support
