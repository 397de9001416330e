"""HTML from the templates of this wing, in which everything that comes from data, options or files is escaped."""

from __future__ import annotations

from functools import cache
from typing import Any


def render_template(name: str, **values: Any) -> Any:
    """Fill in a template and return markup, which other templates take as it is."""
    from markupsafe import Markup

    return Markup(_environment().get_template(name).render(**values))


@cache
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("pvae.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
