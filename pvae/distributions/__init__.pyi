from .counts import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from .flows import Flow
from .masked_likelihood import MaskedDistribution
from .mixtures import DiagonalMixture, ReparametrizedMixture
from .noise_convolution import NoiseConvolution
from .univariate import Bernoulli, Categorical, ContinuousBernoulli, DiscretizedLogistic, StudentT

__all__ = [
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "DiagonalMixture",
    "DiscretizedLogistic",
    "Flow",
    "MaskedDistribution",
    "NegativeBinomial",
    "NoiseConvolution",
    "Poisson",
    "ReparametrizedMixture",
    "StudentT",
    "ZeroInflatedNegativeBinomial",
]
