"""Results as tables of words: the same for the screen and for the page."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from pvae.stats import Estimate, number

# Quantities in the order of the tables, with the words that stand for them.
QUANTITIES = {
    "log_joint": "log p(x, z)",
    "elbo": "ELBO",
    "iwae": "IWAE",
    "ais": "AIS",
    "best_elbo": "best ELBO in family",
    "evidence": "evidence",
    "approximation_gap": "approximation gap",
    "amortization_gap": "amortization gap",
    "optimization_gap": "optimization gap",
    "kl": "KL",
    "reconstruction": "reconstruction",
}

# The figures of a diagnosis by what they tell of, with the words that stand for them; others are not shown.
FIGURES = {
    "Evidence and weights, test rows": {
        "elbo": "ELBO (nats)",
        "evidence": "evidence (nats)",
        "inference_gap": "below the evidence (nats)",
        "approximation_gap": "of it by the family of q",
        "amortization_gap": "of it by the source of q_params",
        "k_hat_above": "share of rows with k-hat above 0.7",
        "draws_needed": "draws that half of the rows need for weights to hold",
        "ess": "effective draws",
        "evidence_width": "between bounds of the evidence, simulated rows (nats)",
    },
    "Against long chains, test rows": {
        "sound": "share of rows whose chains agree",
        "mean_error": "error of means (posterior sd)",
        "sd_ratio": "ratio of sds, q to chains",
        "coverage_50": "coverage of 50% intervals",
        "coverage_90": "coverage of 90% intervals",
        "reference_p": "p of means and sds",
    },
    "Calibration, simulated rows": {
        "sbc_p": "p of ranks",
        "sbc_distance": "their largest distance",
        "tarp_p": "p of joint coverage (TARP)",
        "tarp_distance": "its distance",
        "sbc_coverage_50": "coverage of 50% intervals",
        "sbc_coverage_90": "coverage of 90% intervals",
        "z_mean": "largest mean z-score",
        "z_sd": "spread of z-scores",
        "contraction": "contraction",
    },
    "Latents, test rows": {
        "total_kl": "KL (nats)",
        "mutual_information": "mutual information (nats)",
        "information_bound": "which can't exceed (log of the rows)",
        "marginal_kl": "KL of the aggregate (nats)",
        "active_units": "active dimensions",
        "mmd": "squared MMD of the aggregate",
        "mmd_p": "its p",
        "ks_distance": "largest distance of a marginal",
        "ks_p": "its p",
        "holes": "share of the prior without codes",
    },
    "Predictive checks, test rows": {
        "statistics_off": "statistics off",
        "columns_off": "share of columns off",
        "imputation": "hidden values (nats each)",
        "imputation_marginal": "the same by columns alone",
        "imputation_gain": "won by looking at the rest",
    },
}

# The figures of a latent space, see pvae.diagnostics.latent_geometry, with the words that stand for them.
SPACE = {
    "step": "x moves for 0.1 sd of the codes (rms)",
    "roughness": "steepest 5% of codes, times the median",
    "vacuum_prior": "prior draws far from data (data: 0.05)",
    "vacuum_between": "midpoints of codes far from data (0.05)",
    "variety": "spread of prior draws over reconstructions' (1)",
}

# Variants beyond which they stand one below the other on a terminal.
MANY = 4


class Table(NamedTuple):
    """A table of text: a title, what the first column is, column names, and rows that start with their name."""

    title: str
    header: list[str]
    rows: list[list[str]]


def comparison_tables(group: dict[str, Any]) -> dict[str, Table]:
    """The tables of a group in ``results.json`` by name, of what is there.

    ``test`` and ``train`` rows, ``weights`` of q, ``families`` that q could be of, the ``latent_space``, ``cost`` of
    each variant, and every source on the ``same_decoder``.
    """
    found = {"test": _quantities(group, "test"), "train": _quantities(group, "train")}
    if any("k_hat" in row["test"] for row in group["rows"]):
        found["weights"] = _weights(group)
    if any(name.startswith("family_gain[") for row in group["rows"] for name in row["test"]):
        found["families"] = _families(group)
    if any("latent_space" in row for row in group["rows"]):
        found["latent_space"] = _latent_space(group)
    found["cost"] = _cost(group)
    if "same_decoder" in group:
        found["same_decoder"] = _same_decoder(group)
    return found


def _weights(group: dict[str, Any]) -> Table:
    rows = [row for row in group["rows"] if "k_hat" in row["test"]]
    K = rows[0]["test"]["ess"]["K"]
    names = ("k_hat", "k_hat_above", "ess")
    header = ["variant", "k-hat", "share of rows above 0.7", f"effective draws of {K}"]
    cells = [[row["name"], *(_estimate(row["test"].get(name)) for name in names)] for row in rows]
    return Table("Importance weights of q, test rows", header, cells)


def _families(group: dict[str, Any]) -> Table:
    gains = {
        row["name"]: {n: v for n, v in row["test"].items() if n.startswith("family_gain[")} for row in group["rows"]
    }
    names = list(dict.fromkeys(name for own in gains.values() for name in own))
    header = ["variant", *(name.removeprefix("family_gain[").removesuffix("]") for name in names)]
    cells = [[name, *(_estimate(own.get(gain)) for gain in names)] for name, own in gains.items() if own]
    return Table("What the best q of another family would win, test rows (nats of ELBO per row)", header, cells)


def _quantities(group: dict[str, Any], split: str) -> Table:
    rows = group["rows"]
    names = [name for name in QUANTITIES if any(name in row[split] for row in rows)]
    K = next(iter(rows[0][split].values()))["K"]
    header = ["variant", *(f"IWAE-{K}" if name == "iwae" else QUANTITIES[name] for name in names)]
    cells = [[row["name"], *(_estimate(row[split].get(name)) for name in names)] for row in rows]
    where = {"test": "test rows", "train": "training rows"}[split]
    seeds = f", {len(rows[0]['seeds'])} seeds" if len(rows[0]["seeds"]) > 1 else ""
    return Table(f"Each with its own decoder, {where} (nats per row{seeds})", header, cells)


def _latent_space(group: dict[str, Any]) -> Table:
    rows = [(row["name"], row["latent_space"]) for row in group["rows"] if "latent_space" in row]
    cells = [[name, *(_estimate(found.get(figure)) for figure in SPACE)] for name, found in rows]
    return Table("Latent space, test rows", ["variant", *SPACE.values()], cells)


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
    header = ["source of q_params", "ELBO", "against its own encoder", "below the best in the family", "ms per row"]
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


def diagnosis_tables(variant: dict[str, Any]) -> list[Table]:
    """The figures of a variant's diagnosis: of the guide and, where that changes them, of the same q refined."""
    guide, refined = variant["figures"], variant["refined"]
    found = []
    for title, words in FIGURES.items():
        known = [name for name in words if name in guide]
        both = any(name in refined for name in known)
        rows = [[words[n], _estimate(guide[n]), *([_estimate(refined.get(n))] if both else [])] for n in known]
        if rows:
            found.append(Table(title, ["", "the guide", *(["refined"] if both else [])], rows))
    return found


def _estimate(value: dict[str, Any] | None) -> str:
    if value is None or value["mean"] is None or math.isnan(value["mean"]):
        return "–"
    return number(Estimate(value["mean"], float("nan") if value["se"] is None else value["se"]))


def rich_table(own: Table) -> Any:
    """A table for a terminal, as it stands."""
    import rich.box
    from rich.table import Table as RichTable

    title, header, rows = own
    table = RichTable(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, title_style="bold")
    table.add_column(header[0])
    for name in header[1:]:
        table.add_column(name, justify="right")
    for line in rows:
        table.add_row(*line)
    return table


def rich_tables(results: dict[str, Any]) -> list[Any]:
    """The tables of all groups for a terminal, turned so that few variants stand side by side."""
    found = []
    for group in results["groups"]:
        data, alone = group["data"], len(results["groups"]) == 1
        several = "" if alone else f" - {data['identity']}, {data['base_measure']}"
        for title, header, rows in comparison_tables(group).values():
            across = [header, *rows] if len(rows) > MANY else [list(line) for line in zip(header, *rows, strict=True)]
            found.append(rich_table(Table(title + several, across[0], across[1:])))
    return found
