"""Results to tables, figures and one HTML page.

``write_report`` makes the page of a run folder from the files in it; :mod:`style` has what all figures share.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
