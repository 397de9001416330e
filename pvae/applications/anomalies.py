"""Anomaly detection: rows that a fitted program finds unlike its reference, with an error rate that is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from scipy.stats import rankdata
from torch import Tensor

from pvae.errors import Incompatible, UserError, check_range, nearest
from pvae.inference.batching import RowBatch, Values, map_batches
from pvae.inference.guides import Guide
from pvae.inference.importance import log_weights
from pvae.inference.posterior import posterior_moments
from pvae.runtime.pyro_params import Program
from pvae.stats import Estimate, log_mean_exp, mean_se

# Which reference code's distance counts as that of the neighbours, and how many distances are held at once.
NEIGHBOUR, DISTANCES = 5, 2**22

# Added to the variances of codes, as a share of their mean, so that dimensions without any can't decide alone.
RIDGE = 1e-3

# The reference's draws are not those of the rows; passes number streams in steps of a million and three.
REFERENCE = 500_009

# What is known of rows, by name, [B, ...].
Found = dict[str, Tensor]


@dataclass(frozen=True)
class AnomalyScores:
    r"""How unlike a reference B rows are, by each score: the higher, the more anomalous.

    Attributes:
        scores: by name, [B] each.
        reference: the same of the R reference rows, [R] each.
        false_alarm: share of normal rows that may be flagged, a.
        K: draws for each row.
        left_out: scores that this guide has not, with the reason.
        missing: share of entries that are missing, of each row, [B], and of each reference row, [R].

    Where entries are missing, evidence and its kin add up what is there: a row with fewer entries seems more normal,
    whatever they are. Rates of false alarms hold where rows miss entries as the reference does; ranks among rows that
    miss different numbers of them say little (``comparable``).
    """

    scores: dict[str, Tensor]
    reference: dict[str, Tensor]
    false_alarm: float
    K: int
    left_out: dict[str, str]
    missing: tuple[Tensor, Tensor] = (torch.zeros(0), torch.zeros(0))

    @property
    def comparable(self) -> bool:
        """Whether all rows, the reference's too, have the same number of entries."""
        return len(torch.cat(self.missing).unique()) <= 1

    @property
    def thresholds(self) -> dict[str, float]:
        r"""Scores above which a row is flagged: the :math:`\lceil (R + 1)(1 - a) \rceil`-th of the reference's."""
        rank = _rank(self._rows, self.false_alarm)
        return {name: own.kthvalue(rank).values.item() for name, own in self.reference.items()}

    @property
    def expected(self) -> Estimate:
        r"""The share of fresh normal rows that a threshold flags, with its spread over references, about
        :math:`\sqrt{a (1 - a) / R}`: a Beta distribution's, whatever the score's is. Ties make it smaller.
        """
        R, k = self._rows, _rank(self._rows, self.false_alarm)
        return Estimate(1 - k / (R + 1), math.sqrt(k * (R + 1 - k) / (R + 2)) / (R + 1))

    @property
    def _rows(self) -> int:
        return len(next(iter(self.reference.values())))

    def flagged(self, name: str) -> Tensor:
        """Rows above a score's threshold, [B]."""
        return self.scores[self._known(name)] > self.thresholds[name]

    def p_values(self, name: str) -> Tensor:
        r"""Conformal p-values, :math:`(1 + \#\{j : s_j \ge s\}) / (R + 1)`, [B]; at most a where a row is flagged.

        For a normal row :math:`P(p \le t) \le t`, whatever the score.

        Source: Bates, Candes, Lei, Romano, Sesia (2023), *Testing for Outliers with Conformal p-values*,
        arXiv:2104.08279.
        """
        reference = self.reference[self._known(name)].sort().values
        below = torch.searchsorted(reference, self.scores[name].contiguous())
        return (1 + len(reference) - below).double() / (len(reference) + 1)

    def summary(self, labels: Values) -> dict[str, Estimate]:
        """Of each score S: ``auroc[S]``, and the shares flagged of anomalous and of normal rows, ``detected[S]`` and
        ``false_alarms[S]``.

        Arguments:
            labels: True where a row is anomalous, [B].

        Raises:
            UserError: labels that do not fit the rows, or only one kind of them.
        """
        found, anomalous = {}, _checked(labels, len(next(iter(self.scores.values()))))
        for name, own in self.scores.items():
            flagged = self.flagged(name).double()
            found[f"auroc[{name}]"] = auroc(own, anomalous)
            found[f"detected[{name}]"] = mean_se(flagged[anomalous])
            found[f"false_alarms[{name}]"] = mean_se(flagged[~anomalous])
        return found

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
    false_alarm: float = 0.05,
    seed: int = 0,
    progress: Callable[[int], None] = lambda rows: None,
) -> AnomalyScores:
    r"""Score rows by how unlike a reference they are, with thresholds for a given rate of false alarms.

    ==================  ==============================================================================
    ``evidence``        :math:`-\mathrm{IWAE}_K`, the estimate of :math:`-\log p(x)`
    ``elbo``            :math:`-\mathrm{ELBO}`
    ``reconstruction``  :math:`-E_q[\log p(x|z)]`
    ``typicality``      :math:`|\mathrm{ELBO} - \overline{\mathrm{ELBO}}|`, from the reference's mean
    ``distance``        Mahalanobis distance, squared, of the code's mean from the reference's codes
    ``neighbours``      distance of the code's mean from the fifth nearest of the reference's codes
    ==================  ==============================================================================

    Simple rows are likely under a program of rows that are less so: evidence may then rank anomalies last, and a score
    of codes is the one to ask.

    Arguments:
        model, guide: a fitted program and its guide.
        x, index: rows [B, C], and which training datapoints they are; None for new ones.
        reference: normal rows [R, C] that nothing was fitted to.
        scores: their names; all that the guide has unless given.
        K: draws for each row.
        false_alarm: a, the share of normal rows that may be flagged.
        seed: of the draws.
        progress: called with the number of rows done, those of the reference among them.

    A reference row is left out of what it is itself compared with, so that it counts as new rows do, up to 1 / R.
    Evidence that is no number counts as most anomalous. Of rows with missing entries only what is there is scored.

    Raises:
        UserError: an unknown score, a rate outside (0, 1), or a reference of too few rows for it.
        Incompatible: the guide has none of the scores.

    Sources: Nalisnick, Matsukawa, Teh, Lakshminarayanan (2019), *Detecting Out-of-Distribution Inputs to Deep
    Generative Models Using Typicality*, arXiv:1906.02994; Sun, Ming, Zhu, Li (2022), *Out-of-Distribution Detection
    with Deep Nearest Neighbors*, arXiv:2204.06507.
    """
    check_range("anomalies", K=K)
    if not 0 < false_alarm < 1:
        raise UserError(f"the rate of false alarms is {false_alarm}, but it must be between 0 and 1")
    wanted, left_out = _available(guide, scores)
    look = partial(_looked_at, model, guide, K=K, progress=progress)
    _rank(len(reference), false_alarm)  # refused before any work
    normal = look(reference, None, seed=seed + REFERENCE)
    found = look(x, index, seed=seed)
    pairs = {name: [_ordered(each) for each in SCORES[name](found, normal)] for name in wanted}
    own, others = ({name: pair[side] for name, pair in pairs.items()} for side in (0, 1))
    return AnomalyScores(own, others, false_alarm, K, left_out, (found["missing"], normal["missing"]))


