"""Results and diagnoses as tables of words, the same for the screen, the page and a notebook."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import rich.box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable

from pvae.diagnostics.quantities import SECTIONS, describe
from pvae.diagnostics.trust import USES
from pvae.stats import Estimate, number

# Quantities of a comparison's tables of bounds and gaps, in their order.
COMPARED = (
    *("log_joint", "elbo", "iwae", "ais", "best_elbo", "evidence"),
    *("approximation_gap", "amortization_gap", "optimization_gap", "kl", "reconstruction"),
)
SPLITS = {"test": "test rows", "train": "training rows"}
Figures = Mapping[str, Any]


class Table(NamedTuple):
    """A table of text: title, column names, rows that start with their name, and the meaning of names that have one."""

    title: str
    header: list[str]
    rows: list[list[str]]
    help: Mapping[str, str] = {}


def comparison_tables(group: dict[str, Any]) -> dict[str, Table]:
    """Return the tables of a group in ``results.json`` by name, as far as it has their figures.

    ``test`` and ``train`` rows, importance ``weights``, gains of other ``families``, the ``latent_space``, ``cost`` of
    each variant, and every inference method on the ``same_decoder``.
    """
    rows = group["rows"]
    test, spaces = ({row["name"]: row.get(part, {}) for row in rows} for part in ("test", "latent_space"))
    ess = {"ess": f"effective sample size of {_draws(rows, 'test')} draws"}
    gains = list(dict.fromkeys(key for row in rows for key in row["test"] if key.startswith("family_gain[")))
    tables = {
        **{split: _bounds(rows, split) for split in SPLITS},
        "weights": _by_variant("Importance weights, test rows", ("k_hat", "k_hat_above", "ess"), test, ess),
        "families": _by_variant("Best ELBO of other families, test rows (nats per row)", gains, test),
        "latent_space": _by_variant("Latent geometry, test rows", SECTIONS["Latent geometry"], spaces),
        "cost": _cost(rows),
    }
    if "same_decoder" in group:
        tables["same_decoder"] = _same_decoder(group["same_decoder"])
    return {name: table for name, table in tables.items() if table.rows}


def _by_variant(
    title: str, keys: Sequence[str], figures: Mapping[str, Figures], labels: Mapping[str, str] | None = None
) -> Table:
    """Return a table with a column for each quantity and a line for each variant that has any."""
    names = {key: (labels or {}).get(key, describe(key).heading) for key in keys}
    known = {name: values for name, values in figures.items() if values.keys() & names.keys()}
    lines = [[name, *(_estimate(values.get(key)) for key in keys)] for name, values in known.items()]
    return Table(title, ["variant", *names.values()], lines, {name: describe(key).help for key, name in names.items()})


def _bounds(rows: list[dict[str, Any]], split: str) -> Table:
    keys = [key for key in COMPARED if any(key in row[split] for row in rows)]
    seeds = f", {len(rows[0]['seeds'])} seeds" if len(rows[0]["seeds"]) > 1 else ""
    labels = {key: describe(key).label for key in keys} | {"iwae": f"IWAE-{_draws(rows, split)}"}
    title = f"Each variant with its own decoder, {SPLITS[split]} (nats per row{seeds})"
    return _by_variant(title, keys, {row["name"]: row[split] for row in rows}, labels)


def _draws(rows: list[dict[str, Any]], split: str) -> int:
    return int(next(iter(rows[0][split].values()))["K"])


def _cost(rows: list[dict[str, Any]]) -> Table:
    columns: dict[str, Callable[[Any], str]] = {
        "variant": lambda row: row["name"],
        "shared parameters": lambda row: f"{row['parameters']['global']:,}",
        "local parameters": lambda row: f"{row['parameters']['local']:,}",
        "epochs": lambda row: str(row["epochs"]),
        "training (s)": lambda row: f"{row['seconds']:.1f}",
        "time per epoch (s)": lambda row: f"{row['seconds'] / max(row['epochs'], 1):.3g}",
        "evaluation (s)": lambda row: f"{row['evaluation_seconds']:.1f}",
    }
    lines = [[write(row) for write in columns.values()] for row in rows]
    return Table("Cost", [*columns], lines, {"local parameters": "Variational parameters of the training rows."})


def _same_decoder(same: dict[str, Any]) -> Table:
    header = ["inference method", "ELBO", "ELBO gain over the encoder", "amortization gap", "time per row (ms)"]
    lines = []
    for row in same["rows"]:
        elbo, gain, left = (_estimate(row[key]) for key in ("elbo", "gain", "left"))
        time = f"{row['seconds_per_row'] * 1e3:.2g}"
        lines.append([row["guide"], elbo, gain if row["gain"]["se"] else "", left, time])
    title = "Inference methods on the amortized variant's decoder, test rows (nats per row)"
    return Table(title, header, lines, {q.label: q.help for q in map(describe, ("elbo", "amortization_gap"))})


def diagnosis_tables(variant: dict[str, Any]) -> list[Table]:
    """Return the figures of a variant's diagnosis by section: of the guide and, if that changes them, refined."""
    guide, refined = variant["figures"], variant["refined"]
    tables = []
    for title, keys in SECTIONS.items():
        known = {key: describe(key) for key in keys if key in guide}
        whose = {"guide": guide} | ({"refined": refined} if refined.keys() & known.keys() else {})
        lines = [[known[key].heading, *(_estimate(part.get(key)) for part in whose.values())] for key in known]
        if lines:
            rows = "simulated rows" if title == "Calibration" else "test rows"
            tables.append(Table(f"{title}, {rows}", ["", *whose], lines, {q.heading: q.help for q in known.values()}))
    return tables


