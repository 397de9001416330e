"""Likelihoods p(x|z): modules that map the decoder's outputs eta to a distribution over x."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, get_args

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import constraints

from pvae.distributions import counts, univariate
from pvae.errors import UserError, check_range, nearest

__all__ = [
    "Bernoulli",
    "ContinuousBernoulli",
    "Gaussian",
    "StudentT",
    "Laplace",
    "Beta",
    "DiscretizedLogistic",
    "Categorical",
    "Poisson",
    "NegativeBinomial",
    "ZeroInflatedNegativeBinomial",
]

Spread = Literal["fixed", "shared", "decoder"]


def positive(output: Tensor, least: float) -> Tensor:
    """Map a decoder's output to positive values by a softplus: 1 + least at 0, linear above, ``least`` far below."""
    return least + F.softplus(output, beta=math.log(2))


class Likelihood(nn.Module):
    """Base class of likelihoods. Calling one with eta [..., P * D] returns p(x|z) over x [..., D].

    eta holds the first parameter of all D entries, then the second, and so on; x is floating-point, counts too.

    Attributes:
        support: the values that one entry of x may take.
        base_measure: of p(x|z), a mass (counting measure) or a density (Lebesgue measure), whose nats don't compare.
        params_per_value: P, the number of decoder outputs for each entry of x.
    """

    support: constraints.Constraint
    base_measure: ClassVar[Literal["mass", "density"]]
    params_per_value: int = 1


class Bernoulli(Likelihood):
    r"""Bernoulli likelihood of binary values, :math:`\prod_d \sigma(\eta_d)^{x_d} (1 - \sigma(\eta_d))^{1 - x_d}`.

    Shapes: eta [..., D] are log-odds; x [..., D] is 0 or 1. A probability mass.

    >>> Bernoulli()(torch.zeros(3, 64)).log_prob(torch.ones(3, 64)).shape
    torch.Size([3])
    """

    support = constraints.boolean
    base_measure = "mass"

    def forward(self, eta: Tensor) -> dist.TorchDistribution:
        return univariate.Bernoulli(logits=eta).to_event(1)


class ContinuousBernoulli(Likelihood):
    r"""Continuous Bernoulli likelihood of values in [0, 1].

    .. math:: p(x|z) = \prod_d C(\eta_d)\, \sigma(\eta_d)^{x_d} (1 - \sigma(\eta_d))^{1 - x_d}

    C(eta) normalizes the density; the Bernoulli likelihood of grey values lacks it, so that its nats mean nothing.

    Shapes: eta [..., D] are log-odds; x [..., D] is in [0, 1]. A probability density.

    Source: Loaiza-Ganem and Cunningham (2019), *The Continuous Bernoulli*, arXiv:1907.06845.

    >>> ContinuousBernoulli()(torch.zeros(64)).log_prob(torch.rand(3, 64))
    tensor([0., 0., 0.])
    """

    support = constraints.unit_interval
    base_measure = "density"

    def forward(self, eta: Tensor) -> dist.TorchDistribution:
        return univariate.ContinuousBernoulli(eta).to_event(1)


