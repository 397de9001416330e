"""Models whose posterior and evidence are known, in closed form or by quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.generative.likelihoods import Bernoulli, Gaussian
from pvae.generative.priors import StandardNormal
from pvae.generative.vae import VAE
from pvae.inference.families import DiagonalNormal
from pvae.inference.guides import Amortized, Guide, PerDatapoint, SemiAmortized
from pvae.runtime.pyro_params import Program

__all__ = ["SOURCES", "Curved", "LinearGaussian"]

# The three inference methods for diagonal Gaussians under a program of D latents and M columns, for N rows. A linear
# encoder holds the best diagonal of LinearGaussian exactly; draws and rates leave little noise in it.
SOURCES: dict[str, Callable[[Program, int, int, int], Guide]] = {
    "Amortized": lambda model, D, M, N: Amortized(nn.Linear(M, 2 * D), DiagonalNormal(D)),
    "SemiAmortized": lambda model, D, M, N: SemiAmortized(
        nn.Linear(M, 2 * D),
        DiagonalNormal(D),
        steps=3,
        model=model,
        draws=16,
        learning_rate=0.1,
    ),
    "PerDatapoint": lambda model, D, M, N: PerDatapoint(N, DiagonalNormal(D), model=model, local_learning_rate=0.05),
}


class LinearGaussian(VAE):
    r"""Probabilistic PCA with frozen parameters, :math:`z \sim N(0, I_D)`, :math:`x \sim N(W z + b, s^2 I_M)`.

    Arguments:
        dim: D, the number of latent dimensions.
        columns: M, the number of data columns.
        scale: s.
        conditioning: largest over smallest singular value of W; 1 makes the posterior's covariance a multiple of I.
        seed: of W and b.

    The posterior is :math:`N(m, L^{-1})` with :math:`L = I + W^T W / s^2` and :math:`m = L^{-1} W^T (x - b) / s^2`.
    Closed forms are computed in double precision from the parameters as they are, and pass gradients.
    """

    def __init__(
        self, dim: int = 2, columns: int = 5, *, scale: float = 0.5, conditioning: float = 3.0, seed: int = 0
    ) -> None:
        super().__init__(nn.Linear(dim, columns), Gaussian(scale=scale), StandardNormal(dim))
        random = torch.Generator().manual_seed(seed)
        left, _ = torch.linalg.qr(torch.randn(columns, dim, generator=random))
        right, _ = torch.linalg.qr(torch.randn(dim, dim, generator=random))
        values = torch.logspace(0, -math.log10(conditioning), dim)
        self.requires_grad_(False).eval()
        self.decoder.weight.copy_(left * values @ right)
        self.decoder.bias.copy_(torch.randn(columns, generator=random))

    def train(self, mode: bool = True) -> LinearGaussian:
        """Frozen parameters are not trained; Pyro warns of those that are in training mode."""
        return super().train(False)

    @property
    def weight(self) -> Tensor:
        """W, [M, D]."""
        return self.decoder.weight.double()

    @property
    def bias(self) -> Tensor:
        """b, [M]."""
        return self.decoder.bias.double()

    @property
    def scale(self) -> Tensor:
        """s."""
        return self.likelihood.log_scale.double().exp()

    @property
    def precision(self) -> Tensor:
        r""":math:`L = I + W^T W / s^2`, [D, D]: the posterior's, the same for every datapoint."""
        return torch.eye(self.weight.shape[1]).double() + self.weight.T @ self.weight / self.scale**2

    @property
    def covariance(self) -> Tensor:
        r""":math:`L^{-1}`, [D, D]."""
        return torch.linalg.inv(self.precision)

    @property
    def gap(self) -> Tensor:
        r"""What the best diagonal Gaussian leaves to win, :math:`(\sum_i \log L_{ii} - \log\det L) / 2` nats."""
        return (self.precision.diag().log().sum() - torch.logdet(self.precision)) / 2

    def mean(self, x: Tensor) -> Tensor:
        """Posterior mean m of the rows x [B, M], [B, D]."""
        return (x.double() - self.bias) @ self.weight / self.scale**2 @ self.covariance

    def evidence(self, x: Tensor) -> Tensor:
        r""":math:`\log p(x) = -\frac12 (M \log 2 \pi s^2 + \log\det L + |x - b|^2 / s^2 - m^T L m)`, [B]."""
        m, residual = self.mean(x), (x.double() - self.bias) / self.scale
        constant = x.shape[1] * (2 * math.pi * self.scale**2).log() + torch.logdet(self.precision)
        return -(constant + (residual**2).sum(-1) - (m @ self.precision * m).sum(-1)) / 2

    def elbo(self, q_params: Tensor, x: Tensor) -> Tensor:
        r"""ELBO [B] of the diagonal Gaussians q_params = (mu, log sigma) [B, 2 D].

        .. math:: -\frac{M}2 \log 2 \pi s^2 - \frac{|x - W \mu - b|^2 + \sum_i (W^T W)_{ii} \sigma_i^2}{2 s^2}
                  - \frac12 \sum_i (\sigma_i^2 + \mu_i^2 - 1 - \log \sigma_i^2)
        """
        mu, log_sigma = q_params.double().chunk(2, -1)
        variance = (2 * log_sigma).exp()
        residual = x.double() - mu @ self.weight.T - self.bias
        spread = (residual**2).sum(-1) + variance @ (self.weight**2).sum(0)
        fit = -x.shape[1] / 2 * (2 * math.pi * self.scale**2).log() - spread / (2 * self.scale**2)
        return fit - (variance + mu**2 - 1 - 2 * log_sigma).sum(-1) / 2

    def best(self, x: Tensor) -> Tensor:
        r"""The q_params [B, 2 D] of the largest ELBO: :math:`\mu = m` and :math:`\sigma_i^2 = 1 / L_{ii}`."""
        return torch.cat([self.mean(x), -self.precision.diag().log().expand(len(x), -1) / 2], -1).to(x.dtype)

    def posterior(self, x: Tensor, index: Tensor | None = None) -> None:
        """The exact posterior as a guide: a plain Pyro program without parameters."""
        root = torch.linalg.cholesky(self.covariance).to(x.dtype)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(self.mean(x).to(x.dtype), scale_tril=root))

    @torch.no_grad()
    def sample(self, count: int, seed: int = 0) -> Tensor:
        """Rows drawn from p(x), [count, M]."""
        random = torch.Generator().manual_seed(seed)
        columns, dim = self.decoder.weight.shape
        z, noise = (torch.randn(count, n, generator=random, dtype=torch.double) for n in (dim, columns))
        return (z @ self.weight.T + self.bias + self.scale * noise).to(self.decoder.weight.dtype)


