"""The CUDA C++ backward of attention, on its own: every plan against float64, conflicts of banks, orders of threads."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

import mmfast
from mmfast import cuda, ops, reference
from mmfast.commands import _grading
from mmfast.ops._attention import attention_torch, forward_torch
from tests.grading import ATOL, check_against_reference

pytestmark = pytest.mark.cuda

SLOW = pytest.mark.slow
HALF = (
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.bf16),
)
SANITIZED = "san.so" in os.environ.get("LD_PRELOAD", "")  # such a build has one width of each kind
Heads = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def _emulated(device: torch.device) -> Iterator[None]:
    """Start from counters of zero, and leave threads in order."""
    if device.type == "cpu":
        cuda.extension().reset_statistics()
    yield
    if device.type == "cpu":
        assert cuda.extension().statistics()["ldmatrix_conflicts"] == 0
        cuda.extension().set_thread_order(int(os.environ.get("MMFAST_THREAD_ORDER", "0")))


def draw(
    device: torch.device,
    dtype: torch.dtype,
    n_q: int,
    n_k: int,
    head_dim: int,
    *,
    batch: int = 1,
    heads: int = 1,
    kv_heads: int | None = None,
) -> Heads:
    """q and dout (B, H, n_q, d) in memory as (B, n_q, H, d), k and v (B, Hk, n_k, d) contiguous."""
    q, dout = (torch.randn(batch, n_q, heads, head_dim, device=device).to(dtype).transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(batch, kv_heads or heads, n_k, head_dim, device=device).to(dtype) for _ in range(2))
    return q, k, v, dout


def backward(
    tensors: Heads,
    *,
    scale: float | None = None,
    plan: tuple[int, int, int, int] | None = None,
    need_dkv: bool = True,
    grads: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The launcher's gradients, its output and lse those of the torch backend."""
    from mmfast.cuda._attention_backward import attention_backward

    q, k, v, dout = tensors
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out, lse = forward_torch(q, k, v, None, False, scale)
    return attention_backward(
        dout, q, k, v, out, lse, None, is_causal=False, scale=scale, need_dkv=need_dkv, grads=grads, plan=plan
    )


def check(tensors: Heads, found: tuple[Tensor | None, ...], scale: float | None = None) -> None:
    """Assert the project's rule: errors at most twice those of PyTorch's own gradients in the same dtype."""
    q, k, v, dout = tensors
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    truth = torch.autograd.grad(reference.attention(*inputs, scale=scale, enable_gqa=True), inputs, dout.double())
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    peer = torch.autograd.grad(attention_torch(*inputs, None, 0.0, False, scale, True), inputs, dout)
    for name, ours, theirs, true in zip(("dq", "dk", "dv"), found, peer, truth, strict=True):
        if ours is None:
            continue
        assert ours.shape == true.shape
        assert ours.dtype == q.dtype
        error, bound = _grading.error(ours, true), _grading.error(theirs, true)
        assert error <= 2 * bound + ATOL[q.dtype], f"{name}: error {error:.3g}, PyTorch's {bound:.3g}"


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16)


# Whole bands of 16 keys and steps of 64 queries, tails of 1, 5 and 7, a single row.
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("n", [1, 7, 16, 17, 50, 64, 65, 197, *(pytest.param(n, marks=SLOW) for n in (257, 577))])
def test_lengths(device: torch.device, dtype: torch.dtype, n: int) -> None:
    tensors = draw(device, dtype, n, n, 64)
    check(tensors, backward(tensors))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("head_dim", (32, 40, 64, 72, 128) if SANITIZED else range(32, 129, 8))
