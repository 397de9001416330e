"""Objectives: each a ``pyro.infer.ELBO`` that works in Pyro's ``SVI``."""

from __future__ import annotations

import math
from typing import Any

from pyro.infer import Trace_ELBO
from pyro.poutine import Trace

__all__ = ["ELBO", "NonFinite"]


class NonFinite(ArithmeticError):
    """A site's log-density is NaN or infinite.

    Attributes:
        site: its name.
    """

    def __init__(self, site: str) -> None:
        super().__init__(f"the log-density of site '{site}' is not finite")
        self.site = site


class ELBO(Trace_ELBO):
    r"""Pyro's ``Trace_ELBO``, :math:`E_q[\log p(x, z) - \log q(z|x)]`, that stops before a bad step, not after.

    Raises:
        NonFinite: a site's log-density is not finite; no gradient has been taken and no parameter has moved.
    """

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        for trace in (guide_trace, model_trace):
            for name, site in trace.nodes.items():
                if site["type"] == "sample" and not math.isfinite(site["log_prob_sum"].item()):
                    raise NonFinite(name)
        return model_trace, guide_trace