class Curved(VAE):
    r"""Two latents behind a frozen nonlinear decoder of binary values; integrals by quadrature over a grid.

    Arguments:
        columns: M, the number of data columns.
        hidden: width of the decoder's hidden layer.
        steepness: scale of its weights; at 3 posteriors are bent, with a skewness of up to 1 either way.
        seed: of the weights.

    :math:`z \sim N(0, I_2)`, :math:`x_m \sim \mathrm{Bernoulli}(\sigma(\eta_m(z)))`. The grid's spacing is far below
    the decoder's finest features, where the trapezoid rule for smooth integrands converges faster than any power.
    """

    def __init__(self, columns: int = 8, *, hidden: int = 6, steepness: float = 3.0, seed: int = 0) -> None:
        decoder = nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, columns))
        super().__init__(decoder, Bernoulli(), StandardNormal(2))
        random = torch.Generator().manual_seed(seed)
        self.requires_grad_(False).eval()
        for weights in (decoder[0].weight, decoder[0].bias, decoder[2].weight):
            weights.copy_(steepness / 2 * torch.randn(weights.shape, generator=random, dtype=weights.dtype))
        # As PyTorch would draw it, but from the seed: tests must not depend on what was drawn before them.
        decoder[2].bias.copy_((2 * torch.rand(columns, generator=random) - 1) / hidden**0.5)
        line = torch.linspace(-7, 7, 351, dtype=torch.double)
        self.grid, self.cell = torch.cartesian_prod(line, line), (line[1] - line[0]) ** 2

    def train(self, mode: bool = True) -> Curved:
        """Frozen parameters are not trained; Pyro warns of those that are in training mode."""
        return super().train(False)

    def log_joint(self, x: Tensor) -> Tensor:
        """log p(x, z) of the rows x [B, M] at the grid's points, [G, B] in nats."""
        one, two = self.decoder[0], self.decoder[2]
        hidden = (self.grid @ one.weight.double().T + one.bias.double()).tanh()
        eta = hidden @ two.weight.double().T + two.bias.double()
        prior = -(self.grid**2).sum(-1) / 2 - math.log(2 * math.pi)
        return eta @ x.double().T + (prior - nn.functional.softplus(eta).sum(-1)).unsqueeze(-1)

    def evidence(self, x: Tensor) -> Tensor:
        """log p(x), [B]."""
        return self.log_joint(x).logsumexp(0) + self.cell.log()

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior means and standard deviations of the rows x [B, M], [B, 2] each."""
        weights = self.log_joint(x).softmax(0).T
        mean = weights @ self.grid
        return mean, (weights @ self.grid**2 - mean**2).sqrt()

    @torch.no_grad()
    def sample(self, count: int, seed: int = 0) -> Tensor:
        """Rows drawn from p(x), [count, M]."""
        random, weight = torch.Generator().manual_seed(seed), self.decoder[0].weight
        eta = self.decoder(torch.randn(count, 2, generator=random, dtype=weight.dtype))
        return (torch.rand(eta.shape, generator=random, dtype=weight.dtype) < eta.sigmoid()).to(weight.dtype)
