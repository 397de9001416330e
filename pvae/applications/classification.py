"""Generative classification: Bayes' rule on each row's evidence under a program for every class."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from scipy.optimize import brentq
from torch import Tensor

from pvae.errors import Incompatible, UserError, check_range
from pvae.inference.batching import RowBatch, Values, map_batches
from pvae.inference.guides import Guide
from pvae.inference.importance import log_weights
from pvae.inference.posterior import with_fixed_params
from pvae.runtime.pyro_params import Program
from pvae.stats import Estimate, log_mean_exp, log_mean_exp_se, mean_se

# Bins of confidence in which the calibration error is measured, and draws that tell how large it is by chance.
BINS, CHANCES = 15, 200

# Logarithms of the smallest and the largest 1 / T that is sought.
LOG_POWERS = (-12.0, 12.0)


@dataclass(frozen=True)
class Classification:
    r"""What B rows' evidence under C classes says of their class, :math:`p(y|x) \propto p(y)\, p(x|y)^{1 / T}`.

    Attributes:
        log_evidence: IWAE-K under each class, [B, C] nats: lower bounds of log p(x|y) in expectation.
        log_evidence_se: their Monte Carlo errors, [B, C]; far too small where q misses the posterior, as that of
            another class may.
        log_prior: log p(y), [C].
        temperature: T.
        K: draws for each row and class.
    """

    log_evidence: Tensor
    log_evidence_se: Tensor
    log_prior: Tensor
    temperature: float
    K: int

    @property
    def log_probabilities(self) -> Tensor:
        """log p(y|x), [B, C]."""
        return _posterior(self.log_evidence, self.log_prior, 1 / self.temperature)

    @property
    def predicted(self) -> Tensor:
        """The most probable class, [B]."""
        return self.log_probabilities.argmax(1)

    def at(self, temperature: float) -> Classification:
        """The same evidence at another temperature, such as that of `fit_temperature`."""
        check_range("classes", temperature=temperature)
        return replace(self, temperature=temperature)

    def summary(self, labels: Values) -> dict[str, Estimate]:
        r"""Accuracy and how good the probabilities are, from the labels [B], numbers of classes from 0.

        ``log_loss`` is :math:`-\log p(y|x)` in nats, ``brier`` is :math:`\sum_c (p(c|x) - [c = y])^2`. Of rows
        sorted by their confidence :math:`\max_c p(c|x)` into 15 bins of one size, ``calibration_error`` is the mean
        distance between confidence and accuracy. It can't be negative, so that a perfectly calibrated classifier has
        one too: ``calibration_error_by_chance``, by simulation, falls with the number of rows. It judges the first
        class alone, and differences inside a bin cancel; log loss and Brier score have no such holes.

        Sources: Naeini, Cooper, Hauskrecht (2015), *Obtaining Well Calibrated Probabilities Using Bayesian Binning*,
        AAAI; Brier (1950), *Verification of Forecasts Expressed in Terms of Probability*, Monthly Weather Review 78.
        """
        y, log_p = _checked(labels, self.log_evidence), self.log_probabilities
        p = log_p.exp()
        confidence, order = p.max(1).values.sort(stable=True)
        right = (self.predicted == y).double()
        random = torch.Generator().manual_seed(0)
        simulated = (torch.rand(CHANCES, len(y), generator=random, dtype=p.dtype) < confidence).double()
        chance = _bins(confidence, simulated)[0]
        error, se = _bins(confidence, right[order])
        return {
            "accuracy": mean_se(right),
            "log_loss": mean_se(-log_p.gather(1, y.unsqueeze(1))),
            "brier": mean_se((p - torch.nn.functional.one_hot(y, p.shape[1])).square().sum(1)),
            "calibration_error": Estimate(error.item(), se.item()),
            "calibration_error_by_chance": Estimate(chance.mean().item(), chance.std().item()),
        }

    def confusion(self, labels: Values) -> Tensor:
        """Numbers of rows, [C, C]: the label's row, the prediction's column."""
        y, classes = _checked(labels, self.log_evidence), self.log_evidence.shape[1]
        return torch.bincount(y * classes + self.predicted, minlength=classes**2).view(classes, classes)


def classify(
    models: Sequence[tuple[Program, Program]],
    x: Values,
    *,
    prior: Values | Sequence[float] | None = None,
    temperature: float = 1.0,
    K: int = 16,
    seed: int = 0,
    progress: Callable[[int], None] = lambda rows: None,
) -> Classification:
    r"""Classify rows by programs fitted to the rows of one class each.

    Arguments:
        models: a fitted program and its guide for every class, in the classes' order.
        x: rows [B, columns].
        prior: p(y), [C], or weights that are proportional to it; alike unless given.
        temperature: T, by which evidence is divided: 1 is Bayes' rule. Networks err on all columns of a row together,
            so that probabilities at 1 are too sure; `fit_temperature` finds T.
        K: draws for each row and class.
        seed: of the draws.
        progress: called with the number of rows done, B for each class in all.

    To spend a search on each row and class give ``Optimized(guide, model)`` for a guide.

    Raises:
        UserError: fewer than two classes, a prior that does not fit, or a temperature that is not positive.
        Incompatible: a guide of point masses, which has no evidence.

    Source: Ng and Jordan (2002), *On Discriminative vs. Generative Classifiers*, NeurIPS 14.
    """
    return _classified([(*pair, x) for pair in models], prior, temperature, K, seed, progress)


def evidence_by_label(
    model: Program,
    guide: Program,
    x: Values,
    classes: int,
    *,
    prior: Values | Sequence[float] | None = None,
    temperature: float = 1.0,
    K: int = 16,
    seed: int = 0,
    progress: Callable[[int], None] = lambda rows: None,
) -> Classification:
    """Classify rows by one program that is given the label, one-hot, at the end of each row.

    Arguments:
        model, guide: a fitted program of p(x|y) and its guide, both of rows [B, columns + classes].
        x: rows without their labels, [B, columns].
        classes: C, the number of classes.
        prior, temperature, K, seed, progress: as of `classify`.
    """
    rows = torch.as_tensor(x)
    labelled = (torch.cat([rows, y.expand(len(rows), -1)], 1) for y in torch.eye(classes).to(rows))
    return _classified([(model, guide, each) for each in labelled], prior, temperature, K, seed, progress)


def fit_temperature(log_evidence: Tensor, labels: Values, prior: Values | Sequence[float] | None = None) -> Estimate:
    r"""The temperature T of the smallest log loss on held-out rows, and its standard error.

    .. math:: \hat T = \arg\min_T -\frac1B \sum_i \log \mathrm{softmax}_y(\log p(y) + \log p(x_i|y) / T)_{y_i}

    Arguments:
        log_evidence: log p(x|y) of rows that no program was fitted to, [B, C].
        labels: their classes, [B].
        prior: as of `classify`.

    The loss is convex in 1 / T. The error is the sandwich estimator's, for independent rows. Evidence that tells all
    rows apart has no best T: it is then found with a doubt of 1 / (B + 2) in every label, and has no error.

    Raises:
        UserError: the evidence tells less of these rows than the prior does, so that T would be infinite.

    Sources: Guo, Pleiss, Sun, Weinberger (2017), *On Calibration of Modern Neural Networks*, arXiv:1706.04599; the
    doubt is that of Platt (1999), *Probabilistic Outputs for Support Vector Machines*.

    >>> round(fit_temperature(torch.tensor([[3.0, 0.0], [3.0, 0.0], [3.0, 0.0], [0.0, 3.0]]), [0, 0, 1, 1]).mean, 2)
    2.73
    """
    y, log_evidence = _checked(labels, log_evidence), log_evidence.double()
    rows, classes = log_evidence.shape
    log_prior, exact = _log_prior(prior, classes), torch.nn.functional.one_hot(y, classes).double()
    doubt = 1 / (rows + 2)
    for target in (exact, (1 - doubt) * exact + doubt * (1 - exact) / (classes - 1)):
        slopes = partial(_slopes, log_evidence, log_prior, target)
        flattest, steepest = (slopes(end)[0].mean().item() for end in LOG_POWERS)
        if flattest >= 0:
            raise UserError(
                f"the evidence tells less of the classes of these {rows} rows than the prior does, so that no "
                "temperature is best; fit the programs for longer or to more rows, or calibrate on rows like theirs"
            )
        if steepest > 0:
            break
    power = brentq(lambda at: slopes(at)[0].mean().item(), *LOG_POWERS)
    first, second = slopes(power)
    se = mean_se(first).se / second.mean().item() * math.exp(-2 * power)
    return Estimate(math.exp(-power), se if target is exact else math.nan)


def _slopes(log_evidence: Tensor, log_prior: Tensor, target: Tensor, log_power: float) -> tuple[Tensor, Tensor]:
    """First and second derivative of each row's log loss by 1 / T, [B], for targets [B, C]."""
    p = _posterior(log_evidence, log_prior, math.exp(log_power)).exp()
    mean = (p * log_evidence).sum(1)
    return mean - (target * log_evidence).sum(1), (p * (log_evidence - mean.unsqueeze(1)).square()).sum(1)


