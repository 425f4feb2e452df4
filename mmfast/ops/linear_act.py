"""`linear_act`: a linear layer with its activation, gated ones included: registration and autograd."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends
from ._register import autocasts, register
from ._validate import check_input, check_tensor

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "geglu", "swiglu")
GATED = ("geglu", "swiglu")

EPILOGUE_DEPTH = 900
"""K up to which the activation is in the epilogue of a Triton product; above, cuBLAS multiplies and one pass follows.

That pass moves 2 elements (1.5 of a pre-activation if gated), which takes 300 / K of the product's own time at 720
TFLOP/s and 4.8 TB/s: 39 % at K = 768. So Triton's product wins while it reaches K / (K + 300) of cuBLAS's rate, and 900
is where that is 0.75. Published shares are 0.61 (one shape, without TMA) and 0.89 to 0.97 (with TMA and warp
specialization). Unmeasured: the rows "mmfast epilogue" and "mmfast pass" of `mmfast bench linear_act` are the two
sides, and the K where they meet is the number to put here."""
FEWEST_ROWS = 64
"""Rows from which a Triton product serves: with fewer, most of a tile is padding, and cuBLAS splits K instead."""


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str) -> Tensor:
    """A linear layer and its activation, `act(x weight^T + bias)`.

    The same as `act(F.linear(x, weight, bias))`. The weight of a gated activation has 2M rows, packed; of the halves of
    the linear layer's output, first and second, the result is

        geglu    first * gelu(second)      diffusers' `GEGLU`: the gate comes last
        swiglu   silu(first) * second      timm's `SwiGLUPacked` and DINOv2: the gate comes first

    Under autocast x, weight and bias are cast to the autocast dtype, as `F.linear` does.

    Args:
        x: (..., K), float32, float16, bfloat16 or float64, any strides.
        weight: (M, K) as `nn.Linear`'s, or (2M, K) if gated, in x's dtype.
        bias: (M,), or (2M,) if gated, in x's dtype, or None.
        activation: "none", "gelu" (with erf), "gelu_tanh", "quick_gelu" (`x * sigmoid(1.702 x)`), "relu", "silu",
            "geglu" or "swiglu".

    Returns:
        (..., M) in x's dtype, contiguous.

    Raises:
        TypeError: an argument is not a tensor, or its dtype does not fit.
        ValueError: a shape, a device or the activation does not fit.
        BackendError: a forced backend cannot serve.

    Source: Hendrycks, Gimpel, "Gaussian Error Linear Units", arXiv:1606.08415; Shazeer, "GLU Variants Improve
    Transformer", arXiv:2002.05202.
    """
    _check(x, weight, bias, activation)
    if backends.torch_serves(x):
        return linear_act_torch(x, weight, bias, activation)
    facts = _facts(x, weight, bias, activation)
    if backends.choose("linear_act", facts) != "torch":
        return _linear_act(x, weight, bias, activation)
    if facts.refusal == LIBRARY and bias is not None:
        return library_epilogue(x, weight, bias, activation)
    return linear_act_torch(x, weight, bias, activation)


def linear_act_torch(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """The torch backend: `F.linear` and PyTorch's activation."""
    return activate_torch(F.linear(x, weight, bias), activation)


def activate_torch(pre: Tensor, activation: str) -> Tensor:
    """The activation by PyTorch's own ops, the steps of the modules replaced."""
    if activation == "gelu":
        return F.gelu(pre)
    if activation == "gelu_tanh":
        return F.gelu(pre, approximate="tanh")
    if activation == "quick_gelu":
        return pre * torch.sigmoid(1.702 * pre)
    if activation == "relu":
        return F.relu(pre)
    if activation == "silu":
        return F.silu(pre)
    if activation in GATED:
        first, second = pre.chunk(2, dim=-1)
        return first * F.gelu(second) if activation == "geglu" else F.silu(first) * second
    return pre


def activate_torch_backward(dy: Tensor, kept: Tensor, activation: str) -> Tensor:
    """The gradient of the pre-activation, by PyTorch's own ops: it can be differentiated again.

    `kept` is the pre-activation; y for "relu"; anything for "none".
    """
    if activation in ("gelu", "gelu_tanh"):
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        return torch.ops.aten.gelu_backward.default(dy, kept, approximate=approximate)
    if activation == "quick_gelu":
        s = torch.sigmoid(1.702 * kept)
        return dy * (s + 1.702 * (kept * (s * (1 - s))))
    if activation == "relu":
        return torch.ops.aten.threshold_backward.default(dy, kept, 0)
    if activation == "silu":
        return _silu_backward(dy, kept)
    if activation in GATED:
        first, second = kept.chunk(2, dim=-1)
        if activation == "geglu":
            return torch.cat([dy * F.gelu(second), torch.ops.aten.gelu_backward.default(dy * first, second)], -1)
        return torch.cat([_silu_backward(dy * second, first), dy * F.silu(first)], -1)
    return dy.clone()


