"""The recipes by method and name: a method of `training.methods` has its recipes in the file of its name here."""

from collections.abc import Callable
from types import ModuleType

from infra.errors import TesseraError
from training.recipe import Recipe
from training.recipes import generalist, panoptic_deeplab

_FILES: dict[str, ModuleType] = {
    "generalist": generalist,
    "panoptic_deeplab": panoptic_deeplab,
}

RECIPES: dict[str, dict[str, Callable[[], Recipe]]] = {method: file.RECIPES for method, file in _FILES.items()}
"""Method -> name -> the function that makes the recipe."""

PUBLISHED: dict[str, float] = {
    f"{method}/{name}": pq for method, file in _FILES.items() for name, pq in file.PUBLISHED.items()
}
"""By Recipe.name: PQ on the val split that a paper states for what the recipe mirrors, beside ours in comparisons."""


def recipe(method: str, name: str) -> Recipe:
    """The recipe of that method and name; TesseraError listing what there is instead if there is none."""
    if method not in RECIPES:
        raise TesseraError(f"unknown method {method!r}; there are {', '.join(RECIPES)}")
    if name not in RECIPES[method]:
        others = [other for other, named in RECIPES.items() if name in named]
        elsewhere = f"; {name!r} is a recipe of {', '.join(others)}" if others else ""
        raise TesseraError(f"unknown recipe {name!r} of {method}; there are {', '.join(RECIPES[method])}{elsewhere}")
    return RECIPES[method][name]()