def _classified(
    cases: Sequence[tuple[Program, Program, Values]],
    prior: Values | Sequence[float] | None,
    temperature: float,
    K: int,
    seed: int,
    progress: Callable[[int], None],
) -> Classification:
    """Evidence of rows under each class's program, laid side by side."""
    if len(cases) < 2:
        raise UserError(f"{len(cases)} class is given; at least 2 are needed to classify")
    check_range("classify", temperature=temperature, K=K)
    log_prior = _log_prior(prior, len(cases))
    found = [_evidence(*case, K, seed, progress) for case in cases]
    evidence, se = (torch.stack([each[name] for each in found], 1) for name in ("evidence", "se"))
    return Classification(evidence, se, log_prior, temperature, K)


def _evidence(
    model: Program, guide: Program, x: Values, K: int, seed: int, progress: Callable[[int], None]
) -> dict[str, Tensor]:
    if isinstance(guide, Guide) and guide.family.point_mass:
        raise Incompatible("a guide of point masses has no evidence to classify by; fit with another --family")

    def compute(rows: RowBatch) -> dict[str, Tensor]:
        log_w = log_weights(model, with_fixed_params(guide, rows.x, rows.index), rows.x, rows.index, K).log_w.double()
        return {"evidence": log_mean_exp(log_w), "se": log_mean_exp_se(log_w)}

    return map_batches(model, guide, compute, x, seed=seed, progress=progress)


