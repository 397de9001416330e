"""Generative classification: Bayes' rule on each row's evidence under a program for every class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from scipy.optimize import brentq
from torch import Tensor
from torch.nn.functional import one_hot

from pvae.applications.evidence import batch_size, evidence_plan, fix_params, row_evidence
from pvae.errors import Incompatible, UserError, check_range, param
from pvae.inference.batching import Progress, RowBatch, Values, map_batches, silent
from pvae.inference.guides import Guide
from pvae.inference.importance import log_weights
from pvae.runtime.pyro_params import Program
from pvae.samplers.row_posterior import Accuracy
from pvae.stats import Estimate, mean_se

ClassPrior = Values | Sequence[float] | None
_Case = tuple[Program, Program, Values]  # program, guide and rows


@dataclass(frozen=True)
class Classification:
    r"""Class probabilities of B rows among C classes, :math:`p(y|x) \propto p(y)\, p(x|y)^{1 / T}`.

    Attributes:
        log_evidence: IWAE-K under each class, [B, C] nats: lower bounds of log p(x|y) in expectation.
        log_evidence_se: their Monte Carlo standard errors, [B, C]; far too small where q misses the posterior.
        log_prior: log p(y), [C].
        temperature: T.
        K: draws for each row and class.
        reliable: whether the weights behind each evidence passed the checks, [B, C].
    """

    log_evidence: Tensor
    log_evidence_se: Tensor
    log_prior: Tensor
    temperature: float
    K: int
    reliable: Tensor = field(default_factory=partial(torch.zeros, 0, dtype=torch.bool))

    @property
    def log_probabilities(self) -> Tensor:
        """log p(y|x), [B, C]."""
        return (self.log_prior + 1 / self.temperature * self.log_evidence.double()).log_softmax(1)

    @property
    def predicted(self) -> Tensor:
        """The most probable class, [B]."""
        return self.log_probabilities.argmax(1)

    def at(self, temperature: float) -> Classification:
        """Return the same evidence at another temperature, such as that of `fit_temperature`."""
        check_range("classify", temperature=temperature)
        return replace(self, temperature=temperature)

    def summary(self, labels: Values) -> dict[str, Estimate]:
        r"""Compute accuracy, log loss, Brier score and expected calibration error (ECE) from labels [B], 0 to C - 1.

        ``log_loss`` is :math:`-\log p(y|x)` in nats, ``brier`` is :math:`\sum_c (p(c|x) - [c = y])^2`. Rows are sorted
        by their confidence :math:`\max_c p(c|x)` into 15 bins of one size; ``calibration_error`` is the mean distance
        between confidence and accuracy in a bin; ``calibration_error_by_chance`` is that of a perfectly calibrated
        classifier, by simulation. The ECE judges the most probable class alone, and differences inside a bin cancel.

        Sources: Naeini, Cooper, Hauskrecht (2015), *Obtaining Well Calibrated Probabilities Using Bayesian Binning*,
        AAAI; Brier (1950), *Verification of Forecasts Expressed in Terms of Probability*, Monthly Weather Review 78.
        """
        y, log_p = _check_labels(labels, self.log_evidence), self.log_probabilities
        p, is_right = log_p.exp(), (self.predicted == y).double()
        confidence, order = p.max(1).values.sort(stable=True)
        uniform = torch.rand(200, len(y), generator=torch.Generator().manual_seed(0), dtype=p.dtype)
        by_chance = _calibration_error(confidence, (uniform < confidence).double())[0]
        error, se = _calibration_error(confidence, is_right[order])
        return {
            "accuracy": mean_se(is_right),
            "log_loss": mean_se(-log_p.gather(1, y.unsqueeze(1))),
            "brier": mean_se((p - one_hot(y, p.shape[1])).square().sum(1)),
            "calibration_error": Estimate(error.item(), se.item()),
            "calibration_error_by_chance": Estimate(by_chance.mean().item(), by_chance.std().item()),
        }

    def confusion(self, labels: Values) -> Tensor:
        """Count the rows of each label (rows) and predicted class (columns): the confusion matrix, [C, C]."""
        y, C = _check_labels(labels, self.log_evidence), self.log_evidence.shape[1]
        return torch.bincount(C * y + self.predicted.cpu(), minlength=C**2).view(C, C)


def classify(
    models: Sequence[tuple[Program, Program]],
    x: Values,
    *,
    prior: ClassPrior = None,
    temperature: float = 1.0,
    K: int = 16,
    accuracy: str | Accuracy | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Classification:
    r"""Classify rows by the evidence (IWAE-K) of programs that were fitted to the rows of one class each.

    Arguments:
        models: a fitted program and its guide for every class, in the classes' order. To refine q for each row and
            class give ``RefinedGuide(guide, model)`` for a guide.
        x: rows [B, columns].
        prior: p(y), [C], or weights proportional to it; uniform unless given.
        temperature: T, by which the log evidence is divided: 1 is Bayes' rule, which is overconfident as networks err
            on all columns of a row together; `fit_temperature` estimates T.
        K, seed, progress: as for `encode`, for each class.
        accuracy: of the evidence, as for `detect_anomalies`.

    Raises:
        UserError: fewer than two classes, a prior that does not fit, or a temperature that is not positive.
        Incompatible: a guide of point masses, which has no evidence.

    See also: `classify_conditional`, for one program that is given the label; `detect_anomalies`.
    Source: Ng and Jordan (2002), *On Discriminative vs. Generative Classifiers*, NeurIPS 14.
    """
    return _classify([(*pair, x) for pair in models], prior, temperature, K, accuracy, seed, progress)


def classify_conditional(
    model: Program,
    guide: Program,
    x: Values,
    classes: int,
    *,
    prior: ClassPrior = None,
    temperature: float = 1.0,
    K: int = 16,
    accuracy: str | Accuracy | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Classification:
    """Classify rows by the evidence (IWAE-K) of one conditional program p(x|y), given the label at the end of each row.

    Arguments:
        model, guide: a fitted program of p(x|y) and its guide, both of rows [B, columns + C] with one-hot labels.
        x: rows without their labels, [B, columns].
        classes: C, the number of classes.
        prior, temperature, K, accuracy, seed, progress: as for `classify`.
    """
    rows, labels = torch.as_tensor(x), torch.eye(classes)
    cases = [(model, guide, torch.cat([rows, y.to(rows).expand(len(rows), -1)], 1)) for y in labels]
    return _classify(cases, prior, temperature, K, accuracy, seed, progress)


def fit_temperature(log_evidence: Tensor, labels: Values, prior: ClassPrior = None) -> Estimate:
    r"""Fit the temperature T by maximum likelihood on held-out rows (temperature scaling), with its standard error.

    .. math:: \hat T = \arg\min_T -\frac1B \sum_i \log \mathrm{softmax}_y(\log p(y) + \log p(x_i|y) / T)_{y_i}

    Arguments:
        log_evidence: log p(x|y) of rows that no program was fitted to, [B, C].
        labels: their classes, [B].
        prior: as for `classify`.

    The loss is convex in 1 / T. The standard error is the sandwich estimator's, for independent rows. If the evidence
    separates all rows, there is no best T: T is then fitted to labels smoothed by 1 / (B + 2), without standard error.

    Raises:
        UserError: the evidence says less about these rows than the prior does, so that T would be infinite.

    Sources: Guo, Pleiss, Sun, Weinberger (2017), *On Calibration of Modern Neural Networks*, arXiv:1706.04599; the
    smoothing is that of Platt (1999), *Probabilistic Outputs for Support Vector Machines*.

    >>> round(fit_temperature(torch.tensor([[3.0, 0.0], [3.0, 0.0], [3.0, 0.0], [0.0, 3.0]]), [0, 0, 1, 1]).mean, 2)
    2.73
    """
    y, log_evidence = _check_labels(labels, log_evidence), log_evidence.double()
    rows, classes = log_evidence.shape
    exact, smoothing = one_hot(y, classes).double(), 1 / (rows + 2)
    smooth = (1 - smoothing) * exact + smoothing * (1 - exact) / (classes - 1)
    log_prior = _log_prior(prior, classes)

    def derivatives(log_power: float, target: Tensor) -> tuple[Tensor, Tensor]:
        """First and second derivative of each row's log loss by 1 / T, [B], for targets [B, C]."""
        p = (log_prior + math.exp(log_power) * log_evidence).log_softmax(1).exp()
        mean = (p * log_evidence).sum(1)
        return mean - (target * log_evidence).sum(1), (p * (log_evidence - mean.unsqueeze(1)).square()).sum(1)

    def slope(log_power: float, target: Tensor) -> float:
        return derivatives(log_power, target)[0].mean().item()

    low, high = -12.0, 12.0  # logarithms of the smallest and the largest 1 / T
    is_separated = slope(low, exact) < 0 >= slope(high, exact)
    target = smooth if is_separated else exact
    if slope(low, target) >= 0:
        problem = f"the evidence says less about the classes of these {rows} rows than the prior does"
        remedy = "fit the programs for longer or to more rows, or calibrate on rows like theirs"
        raise UserError(f"{problem}, so that no temperature is best", remedy)
    power = brentq(slope, low, high, args=(target,))
    first, second = derivatives(power, target)
    se = mean_se(first).se / second.mean().item() * math.exp(-2 * power)
    return Estimate(math.exp(-power), math.nan if is_separated else se)