def auroc(scores: Tensor, anomalous: Tensor) -> Estimate:
    r"""Area under the ROC curve, :math:`P(s_1 > s_0) + P(s_1 = s_0) / 2`, with DeLong's standard error.

    Arguments:
        scores: [B], higher where a row is more likely to be anomalous.
        anomalous: which rows are, [B], some and not all.

    Sources: DeLong, DeLong, Clarke-Pearson (1988), *Comparing the Areas under Two or More Correlated Receiver
    Operating Characteristic Curves*, Biometrics 44; by ranks as in Sun and Xu (2014), IEEE Signal Processing Letters.

    >>> auroc(torch.tensor([0.0, 1.0, 1.0, 2.0]), torch.tensor([False, False, True, True])).mean
    0.875
    """
    ranks = partial(rankdata, method="average")
    high, low = (scores[which].double().cpu().numpy() for which in (anomalous, ~anomalous))
    everything = ranks(scores.double().cpu().numpy())
    is_high = anomalous.cpu().numpy()
    # For each row the share of the other kind that it stands on the right side of.
    above = torch.as_tensor((everything[is_high] - ranks(high)) / len(low))
    below = torch.as_tensor(1 - (everything[~is_high] - ranks(low)) / len(high))
    area, other = mean_se(above), mean_se(below)
    return Estimate(area.mean, math.hypot(area.se, other.se))


def _distance(own: Found, ref: Found) -> tuple[Tensor, Tensor]:
    r"""Squared Mahalanobis distances from the reference's codes, a reference row's from all others.

    With :math:`h = d^T S^{-1} d` for d from the mean of R rows and their scatter S, leaving a row out gives
    :math:`(\frac{R}{R - 1})^2 h / (1 - \frac{R}{R - 1} h)`, by Sherman and Morrison.
    """
    codes, R = ref["code"].double(), len(ref["code"])
    apart, others = (each["code"].double() - codes.mean(0) for each in (own, ref))
    scatter = others.T @ others
    ridge = RIDGE * scatter.diag().mean().clamp(min=1e-30)
    inverse = torch.linalg.inv(scatter + ridge * torch.eye(codes.shape[1], dtype=codes.dtype))
    inside = ((others @ inverse) * others).sum(1)
    grown = R / (R - 1)
    left = (R - 2) * grown**2 * inside / (1 - grown * inside).clamp(min=1e-12)
    return (R - 1) * ((apart @ inverse) * apart).sum(1), left