def _posterior(log_evidence: Tensor, log_prior: Tensor, power: float) -> Tensor:
    """log p(y|x), [B, C], of evidence taken to a power."""
    return (log_prior + power * log_evidence.double()).log_softmax(1)


def _log_prior(prior: Values | Sequence[float] | None, classes: int) -> Tensor:
    p = torch.ones(classes) if prior is None else torch.as_tensor(prior)
    if p.shape != (classes,):
        raise UserError(f"the prior has shape {tuple(p.shape)}, but there are {classes} classes; give one number each")
    if not ((p > 0) & p.isfinite()).all():
        raise UserError(f"the prior is {p.tolist()}, but every class needs a positive number")
    return p.double().log() - p.double().sum().log()


def _checked(labels: Values, log_evidence: Tensor) -> Tensor:
    """Labels as whole numbers on the CPU, one for each row."""
    y, (rows, classes) = torch.as_tensor(labels).cpu(), log_evidence.shape
    if y.shape != (rows,):
        raise UserError(f"the labels have shape {tuple(y.shape)}, but there are {rows} rows; give one number each")
    if strange := [value for value in y.tolist() if value not in range(classes)]:
        raise UserError(f"label {strange[0]:g} is no class; give numbers from 0 to {classes - 1}")
    return y.long()


def _bins(confidence: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Calibration error of sorted confidences [B], and its error, for truth values [..., B] of being right."""
    apart = (right - confidence).tensor_split(min(BINS, len(confidence)), -1)
    share = [part.shape[-1] / len(confidence) for part in apart]
    error = sum(w * part.mean(-1).abs() for w, part in zip(share, apart, strict=True))
    variance = sum(w**2 * part.var(-1, correction=0) / part.shape[-1] for w, part in zip(share, apart, strict=True))
    return torch.as_tensor(error), torch.as_tensor(variance).sqrt()
