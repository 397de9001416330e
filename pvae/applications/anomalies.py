"""Anomaly detection: rows that are improbable under a fitted program, with a known rate of false alarms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from scipy.stats import rankdata
from torch import Tensor

from pvae.applications.evidence import batch_size, evidence_plan, fix_params, row_evidence
from pvae.errors import Incompatible, UserError, check_range, nearest, param
from pvae.inference.batching import Progress, RowBatch, Values, map_batches, silent
from pvae.inference.guides import Guide
from pvae.inference.importance import log_weights
from pvae.inference.posterior import posterior_moments
from pvae.runtime.pyro_params import Program
from pvae.samplers.row_posterior import Accuracy
from pvae.stats import Estimate, mean_se

# Offset of the reference's seed: its draws are not those of the rows, whose batches' seeds are 1,000,003 apart.
REFERENCE = 500_009

# Negative bounds, code and share of missing entries by name, [B, ...], from which the scores are computed.
Statistics = dict[str, Tensor]


@dataclass(frozen=True)
class AnomalyScores:
    r"""Anomaly scores of B rows and of R reference rows: the higher, the more anomalous.

    Attributes:
        scores, reference: scores of the rows, [B], and of the reference rows, [R], by name.
        false_alarm, K: share of normal rows that may be flagged, a; draws for each row.
        left_out: scores that this guide does not have, with the reason.
        missing: share of missing entries of each row, [B], and of each reference row, [R].
        reliable: whether the weights behind a row's evidence passed the checks, [B], and a reference row's, [R].

    Bounds sum over the observed entries: a row with fewer entries seems more normal. Rates of false alarms hold if
    rows miss entries as the reference does; ranks among rows that miss different numbers say little (``comparable``).
    """

    scores: dict[str, Tensor]
    reference: dict[str, Tensor]
    false_alarm: float
    K: int
    left_out: dict[str, str]
    missing: tuple[Tensor, Tensor] = (torch.zeros(0), torch.zeros(0))
    reliable: tuple[Tensor, Tensor] = (torch.zeros(0), torch.zeros(0))

    @property
    def comparable(self) -> bool:
        """Whether all rows, the reference's too, have the same number of observed entries."""
        return len(torch.cat(self.missing).unique()) <= 1

    @property
    def thresholds(self) -> dict[str, float]:
        r"""Scores above which a row is flagged: the :math:`\lceil (R + 1)(1 - a) \rceil`-th of the sorted reference."""
        rank = self._reference_rank[1]
        return {name: values.kthvalue(rank).values.item() for name, values in self.reference.items()}

    @property
    def expected(self) -> Estimate:
        r"""The false-alarm rate on fresh normal rows, with its spread over references, about
        :math:`\sqrt{a (1 - a) / R}`: that of a Beta distribution, whatever the score. Ties make it smaller.
        """
        R, k = self._reference_rank
        return Estimate(1 - k / (R + 1), math.sqrt(k * (R + 1 - k) / (R + 2)) / (R + 1))

    @property
    def _reference_rank(self) -> tuple[int, int]:
        R = len(next(iter(self.reference.values())))
        return R, _threshold_rank(R, self.false_alarm)

    def flagged(self, name: str) -> Tensor:
        """Return which rows are above a score's threshold, [B]."""
        return self.scores[self._known(name)] > self.thresholds[name]

    def p_values(self, name: str) -> Tensor:
        r"""Compute conformal p-values, :math:`(1 + \#\{j : s_j \ge s\}) / (R + 1)`, [B]; at most a for a flagged row.

        For a normal row :math:`P(p \le t) \le t`, whatever the score.

        Source: Bates, Candes, Lei, Romano, Sesia (2023), *Testing for Outliers with Conformal p-values*,
        arXiv:2104.08279.
        """
        reference = self.reference[self._known(name)].sort().values
        below = torch.searchsorted(reference, self.scores[name].contiguous())
        return (1 + len(reference) - below).double() / (len(reference) + 1)

    def summary(self, labels: Values) -> dict[str, Estimate]:
        """Compute ``auroc[S]``, ``detected[S]`` and ``false_alarms[S]`` of each score S: the area under the ROC curve
        and the shares of anomalous and of normal rows that are flagged, from labels [B], True for anomalous rows.
        """
        figures, anomalous = {}, _check_labels(labels, len(next(iter(self.scores.values()))))
        for name, values in self.scores.items():
            flagged = self.flagged(name)
            figures[f"auroc[{name}]"] = auroc(values, anomalous)
            figures[f"detected[{name}]"] = mean_se(flagged[anomalous])
            figures[f"false_alarms[{name}]"] = mean_se(flagged[~anomalous])
        return figures

    def _known(self, name: str) -> str:
        if name not in self.scores:
            reason = f" ({self.left_out[name]})" if name in self.left_out else nearest(name, self.scores)
            raise UserError(f"there is no score '{name}'{reason}")
        return name


