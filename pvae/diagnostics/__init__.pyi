from .battery import DIAGNOSIS_BUDGETS, DiagnosisBudget
from .calibration import Calibration, calibrate
from .diagnosis import Diagnosis, diagnose
from .evaluation import Budget, Evaluation, RefinementCurve, bounds, evaluate, family_gains, refinement_curve
from .gaps import FamilyGain
from .latent_geometry import LatentGeometry, measure_latent_geometry
from .latent_usage import LatentUsage, measure_latent_usage
from .posterior_calibration import PosteriorCalibration, calibrate_posterior
from .predictive_checks import PredictiveChecks, run_predictive_checks
from .quantities import QUANTITIES, Quantity
from .reference_posterior import ReferencePosterior, compare_with_mcmc, compare_with_reference, run_long_chains
from .symmetric_divergence import SymmetricDivergence, measure_symmetric_divergence
from .trust import RULES, TrustVerdict, assess_trust

__all__ = [
    "DIAGNOSIS_BUDGETS",
    "QUANTITIES",
    "RULES",
    "Budget",
    "Calibration",
    "Diagnosis",
    "DiagnosisBudget",
    "Evaluation",
    "FamilyGain",
    "LatentGeometry",
    "LatentUsage",
    "PosteriorCalibration",
    "PredictiveChecks",
    "Quantity",
    "ReferencePosterior",
    "RefinementCurve",
    "SymmetricDivergence",
    "TrustVerdict",
    "assess_trust",
    "bounds",
    "calibrate",
    "calibrate_posterior",
    "compare_with_mcmc",
    "compare_with_reference",
    "diagnose",
    "evaluate",
    "family_gains",
    "measure_latent_geometry",
    "measure_latent_usage",
    "measure_symmetric_divergence",
    "refinement_curve",
    "run_long_chains",
    "run_predictive_checks",
]
