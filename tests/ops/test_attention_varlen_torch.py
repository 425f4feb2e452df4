"""`attention_varlen` where PyTorch's ops serve it, which backend serves, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfast
from mmfast import backends, ops, reference
from mmfast.ops import _attention_varlen_torch
from tests.grading import outputs_and_gradients
from tests.ops.test_attention_varlen import draw, loop


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_reference_and_torch_backend_are_pytorchs_attention_of_each_sequence(is_causal: bool) -> None:
    args = draw(torch.device("cpu"), (6, 0, 3, 7, 4), (6, 2, 8, 5, 0), heads=(4, 2), padding=2)
    wanted = outputs_and_gradients(loop, args, {"is_causal": is_causal}, torch.float64)
    for fn in (reference.attention_varlen, ops.attention_varlen):
        found = outputs_and_gradients(fn, args, {"is_causal": is_causal}, torch.float64)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's attention under vmap
def test_torch_func_transforms_take_pytorchs_op(device: torch.device) -> None:
    q, k, v, *rest = draw(device)
    copies = torch.stack((q, q + 1))
    found = torch.func.vmap(lambda q: ops.attention_varlen(q, k, v, *rest))(copies)
    torch.testing.assert_close(found, torch.stack([loop(x, k, v, *rest) for x in copies]), rtol=1e-4, atol=1e-5)
    grad = torch.func.grad(lambda k: ops.attention_varlen(q, k, v, *rest).square().sum())(k)
    leaf = k.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loop(q, leaf, v, *rest).square().sum(), leaf)
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


def test_registered_op_runs_without_a_kernel() -> None:
    """A program exported on a GPU holds `torch.ops.mmfast.attention_varlen`; on a CPU, PyTorch's ops serve it."""
    args = draw(torch.device("cpu"), (6, 3), (5, 4), heads=(4, 2), padding=2)
    args = (*(x.bfloat16() for x in args[:3]), *args[3:])

    def registered(*args: Any) -> Tensor:
        return torch.ops.mmfast.attention_varlen(*args, False, 0.25)[0]

    found = outputs_and_gradients(lambda q, k, v, a, b, m, n: registered(q, k, v, a, b, m, n), args, {})
    truth = outputs_and_gradients(reference.attention_varlen, args, {}, torch.float64)
    assert {x.dtype for x in found} == {torch.bfloat16}
    torch.testing.assert_close([x.double() for x in found], truth, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_what_varlen_attn_leaves_in_padding_is_cleared(is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's `varlen_attn`, played by one with its arguments that writes NaN where it leaves memory unwritten."""
    q, k, v, *rest = draw(torch.device("cpu"), (5, 3), (5, 3), heads=(4, 2), padding=3)

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, used: int, both: bool) -> Tensor:
            ctx.used = used
            return torch.cat((x[:used], torch.full_like(x[used:], torch.nan))) if both else x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            rows = torch.arange(len(grads[0]))[:, None, None] < ctx.used
            return torch.where(rows, grads[0], torch.nan), None, None

    def varlen_attn(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
        *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        assert (scale, window_size, enable_gqa) == (0.25, (-1, 0 if is_causal else -1), True)
        inputs = (Spoil.apply(x, 8, False) for x in (query, key, value))
        return Spoil.apply(loop(*inputs, cu_seq_q, cu_seq_k, is_causal=is_causal), 8, True)

    monkeypatch.setattr(_attention_varlen_torch, "_flash_serves", lambda q: True)
    monkeypatch.setattr(_attention_varlen_torch, "_varlen_attn", lambda: varlen_attn)
    found = outputs_and_gradients(ops.attention_varlen, (q, k, v, *rest), {"is_causal": is_causal})
    wanted = outputs_and_gradients(reference.attention_varlen, (q, k, v, *rest), {"is_causal": is_causal})
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert all((x[8:] == 0).all() for x in found)


def test_kernel_serves_whatever_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "TRITON_MISSING", None)
    monkeypatch.setattr(backends, "ieee_products", lambda: True)
    facts = backends.Facts(torch.device("cuda"), torch.bfloat16, 64)
    assert backends.choose("attention_varlen", facts) == "triton"
    assert backends.choose("attention_varlen", facts._replace(refusal="head_dim 300 is above 256")) == "torch"
    full = facts._replace(dtype=torch.float32)
    assert backends.choose("attention_varlen", full) == "torch"
    monkeypatch.setattr(backends, "ieee_products", lambda: False)
    assert backends.choose("attention_varlen", full) == "triton"


def test_explains_the_choice() -> None:
    args = draw(torch.device("cpu"), width=300)
    assert "head_dim 300 is above 256" in str(mmfast.explain(ops.attention_varlen, *args))
    torch.testing.assert_close(ops.attention_varlen(*args), loop(*args), rtol=1e-4, atol=1e-5)


Q, K = torch.zeros(8, 4, 16), torch.zeros(6, 2, 16)
CU_Q, CU_K = torch.tensor([0, 5, 8]).int(), torch.tensor([0, 2, 6]).int()
GOOD = {"q": Q, "k": K, "v": K, "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K, "max_q": 5, "max_k": 4}
BAD = {
    "q is a list": ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
    "k is integer": ({"k": K.int()}, TypeError, "k must be floating point, got torch.int32"),
    "q's rank": ({"q": Q[None]}, ValueError, "q must have shape (total_q, H, d), got (1, 8, 4, 16)"),
    "v's rank": ({"v": K[0]}, ValueError, "v must have shape (total_k, Hk, d), got (2, 16)"),
    "k's dtype": ({"k": K.half()}, TypeError, "k must be torch.float32 like q, got torch.float16"),
    "v's device": ({"v": K.to("meta")}, ValueError, "v must be on cpu like q, got meta"),
    "k's width": ({"k": K[..., 1:]}, ValueError, "k must have head_dim 16 like q, got 15"),
    "v's rows": ({"v": K[1:]}, ValueError, "v must have shape (6, 2, 16) like k, got (5, 2, 16)"),
    "heads": ({"k": Q[:6, :3], "v": Q[:6, :3]}, ValueError, "k's heads must divide q's 4, got 3"),
    "no heads": ({"k": K[:, :0], "v": K[:, :0]}, ValueError, "k's heads must divide q's 4, got 0"),
    "lengths": ({"cu_seqlens_q": [0, 5, 8]}, TypeError, "cu_seqlens_q must be a tensor, got list"),
    "int64": ({"cu_seqlens_k": CU_K.long()}, TypeError, "cu_seqlens_k must be torch.int32, got torch.int64"),
    "a table": ({"cu_seqlens_q": CU_Q[None]}, ValueError, "cu_seqlens_q must have shape (B + 1,), got (1, 3)"),
    "nothing": ({"cu_seqlens_q": CU_Q[:0]}, ValueError, "cu_seqlens_q must have shape (B + 1,), got (0,)"),
    "their device": ({"cu_seqlens_q": CU_Q.to("meta")}, ValueError, "cu_seqlens_q must be on cpu like q, got meta"),
    "another batch": (
        {"cu_seqlens_k": CU_K[:2]},
        ValueError,
        "cu_seqlens_k must have shape (3,) like cu_seqlens_q, got (2,)",
    ),
    "max_q": ({"max_q": 5.0}, TypeError, "max_q must be an integer, got float"),
    "no max_k": ({"max_k": None}, TypeError, "max_k must be an integer, got NoneType"),
    "max_k is negative": ({"max_k": -1}, ValueError, "max_k must be at least 0, got -1"),
    "scale": ({"scale": float("inf")}, ValueError, "scale must be a finite number or None, got inf"),
    "not from 0": ({"cu_seqlens_q": CU_Q + 1}, ValueError, "cu_seqlens_q must start with 0, got 1"),
    "beyond the rows": (
        {"cu_seqlens_k": CU_K * 2, "max_k": 9},
        ValueError,
        "cu_seqlens_k must end with at most the 6 rows of k, got 12",
    ),
    "decreasing": (
        {"cu_seqlens_q": torch.tensor([0, 6, 5]).int(), "max_q": 6},
        ValueError,
        "cu_seqlens_q must not decrease, got 5 after 6",
    ),
    "max_q too small": (
        {"max_q": 4},
        ValueError,
        "max_q must be at least 5, the length of sequence 0, got 4",
    ),
    "max_k too small": ({"max_k": 3}, ValueError, "max_k must be at least 4, the length of sequence 1, got 3"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str) -> None:
    changed, kind, message = BAD[what]
    with pytest.raises(kind, match=re.escape(f"attention_varlen: {message}")):
        ops.attention_varlen(**{**GOOD, **changed})


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_torch_backend_on_a_gpu(is_causal: bool, device: torch.device) -> None:
    """`varlen_attn` where this PyTorch has one that fits, with rows of padding, else a loop."""
    args = draw(device, (197, 30, 0, 577), (197, 257, 5, 100), heads=(4, 2), width=64, padding=33)
    args = (*(x.bfloat16() for x in args[:3]), *args[3:])
    with mmfast.backend("torch"):
        found = outputs_and_gradients(ops.attention_varlen, args, {"is_causal": is_causal})
    truth = outputs_and_gradients(reference.attention_varlen, args, {"is_causal": is_causal}, torch.float64)
    torch.testing.assert_close([x.double() for x in found], truth, rtol=3e-2, atol=3e-2)