def _estimate(value: dict[str, Any] | None) -> str:
    if value is None or value["mean"] is None or math.isnan(value["mean"]):
        return "–"
    estimate = number(Estimate(value["mean"], float("nan") if value["se"] is None else value["se"]))
    median = f" (median {value['median']:.5g})" if "median" in value else ""
    return ">= " * ("at_least" in value) + estimate + median


def rich_table(table: Table) -> Any:
    """Return a table for a terminal."""
    drawn = RichTable(title=table.title, title_justify="left", box=rich.box.SIMPLE_HEAD, title_style="bold")
    drawn.add_column(table.header[0])
    for name in table.header[1:]:
        drawn.add_column(name, justify="right")
    for line in table.rows:
        drawn.add_row(*line)
    return drawn


def print_results(results: dict[str, Any], console: Console | None = None) -> None:
    """Print the tables and conclusions of all groups; few variants stand side by side."""
    console = console or Console()
    several = len(results["groups"]) > 1
    for group in results["groups"]:
        note = f" - {_group_name(group)}" if several else ""
        for title, header, rows, _ in comparison_tables(group).values():
            lines = [header, *rows] if len(rows) > 4 else [list(line) for line in zip(header, *rows, strict=True)]
            console.print(rich_table(Table(title + note, lines[0], lines[1:])))
    console.print("\n[bold]Conclusions[/bold]")
    for group in results["groups"]:
        if several:
            console.print(f"{_group_name(group)}:", markup=False)
        for sentence in group["verdicts"]:
            console.print(Padding(f"- {sentence}", (0, 0, 0, 2)), markup=False, highlight=False)


def _group_name(group: dict[str, Any]) -> str:
    return f"{group['data']['identity']}, {group['data']['base_measure']}"


def print_diagnosis(variant: dict[str, Any]) -> None:
    """Print the figures and verdicts of a variant's diagnosis."""
    console = Console()
    console.rule(f"Diagnosis of {variant['name']}", align="left", style="bold")
    for table in diagnosis_tables(variant):
        console.print(rich_table(table))
    console.print(f"[bold]How far may {variant['name']} be trusted?[/bold]")
    for verdict in variant["verdicts"]:
        console.print(f"\n  [bold]{verdict['level']}[/bold]: {USES[verdict['use']]}", highlight=False)
        advice = verdict.get("advice") or f"change first: {verdict['first']}"
        for sentence in verdict["because"] + [advice] * bool(verdict["first"]):
            console.print(Padding(f"- {sentence}", (0, 0, 0, 4)), markup=False, highlight=False)
    console.print()
