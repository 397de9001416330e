"""Training objectives: variational bounds with their gradient estimators, for Pyro's ``SVI``."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO
from pyro.poutine import Trace
from torch import Tensor

from pvae.errors import UserError, check_range
from pvae.inference.importance import LogWeights, score_draws
from pvae.runtime.pyro_params import Program
from pvae.stats import log_mean_exp

__all__ = ["ELBO", "AnalyticKL", "IWAE", "Renyi", "StickingTheLanding", "DReG"]


class NonFiniteLoss(ArithmeticError):
    """A log-density is NaN or infinite; the message says which."""


@dataclass(kw_only=True, eq=False)
class Objective(pyro.infer.ELBO):
    r"""Base of all objectives: a bound of each datapoint from K draws, whose mean over the data SVI maximizes.

    Arguments:
        K: draws for each datapoint.
        kl_weight: beta, the weight of log q(z|x) - log p(z) in training; 1 gives a bound of log p(x).
        warm_up: epochs over which the weight rises from 0 to beta, linearly (KL annealing).
        cycle: epochs after which the rise begins again (cyclical annealing); 0 for once.
        free_bits: nats of KL, a batch's mean over all latent dimensions, that cost nothing.

    Attributes:
        weight: the current KL weight, which `fit` sets to `weight_at` the epoch.

    Evaluation ignores the KL weight. Log-weights are taken without the scales of plates and ``poutine.scale``, which
    would distort an importance-weighted bound; a plate "data" that subsamples scales the loss.

    Source of beta: Higgins et al. (2017), *beta-VAE*, ICLR; of cycles: Fu et al. (2019), arXiv:1903.10145; of free
    bits: Kingma et al. (2016), arXiv:1606.04934.
    """

    K: int = 1
    kl_weight: float = 1.0
    warm_up: float = 0.0
    cycle: float = 0.0
    free_bits: float = 0.0

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_range(name, least=1, K=self.K)
        check_range(name, least=0, kl_weight=self.kl_weight, warm_up=self.warm_up)
        check_range(name, least=0, cycle=self.cycle, free_bits=self.free_bits)
        if 0 < self.cycle <= self.warm_up:
            longer = f"but it must be longer than the warm-up of {self.warm_up} epochs"
            raise UserError(f"{name}: cycle is {self.cycle}, {longer}")
        super().__init__(num_particles=self.K, max_plate_nesting=1)
        self.weight: float | Tensor = self.weight_at(0.0)
        self._kl_factor: float | Tensor = self.weight

    def weight_at(self, epoch: float) -> float:
        """Return the KL weight at a (fractional) epoch, counted from 0."""
        since = epoch % self.cycle if self.cycle else epoch
        return self.kl_weight * (min(1.0, since / self.warm_up) if self.warm_up else 1.0)

    def draw(self, model: Program, guide: Program, x: Tensor, index: Tensor | None = None) -> LogWeights:
        """Return the log-densities of K draws, with the gradients of the estimator."""
        return score_draws(model, guide, x, index, self.K, require_rsample=torch.is_grad_enabled())

    def bound(self, w: LogWeights) -> Tensor:
        """Return the bound of each datapoint, [B] in nats, from log-weights that bear the KL weight: the ELBO here."""
        return w.log_w.mean(0)

    def tempered(self, w: LogWeights) -> LogWeights:
        """Apply the KL weight to log p(z) and log q(z|x), or put the free bits in the place of the KL."""
        if not self.free_bits:
            self._kl_factor = self.weight
            return replace(w, log_prior=self.weight * w.log_prior, log_q=self.weight * w.log_q)
        free = (w.log_q - w.log_prior).detach().mean() < self.free_bits
        self._kl_factor = torch.where(free, 0.0, self.weight)
        constant = torch.where(free, self.weight * self.free_bits, 0.0)
        return replace(w, log_prior=self._kl_factor * w.log_prior, log_q=self._kl_factor * w.log_q + constant)

    def tensor_loss(self, model: Program, guide: Program, x: Tensor, index: Tensor | None = None) -> Tensor:
        """Return minus the bound, summed over the batch, in nats, without reading its value (for tracing)."""
        w = self.tempered(self.draw(model, guide, x, index))
        return -w.scale * self.bound(w).sum()

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return minus the bound, summed over the batch, in nats; raise `NonFiniteLoss` if it is not finite."""
        w = self.tempered(self.draw(model, guide, *args, **kwargs))
        loss = -w.scale * self.bound(w).sum()
        if not math.isfinite(loss.item()):
            parts = {"log p(x|z)": w.log_lik, "log p(z)": w.log_prior, "log q(z|x)": w.log_q}
            broken = [name for name, values in parts.items() if not values.isfinite().all()]
            raise NonFiniteLoss(f"{broken[0] if broken else 'the bound'} is not finite")
        return loss

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        raise NotImplementedError("pvae.inference.importance scores the traces of this objective")

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Return the loss as a number."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Return the loss as a number and add its gradients to those of the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()


