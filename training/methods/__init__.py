"""The methods by name."""

from collections.abc import Callable

from preprocessing.geometry import Size
from preprocessing.labels import LabelTable
from training.methods.base import Method
from training.methods.generalist.config import GeneralistConfig
from training.methods.generalist.model import Generalist

MethodConfig = GeneralistConfig
METHODS: dict[type[MethodConfig], Callable[[MethodConfig, LabelTable, Size], Method]] = {GeneralistConfig: Generalist}
"""The method of each config class: a recipe names its method by the options it gives."""
