"""How far a posterior is from the truth: one file per diagnostic, a battery of them, and the rules of trust.

Start with ``diagnose``, which runs everything and gives a verdict for each use, or with ``evaluate`` for bounds,
evidence and gaps. ``calibrate`` (SBC, TARP), ``compare_with_mcmc``, ``measure_latent_usage``,
``measure_latent_geometry`` and ``run_predictive_checks`` each answer one question. ``QUANTITIES`` says what every
reported number means.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
