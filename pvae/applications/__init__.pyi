from .anomalies import AnomalyScores, auroc, detect_anomalies
from .classification import Classification, classify, classify_conditional, fit_temperature
from .coding import Augmentation, Encoding, Path, augment, decode, encode, interpolate, reconstruct, sample
from .latent_map import LatentMap, Sliders, make_sliders, map_latents
from .restoration import Denoising, Imputation, denoise, impute

__all__ = [
    "AnomalyScores",
    "Augmentation",
    "Classification",
    "Denoising",
    "Encoding",
    "Imputation",
    "LatentMap",
    "Path",
    "Sliders",
    "augment",
    "auroc",
    "classify",
    "classify_conditional",
    "decode",
    "denoise",
    "detect_anomalies",
    "encode",
    "fit_temperature",
    "impute",
    "interpolate",
    "make_sliders",
    "map_latents",
    "reconstruct",
    "sample",
]
