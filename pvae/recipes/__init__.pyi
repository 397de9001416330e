from .build import build_model, fit_recipe
from .preflight import check_recipe, try_recipe
from .recipe import Recipe, resolve

__all__ = ["Recipe", "build_model", "check_recipe", "fit_recipe", "resolve", "try_recipe"]