class ELBO(Objective, Trace_ELBO):
    r"""Evidence lower bound (ELBO), :math:`E_q[\log p(x|z)] - \beta\, E_q[\log q(z|x) - \log p(z)]`, over K draws.

    Arguments: see `Objective`. If ``plain`` (one draw, no KL weight), it is Pyro's ``Trace_ELBO``, which also takes
    latents that are not reparametrized.

    Source: Kingma and Welling (2014), *Auto-Encoding Variational Bayes*, arXiv:1312.6114.
    """

    @property
    def plain(self) -> bool:
        return (self.K, self.kl_weight, self.warm_up, self.free_bits) == (1, 1, 0, 0)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        kind: Any = Trace_ELBO if self.plain else Objective
        return kind.differentiable_loss(self, model, guide, *args, **kwargs)

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        kind: Any = Trace_ELBO if self.plain else Objective
        return kind.loss(self, model, guide, *args, **kwargs)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        model_trace, guide_trace = Trace_ELBO._get_trace(self, model, guide, args, kwargs)
        for trace in (guide_trace, model_trace):
            for name, site in trace.nodes.items():
                if site["type"] == "sample" and not math.isfinite(site["log_prob_sum"].item()):
                    raise NonFiniteLoss(f"the log-density of site '{name}' is not finite")
        return model_trace, guide_trace


class AnalyticKL(Objective):
    r"""ELBO with an analytic KL, :math:`E_q[\log p(x|z)] - \beta\, KL(q(z|x) \| p(z))`. Arguments: see `Objective`.

    Raises:
        UserError: in training, where family and prior have no KL in closed form; it never falls back to sampling.

    Source: Kingma and Welling (2014), arXiv:1312.6114, appendix B.
    """

    def draw(self, model: Program, guide: Program, x: Tensor, index: Tensor | None = None) -> LogWeights:
        return score_draws(model, guide, x, index, self.K, require_rsample=torch.is_grad_enabled(), analytic_kl=True)


@dataclass(kw_only=True, eq=False)
class IWAE(Objective):
    r"""Importance-weighted bound (IWAE), :math:`E[\log \frac1K \sum_k w_k]`, :math:`w_k = p(x, z_k) / q(z_k|x)`.

    Arguments: see `Objective`; K is 5 by default.

    Source: Burda, Grosse, Salakhutdinov (2016), *Importance Weighted Autoencoders*, arXiv:1509.00519.
    """

    K: int = 5

    def bound(self, w: LogWeights) -> Tensor:
        return log_mean_exp(w.log_w)


@dataclass(kw_only=True, eq=False)
class Renyi(Objective):
    r"""Renyi bound, :math:`\frac1{1 - \alpha} \log \frac1K \sum_k w_k^{1 - \alpha}`: IWAE at 0, ELBO near 1.

    Arguments:
        alpha: order, not 1; above 1 and below 0 it is no lower bound of the evidence.

    Other arguments: see `Objective`; K is 5 by default.

    Source: Li and Turner (2016), *Renyi Divergence Variational Inference*, arXiv:1602.02311.
    """

    alpha: float = 0.5
    K: int = 5

    def __post_init__(self) -> None:
        if self.alpha == 1 or not math.isfinite(self.alpha):
            raise UserError(
                f"Renyi: alpha is {self.alpha}, but it must be finite and not 1, where the bound is the ELBO"
            )
        super().__post_init__()

    def bound(self, w: LogWeights) -> Tensor:
        return log_mean_exp((1 - self.alpha) * w.log_w) / (1 - self.alpha)


class StickingTheLanding(Objective):
    r"""ELBO with the path gradient (STL), :math:`\nabla_\phi z\, \nabla_z \log w`, without the score of q.

    At the exact posterior the gradient of each draw is zero, not only their mean. Arguments: see `Objective`.

    Source: Roeder, Wu, Duvenaud (2017), *Sticking the Landing*, arXiv:1703.09194.
    """

    def draw(self, model: Program, guide: Program, x: Tensor, index: Tensor | None = None) -> LogWeights:
        return score_draws(model, guide, x, index, self.K, path_gradient=True)


class DReG(IWAE):
    r"""IWAE with the doubly reparametrized gradient, :math:`\sum_k \tilde w_k^2 \nabla_\phi z_k \nabla_z \log w_k`.

    The gradient of the model's parameters is that of IWAE. With a KL weight beta, :math:`\tilde w^2` becomes
    :math:`\tilde w (1 - \beta + \beta \tilde w)`. Arguments: see `IWAE`.

    Source: Tucker, Lawson, Gu, Maddison (2019), *Doubly Reparameterized Gradient Estimators*, arXiv:1810.04152.
    """

    def draw(self, model: Program, guide: Program, x: Tensor, index: Tensor | None = None) -> LogWeights:
        self._factor: Tensor | None = None
        return score_draws(model, guide, x, index, self.K, hook=self._hook, path_gradient=True)

    def _hook(self, z: Tensor, event_dim: int) -> Tensor:
        """Return the draw with a hook that multiplies its gradient by a factor known only in the backward pass."""
        if not z.requires_grad:
            return z
        z = z.view_as(z)

        def rescale(gradient: Tensor) -> Tensor:
            assert self._factor is not None
            K, B = self._factor.shape
            lead = (K,) if K > 1 else ()
            inner = (1,) * (gradient.dim() - event_dim - 1 - len(lead))
            return gradient * self._factor.view(*lead, *inner, B, *[1] * event_dim)

        z.register_hook(rescale)
        return z

    def bound(self, w: LogWeights) -> Tensor:
        normalized = w.log_w.detach().softmax(0)
        # A point mass has no score of q to turn into a path, nor have free bits in the KL's place.
        beta = self._kl_factor if w.log_q.requires_grad and not w.point_mass else 0.0
        self._factor = 1 - beta + beta * normalized
        surrogate = (normalized * (w.log_lik + w.log_prior - self._factor * w.log_q)).sum(0)
        return log_mean_exp(w.log_w).detach() + surrogate - surrogate.detach()
