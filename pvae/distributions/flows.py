"""Normalizing flows as Pyro distributions, with zuko's neural splines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal, constraints

from pvae.errors import UserError, check_range

Kind = Literal["coupling", "autoregressive"]


class Flow(dist.TorchDistribution):
    r"""Normalizing flow :math:`z = \mu + \sigma T^{-1}(\epsilon)`, :math:`\epsilon \sim N(0, I)`, of an invertible T.

    Arguments:
        mean: mu, [..., D].
        scale: sigma, [..., D].
        transform: T of zuko, from z to the noise: scoring is the direction that always takes a single pass.
        temperature: standard deviation of the noise.

    >>> transform = spline(3, transforms=2, hidden=[8], bins=4)()
    >>> q = Flow(torch.zeros(5, 3), torch.ones(5, 3), transform)
    >>> q.log_prob(q.sample((7,))).shape
    torch.Size([7, 5])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, mean: Tensor, scale: Tensor, transform: Any, *, temperature: float = 1.0) -> None:
        self.shift, self.scale, self.transform, self.temperature = mean, scale, transform, temperature
        super().__init__(mean.shape[:-1], mean.shape[-1:])

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> Flow:
        shape = torch.Size(batch_shape) + self.event_shape
        return Flow(self.shift.expand(shape), self.scale.expand(shape), self.transform, temperature=self.temperature)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.shift.dtype, device=self.shift.device)
        noise = noise if self.temperature == 1 else self.temperature * noise
        return self.shift + self.scale * self.transform.inv(noise)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        noise, log_slope = self.transform.call_and_ladj((value - self.shift) / self.scale)
        standard = Normal(noise.new_zeros(()), noise.new_full((), self.temperature))
        return (standard.log_prob(noise) - self.scale.log()).sum(-1) + log_slope


def spline(
    dim: int, context: int = 0, *, kind: Kind = "coupling", transforms: int, hidden: Sequence[int], bins: int
) -> nn.Module:
    """Make a neural spline flow (NSF) near the identity: a module that maps a context [..., C] (or nothing) to T.

    Arguments:
        kind: "coupling": every other value is transformed, given the rest; "autoregressive": each, given all before it.
        transforms: number of layers. The next one transforms the other half, or takes the values in reversed order.
        hidden: widths of the networks that compute the splines' knots.
        bins: of each spline. It covers [-5, 5]; beyond, T is the identity, so that densities stay normalized.

    Source: Durkan, Bekasov, Murray, Papamakarios (2019), *Neural Spline Flows*, arXiv:1906.04032.
    """
    if kind not in get_args(Kind):
        raise UserError(f"flow: kind is '{kind}', but it must be 'coupling' or 'autoregressive'")
    check_range("flow", least=1, transforms=transforms, hidden=hidden)
    check_range("flow", least=2, bins=bins)
    zuko = _zuko()
    # A smooth activation: with kinks in T, second derivatives through its draws would be wrong.
    options = {"transforms": transforms, "hidden_features": tuple(hidden), "activation": nn.SiLU}
    if kind == "coupling":
        shapes = [(bins,), (bins,), (bins - 1,)]
        flow = zuko.flows.NICE(dim, context, univariate=zuko.transforms.MonotonicRQSTransform, shapes=shapes, **options)
    else:
        flow = zuko.flows.NSF(dim, context, bins=bins, **options)
    with torch.no_grad():
        for layer in flow.transform.transforms:
            for parameter in layer.hyper[-1].parameters() if hasattr(layer, "hyper") else layer.phi:
                parameter *= 0.1
    return flow.transform


def _zuko() -> Any:
    # Importing zuko switches validation off for the whole process.
    validate = Distribution._validate_args
    try:
        import zuko
    finally:
        Distribution.set_default_validate_args(validate)
    return zuko
