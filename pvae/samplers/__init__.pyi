from . import hmc
from .ais import AISEstimate, SandwichBounds, anneal, sandwich
from .gaussian_vi import fit_gaussian
from .log_joint import JointDraws, LogJoint, simulate_joint
from .posterior_draws import PosteriorDraws
from .row_posterior import posterior

__all__ = [
    "AISEstimate",
    "JointDraws",
    "LogJoint",
    "PosteriorDraws",
    "SandwichBounds",
    "anneal",
    "fit_gaussian",
    "hmc",
    "posterior",
    "sandwich",
    "simulate_joint",
]
