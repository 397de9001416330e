"""Results to tables, figures and one HTML page.

:func:`compare` trains and evaluates variants from Python and returns a :class:`Comparison`; ``write_report`` makes the
page of a run folder; :mod:`arviz_figures` draws a run's draws with ArviZ, and :mod:`style` is shared by all figures.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
