"""The operators: functions of tensors with autograd, torch.compile and autocast support."""

from .add_layer_norm import add_layer_norm
from .layer_norm import layer_norm

NAMES = ("layer_norm", "add_layer_norm")
"""Every op. `mmfast.ops.X`, `mmfast.reference.X`, `mmfast.kernels.X` and `benchmarks/bench_X.py` exist for each."""

__all__ = ["NAMES", "add_layer_norm", "layer_norm"]
