"""Results as tables of words: the same for the screen and for the page."""

from __future__ import annotations

from typing import Any, NamedTuple

from pvae.stats import Estimate
from pvae.verdicts import number

__all__ = ["QUANTITIES", "Table", "rich_tables", "tables"]

# Quantities in the order of the tables, with the words that stand for them.
QUANTITIES = {
    "log_joint": "log p(x, z)",
    "elbo": "ELBO",
    "iwae": "IWAE",
    "best_elbo": "best ELBO in family",
    "evidence": "evidence",
    "approximation_gap": "approximation gap",
    "amortization_gap": "amortization gap",
    "optimization_gap": "optimization gap",
    "kl": "KL",
    "reconstruction": "reconstruction",
}


class Table(NamedTuple):
    """A table of text: a title, what the first column is, column names, and rows that start with their name."""

    title: str
    header: list[str]
    rows: list[list[str]]


def tables(results: dict[str, Any]) -> list[Table]:
    """The tables of ``results.json``: test rows, training rows and cost of each variant, and the same decoder."""
    found = [_quantities(results, "test"), _quantities(results, "train"), _cost(results)]
    if "same_decoder" in results:
        found.append(_same_decoder(results))
    return found


def _quantities(results: dict[str, Any], split: str) -> Table:
    rows = results["rows"]
    names = [name for name in QUANTITIES if any(name in row[split] for row in rows)]
    K = next(iter(rows[0][split].values()))["K"]
    header = ["guide", *(f"IWAE-{K}" if name == "iwae" else QUANTITIES[name] for name in names)]
    cells = [[row["guide"], *(_estimate(row[split].get(name)) for name in names)] for row in rows]
    where = {"test": "test rows", "train": "training rows"}[split]
    return Table(f"Each with its own decoder, {where} (nats per row)", header, cells)


def _cost(results: dict[str, Any]) -> Table:
    header = [
        "guide",
        "shared parameters",
        "parameters of rows",
        "epochs",
        "training (s)",
        "s per epoch",
        "evaluation (s)",
    ]
    rows = [
        [
            row["guide"],
            f"{row['parameters']['global']:,}",
            f"{row['parameters']['local']:,}",
            str(row["epochs"]),
            f"{row['seconds']:.1f}",
            f"{row['seconds'] / max(row['epochs'], 1):.3g}",
            f"{row['evaluation_seconds']:.1f}",
        ]
        for row in results["rows"]
    ]
    return Table("What it cost", header, rows)


def _same_decoder(results: dict[str, Any]) -> Table:
    same = results["same_decoder"]
    header = ["source of lam", "ELBO", "against its own encoder", "below the best in the family", "ms per row"]
    rows = [
        [
            row["guide"],
            _estimate(row["elbo"]),
            _estimate(row["gain"]) if row["gain"]["se"] else "",
            _estimate(row["left"]),
            f"{row['seconds_per_row'] * 1e3:.2g}",
        ]
        for row in same["rows"]
    ]
    return Table("All on the amortized variant's decoder, test rows (nats per row)", header, rows)


def _estimate(value: dict[str, Any] | None) -> str:
    if value is None or value["mean"] is None:
        return "–"
    return number(Estimate(value["mean"], value["se"] if value["se"] is not None else float("nan")))


def rich_tables(results: dict[str, Any]) -> list[Any]:
    """The tables for a terminal, turned so that guides stand side by side."""
    import rich.box
    from rich.table import Table as RichTable

    found = []
    for title, header, rows in tables(results):
        table = RichTable(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, title_style="bold")
        table.add_column(header[0])
        for row in rows:
            table.add_column(row[0], justify="right")
        for column in range(1, len(header)):
            table.add_row(header[column], *(row[column] for row in rows))
        found.append(table)
    return found