def test_head_dims(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Widths with and without an odd chunk of 8 columns; the last band has one key, the last step one query."""
    tensors = draw(device, dtype, 65, 49, head_dim)
    check(tensors, backward(tensors, plan=(4, 4, 1, 1)))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("head_dim", [40, 72])
@pytest.mark.parametrize(
    "plan",
    [
        (5, 5, 1, 1),  # a block a head
        (2, 5, 1, 1),  # keys in chunks, one after another
        (4, 5, 1, 2),
        (5, 5, 1, 3),  # blocks that share the queries
        (2, 2, 3, 1),  # that share the keys
        (1, 1, 5, 3),
        (2, 4, 2, 2),  # that share both, their keys in chunks
    ],
    ids=str,
)
def test_plans(device: torch.device, dtype: torch.dtype, head_dim: int, plan: tuple[int, int, int, int]) -> None:
    tensors = draw(device, dtype, 150, 77, head_dim, batch=2, heads=2)
    check(tensors, backward(tensors, plan=plan))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("splits", [1, 2])
def test_a_band_that_the_warps_share(device: torch.device, dtype: torch.dtype, splits: int) -> None:
    """The 257th key, whose scores and gradients are divided among the warps: in a last step of one query, too."""
    tensors = draw(device, dtype, 65, 257, 64)
    check(tensors, backward(tensors, plan=(17, 17, 1, splits)))
    check(tensors, backward(tensors, plan=(17, 17, 1, splits), need_dkv=False))


@pytest.mark.parametrize(("n_q", "n_k"), [(32, 77), (77, 32), (130, 20)])
@pytest.mark.parametrize("dtype", HALF)
def test_cross_attention(device: torch.device, dtype: torch.dtype, n_q: int, n_k: int) -> None:
    tensors = draw(device, dtype, n_q, n_k, 72, heads=2)
    check(tensors, backward(tensors))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("plan", [None, (3, 3, 1, 1), (2, 3, 1, 4), (2, 2, 2, 2)], ids=str)
def test_heads_that_share_keys(device: torch.device, dtype: torch.dtype, plan: tuple[int, int, int, int]) -> None:
    """dk and dv are sums over the group, in one block or several."""
    tensors = draw(device, dtype, 70, 40, 32, batch=2, heads=4, kv_heads=2)
    check(tensors, backward(tensors, plan=plan))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("plan", [None, (2, 3, 1, 1), (2, 2, 2, 2)], ids=str)
def test_only_dq(device: torch.device, plan: tuple[int, int, int, int]) -> None:
    tensors = draw(device, torch.float16, 70, 40, 64)
    found = backward(tensors, plan=plan, need_dkv=False)
    assert found[1] is None
    assert found[2] is None
    check(tensors, found)
    assert torch.equal(bits(found[0]), bits(backward(tensors, plan=plan)[0]))


def test_packed_gradients_in_place(device: torch.device) -> None:
    """q, k, v and their gradients are views of (B, N, 3 H d); nothing beside them is written."""
    packed = torch.randn(2, 50, 3, 2, 64, device=device).half()
    into = torch.full((2, 50, 3, 2, 80), 7.0, device=device, dtype=torch.float16)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    dq, dk, dv = into[..., 8:72].permute(2, 0, 3, 1, 4).unbind(0)
    dout = torch.randn(2, 50, 2, 64, device=device).half().transpose(1, 2)
    for plan in (None, (4, 4, 1, 1), (2, 2, 2, 1)):
        found = backward((q, k, v, dout), grads=(dq, dk, dv), plan=plan)
        assert found[0] is dq
        assert found[1] is dk
        assert found[2] is dv
        check((q, k, v, dout), found)
        assert (into[..., :8] == 7).all()
        assert (into[..., 72:] == 7).all()


@pytest.mark.parametrize("kind", ["transposed", "expanded", "one number", "offset", "negative"])
def test_strides(device: torch.device, kind: str) -> None:
    q, k, v, dout = draw(device, torch.float16, 20, 33, 40, batch=2, heads=2)
    if kind == "transposed":  # columns are not one apart
        dout, k = dout.mT.contiguous().mT, k.mT.contiguous().mT
    elif kind == "expanded":
        dout, v = dout[:, :1, :1].expand_as(dout), v[:1].expand_as(v)
    elif kind == "one number":
        dout = torch.full((), 0.5, device=device, dtype=dout.dtype).expand_as(dout)
    elif kind == "offset":  # rows that begin anywhere
        q = torch.randn(2, 2, 20, 43, device=device).half()[..., 1:41]
    else:
        q, k = q.flip(2), k.flip(1)
    check((q, k, v, dout), backward((q, k, v, dout)))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("sign", [1, -1])
def test_big_scores(device: torch.device, dtype: torch.dtype, sign: int) -> None:
    """lse of about +-1000: exp2(0 - lse) of a key that is not there would be infinite, and infinity times 0 NaN."""
    q, k, v, dout = draw(device, dtype, 17, 33, 32)
    q[..., 0], k[..., 0] = 64.0, sign * 64.0
    found = backward((q, k, v, dout))
    assert all(x is not None and x.isfinite().all() for x in found)
    check((q, k, v, dout), found)


def test_nan_and_infinity_stay_in_their_rows(device: torch.device) -> None:
    """A NaN in q or dout is in the gradients of its head; a row whose lse is +inf has gradients of 0."""
    from mmfast.cuda._attention_backward import attention_backward

    q, k, v, dout = draw(device, torch.float16, 70, 33, 32, heads=2)
    out, lse = forward_torch(q, k, v, None, False, 0.2)
    lse[0, 0, 5] = math.inf
    dout = dout.clone()
    dout[0, 1, 69] = math.nan
    dq, dk, dv = attention_backward(dout, q, k, v, out, lse, None, is_causal=False, scale=0.2)
    assert dk is not None
    assert dv is not None
    assert (dq[0, 0, 5] == 0).all()
    assert dq[0, 1].isnan().any(-1).nonzero().flatten().tolist() == [69]
    assert dk[0, 0].isfinite().all()
    assert dk[0, 1].isnan().all()
    assert dv[0, 1].isnan().all()


@pytest.mark.sanitized
@pytest.mark.parametrize("plan", [(17, 17, 1, 1), (5, 9, 2, 2)], ids=str)
def test_the_same_bits_in_any_order_of_threads(device: torch.device, plan: tuple[int, int, int, int]) -> None:
    tensors = draw(device, torch.bfloat16, 97, 257 if plan[0] == 17 else 261, 64)
    first = backward(tensors, plan=plan)
    for order in (0, 1, 3):
        if device.type == "cpu":
            cuda.extension().set_thread_order(order)
        again = backward(tensors, plan=plan)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(first, again, strict=True))


def test_the_same_bits_for_any_batch(device: torch.device) -> None:
    """What a head's gradients are does not depend on the heads beside it, under one plan."""
    tensors = draw(device, torch.float16, 65, 49, 64, batch=2, heads=2)
    all_heads = backward(tensors, plan=(4, 4, 1, 1))
    one = backward(tuple(x[1:, 1:] for x in tensors), plan=(4, 4, 1, 1))
    assert all(torch.equal(bits(a[1:, 1:]), bits(b)) for a, b in zip(all_heads, one, strict=True))


H100, A100 = 232448, 166912


@pytest.mark.parametrize(
    ("shape", "limit", "plan"),
    [
        ((256 * 12, 1, 197, 197, 64), H100, (13, 13, 1, 1)),  # ViT-B: a block a head
        ((256 * 12, 1, 197, 197, 64), A100, (8, 13, 1, 1)),  # in two chunks
        ((256 * 16, 1, 257, 257, 64), H100, (17, 17, 1, 1)),  # ViT-L/14: a shared band
        ((256 * 16, 1, 257, 257, 64), A100, (10, 17, 1, 1)),
        ((64 * 16, 1, 577, 577, 64), H100, (14, 37, 1, 1)),
        ((1024 * 12, 1, 50, 50, 64), H100, (4, 4, 1, 1)),
        ((256 * 16, 1, 257, 257, 80), H100, (9, 17, 1, 1)),
        ((12, 1, 197, 197, 64), H100, (8, 8, 2, 4)),  # one image: blocks share heads
        ((16 * 8, 1, 4096, 77, 40), H100, (5, 5, 1, 2)),  # Stable Diffusion's cross-attention
        ((1, 1, 1, 1, 128), H100, (1, 1, 1, 1)),
    ],
)
def test_the_rule(shape: tuple[int, ...], limit: int, plan: tuple[int, ...]) -> None:
    assert tuple(cuda.extension().attention_backward_plan(*shape, 132, limit)) == plan


def test_every_plan_of_the_rule_is_one_that_runs() -> None:
    """Whatever the sizes, the plan covers all keys and queries."""
    for head_dim in range(32, 129, 8):
        for heads in (1, 7, 5000):
            for n_q, n_k in ((1, 1), (64, 272), (65, 273), (1000, 77), (31, 3000)):
                for group in (1, 3):
                    sizes = (heads, group, n_q, n_k, head_dim)
                    chunk, split, key_splits, query_splits = cuda.extension().attention_backward_plan(*sizes, 132, A100)
                    bands, steps = -(-n_k // 16), group * -(-n_q // 64)
                    assert 0 < chunk <= split <= bands, sizes
                    assert split * (key_splits - 1) < bands <= split * key_splits, sizes
                    assert 0 < query_splits <= steps, sizes
                    assert -(-steps // query_splits) * (query_splits - 1) < steps, sizes


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ((0, 3, 1, 1), "a plan of 0 bands of 3"),
        ((3, 2, 1, 1), "does not fit 40 keys"),
        ((3, 3, 2, 1), "2 key splits"),
        ((3, 3, 1, 3), "3 query splits"),
        ((40, 40, 1, 1), "does not fit"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(
    device: torch.device, plan: tuple[int, int, int, int], message: str
) -> None:
    tensors = draw(device, torch.float16, 70, 40, 64)
    with pytest.raises(ValueError, match=message):
        backward(tensors, plan=plan)


def test_what_the_kernel_does_not_serve_is_refused(device: torch.device) -> None:
    from mmfast.cuda._attention_backward import attention_backward

    q, k, v, dout = draw(device, torch.float16, 20, 20, 64)
    out, lse = forward_torch(q, k, v, None, False, 0.1)
    with pytest.raises(ValueError, match="serves no mask"):
        attention_backward(dout, q, k, v, out, lse, None, is_causal=True, scale=0.1)
    with pytest.raises(ValueError, match="head_dim must be a multiple of 8 from 32 to 128, got 24"):
        backward(tuple(x[..., :24] for x in (q, k, v, dout)), plan=(2, 2, 1, 1))
    with pytest.raises(ValueError, match=r"dtype must be 1 \(float16\) or 2 \(bfloat16\), got 0"):
        backward(tuple(x.float() for x in (q, k, v, dout)), plan=(2, 2, 1, 1))


# ---------------------------------------------------------------- by way of the ops
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("n_q", "n_k", "head_dim", "kv_heads"), [(50, 50, 64, 2), (20, 77, 40, 2), (33, 17, 72, 1)])
def test_gradients_of_attention(
    device: torch.device, dtype: torch.dtype, n_q: int, n_k: int, head_dim: int, kv_heads: int
) -> None:
    q, k, v, _ = draw(device, dtype, n_q, n_k, head_dim, batch=2, heads=2, kv_heads=kv_heads)
    attention = partial(ops.attention, enable_gqa=True)
    check_against_reference(attention, partial(reference.attention, enable_gqa=True), (q, k, v), {}, "cuda", dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("length", [17, 65])
def test_gradients_of_attention_qkv(device: torch.device, dtype: torch.dtype, length: int) -> None:
    qkv = torch.randn(2, length, 3 * 2 * 64, device=device).to(dtype)
    attention, truth = partial(ops.attention_qkv, num_heads=2), partial(reference.attention_qkv, num_heads=2)
    check_against_reference(attention, truth, (qkv,), {}, "cuda", dtype)


@pytest.mark.usefixtures("poisoned")
def test_a_sum_and_one_wanted_gradient(device: torch.device) -> None:
    """A gradient of the output without strides; where dq alone is wanted nothing else is computed."""
    q, k, v, _ = draw(device, torch.float16, 50, 33, 64, heads=2)
    for wanted in (0, 1, 2):
        tensors = [x.clone() for x in (q, k, v)]
        tensors[wanted].requires_grad_()
        with mmfast.backend("cuda"):
            found = torch.autograd.grad(ops.attention(*tensors).sum(), tensors[wanted])[0]
        exact = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
        truth = torch.autograd.grad(reference.attention(*exact).sum(), exact[wanted])[0]
        torch.testing.assert_close(found.double(), truth, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backends", [("cuda", "torch"), ("torch", "cuda")], ids="-".join)
def test_forward_and_backward_of_two_backends(device: torch.device, backends: tuple[str, str]) -> None:
    """What is saved means the same to both."""
    tensors = draw(device, torch.float16, 50, 33, 64, heads=2)
    inputs = [x.requires_grad_() for x in tensors[:3]]
    with mmfast.backend(backends[0]):
        out = torch.ops.mmfast.attention(*inputs, None, False, 0.125)[0]
    with mmfast.backend(backends[1]):
        found = torch.autograd.grad(out, inputs, tensors[3])
    check((*(x.detach() for x in inputs), tensors[3]), found)


@SLOW
def test_compiled_gradients_equal_eager(device: torch.device) -> None:
    q, k, v, dout = draw(device, torch.bfloat16, 20, 33, 64)
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q * 1.5, k, v)

    with mmfast.backend("cuda"):
        expected = torch.autograd.grad(run(*inputs), inputs, dout)
        found = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs), inputs, dout)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found, expected, strict=True))
