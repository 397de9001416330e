from . import families
from .guides import Amortized, Guide, PerDatapoint, RefinedGuide, SemiAmortized
from .importance import LogWeights, log_weights
from .latents import LatentSites, find_latent_sites
from .posterior import WeightedDraws, importance_draws
from .refinement import maximize_local_elbo, refine

__all__ = [
    "Amortized",
    "Guide",
    "LatentSites",
    "LogWeights",
    "PerDatapoint",
    "RefinedGuide",
    "SemiAmortized",
    "WeightedDraws",
    "families",
    "find_latent_sites",
    "importance_draws",
    "log_weights",
    "maximize_local_elbo",
    "refine",
]
