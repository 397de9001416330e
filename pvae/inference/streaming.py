"""Running totals over chunks of log-weights: bounds, their errors and diagnostics in memory that K does not change."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pvae.inference.importance import LogWeights
from pvae.stats import k_hat_of_tail, tail_length

# Draws below which k-hat has no tail to look at.
MIN_DRAWS_FOR_K_HAT = 30


class RunningMoments:
    """Mean and variance of values [K, B] over draws that come in chunks.

    Source: Chan, Golub, LeVeque (1983), *Algorithms for Computing the Sample Variance*, The American Statistician 37.

    >>> found = RunningMoments()
    >>> for part in torch.arange(10.0).view(10, 1).split(4): found.add(part)
    >>> found.mean.item(), round(found.se.item(), 4)
    (4.5, 0.9574)
    """

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, values: Tensor) -> None:
        """Count a chunk [k, B] in."""
        values = values.double()
        mean, size = values.mean(0), len(values)
        squares = ((values - mean) ** 2).sum(0)
        if not self.count:
            self.count, self.mean, self.squares = size, mean, squares
            return
        total, apart = self.count + size, mean - self.mean
        self.squares = self.squares + squares + apart**2 * (self.count * size / total)
        # Infinite values, weights of 0, have an infinite mean and no variance.
        self.mean = torch.where(apart.isfinite(), self.mean + apart * (size / total), self.mean + mean)
        self.count = total

    @property
    def se(self) -> Tensor:
        """Standard error of the mean, [B]; NaN for a single draw."""
        if self.count < 2:
            return torch.full_like(self.mean, torch.nan)
        return (self.squares / (self.count - 1) / self.count).sqrt()


class StreamingWeights:
    r"""What K log-weights of each datapoint tell, from their chunks; sums are in double precision.

    Arguments:
        K: the number of draws to come.
        tail: keep the largest weights, for k-hat.

    The largest :math:`O(\sqrt K)` weights of a datapoint are kept, and nothing else that grows with K.

    >>> from pvae.inference.importance import LogWeights
    >>> found = StreamingWeights(4)
    >>> for w in torch.tensor([0.0, 1.0, 2.0, 3.0]).view(4, 1).split(2): found.add(LogWeights(w, 0 * w, 0 * w))
    >>> found.elbo, found.iwae
    (tensor([1.5000]), tensor([2.0539]))
    """

    def __init__(self, K: int, *, tail: bool = True) -> None:
        self.K, self.kept = K, tail_length(K) + 1 if tail and K >= MIN_DRAWS_FOR_K_HAT else 0
        self.log_w, self.log_lik, self.rest = RunningMoments(), RunningMoments(), RunningMoments()
        self.top, self.waiting = torch.empty(0), list[Tensor]()
        self.largest, self.first, self.second = torch.tensor(-torch.inf), torch.zeros(()), torch.zeros(())

    def add(self, w: LogWeights) -> None:
        """Count a chunk in."""
        log_w = w.log_w
        self.dtype = log_w.dtype
        self.log_w.add(log_w)
        self.log_lik.add(w.log_lik)
        self.rest.add(w.log_prior - w.log_q)
        self._add_weights(log_w.double())
        if self.kept:
            self.waiting.append(log_w)
            if sum(map(len, self.waiting)) >= self.kept:
                self._sort()

    def _add_weights(self, log_w: Tensor) -> None:
        largest = torch.maximum(self.largest.to(log_w), log_w.amax(0))
        # Where every weight so far is 0, any finite number serves to measure from.
        origin = torch.where(largest.isinf(), 0.0, largest)
        shrink = torch.where(self.largest.to(log_w).isinf(), 0.0, (self.largest.to(log_w) - origin).exp())
        weights = (log_w - origin).exp()
        self.first = self.first.to(log_w) * shrink + weights.sum(0)
        self.second = self.second.to(log_w) * shrink**2 + (weights**2).sum(0)
        self.largest = largest

    def _sort(self) -> None:
        """Keep the largest of what waits; sorting is put off until it is worth its while."""
        everything = torch.cat([self.top.to(self.waiting[0]).view(-1, self.waiting[0].shape[1]), *self.waiting])
        self.top, self.waiting = everything.topk(min(self.kept, len(everything)), 0).values, []

    @property
    def elbo(self) -> Tensor:
        """Mean log-weight, [B] nats."""
        return self.log_w.mean.to(self.dtype)

    @property
    def elbo_se(self) -> Tensor:
        """Its Monte Carlo error, [B]."""
        return self.log_w.se.to(self.dtype)

    @property
    def iwae(self) -> Tensor:
        """Logarithm of the mean weight, [B] nats."""
        return (self.largest + self.first.log() - math.log(self.log_w.count)).to(self.dtype)

    @property
    def iwae_se(self) -> Tensor:
        """Its Monte Carlo error by the delta method, [B]; far too small where k-hat is above 0.7."""
        n = self.log_w.count
        spread = (self.second * n / self.first**2 - 1).clamp(min=0) / max(n - 1, 1)
        return (spread.sqrt() if n > 1 else spread * torch.nan).to(self.dtype)

    @property
    def ess(self) -> Tensor:
        """Kish's effective number of draws, [B]."""
        return (self.first**2 / self.second).to(self.dtype)

    @property
    def kl(self) -> Tensor:
        """Mean of log q - log p(z), [B] nats."""
        return -self.rest.mean.to(self.dtype)

    @property
    def reconstruction(self) -> Tensor:
        """Mean of log p(x|z), [B] nats."""
        return self.log_lik.mean.to(self.dtype)

    @property
    def k_hat(self) -> Tensor:
        """Pareto shape of the weights, [B], on the weights' device; see `k_hat`."""
        if self.waiting:
            self._sort()
        return k_hat_of_tail(self.top, self.K).to(self.top.device)
