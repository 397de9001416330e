"""Streaming statistics of log-weights: bounds, errors and diagnostics in memory that K does not change."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pvae.inference.importance import LogWeights
from pvae.stats import k_hat_of_tail, tail_length

MIN_DRAWS_FOR_K_HAT = 30  # fewer have too short a tail


class RunningMoments:
    """Running mean and variance of values [K, B] over draws, by Welford's updates for chunks.

    ``m2`` is the sum of the draws' squared differences from their mean, [B].

    Source: Chan, Golub, LeVeque (1983), *Algorithms for Computing the Sample Variance*, The American Statistician 37.

    >>> moments = RunningMoments()
    >>> for values in torch.arange(10.0).view(10, 1).split(4): moments.add(values)
    >>> moments.mean.item(), round(moments.se.item(), 4)
    (4.5, 0.9574)
    """

    def __init__(self) -> None:
        self.count, self.mean, self.m2 = 0, torch.zeros(()), torch.zeros(())

    def add(self, values: Tensor) -> None:
        """Add a chunk of values, [k, B]."""
        values = values.double()
        mean, size = values.mean(0), len(values)
        m2 = ((values - mean) ** 2).sum(0)
        if not self.count:
            self.count, self.mean, self.m2 = size, mean, m2
            return
        total, delta = self.count + size, mean - self.mean
        self.m2 = self.m2 + m2 + delta**2 * (self.count * size / total)
        # Infinite values, weights of 0, have an infinite mean and no variance.
        self.mean = torch.where(delta.isfinite(), self.mean + delta * (size / total), self.mean + mean)
        self.count = total

    @property
    def se(self) -> Tensor:
        """Standard error of the mean, [B]; NaN for a single draw."""
        unknown = torch.full_like(self.mean, torch.nan)
        return (self.m2 / (self.count - 1) / self.count).sqrt() if self.count > 1 else unknown


class StreamingWeights:
    r"""Streaming bounds and diagnostics of the K log-weights of each datapoint; sums are in double precision.

    Arguments:
        K: the number of draws to come.
        tail: keep the largest :math:`O(\sqrt K)` weights of each datapoint for k-hat. Nothing else grows with K.

    >>> from pvae.inference import LogWeights
    >>> weights = StreamingWeights(4)
    >>> for w in torch.tensor([0.0, 1.0, 2.0, 3.0]).view(4, 1).split(2): weights.add(LogWeights(w, 0 * w, 0 * w))
    >>> weights.elbo, weights.iwae
    (tensor([1.5000]), tensor([2.0539]))
    """

    def __init__(self, K: int, *, tail: bool = True) -> None:
        self.K, self.tail_size = K, tail_length(K) + 1 if tail and K >= MIN_DRAWS_FOR_K_HAT else 0
        self.log_w, self.log_lik, self.negative_kl = RunningMoments(), RunningMoments(), RunningMoments()
        self.tail, self.pending = torch.empty(0), list[Tensor]()
        # Sums of weights and of their squares, in units of the largest.
        self.max_log_w, self.sum_w, self.sum_w2 = torch.tensor(-torch.inf), torch.zeros(()), torch.zeros(())

    def add(self, w: LogWeights) -> None:
        """Add a chunk of log-weights, [k, B]."""
        self.dtype = w.log_w.dtype
        self.log_w.add(w.log_w)
        self.log_lik.add(w.log_lik)
        self.negative_kl.add(w.log_prior - w.log_q)
        self._add_weights(w.log_w.double())
        if self.tail_size:
            self.pending.append(w.log_w)
            if sum(map(len, self.pending)) >= self.tail_size:
                self._merge_tail()

    def _add_weights(self, log_w: Tensor) -> None:
        before = self.max_log_w.to(log_w)
        self.max_log_w = torch.maximum(before, log_w.amax(0))
        # If every weight so far is 0, any finite number serves as the unit.
        unit = torch.where(self.max_log_w.isinf(), 0.0, self.max_log_w)
        shrink = torch.where(before.isinf(), 0.0, (before - unit).exp())
        weights = (log_w - unit).exp()
        self.sum_w = self.sum_w.to(log_w) * shrink + weights.sum(0)
        self.sum_w2 = self.sum_w2.to(log_w) * shrink**2 + (weights**2).sum(0)

    def _merge_tail(self) -> None:
        # Only once they are as many as the tail holds, so that sorting pays.
        values = torch.cat([self.tail.to(self.pending[0]).view(-1, self.pending[0].shape[1]), *self.pending])
        self.tail, self.pending = values.topk(min(self.tail_size, len(values)), 0).values, []

    @property
    def elbo(self) -> Tensor:
        """Evidence lower bound (ELBO), the mean log-weight, [B] nats."""
        return self.log_w.mean.to(self.dtype)

    @property
    def elbo_se(self) -> Tensor:
        """Monte Carlo error of the ELBO, [B]."""
        return self.log_w.se.to(self.dtype)

    @property
    def iwae(self) -> Tensor:
        """Importance-weighted bound (IWAE-K), the logarithm of the mean weight, [B] nats."""
        return (self.max_log_w + self.sum_w.log() - math.log(self.log_w.count)).to(self.dtype)

    @property
    def iwae_se(self) -> Tensor:
        """Monte Carlo error of IWAE-K by the delta method, [B]; far too small where k-hat is above 0.7."""
        n = self.log_w.count
        relative_variance = (self.sum_w2 * n / self.sum_w**2 - 1).clamp(min=0) / max(n - 1, 1)
        return (relative_variance.sqrt() if n > 1 else relative_variance * torch.nan).to(self.dtype)

    @property
    def ess(self) -> Tensor:
        """Kish's effective sample size (ESS), [B]."""
        return (self.sum_w**2 / self.sum_w2).to(self.dtype)

    @property
    def kl(self) -> Tensor:
        """Mean of log q - log p(z), [B] nats."""
        return -self.negative_kl.mean.to(self.dtype)

    @property
    def reconstruction(self) -> Tensor:
        """Mean of log p(x|z), [B] nats."""
        return self.log_lik.mean.to(self.dtype)

    @property
    def k_hat(self) -> Tensor:
        """Pareto shape of the weights, [B], on their device; see `pvae.stats.k_hat`."""
        if self.pending:
            self._merge_tail()
        return k_hat_of_tail(self.tail, self.K).to(self.tail.device)