def _neighbours(own: Found, ref: Found) -> tuple[Tensor, Tensor]:
    """Distances from the nearest codes of the reference; a reference row is its own nearest, and not counted."""
    codes = ref["code"]
    k = min(NEIGHBOUR, len(codes) - 1)
    return _nearest(own["code"], codes, k), _nearest(codes, codes, k + 1)


def _nearest(z: Tensor, codes: Tensor, k: int) -> Tensor:
    pieces = z.split(max(1, DISTANCES // len(codes)))
    exact = "donot_use_mm_for_euclid_dist"  # by products, a row's distance from itself is not 0
    return torch.cat([torch.cdist(each, codes, compute_mode=exact).kthvalue(k, 1).values for each in pieces])


def _typicality(own: Found, ref: Found) -> tuple[Tensor, Tensor]:
    """Distances from the reference's mean ELBO, a reference row's from that of all others."""
    elbo = ref["elbo"].double()
    R = len(elbo)
    return (own["elbo"].double() - elbo.mean()).abs(), (elbo - elbo.mean()).abs() * R / (R - 1)


def _negative(name: str) -> Callable[[Found, Found], tuple[Tensor, Tensor]]:
    return lambda own, ref: (-own[name], -ref[name])


# What is known of rows and of the reference to the scores of both.
SCORES: dict[str, Callable[[Found, Found], tuple[Tensor, Tensor]]] = {
    "evidence": _negative("evidence"),
    "elbo": _negative("elbo"),
    "reconstruction": _negative("reconstruction"),
    "typicality": _typicality,
    "distance": _distance,
    "neighbours": _neighbours,
}


def _available(guide: Program, names: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    """The scores that a guide has, of those wanted, and why not the others."""
    wanted = list(SCORES) if names is None else list(names)
    for name in wanted:
        if name not in SCORES:
            raise UserError(f"unknown score '{name}'{nearest(name, SCORES)}")
    left_out: dict[str, str] = {}
    if not isinstance(guide, Guide):
        left_out = dict.fromkeys(("distance", "neighbours"), "the guide has no family whose means are codes")
    elif guide.family.point_mass:
        left_out = dict.fromkeys(("evidence", "elbo", "typicality"), "a guide of point masses bounds no evidence")
    left_out = {name: why for name, why in left_out.items() if name in wanted}
    if not (kept := [name for name in wanted if name not in left_out]):
        raise Incompatible(f"no score is left: {'; '.join(dict.fromkeys(left_out.values())) or 'none was given'}")
    return kept, left_out


def _looked_at(
    model: Program,
    guide: Program,
    x: Values,
    index: Tensor | None,
    *,
    K: int,
    seed: int,
    progress: Callable[[int], None],
) -> Found:
    """What the scores take of each row: its bounds, its code where the guide has any, its share of missing entries."""

    def compute(rows: RowBatch) -> Found:
        missing = {"missing": rows.x.isnan().flatten(1).double().mean(1)}
        if not isinstance(guide, Guide):
            return _bounds(model, guide, rows, K) | missing
        q_params = guide.params(rows.x, rows.index).detach()
        return (
            _bounds(model, guide.with_params(q_params), rows, K)
            | missing
            | {"code": posterior_moments(guide.family, q_params)[0]}
        )

    return map_batches(model, guide, compute, x, index, seed=seed, progress=progress)


def _bounds(model: Program, q: Program, rows: RowBatch, K: int) -> Found:
    w = log_weights(model, q, rows.x, rows.index, K)
    return {
        "evidence": log_mean_exp(w.log_w.double()),
        "elbo": w.log_w.mean(0),
        "reconstruction": w.log_lik.mean(0),
    }


def _ordered(scores: Tensor) -> Tensor:
    """In double precision, and what is no number last."""
    return scores.double().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _rank(R: int, rate: float) -> int:
    """Which of R sorted reference scores is the threshold."""
    least = max(3, math.ceil((1 - rate) / rate - 1e-9))
    if least > R:
        raise UserError(f"{R} reference rows are too few for a false-alarm rate of {rate:g}; give {least} or more")
    return R + 1 - math.floor(rate * (R + 1) + 1e-9)


def _checked(labels: Values, rows: int) -> Tensor:
    """Which rows are anomalous, [B]."""
    given = torch.as_tensor(labels).cpu()
    if given.shape != (rows,) or not ((given == 0) | (given == 1)).all():
        raise UserError(f"the labels must be {rows} truth values, True where a row is anomalous")
    if given.all() or not given.any():
        raise UserError(f"all rows are {'anomalous' if given.all() else 'normal'}; an AUROC needs rows of both kinds")
    return given.bool()
