"""The page: results and pictures in one self-contained HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pvae import export
from pvae.errors import UserError
from pvae.figures import figures
from pvae.files import read_json, write_text
from pvae.tables import tables

__all__ = ["write"]

FILE = "report.html"


def write(folder: Path) -> Path:
    """Write ``report.html`` of an evaluated run folder and return its path.

    Raises:
        UserError: the folder has no results, or they are broken or of another version.
    """
    results = read_json(folder / "results.json", f"pvae evaluate {folder} writes it")
    if not isinstance(results, dict) or results.get("schema") != 1:
        raise UserError(f"{folder / 'results.json'} is of another version; pvae evaluate {folder} writes it anew")
    idata = export.load(folder)
    try:
        page = render(results, figures(results, idata))
    except (KeyError, IndexError, TypeError) as error:
        path = folder / "results.json"
        raise UserError(f"{path} lacks {error} or does not go with {export.FILE}; pvae evaluate writes both") from error
    write_text(folder / FILE, page)
    return folder / FILE


def render(results: dict[str, Any], pictures: dict[str, str]) -> str:
    """The page's HTML; everything that comes from data, flags or files is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pvae", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    template = environment.get_template("report.html.jinja")
    own = {table.title: table for table in tables(results)}
    titles = list(own)
    return template.render(
        results=results, own=[own[t] for t in titles[:3]], same=[own[t] for t in titles[3:]], figures=pictures
    )