def detect_anomalies(
    model: Program,
    guide: Program,
    x: Values,
    index: Tensor | None = None,
    *,
    reference: Values,
    scores: Sequence[str] | None = None,
    K: int = 16,
    accuracy: str | Accuracy | None = None,
    false_alarm: float = 0.05,
    seed: int = 0,
    progress: Progress = silent,
) -> AnomalyScores:
    r"""Score how anomalous rows are against normal reference rows, with thresholds for a given false-alarm rate.

    ==================  ==============================================================================
    ``evidence``        :math:`-\mathrm{IWAE}_K`, the estimate of :math:`-\log p(x)`
    ``elbo``            :math:`-\mathrm{ELBO}`
    ``reconstruction``  :math:`-E_q[\log p(x|z)]`
    ``typicality``      :math:`|\mathrm{ELBO} - \overline{\mathrm{ELBO}}|`, from the reference's mean
    ``distance``        Mahalanobis distance, squared, of the code's mean from the reference's codes
    ``neighbours``      distance of the code's mean from the fifth nearest of the reference's codes
    ==================  ==============================================================================

    Simple rows are probable under a program of less simple rows: evidence may then rank anomalies last, and scores of
    codes are the ones to use.

    Arguments:
        model, guide, x, index, K, seed, progress: as for `encode`; the guide may be any Pyro program.
        reference: normal rows [R, C] that nothing was fitted to.
        scores: their names; all that the guide has unless given.
        accuracy: of the evidence: rows on which the guide's weights fail their checks go on to other proposals, as in
            `posterior`, in some milliseconds each. None leaves them as they are, with ``reliable`` False.
        false_alarm: a, the share of normal rows that may be flagged.

    A reference row is left out of what it is compared with, so that it counts as new rows do, up to 1 / R. Evidence
    that is not a number counts as most anomalous. Only observed entries are scored.

    Raises:
        UserError: an unknown score, a rate outside (0, 1), or too few reference rows for it.
        Incompatible: the guide has none of the scores.

    See also: `classify`, if there are programs for several classes.
    Sources: Nalisnick, Matsukawa, Teh, Lakshminarayanan (2019), *Detecting Out-of-Distribution Inputs to Deep
    Generative Models Using Typicality*, arXiv:1906.02994; Sun, Ming, Zhu, Li (2022), *Out-of-Distribution Detection
    with Deep Nearest Neighbors*, arXiv:2204.06507.
    """
    check_range("anomalies", K=K)
    if not 0 < false_alarm < 1:
        raise UserError(f"{param('false_alarm')} is {false_alarm}, but it must be between 0 and 1")
    names, left_out = _available_scores(guide, scores)
    _threshold_rank(len(reference), false_alarm)  # refused before any work
    plan = evidence_plan(accuracy) if "evidence" in names else None
    K = max(K, plan.K) if plan else K
    compute, size = partial(_row_statistics, model, guide, K, plan), batch_size(plan, guide)
    options: dict[str, Any] = {"batch_size": size, "progress": progress}
    normal = map_batches(model, guide, compute, reference, seed=seed + REFERENCE, **options)
    rows = map_batches(model, guide, compute, x, index, seed=seed, **options)
    results = {name: DERIVED[name](rows, normal) if name in DERIVED else (rows[name], normal[name]) for name in names}
    pairs = {name: [torch.where(s.isnan(), torch.inf, s.double()) for s in pair] for name, pair in results.items()}
    of_rows, of_normal = ({name: pair[side] for name, pair in pairs.items()} for side in (0, 1))
    about = {name: (rows[name], normal[name]) for name in ("missing", "reliable")}
    return AnomalyScores(of_rows, of_normal, false_alarm, K, left_out, **about)


def auroc(scores: Tensor, anomalous: Tensor) -> Estimate:
    r"""Compute the area under the ROC curve, :math:`P(s_1 > s_0) + P(s_1 = s_0) / 2`, with DeLong's standard error.

    Arguments:
        scores, anomalous: [B] each, higher for rows that are more likely to be anomalous; which rows are, not all.

    Sources: DeLong, DeLong, Clarke-Pearson (1988), *Comparing the Areas under Two or More Correlated Receiver
    Operating Characteristic Curves*, Biometrics 44; by ranks as in Sun and Xu (2014), IEEE Signal Processing Letters.

    >>> auroc(torch.tensor([0.0, 1.0, 1.0, 2.0]), torch.tensor([False, False, True, True])).mean
    0.875
    """
    values, is_high = scores.double().cpu().numpy(), anomalous.cpu().numpy()
    high, low, ranks = values[is_high], values[~is_high], rankdata(values)
    # For each row the share of the other kind that is on the right side of it.
    above = torch.as_tensor((ranks[is_high] - rankdata(high)) / len(low))
    below = torch.as_tensor(1 - (ranks[~is_high] - rankdata(low)) / len(high))
    area, other = mean_se(above), mean_se(below)
    return Estimate(area.mean, math.hypot(area.se, other.se))