def _silu_backward(dy: Tensor, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return torch.ops.aten.silu_backward.default(dy, x)
    s = torch.sigmoid(x)  # PyTorch's own op has no derivative
    return dy * (s + x * (s * (1 - s)))


def library_epilogue(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """ReLU or tanh-GELU in the epilogue of cuBLASLt's product. No gradient: it keeps no pre-activation."""
    dtype = _dtype(x)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    y = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=activation == "gelu_tanh")
    return y.view(*x.shape[:-1], weight.shape[0])


def cost(x: Tensor, weight: Tensor, *, activation: str, backward: bool = False) -> dict[str, int]:
    """FLOPs of the matrix products, and bytes through device memory that the op cannot do without."""
    rows, width = math.prod(x.shape[:-1]), weight.shape[0]
    y = rows * (width // 2 if activation in GATED else width)
    # Forward: x, weight, y. Backward: two products; x, weight, dy and the pre-activation (y for ReLU), dx and dweight.
    kept = {"none": 0, "relu": y}.get(activation, rows * width)
    elements = 2 * x.numel() + 2 * weight.numel() + y + kept if backward else x.numel() + weight.numel() + y
    flops = 2 * rows * weight.numel() * (2 if backward else 1)
    return {"flops": flops, "bytes": elements * x.element_size()}


LIBRARY = "cuBLASLt has this activation in its epilogue, for inference"
PLAIN = "no activation: the product is cuBLAS's"


def _facts(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> backends.Facts:
    dtype = _dtype(x)
    refusal = None
    if backends.forced() is None:  # a kernel serves these too, but loses
        if activation == "none":
            refusal = PLAIN
        elif x.is_cuda and bias is not None and not _wants_gradient(x, weight, bias):
            refusal = _library_serves(dtype, activation, x.numel())
    detail = None
    if backends.explaining():  # else not asked, since a compiled program would be bound to what it asked of the rows
        detail = _plan(math.prod(x.shape[:-1]), x.shape[-1], dtype.itemsize, activation)[1]
    return backends.Facts(x.device, dtype, x.shape[-1], refusal=refusal, detail=detail)


def _library_serves(dtype: torch.dtype, activation: str, elements: int) -> str | None:
    """LIBRARY where `torch._addmm_activation` is the choice on a GPU, else None.

    Its GELU is off by 5e-6, which is nothing in 16 bits and too much in float32.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    if not elements or not (activation == "relu" or (half and activation == "gelu_tanh")):
        return None
    if torch.version.hip is not None or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return None
    return LIBRARY


def _plan(rows: int, depth: int, itemsize: int, activation: str) -> tuple[str, str]:
    """How the triton backend computes: ("epilogue", why), one Triton kernel, or ("pass", why), cuBLAS and a kernel.

    A forced backend is the Triton kernel alone.
    """
    if backends.forced() == "triton":
        return "epilogue", "forced"
    if rows < FEWEST_ROWS:
        return "pass", f"cuBLAS and a pass for the activation: {rows} rows are few"
    if depth * itemsize % 16:
        return "pass", f"cuBLAS and a pass for the activation: K = {depth} is no number of 16-byte pieces"
    limit = EPILOGUE_DEPTH * 3 // 4 if activation in GATED else EPILOGUE_DEPTH
    if depth > limit:
        return "pass", f"cuBLAS and a pass for the activation, which is little beside K = {depth}"
    return "epilogue", f"the activation in the product's epilogue, since a pass for it is much beside K = {depth}"


class LinearActFunction(torch.autograd.Function):
    """Autograd of `linear_act`, as (y, pre-activation): saves the latter (y for ReLU), and x and weight where needed.

    The pre-activation is an output so that the backward pass, made with create_graph=True, has a graph to it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
        y, pre = _linear_act_forward(x, weight, bias, activation)
        kept = pre
        if activation in ("none", "relu"):
            ctx.mark_non_differentiable(pre)
            kept = y if activation == "relu" else None
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x if needs[1] else None, weight if needs[0] else None, kept)
        ctx.set_materialize_grads(False)
        ctx.activation, ctx.x_shape = activation, x.shape
        return y, pre

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, kept = ctx.saved_tensors
        dy, dpre = grads
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        dbias = None
        if dy is not None:
            again = torch.is_grad_enabled()  # create_graph=True: PyTorch's own ops can be differentiated again
            if again:
                found = activate_torch_backward(dy, kept, ctx.activation)
            else:
                kept = dy.new_empty(0) if kept is None else kept
                found, dbias = _linear_act_backward(dy, kept, ctx.activation, need_bias and dpre is None)
            dpre, dbias = (found, None if again else dbias) if dpre is None else (found + dpre, None)
        if dpre is None:
            return None, None, None, None
        rows = math.prod(dpre.shape[:-1])
        flat = dpre.reshape(rows, dpre.shape[-1])
        dx = (flat @ weight).view(ctx.x_shape) if need_x else None
        dweight = flat.t() @ x.reshape(rows, x.shape[-1]) if need_weight else None
        if need_bias and dbias is None:
            dbias = flat.sum(0)
        return dx, dweight, dbias if need_bias else None, None


def _autograd(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """With a gradient to come, the function that keeps the pre-activation; without, the op alone."""
    if _wants_gradient(x, weight, bias):
        return LinearActFunction.apply(x, weight, bias, activation)[0]
    with torch._C._AutoDispatchBelowAutograd():
        return _linear_act(x, weight, bias, activation)


# What the registered ops run. The pre-activation is empty where the backward pass does without: "none" and "relu".


def _implementation(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return _compute(x, weight, bias, activation, save_pre=False)[0]


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    y, pre = _compute(x, weight, bias, activation, save_pre=activation not in ("none", "relu"))
    return y, x.new_empty(0) if pre is None else pre


def _compute(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, *, save_pre: bool
) -> tuple[Tensor, Tensor | None]:
    if _pick(x) == "torch":
        pre = F.linear(x, weight, bias)
        y = activate_torch(pre, activation)
    else:
        from ..kernels.linear_act import activation_forward, linear_act_forward

        rows = math.prod(x.shape[:-1])
        if _plan(rows, x.shape[-1], x.element_size(), activation)[0] == "epilogue":
            precision = "ieee" if backends.ieee_products() else "tf32"
            return linear_act_forward(x, weight, bias, activation, save_pre=save_pre, precision=precision)
        pre = F.linear(x, weight, bias)
        y = activation_forward(pre, activation)
    return y.contiguous(), pre.contiguous() if save_pre else None


def _backward(dy: Tensor, kept: Tensor, activation: str, need_dbias: bool) -> tuple[Tensor, Tensor]:
    if _pick(dy) != "torch":
        from ..kernels.linear_act import linear_act_backward

        pre = None if activation == "none" else kept
        dpre, dbias = linear_act_backward(dy, pre, activation, need_dbias=need_dbias)
    else:
        dpre = activate_torch_backward(dy, kept, activation).contiguous()
        dbias = dpre.reshape(math.prod(dpre.shape[:-1]), dpre.shape[-1]).sum(0) if need_dbias else None
    return dpre, dy.new_empty(0) if dbias is None else dbias


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    kept = activation not in ("none", "relu")
    return _fake(x, weight, bias, activation), x.new_empty((*x.shape[:-1], weight.shape[0]) if kept else (0,))


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // (2 if activation in GATED else 1)))


def _backward_fake(dy: Tensor, kept: Tensor, activation: str, need_dbias: bool) -> tuple[Tensor, Tensor]:
    width = dy.shape[-1] * (2 if activation in GATED else 1)
    return dy.new_empty((*dy.shape[:-1], width)), dy.new_empty(width if need_dbias else 0)


def _pick(x: Tensor) -> str:
    return backends.pick("linear_act", backends.Facts(x.device, x.dtype, x.shape[-1]))


def _wants_gradient(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )


def _dtype(x: Tensor) -> torch.dtype:
    """The dtype of the product: that of x, or autocast's."""
    casts = autocasts(x.device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if casts else x.dtype


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    op = "linear_act"
    check_input(op, "x", x)
    check_tensor(op, "weight", weight)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"{op}: weight must have shape (M, {x.shape[-1]}), got {tuple(weight.shape)}")
    if activation in GATED and weight.shape[0] % 2:
        raise ValueError(f"{op}: weight of {activation} must have an even number of rows, got {weight.shape[0]}")
    if bias is not None:
        check_tensor(op, "bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{op}: bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        if value.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device} like x, got {value.device}")
        if value.dtype != x.dtype and (torch.float64 in (value.dtype, x.dtype) or not autocasts(x.device)):
            raise TypeError(f"{op}: {name} must be {x.dtype} like x, got {value.dtype}")


_linear_act = register(
    "linear_act(Tensor x, Tensor weight, Tensor? bias, str activation) -> Tensor",
    _implementation,
    fake=_fake,
    autograd=_autograd,
    autocast="lower_precision",
)
_linear_act_forward = register(
    "linear_act_forward(Tensor x, Tensor weight, Tensor? bias, str activation) -> (Tensor, Tensor)",
    _forward,
    fake=_forward_fake,
)
_linear_act_backward = register(
    "linear_act_backward(Tensor dy, Tensor kept, str activation, bool need_dbias) -> (Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
)
