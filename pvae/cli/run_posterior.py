"""The use of a run that draws each row's latents from their posterior, by the cheapest method whose checks pass."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from pvae import applications
from pvae.cli.run_restoration import name_rows
from pvae.cli.use_context import UseContext, make_result
from pvae.errors import UserError, nearest, param
from pvae.experiments.use_results import UseResult
from pvae.inference.latents import LatentSites
from pvae.samplers.posterior_draws import METHODS, PosteriorDraws
from pvae.samplers.row_posterior import ACCURACIES, posterior


def draw_posterior(context: UseContext, *, accuracy: str = "standard", draws: int = 100) -> UseResult:
    """Draw from each row's posterior; say which rows took which method, what it cost, and what the guide had missed."""
    if accuracy not in ACCURACIES:
        raise UserError(f"{param('accuracy', accuracy)} is no accuracy{nearest(accuracy, ACCURACIES)}")
    drawn = context.apply(posterior, accuracy=accuracy)
    mean, sd = drawn.moments
    arrays = {"mean": mean, "sd": sd, "ess": drawn.ess, "reliable": drawn.reliable}
    sites = site_values(context.run.guide.sites, drawn.resample(draws, seed=context.seed))
    draws_of = {f"draws_{name}": values for name, values in sites.items()}
    sentences = [_methods(context, drawn, accuracy), *_gain(context, drawn), *_unreliable(context, drawn)]
    decoded = applications.decode(*context.programs, mean.to(context.rows.x), context.rows.x)
    figure = context.strips({"original": context.x, "decoded mean of the posterior": decoded})
    arrays |= {"row": context.rows.place} | context.labels | draws_of
    result = make_result("posterior", arrays, sentences, figure)
    result.arrays |= {"method": np.array(METHODS)[drawn.method.cpu()]} | _where_known(drawn)
    result.not_columns = draws_of.keys()
    return result


def site_values(sites: LatentSites, u: Tensor) -> dict[str, Tensor]:
    """Return the values [K, B, ...] of each latent site, in the program's coordinates, of draws u [K, B, D].

    >>> import torch
    >>> from pvae.inference.latents import real_vector_latent
    >>> {name: values.shape for name, values in site_values(real_vector_latent(3), torch.zeros(4, 2, 3)).items()}
    {'z': torch.Size([4, 2, 3])}
    """
    parts = u.split([math.prod(site.unconstrained_shape) for site in sites.sites], -1)
    shaped = [
        part.reshape(u.shape[:-1] + site.unconstrained_shape) for site, part in zip(sites.sites, parts, strict=True)
    ]
    return {site.name: site.transform(part) for site, part in zip(sites.sites, shaped, strict=True)}


def _where_known(drawn: PosteriorDraws) -> dict[str, np.ndarray]:
    """Return Pareto k-hat and the evidence if any row has them; they are NaN for chains."""
    values: dict[str, Any] = {"k_hat": drawn.k_hat, "log_evidence": drawn.log_evidence}
    return {name: value.cpu().numpy() for name, value in values.items() if value.isfinite().any()}


def _methods(context: UseContext, drawn: PosteriorDraws, accuracy: str) -> str:
    ways = []
    for name, count in drawn.counts().items():
        spent = drawn.seconds.get("importance sampling" if name == "guide" else name)
        ways.append(f"{name} {count}" + ("" if spent is None else f" ({spent:.1f} s)"))
    scouts = drawn.seconds["annealed particles"]
    total = sum(drawn.seconds.values())
    return (
        f"Posterior draws of {context.count} (accuracy {accuracy}), rows by method: {', '.join(ways)}; "
        f"{total:.1f} s in all, {scouts:.1f} s of them for annealed particles that look for modes."
    )


def _gain(context: UseContext, drawn: PosteriorDraws) -> list[str]:
    """Say by how much the guide's means and standard deviations differ from the draws' on rows that are reliable."""
    sound = drawn.reliable
    if context.run.guide.family.point_mass or not sound.any():
        return []
    rows = context.rows
    codes = applications.encode(*context.programs, rows.x, rows.index, K=1, seed=context.seed)
    mean, sd = (values[sound] for values in drawn.moments)
    shift = ((codes.mean.to(mean)[sound] - mean) / sd).square()
    ratio = codes.sd.to(sd)[sound] / sd
    low, middle, high = ratio.flatten().quantile(ratio.new_tensor([0.05, 0.5, 0.95])).tolist()
    noise = (1 / drawn.ess[sound]).mean().sqrt()
    return [
        f"The guide's means are {shift.mean().sqrt():.2f} posterior standard deviations off (root mean square; the "
        f"draws' own error makes {noise:.2f}), its standard deviations {middle:.2f} times the posterior's (median; "
        f"{low:.2f} to {high:.2f} for 90%)."
    ]


def _unreliable(context: UseContext, drawn: PosteriorDraws) -> list[str]:
    failed = context.rows.place[~drawn.reliable.cpu()]
    if not len(failed):
        return ["The checks of a method passed on every row."]
    which = "every row" if len(failed) == len(drawn.method) else name_rows(failed)
    return [f"Unreliable: the checks of all methods failed on {which}; their draws may be far off."]
