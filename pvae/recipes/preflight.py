"""Checks of a recipe before anything is spent: components, budget, support, first loss, gradients."""

from __future__ import annotations

from collections.abc import Iterator

from pyro.infer import SVI

from pvae.data.dataset import Dataset
from pvae.errors import UserError, param
from pvae.inference.guides import PerDatapoint
from pvae.recipes.build import FittedModel, build_model
from pvae.recipes.recipe import Recipe
from pvae.recipes.registry import make
from pvae.runtime.torch_state import no_validation, seeded
from pvae.runtime.tracing import restore_state
from pvae.training.loop import check_budget
from pvae.training.objectives import NonFiniteLoss
from pvae.training.optimizer import FusedAdam
from pvae.training.support_check import check_support


def check_recipe(recipe: Recipe, data: Dataset, *, check_data: bool = True) -> FittedModel:
    """Build a resolved recipe's model and refuse what training would refuse, before anything is written.

    Arguments:
        check_data: refuse data outside the support, by a pass over all rows.

    Returns:
        The untrained model, which `fit_recipe` may train: nothing of the check is left in it.

    Raises:
        UserError: a component, the budget, data outside the support, or a first loss that is not finite.
        Incompatible: components that do not go together.

    See also: `try_recipe`, which takes two steps of training.
    """
    check_budget(data, recipe.epochs or 0, recipe.batch_size, recipe.learning_rate or 0.0, recipe.patience)
    untrained, shard = build_model(recipe, data), data.shard()
    with restore_state([buffer for module in untrained.modules.values() for buffer in module.buffers()]):
        if check_data:
            check_support(untrained.model, shard)
        x, index = next(shard.batches(2, recipe.seed, 0))
        try:
            with seeded(recipe.seed), no_validation():
                untrained.objective.loss(untrained.model, untrained.guide, x, index)
        except NonFiniteLoss as error:
            remedy = f"choose another {param('likelihood')} or scale the data"
            raise UserError(f"at the first step {error}", remedy) from error
    if isinstance(untrained.guide, PerDatapoint):
        untrained.guide.drop_visit()
    return untrained


def try_recipe(untrained: FittedModel, data: Dataset) -> Iterator[str]:
    """Take two training steps with a model of `check_recipe` and describe it, line by line.

    Raises:
        UserError: a parameter that no finite gradient reaches.
    """
    yield data.summary()
    guide = untrained.guide
    latents = ", ".join(f"{site.name} {list(site.shape)}" for site in guide.sites.sites)
    yield f"latents: {latents}; q has {guide.family.num_params} parameters for each row"
    yield f"two steps: loss {_take_two_steps(untrained, data):.2f} nats per row"
    named = [(f"{kind}.{name}", p) for kind, m in untrained.modules.items() for name, p in m.named_parameters()]
    if names := [name for name, p in named if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())]:
        raise UserError(f"no finite gradient reaches {', '.join(names)}; is the parameter used in the program?")
    sizes = {k: sum(p.numel() for p in m.parameters() if p.requires_grad) for k, m in untrained.modules.items()}
    sizes |= {"rows": guide.table.numel()} if hasattr(guide, "table") else {}
    yield f"a gradient in every parameter: {', '.join(f'{kind} {size:,}' for kind, size in sizes.items())}"


def recipe_warnings(recipe: Recipe) -> Iterator[str]:
    """Return warnings of settings that can be trained but are hardly meant, for a resolved recipe."""
    warm_up, epochs = make("objective", recipe.objective).warm_up, recipe.epochs or 0
    if warm_up > epochs:
        rise = f"the KL weight rises over {warm_up:g} epochs"
        yield f"{rise}, but training has {epochs}: it never reaches its full value"


class _GradientKeepingAdam(FusedAdam):
    """Adam that does not clear the gradients of its last step."""

    def step_parameters(self) -> None:
        if self.adam:
            self.adam.step()


def _take_two_steps(untrained: FittedModel, data: Dataset) -> float:
    """Train on two small batches, the KL nearly at its full weight, and return the loss per row."""
    recipe, objective = untrained.recipe, untrained.objective
    objective.weight, objective.free_bits = objective.weight_at(0.9 * objective.warm_up), 0.0
    optimizer = _GradientKeepingAdam(*untrained.modules.values(), learning_rate=recipe.learning_rate or 1e-3)
    svi, loss = SVI(untrained.model, untrained.guide, optimizer, objective), 0.0
    with seeded(recipe.seed), no_validation():
        for epoch in range(2):
            x, index = next(data.batches(min(recipe.batch_size, 64), recipe.seed, epoch))
            loss = svi.step(x, index) / len(x)
    return loss
