"""distributions.supports."""

from __future__ import annotations

from typing import Any


def base_constraint(support: Any) -> Any:
    """The constraint on one entry, whatever it is wrapped in."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support
