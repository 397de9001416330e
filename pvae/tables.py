"""Results as tables of words: the same for the screen and for the page."""

from __future__ import annotations

from typing import Any, NamedTuple

from pvae.stats import Estimate, number

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

# Variants beyond which they stand one below the other on a terminal.
MANY = 4


class Table(NamedTuple):
    """A table of text: a title, what the first column is, column names, and rows that start with their name."""

    title: str
    header: list[str]
    rows: list[list[str]]


def tables(group: dict[str, Any]) -> list[Table]:
    """The tables of a group in ``results.json``: test and training rows, cost of each variant, and the same decoder."""
    found = [_quantities(group, "test"), _quantities(group, "train"), _cost(group)]
    if "same_decoder" in group:
        found.append(_same_decoder(group))
    return found


def _quantities(group: dict[str, Any], split: str) -> Table:
    rows = group["rows"]
    names = [name for name in QUANTITIES if any(name in row[split] for row in rows)]
    K = next(iter(rows[0][split].values()))["K"]
    header = ["variant", *(f"IWAE-{K}" if name == "iwae" else QUANTITIES[name] for name in names)]
    cells = [[row["name"], *(_estimate(row[split].get(name)) for name in names)] for row in rows]
    where = {"test": "test rows", "train": "training rows"}[split]
    seeds = f", {len(rows[0]['seeds'])} seeds" if len(rows[0]["seeds"]) > 1 else ""
    return Table(f"Each with its own decoder, {where} (nats per row{seeds})", header, cells)


def _cost(group: dict[str, Any]) -> Table:
    header = [
        "variant",
        "shared parameters",
        "parameters of rows",
        "epochs",
        "training (s)",
        "s per epoch",
        "evaluation (s)",
    ]
    rows = [
        [
            row["name"],
            f"{row['parameters']['global']:,}",
            f"{row['parameters']['local']:,}",
            str(row["epochs"]),
            f"{row['seconds']:.1f}",
            f"{row['seconds'] / max(row['epochs'], 1):.3g}",
            f"{row['evaluation_seconds']:.1f}",
        ]
        for row in group["rows"]
    ]
    return Table("What it cost", header, rows)


def _same_decoder(group: dict[str, Any]) -> Table:
    same = group["same_decoder"]
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
    """The tables of all groups for a terminal, turned so that few variants stand side by side."""
    import rich.box
    from rich.table import Table as RichTable

    found = []
    for group in results["groups"]:
        data, alone = group["data"], len(results["groups"]) == 1
        several = "" if alone else f" - {data['identity']}, {data['base_measure']}"
        for title, header, rows in tables(group):
            table = RichTable(title=title + several, title_justify="left", box=rich.box.SIMPLE_HEAD, title_style="bold")
            across = [header, *rows] if len(rows) > MANY else [list(line) for line in zip(header, *rows, strict=True)]
            table.add_column(across[0][0])
            for name in across[0][1:]:
                table.add_column(name, justify="right")
            for line in across[1:]:
                table.add_row(*line)
            found.append(table)
    return found
