from . import hmc
from .ais import AISEstimate, SandwichBounds, anneal, sandwich
from .gaussian_vi import fit_gaussian
from .log_joint import JointDraws, LogJoint, simulate_joint

__all__ = [
    "AISEstimate",
    "JointDraws",
    "LogJoint",
    "SandwichBounds",
    "anneal",
    "fit_gaussian",
    "hmc",
    "sandwich",
    "simulate_joint",
]
