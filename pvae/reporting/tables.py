"""Results and diagnoses as tables of words, the same for the screen, the page and a notebook."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pvae.diagnostics.quantities import SECTIONS, describe
from pvae.diagnostics.trust import USES
from pvae.stats import Estimate, number

# Quantities of a comparison's tables of bounds and gaps, in their order.
COMPARED = (
    *("log_joint", "elbo", "iwae", "ais", "best_elbo", "evidence"),
    *("approximation_gap", "amortization_gap", "optimization_gap", "kl", "reconstruction"),
)
SPLITS = {"test": "test rows", "train": "training rows"}
# Number of variants beyond which they stand one below the other on a terminal.
MANY = 4
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
    test = {row["name"]: row["test"] for row in rows}
    tables = {split: _bounds(rows, split) for split in SPLITS}
    weights = {name: figures for name, figures in test.items() if "k_hat" in figures}
    if weights:
        labels = {"ess": f"effective sample size of {_draws(rows, 'test')} draws"}
        tables["weights"] = _by_variant(
            "Importance weights, test rows", ("k_hat", "k_hat_above", "ess"), weights, labels
        )
    gains = list(dict.fromkeys(key for row in rows for key in row["test"] if key.startswith("family_gain[")))
    if gains:
        named = {name: figures for name, figures in test.items() if any(key in figures for key in gains)}
        tables["families"] = _by_variant("Best ELBO of other families, test rows (nats per row)", gains, named)
    spaces = {row["name"]: row["latent_space"] for row in rows if "latent_space" in row}
    if spaces:
        tables["latent_space"] = _by_variant("Latent geometry, test rows", SECTIONS["Latent geometry"], spaces)
    tables["cost"] = _cost(rows)
    if "same_decoder" in group:
        tables["same_decoder"] = _same_decoder(group["same_decoder"])
    return tables


def _by_variant(
    title: str, keys: Sequence[str], figures: Mapping[str, Figures], labels: Mapping[str, str] | None = None
) -> Table:
    """Return a table with a line for each variant and a column for each quantity."""
    names = {key: (labels or {}).get(key, describe(key).heading) for key in keys}
    lines = [[name, *(_estimate(values.get(key)) for key in keys)] for name, values in figures.items()]
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
    header = [
        *("variant", "shared parameters", "local parameters", "epochs"),
        *("training (s)", "time per epoch (s)", "evaluation (s)"),
    ]
    lines = [
        [
            row["name"],
            f"{row['parameters']['global']:,}",
            f"{row['parameters']['local']:,}",
            str(row["epochs"]),
            f"{row['seconds']:.1f}",
            f"{row['seconds'] / max(row['epochs'], 1):.3g}",
            f"{row['evaluation_seconds']:.1f}",
        ]
        for row in rows
    ]
    return Table("Cost", header, lines, {"local parameters": "Variational parameters of the training rows."})


def _same_decoder(same: dict[str, Any]) -> Table:
    keys = ("elbo", "amortization_gap")
    header = ["inference method", "ELBO", "ELBO gain over the encoder", "amortization gap", "time per row (ms)"]
    lines = [
        [
            row["guide"],
            _estimate(row["elbo"]),
            _estimate(row["gain"]) if row["gain"]["se"] else "",
            _estimate(row["left"]),
            f"{row['seconds_per_row'] * 1e3:.2g}",
        ]
        for row in same["rows"]
    ]
    title = "Inference methods on the amortized variant's decoder, test rows (nats per row)"
    return Table(title, header, lines, {describe(key).label: describe(key).help for key in keys})


def diagnosis_tables(variant: dict[str, Any]) -> list[Table]:
    """Return the figures of a variant's diagnosis by section: of the guide and, if that changes them, refined."""
    guide, refined = variant["figures"], variant["refined"]
    tables = []
    for title, keys in SECTIONS.items():
        known = [key for key in keys if key in guide]
        both = any(key in refined for key in known)
        header = ["", "guide", *(["refined"] if both else [])]
        lines = [
            [describe(key).heading, _estimate(guide[key]), *([_estimate(refined.get(key))] if both else [])]
            for key in known
        ]
        if lines:
            rows = "simulated rows" if title == "Calibration" else "test rows"
            help_ = {describe(key).heading: describe(key).help for key in known}
            tables.append(Table(f"{title}, {rows}", header, lines, help_))
    return tables


def _estimate(value: dict[str, Any] | None) -> str:
    if value is None or value["mean"] is None or math.isnan(value["mean"]):
        return "–"
    return number(Estimate(value["mean"], float("nan") if value["se"] is None else value["se"]))


def rich_table(table: Table) -> Any:
    """Return a table for a terminal."""
    import rich.box
    from rich.table import Table as RichTable

    drawn = RichTable(title=table.title, title_justify="left", box=rich.box.SIMPLE_HEAD, title_style="bold")
    drawn.add_column(table.header[0])
    for name in table.header[1:]:
        drawn.add_column(name, justify="right")
    for line in table.rows:
        drawn.add_row(*line)
    return drawn


def print_results(results: dict[str, Any], console: Any) -> None:
    """Print the tables and conclusions of all groups; few variants stand side by side."""
    from rich.padding import Padding

    several = len(results["groups"]) > 1
    for group in results["groups"]:
        note = f" - {_group_name(group)}" if several else ""
        for title, header, rows, _ in comparison_tables(group).values():
            lines = [header, *rows] if len(rows) > MANY else [list(line) for line in zip(header, *rows, strict=True)]
            console.print(rich_table(Table(title + note, lines[0], lines[1:])))
    console.print("\n[bold]Conclusions[/bold]")
    for group in results["groups"]:
        if several:
            console.print(f"{_group_name(group)}:", markup=False)
        for sentence in group["verdicts"]:
            console.print(Padding(f"- {sentence}", (0, 0, 0, 2)), markup=False, highlight=False)


def _group_name(group: dict[str, Any]) -> str:
    return f"{group['data']['identity']}, {group['data']['base_measure']}"


def print_diagnosis(variant: dict[str, Any], console: Any) -> None:
    """Print the figures and verdicts of a variant's diagnosis."""
    from rich.padding import Padding

    console.rule(f"Diagnosis of {variant['name']}", align="left", style="bold")
    for table in diagnosis_tables(variant):
        console.print(rich_table(table))
    console.print(f"[bold]How far may {variant['name']} be trusted?[/bold]")
    for verdict in variant["verdicts"]:
        console.print(f"\n  [bold]{verdict['level']}[/bold]: {USES[verdict['use']]}", highlight=False)
        advice = [f"change first: {verdict['first']}"] if verdict["first"] else []
        for sentence in (*verdict["because"], *advice):
            console.print(Padding(f"- {sentence}", (0, 0, 0, 4)), markup=False, highlight=False)
    console.print()