def _classify(
    cases: Sequence[_Case],
    prior: ClassPrior,
    temperature: float,
    K: int,
    accuracy: str | Accuracy | None,
    seed: int,
    progress: Progress,
) -> Classification:
    check_range("classify", temperature=temperature, K=K)
    if len(cases) < 2:
        raise UserError(f"{len(cases)} class is given; at least 2 are needed to classify")
    log_prior, plan = _log_prior(prior, len(cases)), evidence_plan(accuracy)
    K = max(K, plan.K) if plan else K

    def compute(model: Program, guide: Program, rows: RowBatch) -> dict[str, Tensor]:
        fixed, q = fix_params(guide, rows)
        log_w = log_weights(model, fixed, rows.x, rows.index, K).log_w
        return row_evidence(model, guide, q, rows, log_w, plan)._asdict()

    columns = []
    for model, guide, x in cases:
        if isinstance(guide, Guide) and guide.family.point_mass:
            raise Incompatible(f"a point mass has no evidence to classify by; fit with another {param('family')}")
        options: dict[str, Any] = {"seed": seed, "batch_size": batch_size(plan, guide), "progress": progress}
        columns.append(map_batches(model, guide, partial(compute, model, guide), x, **options))
    evidence, se, reliable = (
        torch.stack([column[name] for column in columns], 1) for name in ("evidence", "se", "reliable")
    )
    return Classification(evidence, se, log_prior, temperature, K, reliable)


