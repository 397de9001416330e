from .anomalies import AnomalyScores, detect_anomalies
from .classification import Classification, classify
from .coding import augment, decode, encode, interpolate, reconstruct, sample
from .latent_map import make_sliders, map_latents
from .restoration import denoise, impute

__all__ = [
    "AnomalyScores",
    "Classification",
    "augment",
    "classify",
    "decode",
    "denoise",
    "detect_anomalies",
    "encode",
    "impute",
    "interpolate",
    "make_sliders",
    "map_latents",
    "reconstruct",
    "sample",
]
