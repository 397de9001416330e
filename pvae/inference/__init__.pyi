from . import families
from .guides import Amortized, FrozenGuide, Guide, PerDatapoint, RefinedGuide, SemiAmortized
from .importance import LogWeights, log_weights
from .latents import LatentSites, find_latent_sites
from .posterior import WeightedDraws, freeze, importance_draws, posterior_predictive, prior_predictive
from .refinement import maximize_local_elbo, refine

__all__ = [
    "Amortized",
    "FrozenGuide",
    "Guide",
    "LatentSites",
    "LogWeights",
    "PerDatapoint",
    "RefinedGuide",
    "SemiAmortized",
    "WeightedDraws",
    "families",
    "find_latent_sites",
    "freeze",
    "importance_draws",
    "log_weights",
    "maximize_local_elbo",
    "posterior_predictive",
    "prior_predictive",
    "refine",
]