def _log_prior(prior: ClassPrior, classes: int) -> Tensor:
    p = torch.ones(classes) if prior is None else torch.as_tensor(prior)
    if p.shape != (classes,):
        raise UserError(f"the prior has shape {tuple(p.shape)}, but there are {classes} classes; give one number each")
    if not ((p > 0) & p.isfinite()).all():
        raise UserError(f"the prior is {p.tolist()}, but every class needs a positive number")
    return p.double().log() - p.double().sum().log()


def _check_labels(labels: Values, log_evidence: Tensor) -> Tensor:
    y, (rows, classes) = torch.as_tensor(labels).cpu(), log_evidence.shape
    if y.shape != (rows,):
        raise UserError(f"the labels have shape {tuple(y.shape)}, but there are {rows} rows; give one number each")
    if unknown := [value for value in y.tolist() if value not in range(classes)]:
        raise UserError(f"label {unknown[0]:g} is no class; give numbers from 0 to {classes - 1}")
    return y.long()


def _calibration_error(confidence: Tensor, is_right: Tensor) -> tuple[Tensor, Tensor]:
    """Expected calibration error of sorted confidences [B], and its standard error, for right predictions [..., B]."""
    differences = (is_right - confidence).tensor_split(min(15, len(confidence)), -1)
    bins = [(d.shape[-1] / len(confidence), d) for d in differences]
    error = sum(weight * d.mean(-1).abs() for weight, d in bins)
    variance = sum(weight**2 * d.var(-1, correction=0) / d.shape[-1] for weight, d in bins)
    return torch.as_tensor(error), torch.as_tensor(variance).sqrt()
