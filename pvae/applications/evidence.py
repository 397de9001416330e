"""Evidence of rows by the guide's importance-weighted draws, and where these fail by the first proposal that passes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pvae.errors import UserError, nearest, param
from pvae.inference.batching import ROWS, RowBatch
from pvae.inference.families import Family
from pvae.inference.guides import Guide
from pvae.inference.streaming import MIN_DRAWS_FOR_K_HAT
from pvae.runtime.pyro_params import Program
from pvae.samplers.log_joint import LogJoint
from pvae.samplers.row_posterior import ACCURACIES, FLAT, HELD, Accuracy, draw_rows
from pvae.stats import (
    effective_sample_size,
    k_hat,
    k_hat_threshold,
    log_mean_exp,
    log_mean_exp_se,
)

Proposal = tuple[Family, Tensor] | None


class RowEvidence(NamedTuple):
    """Estimates of log p(x), their Monte Carlo errors, and whether their weights passed the checks, [B] each."""

    evidence: Tensor
    se: Tensor
    reliable: Tensor


def evidence_plan(accuracy: str | Accuracy | None) -> Accuracy | None:
    """Return what an accuracy asks of the draws, without chains, which give no evidence; None for none."""
    if accuracy is None:
        return None
    if not isinstance(accuracy, Accuracy) and accuracy not in ACCURACIES:
        raise UserError(f"{param('accuracy')} is '{accuracy}'{nearest(accuracy, ACCURACIES)}")
    return (accuracy if isinstance(accuracy, Accuracy) else ACCURACIES[accuracy])._replace(length=0)


def batch_size(plan: Accuracy | None, guide: Program) -> int:
    """Return how many rows' draws are held together, at most."""
    return max(1, min(ROWS, HELD // (plan.K * guide.sites.dim))) if plan and isinstance(guide, Guide) else ROWS


def fix_params(guide: Program, rows: RowBatch) -> tuple[Program, Proposal]:
    """Return a guide whose q_params for these rows are computed once, and its family with them; None if it has none."""
    if not isinstance(guide, Guide):
        return guide, None
    q_params = guide.params(rows.x, rows.index).detach()
    return guide.with_params(q_params), (guide.family, q_params)


def row_evidence(
    model: Program, guide: Program, q: Proposal, rows: RowBatch, log_w: Tensor, plan: Accuracy | None
) -> RowEvidence:
    """Estimate the evidence of a batch by the log weights [K, B] of a guide's draws (IWAE-K), and check them.

    Weights pass where k-hat is small or nearly all draws are effective; fewer than 30 can't be checked. With a plan the
    rows whose weights fail go on to the proposals of `posterior`: a Gaussian fit, a mixture.
    """
    K, log_w = len(log_w), log_w.double()
    reliable = torch.zeros(log_w.shape[1], dtype=torch.bool, device=log_w.device)
    if K >= MIN_DRAWS_FOR_K_HAT:
        ess = effective_sample_size(log_w)
        passes = (k_hat(log_w) < k_hat_threshold(K)) & (ess >= (plan.ess if plan else 0))
        reliable = passes | (ess >= FLAT * K)
    estimate, failed = RowEvidence(log_mean_exp(log_w), log_mean_exp_se(log_w), reliable), (~reliable).nonzero()[:, 0]
    if plan is None or not len(failed):
        return estimate
    target = LogJoint(model, rows.x, rows.index, guide.sites if isinstance(guide, Guide) else None).rows(failed)
    draws = draw_rows(target, q and (q[0], q[1][failed]), plan, seed=rows.seed)
    se = (1 / draws.ess - 1 / plan.K).clamp(min=0).sqrt()
    mended = draws.log_evidence, se, draws.reliable
    return RowEvidence._make(part.index_copy(0, failed, new) for part, new in zip(estimate, mended, strict=True))