class _LocationScale(Likelihood):
    """Base class of location-scale likelihoods: the decoder gives the location; arguments as of `Gaussian`."""

    support = constraints.real
    base_measure = "density"
    log_scale: Tensor

    def __init__(self, *, scale: float = 1.0, spread: Spread = "shared") -> None:
        super().__init__()
        check_range(type(self).__name__, scale=scale)
        if spread not in get_args(Spread):
            raise UserError(f"{type(self).__name__}: unknown spread '{spread}'{nearest(str(spread), get_args(Spread))}")
        self.spread, self.params_per_value = spread, 2 if spread == "decoder" else 1
        log_scale = torch.tensor(math.log(scale))
        if spread == "shared":
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale, persistent=False)

    def location_and_scale(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        if self.spread != "decoder":
            return eta, self.log_scale.exp()
        location, output = eta.chunk(2, -1)
        return location, self.log_scale.exp() * positive(output, 0.001)


class Gaussian(_LocationScale):
    r"""Gaussian likelihood of real values, :math:`p(x|z) = \prod_d N(x_d; \eta_d, s^2)`.

    Arguments:
        scale: s at the start of training, in the data's units.
        spread: "fixed" keeps s, "shared" learns one s for all entries, and under "decoder" each entry's s is
            ``scale`` times a positive function of a second output, at least ``scale / 1000``.

    Shapes: eta [..., D] are means, or [..., 2 D] means and scales; x [..., D] is real. A probability density.

    Raises:
        UserError: the scale is not positive, or an unknown spread.

    >>> Gaussian(scale=0.5)(torch.zeros(3, 64)).log_prob(torch.zeros(3, 64)).shape
    torch.Size([3])
    """

    def forward(self, eta: Tensor) -> dist.TorchDistribution:
        return dist.Normal(*self.location_and_scale(eta)).to_event(1)


class StudentT(_LocationScale):
    r"""Student t likelihood of real values with outliers, :math:`p(x|z) = \prod_d t_\nu(x_d; \eta_d, s)`.

    Arguments:
        df: nu, degrees of freedom; fewer make the tails heavier, and in the limit of many it is the Gaussian.
        scale, spread: as in `Gaussian`; the standard deviation is s sqrt(nu / (nu - 2)).

    Shapes: eta [..., D] are locations, or [..., 2 D] locations and scales; x [..., D] is real. A probability density.

    Raises:
        UserError: df or the scale is not positive, or an unknown spread.

    Source: Takahashi et al. (2018), *Student-t Variational Autoencoder for Robust Density Estimation*, IJCAI.

    >>> StudentT(df=3.0)(torch.zeros(3, 64)).log_prob(torch.zeros(3, 64)).shape
    torch.Size([3])
    """

    def __init__(self, *, df: float = 4.0, scale: float = 1.0, spread: Spread = "shared") -> None:
        super().__init__(scale=scale, spread=spread)
        check_range(type(self).__name__, df=df)
        self.df = df

    def forward(self, eta: Tensor) -> dist.TorchDistribution:
        location, scale = self.location_and_scale(eta)
        return univariate.StudentT(location.new_tensor(self.df), location, scale).to_event(1)


class Laplace(_LocationScale):
    r"""Laplace likelihood of real values (absolute errors), :math:`p(x|z) = \prod_d e^{-|x_d - \eta_d| / s} / 2 s`.

    Arguments:
        scale, spread: as in `Gaussian`; the standard deviation is s sqrt(2).

    Shapes: eta [..., D] are medians, or [..., 2 D] medians and scales; x [..., D] is real. A probability density.

    Raises:
        UserError: the scale is not positive, or an unknown spread.

    >>> Laplace()(torch.zeros(3, 64)).log_prob(torch.zeros(3, 64)).shape
    torch.Size([3])
    """

    def forward(self, eta: Tensor) -> dist.TorchDistribution:
        return dist.Laplace(*self.location_and_scale(eta)).to_event(1)


class Beta(Likelihood):
    r"""Beta likelihood of values in [0, 1], :math:`\prod_d \mathrm{Beta}(y_d; a_d, b_d) / w`.

    With y = (x + m) / w: a margin m widens the interval to w = 1 + 2 m, so that exact zeros and ones have a density.

    Arguments:
        margin: m.

    Shapes: eta [..., 2 D] give the concentrations a and b, positive(eta) and at least 0.1; x [..., D] is in
    [-m, 1 + m]. A probability density.

    Raises:
        UserError: the margin is not positive.

    >>> Beta()(torch.zeros(3, 2 * 64)).log_prob(torch.ones(3, 64)).isfinite().all()
    tensor(True)
    """

    base_measure = "density"
    params_per_value = 2

    def __init__(self, *, margin: float = 0.005) -> None:
        super().__init__()
        check_range(type(self).__name__, margin=margin)
        self.margin, self.support = margin, constraints.interval(-margin, 1 + margin)

    def forward(self, eta: Tensor) -> dist.TorchDistribution:
        a, b = positive(eta, 0.1).chunk(2, -1)
        low, width = a.new_full((), -self.margin), a.new_full((), 1 + 2 * self.margin)
        return dist.AffineBeta(a, b, low, width).to_event(1)


class _Levels(Likelihood):
    """Base class of likelihoods of the integers from 0 to levels - 1."""

    base_measure = "mass"

    def __init__(self, levels: int) -> None:
        super().__init__()
        check_range(type(self).__name__, least=2, levels=levels)
        self.levels, self.support = levels, constraints.integer_interval(0, levels - 1)


class DiscretizedLogistic(_Levels):
    r"""Discretized logistic likelihood of ordered levels, :math:`P(x_d = k|z) = F_d(k + \frac12) - F_d(k - \frac12)`.

    :math:`F_d(t) = \sigma((t - m_d) / s_d)`; the first and the last level have the mass beyond them. Several
    components form a mixture for each entry.

    Arguments:
        levels: L; 256 for the bytes of an image.
        components: C.

    Shapes: eta [..., 2 D] give m = h (1 + output) and s = h positive(output) with h = (L - 1) / 2, so that
    outputs from -1 to 1 span all levels and s is at least h / 1000; under C > 1 eta [..., 3 C D] give logits of
    the weights, m and s, each [C, D]; x [..., D] is 0, 1, ..., L - 1. A probability mass.

    Raises:
        UserError: fewer than 2 levels, or fewer than 1 component.

    Source: Kingma et al. (2016), *Improving Variational Inference with Inverse Autoregressive Flow*,
    arXiv:1606.04934; mixtures: Salimans et al. (2017), *PixelCNN++*, arXiv:1701.05517.

    >>> DiscretizedLogistic(components=5)(torch.zeros(3, 15 * 64)).log_prob(torch.full((3, 64), 255.0)).shape
    torch.Size([3])
    """

    def __init__(self, *, levels: int = 256, components: int = 1) -> None:
        super().__init__(levels)
        check_range(type(self).__name__, least=1, components=components)
        self.components = components
        self.params_per_value = 2 if components == 1 else 3 * components

    def forward(self, eta: Tensor) -> dist.TorchDistribution:
        if self.components == 1:
            return self._logistic(*eta.chunk(2, -1)).to_event(1)
        weights, *outputs = eta.unflatten(-1, (3, self.components, -1)).transpose(-1, -2).unbind(-3)
        return univariate.Mixture(dist.Categorical(logits=weights), self._logistic(*outputs)).to_event(1)

    def _logistic(self, location: Tensor, scale: Tensor) -> univariate.DiscretizedLogistic:
        half = (self.levels - 1) / 2
        return univariate.DiscretizedLogistic(half * (1 + location), half * positive(scale, 0.001), self.levels)


class Categorical(_Levels):
    r"""Categorical likelihood of levels without order, :math:`P(x_d = k|z) = e^{\eta_{kd}} / \sum_l e^{\eta_{ld}}`.

    Arguments:
        levels: L; the decoder's last layer grows with it.

    Shapes: eta [..., L D] are logits, [L, D] flattened; x [..., D] is 0, 1, ..., L - 1. A probability mass.

    Raises:
        UserError: fewer than 2 levels.

    Source: van den Oord et al. (2016), *Pixel Recurrent Neural Networks*, arXiv:1601.06759.

    >>> Categorical(levels=4)(torch.zeros(3, 4 * 64)).mean.unique()
    tensor([1.5000])
    """

    def __init__(self, *, levels: int = 256) -> None:
        super().__init__(levels)
        self.params_per_value = levels

    def forward(self, eta: Tensor) -> dist.TorchDistribution:
        return univariate.Categorical(eta.unflatten(-1, (self.levels, -1)))


class _Counts(Likelihood):
    """Base class of likelihoods of counts 0, 1, 2, ..."""

    support = constraints.nonnegative_integer
    base_measure = "mass"


class Poisson(_Counts):
    r"""Poisson likelihood of counts, :math:`\prod_d r_d^{x_d} e^{-r_d} / x_d!` with :math:`\log r_d = \eta_d`.

    Shapes: eta [..., D] are log rates, exact for \|eta\| up to 20 and continued by asinh beyond; x [..., D] is
    0, 1, 2, ... A probability mass.

    >>> Poisson()(torch.zeros(3, 64)).log_prob(torch.ones(3, 64))
    tensor([-64., -64., -64.])
    """

    def forward(self, eta: Tensor) -> dist.TorchDistribution:
        return counts.Poisson(eta).to_event(1)


class NegativeBinomial(_Counts):
    r"""Negative binomial likelihood of overdispersed counts, of mean m and variance :math:`m + m^2 / r`.

    :math:`\mathrm{NB}(x; m, r) = \frac{\Gamma(x + r)}{\Gamma(r)\, x!} (1 - q)^r q^x` with :math:`q = m / (m + r)`.

    Shapes: eta [..., 2 D] are log m and log r (log inverse dispersion), treated as the log rates of
    `Poisson`; x [..., D] is 0, 1, 2, ... A probability mass.

    Source: Lopez et al. (2018), *Deep generative modeling for single-cell transcriptomics*, Nature Methods 15,
    doi:10.1038/s41592-018-0229-2.

    >>> NegativeBinomial()(torch.zeros(3, 2 * 64)).mean.unique()
    tensor([1.])
    """

    params_per_value = 2

    def forward(self, eta: Tensor) -> dist.TorchDistribution:
        return counts.NegativeBinomial(*eta.chunk(2, -1)).to_event(1)


class ZeroInflatedNegativeBinomial(_Counts):
    r"""Zero-inflated negative binomial likelihood (ZINB).

    .. math:: p(x|z) = \prod_d \pi_d [x_d = 0] + (1 - \pi_d)\, \mathrm{NB}(x_d; m_d, r_d)

    Shapes: eta [..., 3 D] are log m and log r of `NegativeBinomial` and the log-odds of pi; x [..., D] is
    0, 1, 2, ... A probability mass.

    Source: Lopez et al. (2018), as of `NegativeBinomial`.

    >>> ZeroInflatedNegativeBinomial()(torch.zeros(3, 3 * 64)).log_prob(torch.zeros(3, 64)).shape
    torch.Size([3])
    """

    params_per_value = 3

    def forward(self, eta: Tensor) -> dist.TorchDistribution:
        return counts.ZeroInflatedNegativeBinomial(*eta.chunk(3, -1)).to_event(1)
