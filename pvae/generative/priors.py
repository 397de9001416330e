"""Priors p(z): modules that return a distribution over z."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.distributions.flows import Flow, Kind, spline
from pvae.distributions.mixtures import DiagonalMixture, well_spread
from pvae.errors import UserError, check_range

__all__ = ["StandardNormal", "DiagonalNormal", "Laplace", "StudentT", "GaussianMixture", "VampPrior", "FlowPrior"]


class Prior(nn.Module):
    """Base class of priors. Calling one without arguments returns p(z) over z [D], D being ``dim``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim


class _FixedPrior(Prior):
    """Base class of priors without parameters, of location 0, with constants by dimension."""

    mean: Tensor
    scale: Tensor
    df: Tensor

    def __init__(self, dim: int, **constants: float) -> None:
        super().__init__(dim)
        for name, value in {"mean": 0.0, **constants}.items():
            self.register_buffer(name, torch.full((dim,), float(value)), persistent=False)


class StandardNormal(_FixedPrior):
    r"""Standard Gaussian prior, :math:`p(z) = N(z; 0, I)`, over D = ``dim`` dimensions.

    >>> StandardNormal(8)().sample((5,)).shape
    torch.Size([5, 8])
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, scale=1.0)

    def forward(self) -> dist.TorchDistribution:
        return dist.Normal(self.mean, self.scale).to_event(1)


class DiagonalNormal(Prior):
    r"""Diagonal Gaussian prior with learned location and scale, :math:`p(z) = \prod_d N(z_d; m_d, s_d^2)`, D = ``dim``.

    It starts as the standard Gaussian, and improves on it only if decoder or family can't rescale z themselves.

    >>> DiagonalNormal(8)().sample((5,)).shape
    torch.Size([5, 8])
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.mean, self.log_scale = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self) -> dist.TorchDistribution:
        return dist.Normal(self.mean, self.log_scale.exp()).to_event(1)


class Laplace(_FixedPrior):
    r"""Laplace prior, which favours codes near 0, :math:`p(z) = \prod_d e^{-|z_d| / b} / 2b`.

    Arguments:
        dim: D, the number of latent dimensions.
        scale: b; the standard deviation is :math:`\sqrt 2 b`.

    Raises:
        UserError: the scale is not positive.

    >>> Laplace(8)().sample((5,)).shape
    torch.Size([5, 8])
    """

    def __init__(self, dim: int, *, scale: float = 1.0) -> None:
        check_range("Laplace", scale=scale)
        super().__init__(dim, scale=scale)

    def forward(self) -> dist.TorchDistribution:
        return dist.Laplace(self.mean, self.scale).to_event(1)


class StudentT(_FixedPrior):
    r"""Student t prior, with heavy tails, :math:`p(z) = \prod_d t_\nu(z_d)`.

    Arguments:
        dim: D, the number of latent dimensions.
        df: nu, the degrees of freedom; the tails fall as :math:`|z_d|^{-\nu - 1}`.

    Raises:
        UserError: the degrees of freedom are not positive.

    >>> StudentT(8)().sample((5,)).shape
    torch.Size([5, 8])
    """

    def __init__(self, dim: int, *, df: float = 4.0) -> None:
        check_range("StudentT", df=df)
        super().__init__(dim, df=df)

    def forward(self) -> dist.TorchDistribution:
        return dist.StudentT(self.df, self.mean, 1.0).to_event(1)


class GaussianMixture(Prior):
    r"""Gaussian mixture prior, learned, :math:`p(z) = \sum_c \pi_c \prod_d N(z_d; m_{cd}, s_{cd}^2)`.

    Arguments:
        dim: D, the number of latent dimensions.
        components: C, the number of Gaussians; they start evenly spread over a standard Gaussian, with scale 1.

    Raises:
        UserError: components below 1.

    >>> GaussianMixture(8)().sample((5,)).shape
    torch.Size([5, 8])
    """

    def __init__(self, dim: int, *, components: int = 10) -> None:
        super().__init__(dim)
        check_range("GaussianMixture", components=components)
        self.logits = nn.Parameter(torch.zeros(components))
        self.means = nn.Parameter(well_spread(components, dim))
        self.log_scales = nn.Parameter(torch.zeros(components, dim))

    def forward(self) -> dist.TorchDistribution:
        return DiagonalMixture(self.logits, self.means, self.log_scales.exp())


