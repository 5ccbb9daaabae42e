"""The recipes of all methods, for parametrised tests."""

import pytest

from training.recipes import RECIPES


def every_recipe(starting: str = "") -> list:
    """The functions that make them, for names that start so."""
    return [
        pytest.param(make, id=f"{method}-{name}")
        for method, named in RECIPES.items()
        for name, make in named.items()
        if name.startswith(starting)
    ]
