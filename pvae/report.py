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
    if not isinstance(results, dict) or results.get("schema") != 2:
        raise UserError(f"{folder / 'results.json'} is of another version; pvae evaluate {folder} writes it anew")
    try:
        groups = results["groups"]
        pictures = [figures(group, export.load(folder, n)) for n, group in enumerate(groups, 1)]
        page = render(results, pictures)
    except (KeyError, IndexError, TypeError) as error:
        path = folder / "results.json"
        raise UserError(f"{path} lacks {error} or does not go with {export.FILE}; pvae evaluate writes both") from error
    write_text(folder / FILE, page)
    return folder / FILE


def render(results: dict[str, Any], pictures: list[dict[str, str]]) -> str:
    """The page's HTML, with each group's pictures; everything that comes from data, flags or files is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pvae", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    template = environment.get_template("report.html.jinja")
    told = [tables(group) for group in results["groups"]]
    return template.render(results=results, groups=list(zip(results["groups"], told, pictures, strict=True)))