class VampPrior(Prior):
    r"""Variational mixture of posteriors (VampPrior) at learned pseudo-inputs, :math:`p(z) = \frac1K \sum_k q(z|u_k)`.

    Arguments:
        dim: D, the number of latent dimensions.
        pseudo_inputs: K. They start at random rows of the data, repeated if there are fewer, plus noise of 0.01 of the
            data's standard deviation.
        posterior: maps u [K, columns] to q(z|u), by the guide's encoder and family, which gradients of p(z) reach.
        data: rows [N, columns]. If all values lie in [0, 1], so do the pseudo-inputs.

    Raises:
        UserError: pseudo_inputs below 1, no rows, or a posterior without a density.

    Source: Tomczak and Welling (2018), *VAE with a VampPrior*, arXiv:1705.07120.

    >>> import pvae
    >>> family, encoder = pvae.families.DiagonalNormal(8), nn.Linear(64, 16)
    >>> VampPrior(8, posterior=lambda u: family(encoder(u)), data=torch.rand(100, 64))().sample((5,)).shape
    torch.Size([5, 8])
    """

    posterior: Callable[[Tensor], dist.TorchDistribution]
    unit: Tensor

    def __init__(
        self, dim: int, *, pseudo_inputs: int = 500, posterior: Callable[[Tensor], dist.TorchDistribution], data: Tensor
    ) -> None:
        super().__init__(dim)
        check_range("VampPrior", pseudo_inputs=pseudo_inputs, rows=len(data))
        # Not by plain assignment, which would register the guide's parameters here again.
        object.__setattr__(self, "posterior", posterior)
        data = data.to(torch.get_default_dtype())
        rows = data[torch.randperm(len(data)).repeat(-(-pseudo_inputs // len(data)))[:pseudo_inputs]]
        rows = rows + 0.01 * data.std() * torch.randn_like(rows) if data.numel() > 1 else rows
        self.unit_interval = bool(data.min() >= 0 and data.max() <= 1)
        # Closer than 0.05 to 0 and 1 the logistic map is nearly flat. In these units a step suits any data.
        self.register_buffer("unit", data.std().clamp_min(1e-6) if data.numel() > 1 else torch.ones(()))
        self.rows = nn.Parameter(rows.clamp(0.05, 0.95).logit() if self.unit_interval else rows / self.unit)

    def inputs(self) -> Tensor:
        """Return the pseudo-inputs u, [K, columns]."""
        return self.rows.sigmoid() if self.unit_interval else self.rows * self.unit

    def forward(self) -> dist.TorchDistribution:
        q, logits = self.posterior(self.inputs()), self.rows.new_zeros(len(self.rows))
        if isinstance(q, dist.Delta):
            raise UserError("VampPrior: its mixture of point masses has no density; take a family other than Delta")
        if isinstance(q, dist.Independent) and isinstance(q.base_dist, dist.Normal):  # a density is a matrix product
            return DiagonalMixture(logits, q.base_dist.loc, q.base_dist.scale)
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), q)


class FlowPrior(Prior):
    r"""Normalizing flow prior (neural spline flow), :math:`z = m + s\, T^{-1}(\epsilon)`.

    Arguments:
        dim: D, the number of latent dimensions.
        kind: "coupling" draws in one pass through each network, "autoregressive" in D; both score in one.
        transforms: number of layers of T.
        hidden: widths of the networks that give the splines' knots.
        bins: of each spline.

    With :math:`\epsilon \sim N(0, I)` and learned m, s and T. It starts near the standard Gaussian; T is the identity
    beyond 5 scales from m.

    Raises:
        UserError: an unknown kind, transforms or a width below 1, or bins below 2.

    Source: Durkan, Bekasov, Murray, Papamakarios (2019), *Neural Spline Flows*, arXiv:1906.04032.

    >>> FlowPrior(8)().sample((5,)).shape
    torch.Size([5, 8])
    """

    def __init__(
        self, dim: int, *, kind: Kind = "coupling", transforms: int = 3, hidden: Sequence[int] = (64, 64), bins: int = 8
    ) -> None:
        super().__init__(dim)
        self.mean, self.log_scale = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.transform = spline(dim, kind=kind, transforms=transforms, hidden=hidden, bins=bins)

    def forward(self) -> dist.TorchDistribution:
        return Flow(self.mean, self.log_scale.exp(), self.transform())
