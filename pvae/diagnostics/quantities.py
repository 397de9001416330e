"""Labels, units and meanings of every quantity that the diagnostics report; the only such table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from pvae.stats import Estimate, number

Figures = Mapping[str, Estimate]


class Quantity(NamedTuple):
    """Reported number: its key in summaries and JSON files, the field's label, its unit, and which way is good.

    The unit is nats, draws, ...; "1" for shares, ratios, p-values and other pure numbers.
    """

    key: str
    label: str
    unit: str
    help: str

    @property
    def heading(self) -> str:
        """The label with its unit, where it has one.

        >>> describe("elbo").heading, describe("k_hat").heading
        ('ELBO (nats)', 'Pareto k-hat')
        """
        return self.label if self.unit == "1" else f"{self.label} ({self.unit})"


_TABLE = {
    "Bounds and gaps": {
        "log_joint": ("log p(x, z)", "nats", "Log joint density at the point mass; it bounds no evidence."),
        "elbo": ("ELBO", "nats", "Evidence lower bound of the guide; higher is better."),
        "iwae": ("IWAE", "nats", "Importance-weighted bound from K draws of the guide; higher is better."),
        "best_elbo": ("best ELBO in family", "nats", "ELBO at the best variational parameters that the search found."),
        "best_iwae": ("IWAE of the best q", "nats", "Importance-weighted bound from the best q of the family."),
        "ais": ("AIS", "nats", "Evidence by annealed importance sampling, a lower bound in expectation."),
        "evidence": ("evidence", "nats", "Best estimate of log p(x), a lower bound in expectation; higher is better."),
        "inference_gap": ("inference gap", "nats", "Evidence minus ELBO; 0 for an exact posterior."),
        "approximation_gap": (
            "approximation gap",
            "nats",
            "Evidence minus best ELBO in family: cost of the family; 0 is good.",
        ),
        "amortization_gap": (
            "amortization gap",
            "nats",
            "Best ELBO in family minus ELBO: cost of the inference method (encoder or row search); 0 is good.",
        ),
        "optimization_gap": ("optimization gap", "nats", "Convergence error of the search for the best q; 0 is good."),
        "family_gain": ("family gain", "nats", "Best ELBO in another family minus the best in this one."),
        "kl": ("KL(q || p)", "nats", "Divergence of q from the prior; 0 if it ignores the row."),
        "reconstruction": ("reconstruction", "nats", "Mean of log p(x|z) over draws from q; higher is better."),
        "ais_acceptance": ("AIS acceptance rate", "1", "Of HMC within annealing; it aims at 0.65."),
        "evidence_reliable": (
            "share of rows with reliable evidence",
            "1",
            "Rows on which some proposal passes its checks; on others the evidence is a lower bound.",
        ),
        "evidence_width": (
            "shortfall of the evidence",
            "nats",
            "Upper AIS bound minus the evidence of simulated rows; 0 is good.",
        ),
        "gap_limit": ("limit of the inference gap", "nats", "The gap plus the shortfall of the evidence."),
    },
    "Importance weights": {
        "k_hat": ("Pareto k-hat", "1", "Tail index of the importance weights; usable up to 0.7."),
        "k_hat_above": ("share of rows with k-hat above 0.7", "1", "Rows whose weights are unreliable; 0 is good."),
        "draws_needed": (
            "sample size needed by half of the rows",
            "draws",
            "For reliable weighted estimates; fewer is better.",
        ),
        "ess": ("effective sample size", "draws", "Effective number of importance draws (Kish); K is the best."),
    },
    "Reference posterior": {
        "reliable": (
            "share of rows with a reference",
            "1",
            "Rows whose reference draws pass their checks; others are left out.",
        ),
        "mean_error": ("RMS error of posterior means", "posterior sd", "Against reference draws; 0 is exact."),
        "sd_ratio": ("ratio of standard deviations, q to reference", "1", "Below 1 q is too narrow, above 1 too wide."),
        "coverage_50": ("coverage of 50% intervals", "1", "Share of reference draws inside; 0.5 is exact."),
        "coverage_90": ("coverage of 90% intervals", "1", "Share of reference draws inside; 0.9 is exact."),
        "reference_p": (
            "p-value of means and sds",
            "1",
            "Smallest adjusted p-value that q equals the reference; small is bad.",
        ),
        "weighted_off": (
            "share of rows whose weighted estimates are off",
            "1",
            "Means, sds or evidence by 1000 weighted draws of q, by more than 0.25; 0 is good.",
        ),
    },
    "Calibration": {
        "sbc_p": ("SBC p-value", "1", "Smallest adjusted p-value of uniform ranks; small is bad."),
        "sbc_distance": ("SBC distance", "1", "Largest ECDF distance of ranks from uniform; 0 is exact."),
        "tarp_p": ("TARP p-value", "1", "p-value of exact joint coverage; small is bad."),
        "tarp_distance": ("TARP distance", "1", "Largest error of the joint coverage; 0 is exact."),
        "sbc_coverage_50": ("coverage of 50% intervals, SBC", "1", "Share of true latents inside; 0.5 is exact."),
        "sbc_coverage_90": ("coverage of 90% intervals, SBC", "1", "Share of true latents inside; 0.9 is exact."),
        "z_mean": ("largest mean z-score", "posterior sd", "Bias of q in its worst dimension; 0 is exact."),
        "z_sd": ("RMS of z-scores", "1", "Above 1 q is too narrow, below 1 too wide."),
        "symmetric_divergence": (
            "symmetric divergence",
            "nats",
            "KL(q || p) + KL(p || q) of simulated rows; 0 is exact.",
        ),
        "missed_mass": (
            "share of true latents missed",
            "1",
            "Simulated rows whose true latents q gives hardly any mass; 0 is good.",
        ),
        "iwae_width": (
            "width of the IWAE bracket",
            "nats",
            "Upper minus lower IWAE bound of simulated rows; 0 is good.",
        ),
        "posterior_sbc_p": ("posterior SBC p-value", "1", "Of uniform ranks at observed rows; small is bad."),
        "posterior_sbc_distance": ("posterior SBC distance", "1", "Largest ECDF distance there; 0 is exact."),
        "posterior_sbc_ess": ("effective updated draws", "draws", "Of q, once updated by a simulated row."),
        "contraction": ("posterior contraction", "1", "1 - variance of q / prior variance; 0 learns nothing."),
    },
    "Latent usage": {
        "total_kl": ("KL(q || p), all rows", "nats", "Mean divergence of q from the prior; 0 is collapse."),
        "mutual_information": ("mutual information", "nats", "Information of the row in its latents; 0 is collapse."),
        "information_bound": ("bound of the mutual information", "nats", "Logarithm of the number of rows."),
        "marginal_kl": ("KL of the aggregate posterior", "nats", "Its mismatch with the prior; 0 is good."),
        "active_units": ("active units", "1", "Latent dimensions that depend on the data (Burda)."),
        "mmd": ("squared MMD of the aggregate posterior", "1", "Its distance from the prior; 0 is good."),
        "mmd_p": ("MMD p-value", "1", "p-value that aggregate posterior and prior agree; small is bad."),
        "ks_distance": ("largest KS distance of a marginal", "1", "Aggregate posterior against prior; 0 is good."),
        "ks_p": ("KS p-value", "1", "Smallest adjusted p-value that the marginals agree; small is bad."),
        "holes": ("share of the prior in holes", "1", "Prior draws far from every encoding; 0.01 without holes."),
    },
    "Latent geometry": {
        "step": ("RMS move of x for 0.1 sd of z", "data units", "Steepness of the decoder; lower is smoother."),
        "roughness": ("roughness", "1", "95th percentile of these steps over their median; 1 is even."),
        "vacuum_prior": ("prior draws far from data", "1", "Share beyond 95% of reconstructions; data have 0.05."),
        "vacuum_between": ("midpoints far from data", "1", "The same halfway between two rows; data have 0.05."),
        "variety": ("variety of prior draws", "1", "Their spread over that of reconstructions; near 1 is good."),
    },
    "Predictive checks": {
        "statistics_off": ("misfitting statistics", "1", "Those with p beyond 0.005 or 0.995; 0 is good."),
        "columns_p": ("p-value of misfitting columns", "1", "Of as many by chance, 0.05 each; small is bad."),
        "columns_off": ("share of misfitting columns", "1", "Those with p beyond 0.025 or 0.975; 0.05 is chance."),
        "imputation": ("log p(missing | observed)", "nats per entry", "Of held-out entries; higher is better."),
        "imputation_marginal": (
            "log p(missing)",
            "nats per entry",
            "Of held-out entries by columns alone: the baseline.",
        ),
        "imputation_gain": ("imputation gain", "nats per entry", "Imputation minus its baseline; above 0 is good."),
    },
}
# Keys by section, in the order of tables.
SECTIONS: dict[str, tuple[str, ...]] = {title: tuple(section) for title, section in _TABLE.items()}
QUANTITIES = {key: Quantity(key, *words) for section in _TABLE.values() for key, words in section.items()}


def describe(key: str) -> Quantity:
    """Return the entry of a reported quantity, also of one of another family or statistic.

    Raises:
        KeyError: no diagnostic reports a quantity of this name.

    >>> describe("amortization_gap").label, describe("family_gain[FullRankNormal]").label
    ('amortization gap', 'FullRankNormal gain')
    """
    if key in QUANTITIES:
        return QUANTITIES[key]
    if key.startswith("p of "):
        label = f"predictive p-value of {key.removeprefix('p of ')}"
        return Quantity(key, label, "1", "Share of replicates above the data; near 0 or 1 is a misfit.")
    if key.endswith("_se"):
        quantity = describe(key.removesuffix("_se"))
        return Quantity(key, f"Monte Carlo error of {quantity.label}", quantity.unit, "Standard error within a row.")
    name, _, family = key.partition("[")
    if not family:
        raise KeyError(key)
    return QUANTITIES[name]._replace(key=key, label=QUANTITIES[name].label.replace("family", family.removesuffix("]")))


def summary_frame(figures: Figures, refined: Figures | None = None) -> Any:
    """Return a pandas.DataFrame of label, unit, mean and se by key; with ``refined``, also refined_mean, refined_se."""
    import pandas

    index = pandas.Index(_ordered(figures), name="quantity")
    rows = [(*describe(key)[1:3], *figures[key]) for key in index]
    frame = pandas.DataFrame(rows, index, ["label", "unit", "mean", "se"])
    if refined is not None:
        unknown = Estimate(math.nan, math.nan)
        frame[["refined_mean", "refined_se"]] = [refined.get(key, unknown) for key in frame.index]
    return frame


def number_frame(figures: Figures, refined: Figures | None = None) -> Any:
    """Return a pandas.DataFrame of numbers with their errors, as text, by headings: to print, or for a notebook."""
    import pandas

    keys = _ordered(figures)
    columns = {"guide": [number(figures[key]) for key in keys]}
    if refined is not None:
        columns["refined"] = [number(refined[key]) if key in refined else "" for key in keys]
    return pandas.DataFrame(columns, index=[describe(key).heading for key in keys])


def _ordered(figures: Figures) -> list[str]:
    """Sort keys in the order of the table; those of other families and statistics come last."""
    return [key for key in QUANTITIES if key in figures] + [key for key in figures if key not in QUANTITIES]
