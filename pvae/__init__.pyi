from . import applications, diagnostics, samplers, sklearn, stats
from .data.dataset import Dataset
from .data.loading import load_data
from .diagnostics.diagnosis import diagnose
from .diagnostics.evaluation import evaluate
from .errors import UserError
from .experiments.run import open_run
from .generative import likelihoods, networks, noise, priors
from .generative.effect_handlers import mask_missing
from .generative.vae import VAE
from .inference import families
from .inference.guides import Amortized, PerDatapoint, RefinedGuide, SemiAmortized
from .inference.importance import log_weights
from .recipes.recipe import Recipe
from .reporting.comparison import compare
from .samplers.row_posterior import posterior
from .training import objectives
from .training.loop import fit

__version__: str
__all__ = [
    "VAE",
    "Amortized",
    "Dataset",
    "PerDatapoint",
    "Recipe",
    "RefinedGuide",
    "SemiAmortized",
    "UserError",
    "applications",
    "compare",
    "diagnose",
    "diagnostics",
    "evaluate",
    "families",
    "fit",
    "likelihoods",
    "load_data",
    "log_weights",
    "mask_missing",
    "networks",
    "noise",
    "objectives",
    "open_run",
    "posterior",
    "priors",
    "samplers",
    "sklearn",
    "stats",
]
