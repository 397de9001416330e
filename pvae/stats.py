"""Estimates and their standard errors: arrays in, arrays out; nothing here knows of models."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Estimate", "effective_sample_size", "log_mean_exp", "log_mean_exp_se", "mean_se"]


class Estimate(NamedTuple):
    """A mean over datapoints and its standard error, in the units of what was averaged."""

    mean: float
    se: float


def mean_se(values: Tensor) -> Estimate:
    r"""Mean of independent values and its standard error, :math:`s / \sqrt{n}`.

    Arguments:
        values: one value per datapoint, [B]; each may carry Monte Carlo noise of its own, which the
            spread over datapoints then includes.

    >>> mean_se(torch.tensor([1.0, 2.0, 3.0, 4.0])).mean
    2.5
    """
    values = values.double()
    n = values.numel()
    se = values.std().item() / math.sqrt(n) if n > 1 else math.nan
    return Estimate(values.mean().item(), se)


def log_mean_exp(log_w: Tensor, dim: int = 0) -> Tensor:
    r""":math:`\log \frac1K \sum_k e^{\log w_k}`, without overflow.

    >>> log_mean_exp(torch.zeros(5, 2))
    tensor([0., 0.])
    """
    return torch.logsumexp(log_w, dim) - math.log(log_w.shape[dim])


def log_mean_exp_se(log_w: Tensor, dim: int = 0) -> Tensor:
    r"""Standard error of :func:`log_mean_exp` by the delta method, :math:`s_w / (\bar w \sqrt K)`.

    >>> log_mean_exp_se(torch.zeros(5, 2))
    tensor([0., 0.])
    """
    w = (log_w - log_w.amax(dim, keepdim=True)).exp()
    if log_w.shape[dim] == 1:
        return torch.full_like(w.mean(dim), torch.nan)  # one draw tells nothing of its own error
    return w.std(dim) / w.mean(dim) / math.sqrt(log_w.shape[dim])


def effective_sample_size(log_w: Tensor, dim: int = 0) -> Tensor:
    r"""Kish's effective number of samples, :math:`(\sum_k w_k)^2 / \sum_k w_k^2`, between 1 and K.

    Source: Kish (1965), *Survey Sampling*.

    >>> effective_sample_size(torch.zeros(5))
    tensor(5.)
    """
    w = (log_w - log_w.amax(dim, keepdim=True)).exp()
    return w.sum(dim) ** 2 / (w**2).sum(dim)
