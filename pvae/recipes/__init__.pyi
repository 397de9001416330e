from .build import FittedModel, build_model, fit_recipe
from .preflight import check_recipe, try_recipe
from .recipe import Recipe, load_recipe_data, read_recipe, resolve, write_recipe

__all__ = [
    "FittedModel",
    "Recipe",
    "build_model",
    "check_recipe",
    "fit_recipe",
    "load_recipe_data",
    "read_recipe",
    "resolve",
    "try_recipe",
    "write_recipe",
]
