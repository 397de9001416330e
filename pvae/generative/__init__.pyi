from . import likelihoods, networks, noise, priors
from .effect_handlers import MaskMissing, ObserveThroughNoise, mask_missing, with_noise
from .vae import VAE

__all__ = [
    "MaskMissing",
    "ObserveThroughNoise",
    "VAE",
    "likelihoods",
    "mask_missing",
    "networks",
    "noise",
    "priors",
    "with_noise",
]
