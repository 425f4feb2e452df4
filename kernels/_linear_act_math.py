"""The activations of `linear_act` on float32 values inside a kernel, and their derivatives.

GELU needs the normal distribution's Phi(x), and an epilogue or a pass that takes erf from the CUDA library is bound by
its instructions and not by memory (37 instructions an element in the forward pass, 49 in the backward one). Here

    Phi(-a) = 2^-Q(a), a >= 0        Phi(a) = 1 - Phi(-a)

with a polynomial Q of degree 8 and one exponential: half as many. Its coefficients are a minimax fit on [0, 5.25] of
the error in Phi (relative below 3e-4); the last is positive, so that beyond 5.25, where Phi is 8e-8, the exponential
goes on to fall to 0. In float32 Phi is off by 1e-7 at most, and GELU by as much as PyTorch's own.

All are written so that a huge finite input gives the limit and not NaN. NaN stays NaN, and an infinite input gives what
the formula gives, as PyTorch's do. tanh is written with the sigmoid: (1 + tanh u) / 2 = sigmoid(2u).
"""

import triton
import triton.language as tl

GATED = ("geglu", "swiglu")
"""Activations of two halves: value * gelu(gate) with the gate last, silu(gate) * value with the gate first."""


@triton.jit
def _normal_cdf(x):
    a = tl.abs(x)
    q = 1.2659686e-06 * a - 2.0984156e-05
    q = q * a + 0.000102613616
    q = q * a + 0.000324801
    q = q * a - 0.0072845793
    q = q * a + 0.052628566
    q = q * a + 0.45917258
    q = q * a + 1.1511083
    q = q * a + 1.0
    below = tl.exp2(-q)
    return tl.where(x > 0.0, 1.0 - below, below)


@triton.jit
def _tanh_exponent(x):
    """-2u log2(e) for the argument u = sqrt(2 / pi) (x + 0.044715 x^3) of GELU's tanh."""
    return x * (-2.302208198144325 - 0.1029432395800235 * (x * x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of x, or of the gate of a gated one."""
    if ACTIVATION == "gelu" or ACTIVATION == "geglu":
        y = x * _normal_cdf(x)
    elif ACTIVATION == "gelu_tanh":
        y = x / (1.0 + tl.exp2(_tanh_exponent(x)))
    elif ACTIVATION == "quick_gelu":
        y = x / (1.0 + tl.exp2(-2.4554669595930156 * x))
    elif ACTIVATION == "relu":
        y = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "silu" or ACTIVATION == "swiglu":
        y = x / (1.0 + tl.exp2(-1.4426950408889634 * x))
    else:
        y = x
    return y


@triton.jit
def derivative(x, ACTIVATION: tl.constexpr):
    """The derivative of `activate` at x. ReLU's is the same at relu(x), which is what is kept for it."""
    if ACTIVATION == "gelu" or ACTIVATION == "geglu":
        d = _normal_cdf(x) + x * (0.3989422804014327 * tl.exp2(-0.7213475204444817 * (x * x)))
    elif ACTIVATION == "gelu_tanh":
        # Beyond 10 the derivative is 0 or 1 to the last bit, and the exponential would overflow.
        x = tl.where(x > 10.0, 10.0, tl.where(x < -10.0, -10.0, x))
        e = tl.exp2(_tanh_exponent(x))
        s = 1.0 / (1.0 + e)
        d = s + x * (s * (e * s)) * (1.5957691216057308 + 0.21406444881780076 * (x * x))
    elif ACTIVATION == "quick_gelu":
        s = 1.0 / (1.0 + tl.exp2(-2.4554669595930156 * x))
        d = s + 1.702 * (x * (s * (1.0 - s)))
    elif ACTIVATION == "relu":
        d = tl.where(x <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "silu" or ACTIVATION == "swiglu":
        s = 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * x))
        d = s + x * (s * (1.0 - s))
    else:
        d = tl.full(x.shape, 1.0, tl.float32)
    return d
