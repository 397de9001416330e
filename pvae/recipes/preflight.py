"""Checks of a recipe before hours are spent on it: shapes, support, one step, a gradient in every parameter."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pyro.infer import SVI

from pvae.data.dataset import Dataset
from pvae.errors import UserError
from pvae.recipes.build import FittedModel, build_model
from pvae.recipes.recipe import Recipe
from pvae.recipes.registry import make
from pvae.runtime.torch_state import no_validation, seeded
from pvae.training.loop import check_budget
from pvae.training.objectives import NonFiniteLoss
from pvae.training.optimizer import FusedAdam
from pvae.training.support import check_support


def try_recipe(own: Recipe, data: Dataset) -> Iterator[str]:
    """Lines that say what is sound in a resolved recipe.

    Raises:
        UserError: the first thing that isn't, as training would say it; or a parameter without a gradient.
    """
    yield data.summary()
    built = check_recipe(own, data)
    sites = ", ".join(f"{site.name} {list(site.shape)}" for site in built.guide.sites.sites)
    yield f"latents: {sites}; q has {built.guide.family.size} parameters for each row"
    modules = {"model": built.program, "guide": built.guide}
    loss = _two_steps(own, built, data)
    yield f"two steps: loss {loss:.2f} nats per row"
    without = [
        f"{kind}.{name}"
        for kind, module in modules.items()
        for name, p in module.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
    if without:
        raise UserError(f"no finite gradient reaches {', '.join(without)}; is the parameter used in the program?")
    counts = {kind: sum(p.numel() for p in module.parameters() if p.requires_grad) for kind, module in modules.items()}
    rows = getattr(built.guide, "table", torch.empty(0)).numel()
    own_rows = f", rows {rows:,}" if rows else ""
    yield f"a gradient in every parameter: model {counts['model']:,}, guide {counts['guide']:,}{own_rows}"


def warnings(own: Recipe) -> Iterator[str]:
    """What a resolved recipe can hardly mean, though it can be trained."""
    warm_up, epochs = make("objective", own.objective).warm_up, own.epochs or 0
    if warm_up > epochs:
        yield (
            f"the KL weight rises over {warm_up:g} epochs, but training has {epochs}: it never reaches its full value"
        )


class _Keeping(FusedAdam):
    """An optimizer that leaves the gradients of its last step to be looked at."""

    def __call__(self, params: object, *args: object, **kwargs: object) -> None:
        if self.adam:
            self.adam.step()
        for table in self.tables:
            table.step_rows()


def _two_steps(own: Recipe, built: FittedModel, data: Dataset) -> float:
    objective = built.objective
    # The KL bears on the loss, as it will sooner or later.
    objective.weight, objective.free_bits = objective.weight_at(0.9 * objective.warm_up), 0.0
    optimizer = _Keeping(built.program, built.guide, learning_rate=own.learning_rate or 1e-3)
    loop, loss = SVI(built.model, built.guide, optimizer, objective), 0.0
    with seeded(own.seed), no_validation():
        for epoch in range(2):
            x, index = next(data.batches(min(own.batch_size, 64), own.seed, epoch))
            loss = loop.step(x, index) / len(x)
    return loss


def check_recipe(own: Recipe, data: Dataset) -> FittedModel:
    """Refuse what can be known to fail before anything is written, and return what was built.

    Raises:
        UserError: a component, the budget, data outside the support.
        Incompatible: components that do not go together.
    """
    check_budget(data, own.epochs or 0, own.batch_size, own.learning_rate or 0.0, own.patience)
    built = build_model(own, data)
    shard = data.shard()
    check_support(built.model, shard)
    x, index = next(shard.batches(2, own.seed, 0))
    with seeded(own.seed), no_validation():
        try:
            built.objective.loss(built.model, built.guide, x, index)
        except NonFiniteLoss as error:
            raise UserError(f"at the first step {error}; choose another --likelihood or scale the data") from error
    return built
