"""HTML from the templates of this wing, in which everything that comes from data, options or files is escaped."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

_LOADER = PackageLoader("pvae.reporting", "templates")
_ENVIRONMENT = Environment(loader=_LOADER, autoescape=True, undefined=StrictUndefined, trim_blocks=True)


def render_template(name: str, **values: Any) -> Markup:
    """Fill in a template and return markup, which other templates take as it is."""
    return Markup(_ENVIRONMENT.get_template(name).render(**values))
