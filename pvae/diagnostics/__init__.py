"""How far a posterior is from the truth: one file per diagnostic, a battery of them, and the rules of trust.

Start with ``evaluate`` (bounds, evidence and gaps). ``calibrate`` (SBC, TARP), ``compare_with_mcmc``,
``measure_latent_usage``, ``run_predictive_checks`` and ``measure_latent_geometry`` each answer one question;
``assess_trust`` turns their figures into verdicts.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
