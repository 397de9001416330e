"""What people do with a fitted VAE: a function for each use, from rows to arrays.

Each takes a Pyro program and its guide as `fit` has fitted them, and tensors or NumPy
arrays; the command line's commands of the same names take a run folder.
"""

from __future__ import annotations

from pvae.applications.anomalies import anomalies
from pvae.applications.classification import classify
from pvae.applications.coding import augment, decode, encode, interpolate, reconstruct, sample
from pvae.applications.latent_map import latent_map as map
from pvae.applications.restoration import denoise, impute

__all__ = [
    "anomalies",
    "augment",
    "classify",
    "decode",
    "denoise",
    "encode",
    "impute",
    "interpolate",
    "map",
    "reconstruct",
    "sample",
]
