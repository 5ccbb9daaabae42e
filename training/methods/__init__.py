"""The methods by config class: a recipe names its method by the options it gives."""

from collections.abc import Callable

from training.methods.base import Method, MethodConfig
from training.methods.generalist.config import GeneralistConfig
from training.methods.generalist.model import Generalist
from training.methods.panoptic_deeplab.config import PanopticDeeplabConfig
from training.methods.panoptic_deeplab.model import PanopticDeeplab

METHODS: dict[type[MethodConfig], Callable[..., Method]] = {
    GeneralistConfig: Generalist,
    PanopticDeeplabConfig: PanopticDeeplab,
}
"""Each takes its config, the LabelTable and the frame."""
