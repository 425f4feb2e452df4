"""The definition of each op in plain torch: runnable in float64, differentiable, the truth that ops are graded by."""

from .add_layer_norm import add_layer_norm
from .layer_norm import layer_norm

__all__ = ["add_layer_norm", "layer_norm"]