def _row_statistics(model: Program, guide: Program, K: int, plan: Accuracy | None, rows: RowBatch) -> Statistics:
    statistics, (fixed, q) = {"missing": rows.x.isnan().flatten(1).double().mean(1)}, fix_params(guide, rows)
    if q:
        statistics["code"] = posterior_moments(*q)[0]
    w = log_weights(model, fixed, rows.x, rows.index, K)
    evidence = row_evidence(model, guide, q, rows, w.log_w, plan)
    bounds = {"evidence": evidence.evidence, "elbo": w.log_w.mean(0), "reconstruction": w.log_lik.mean(0)}
    return statistics | {name: -bound for name, bound in bounds.items()} | {"reliable": evidence.reliable}


def _typicality(rows: Statistics, normal: Statistics) -> tuple[Tensor, Tensor]:
    """Distances from the reference's mean ELBO, a reference row's from that of all others."""
    elbo, R = normal["elbo"].double(), len(normal["elbo"])
    return (rows["elbo"].double() - elbo.mean()).abs(), (elbo - elbo.mean()).abs() * R / (R - 1)


def _distance(rows: Statistics, normal: Statistics) -> tuple[Tensor, Tensor]:
    r"""Squared Mahalanobis distances from the reference's codes, a reference row's from all others.

    For scatter S, leaving a row out turns :math:`h = d^T S^{-1} d` into
    :math:`(\frac{R}{R - 1})^2 h / (1 - \frac{R}{R - 1} h)` (Sherman and Morrison).
    """
    codes, R = normal["code"].double(), len(normal["code"])
    d_rows, d_normal = (statistics["code"].double() - codes.mean(0) for statistics in (rows, normal))
    scatter = d_normal.T @ d_normal
    ridge = 1e-3 * scatter.diag().mean().clamp(min=1e-30)  # so that dimensions without variance don't decide
    inverse = torch.linalg.inv(scatter + ridge * torch.eye(codes.shape[1], dtype=codes.dtype))
    h, factor = ((d_normal @ inverse) * d_normal).sum(1), R / (R - 1)
    left_out = (R - 2) * factor**2 * h / (1 - factor * h).clamp(min=1e-12)
    return (R - 1) * ((d_rows @ inverse) * d_rows).sum(1), left_out


def _neighbours(rows: Statistics, normal: Statistics) -> tuple[Tensor, Tensor]:
    """Distances from the fifth nearest codes of the reference; a reference row is its own nearest, and not counted."""
    codes = normal["code"]
    k = min(5, len(codes) - 1)
    return _kth_distance(rows["code"], codes, k), _kth_distance(codes, codes, k + 1)


def _kth_distance(z: Tensor, codes: Tensor, k: int) -> Tensor:
    chunks = z.split(max(1, 2**22 // len(codes)))  # to hold few distances at once
    exact = "donot_use_mm_for_euclid_dist"  # by products, a row's distance from itself is not 0
    return torch.cat([torch.cdist(chunk, codes, compute_mode=exact).kthvalue(k, 1).values for chunk in chunks])


# Scores of rows and of the reference that are computed from the statistics of both; other scores are such statistics.
DERIVED = {"typicality": _typicality, "distance": _distance, "neighbours": _neighbours}
SCORES = ("evidence", "elbo", "reconstruction", *DERIVED)


def _available_scores(guide: Program, names: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    """Return the wanted scores that a guide has, and why not the others."""
    wanted, reasons = list(SCORES if names is None else names), dict[str, str]()
    if unknown := [name for name in wanted if name not in SCORES]:
        raise UserError(f"unknown score '{unknown[0]}'{nearest(unknown[0], SCORES)}")
    if not isinstance(guide, Guide):
        reasons = dict.fromkeys(("distance", "neighbours"), "the guide has no family whose means are codes")
    elif guide.family.point_mass:
        reasons = dict.fromkeys(("evidence", "elbo", "typicality"), "a guide of point masses bounds no evidence")
    left_out = {name: reason for name, reason in reasons.items() if name in wanted}
    available = [name for name in wanted if name not in left_out]
    if not available:
        raise Incompatible(f"no score is left: {'; '.join(dict.fromkeys(left_out.values())) or 'none was given'}")
    return available, left_out


def _threshold_rank(R: int, rate: float) -> int:
    least = max(3, math.ceil((1 - rate) / rate - 1e-9))
    if least > R:
        raise UserError(f"{R} reference rows are too few for a false-alarm rate of {rate:g}; give {least} or more")
    return R + 1 - math.floor(rate * (R + 1) + 1e-9)


def _check_labels(labels: Values, rows: int) -> Tensor:
    values = torch.as_tensor(labels).cpu()
    if values.shape != (rows,) or not ((values == 0) | (values == 1)).all():
        raise UserError(f"the labels must be {rows} truth values, True where a row is anomalous")
    if values.all() or not values.any():
        raise UserError(f"all rows are {'anomalous' if values.all() else 'normal'}; an AUROC needs rows of both kinds")
    return values.bool()
