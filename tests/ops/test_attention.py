"""`attention` against `F.scaled_dot_product_attention` and its float64 reference: answers, gradients, masks, errors."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmfast
from mmfast import backends, ops, reference
from tests.grading import CUDA, DTYPES, check_against_reference

triton_only = pytest.mark.triton
KERNELS = (pytest.param("triton", marks=triton_only), CUDA)


def draw(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    *,
    n_k: int | None = None,
    kv_heads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, N, d) in memory as (B, N, H, d), and k and v contiguous."""
    batch, heads, length, width = shape
    q = torch.randn(batch, length, heads, width, device=device).to(dtype).transpose(1, 2)
    k, v = (torch.randn(batch, kv_heads or heads, n_k or length, width, device=device).to(dtype) for _ in range(2))
    return q, k, v


def check(tensors: tuple[Tensor, ...], dtype: torch.dtype, backend: str = "triton", **options: Any) -> None:
    check_against_reference(
        partial(ops.attention, **options), partial(reference.attention, **options), tensors, {}, backend, dtype
    )


# Lengths are those of the tiles: one key, whole tiles, tails of 1, 5, 13 and 17 after full ones.
@triton_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n_q", "n_k", "width"),
    [
        (1, 1, 16),
        (17, 17, 32),
        (64, 64, 16),
        (65, 65, 64),
        (50, 77, 40),
        (20, 69, 72),
        (5, 145, 88),
        (33, 20, 104),
        (20, 33, 160),
        (9, 10, 256),
        (7, 8, 19),
        (130, 16, 32),
        (32, 257, 16),
    ],
)
def test_lengths_and_widths(device: torch.device, dtype: torch.dtype, n_q: int, n_k: int, width: int) -> None:
    check(draw(device, dtype, (1, 2, n_q, width), n_k=n_k), dtype)


@triton_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_keys(device: torch.device, dtype: torch.dtype) -> None:
    """More than one pass holds: the online softmax, and one program a tile in the backward."""
    check(draw(device, dtype, (1, 1, 150, 16), n_k=330), dtype)


@triton_only
@pytest.mark.parametrize("ragged", [False, True])
def test_backward_of_one_program_a_tile(device: torch.device, ragged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmfast.kernels import attention as kernels

    plan = kernels.BackwardPlan(False, 64, 32, 4, 1, ragged=ragged, apart=ragged)
    monkeypatch.setattr(kernels, "backward_plan", lambda *args: (plan, plan))
    check(draw(device, torch.float32, (2, 4, 81, 32), n_k=97, kv_heads=2), torch.float32, enable_gqa=True)
    check(draw(device, torch.float32, (1, 2, 81, 16), n_k=97), torch.float32, is_causal=True)


@triton_only
def test_scores_above_the_first_ones_rescale(device: torch.device) -> None:
    """The online softmax meets its largest scores last."""
    q, k, v = draw(device, torch.float32, (1, 1, 20, 16), n_k=200)
    check((q, k * torch.linspace(0.1, 8, 200, device=device)[:, None], v), torch.float32)


@triton_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 2, 20, 33), (2, 1, 20, 33), (1, 2, 1, 33), (2, 1, 1, 33), (20, 33), (1, 33)], ids=str
)
@pytest.mark.parametrize("kind", ["bool", "added"])
def test_masks_broadcast(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], kind: str) -> None:
    mask = torch.rand(shape, device=device) > 0.4
    mask[..., 0] = True
    if kind == "added":
        mask = torch.randn(shape, device=device).to(dtype).masked_fill(~mask, -torch.inf)
    check(draw(device, dtype, (2, 2, 20, 16), n_k=33), dtype, attn_mask=mask)


@triton_only
def test_a_float32_mask_of_half_precision_tensors(device: torch.device) -> None:
    mask = torch.randn(20, 33, device=device)
    check(draw(device, torch.float16, (1, 2, 20, 16), n_k=33), torch.float16, attn_mask=mask)


@triton_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_q", "n_k"), [(70, 70), (20, 70), (70, 20)])
def test_causal_is_top_left(device: torch.device, dtype: torch.dtype, n_q: int, n_k: int) -> None:
    check(draw(device, dtype, (1, 2, n_q, 16), n_k=n_k), dtype, is_causal=True)


@triton_only
def test_causal_and_mask(device: torch.device) -> None:
    mask = torch.rand(20, 33, device=device) > 0.2
    mask[:, 0] = True
    check(draw(device, torch.float32, (1, 2, 20, 16), n_k=33), torch.float32, attn_mask=mask, is_causal=True)


@triton_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_k", [33, 300])
@pytest.mark.parametrize("kind", ["bool", "added"])
def test_rows_without_keys_give_zero(device: torch.device, dtype: torch.dtype, n_k: int, kind: str) -> None:
    mask: Tensor = torch.rand(1, 2, 20, n_k, device=device) > 0.4
    mask[..., 0] = True
    mask[0, 1, 3] = mask[0, 0, 19] = False
    hidden = mask if kind == "bool" else torch.zeros(mask.shape, device=device).masked_fill(~mask, -torch.inf)
    q, k, v = (x.requires_grad_() for x in draw(device, dtype, (1, 2, 20, 16), n_k=n_k))
    with mmfast.backend("triton"):
        out, lse = ops.attention(q, k, v, hidden, return_lse=True)
    assert (out[0, 1, 3] == 0).all()
    assert (out[0, 0, 19] == 0).all()
    assert lse[0, 1, 3] == lse[0, 0, 19] == -torch.inf
    dq = torch.autograd.grad(out.sum(), q)[0]
    assert (dq[0, 1, 3] == 0).all()
    assert dq.isfinite().all()
    check(draw(device, dtype, (1, 2, 20, 16), n_k=n_k), dtype, attn_mask=hidden)


@triton_only
@pytest.mark.parametrize("n_k", [33, 300])
@pytest.mark.parametrize("value", [-1e4, -1e9, -3.4028234663852886e38])
def test_rows_of_very_negative_masks(device: torch.device, n_k: int, value: float) -> None:
    """A mask of large negative numbers, not of -inf, in every key of a row: still probabilities that add up to 1."""
    mask = torch.zeros(20, n_k, device=device)
    mask[3], mask[7, 5:] = value, value
    check(draw(device, torch.float32, (1, 2, 20, 16), n_k=n_k), torch.float32, attn_mask=mask)


@triton_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths_of_64_beyond_128_with_a_mask(device: torch.device, dtype: torch.dtype) -> None:
    """A length of 128 n + 64 with a mask, where a peer's dq is NaN; and lse of -1000, where another's dk is."""
    mask = torch.rand(1, 1, 1, 192, device=device) > 0.3
    q, k, v = draw(device, dtype, (1, 1, 64, 16), n_k=192)
    check((q, k, v), dtype, attn_mask=mask)
    q, k = q.abs() + 1, -k.abs() - 1
    check((q, k, v), dtype, attn_mask=mask, scale=12.0)


@triton_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_heads(device: torch.device, dtype: torch.dtype) -> None:
    check(draw(device, dtype, (2, 6, 19, 16), n_k=21, kv_heads=2), dtype, enable_gqa=True)
    check(draw(device, dtype, (1, 4, 3, 16), n_k=40, kv_heads=1), dtype, enable_gqa=True)


@triton_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_q", [1, 3, 32])
@pytest.mark.parametrize("kind", ["none", "padding", "added"])
def test_keys_split_over_programs(
    device: torch.device, dtype: torch.dtype, n_q: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few queries on many keys: several programs a head and their combination; heads that share keys share one."""
    from mmfast.kernels import attention as kernels

    monkeypatch.setattr(kernels, "SPLIT_KEYS", 64)
    monkeypatch.setattr(kernels, "resident_programs", lambda device: 8)
    calls = []
    split_forward = kernels._split_forward
    monkeypatch.setattr(kernels, "_split_forward", lambda *args: (calls.append(args[6]), split_forward(*args)))
    mask = None
    if kind == "padding":
        mask = torch.rand(1, 1, 1, 300, device=device) > 0.4
        mask[..., :130] = False  # a split without keys
    elif kind == "added":
        mask = torch.randn(2, n_q, 300, device=device).to(dtype)
        mask[1, 0] = -torch.inf
    check(draw(device, dtype, (1, 2, n_q, 40), n_k=300, kv_heads=1), dtype, attn_mask=mask, enable_gqa=True)
    assert calls
    assert calls[0] == 4


@triton_only
def test_strides(device: torch.device) -> None:
    packed = torch.randn(2, 21, 3, 2, 16, device=device)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    check((q, k, v), torch.float32)
    check((q, k[:, :1].expand(2, 2, 21, 16), v.flip(2)), torch.float32)
    check((q.mT.contiguous().mT, k, v[:, :, ::1]), torch.float32)  # columns are not one apart: copied
    odd = torch.randn(2, 2, 21, 19, device=device)[..., 1:18]  # rows that start anywhere
    check((odd, odd.flip(1), odd.flip(2)), torch.float32)


@triton_only
def test_a_gradient_without_strides(device: torch.device) -> None:
    q, k, v = (x.requires_grad_() for x in draw(device, torch.float32, (1, 2, 20, 16), n_k=33))
    with mmfast.backend("triton"):
        found = torch.autograd.grad(ops.attention(q, k, v).sum(), (q, k, v))
    truth = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).sum(), (q, k, v))
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)


@triton_only
def test_only_what_is_needed(device: torch.device) -> None:
    q, k, v = draw(device, torch.float32, (1, 2, 20, 16), n_k=33)
    truth = F.scaled_dot_product_attention
    for wanted in (0, 1, 2):
        tensors = [q.clone(), k.clone(), v.clone()]
        tensors[wanted].requires_grad_()
        with mmfast.backend("triton"):
            found = torch.autograd.grad(ops.attention(*tensors).square().sum(), tensors[wanted])
        torch.testing.assert_close(
            found, torch.autograd.grad(truth(*tensors).square().sum(), tensors[wanted]), rtol=1e-4, atol=1e-5
        )


@triton_only
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("n", [50, 64, 69, 81])
def test_every_element_is_written(device: torch.device, n: int) -> None:
    q, k, v = (x.requires_grad_() for x in draw(device, torch.float16, (2, 2, n, 24)))
    with mmfast.backend("triton"):
        out, lse = ops.attention(q, k, v, return_lse=True)
        grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    for x in (out, lse, *grads):
        assert x.isfinite().all()


@triton_only
def test_nan_stays_in_its_row(device: torch.device) -> None:
    q, k, v = draw(device, torch.float32, (1, 2, 20, 16), n_k=33)
    q[0, 1, 4, 2] = torch.nan
    with mmfast.backend("triton"):
        out = ops.attention(q, k, v)
    assert out[0, 1, 4].isnan().all()
    assert out.isnan().any(-1).sum() == 1


@triton_only
def test_lse(device: torch.device) -> None:
    q, k, v = draw(device, torch.float32, (2, 2, 20, 16), n_k=33)
    mask = torch.randn(20, 33, device=device)
    for hidden in (None, mask):
        with mmfast.backend("triton"):
            out, lse = ops.attention(q, k, v, hidden, return_lse=True)
        scores = q.double() @ k.double().mT / 4 + (0 if hidden is None else hidden)
        torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
        assert lse.shape == (2, 2, 20)
        torch.testing.assert_close(out, ops.attention(q, k, v, hidden), rtol=1e-4, atol=1e-5)


@triton_only
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}])
def test_other_ranks(device: torch.device, options: dict[str, Any]) -> None:
    for shape in ((20, 16), (3, 20, 16), (2, 2, 3, 20, 16)):
        q, k, v = (torch.randn(shape, device=device) for _ in range(3))
        check((q, k, v), torch.float32, **options)
    q, k, v = (torch.randn(n, 2, 9, 16, device=device) for n in (2, 1, 1))
    check((q, k, v), torch.float32, **options)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dropout_p": 0.1}, "dropout"),
        ({"attn_mask": torch.zeros(9, 9, requires_grad=True)}, "gradient of attn_mask"),
    ],
)
def test_a_forced_kernel_refuses(device: torch.device, options: dict[str, Any], reason: str, backend: str) -> None:
    q, k, v = draw(device, torch.float32, (1, 2, 9, 16))
    options = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in options.items()}
    with mmfast.backend(backend), pytest.raises(mmfast.BackendError, match=reason):
        ops.attention(q, k, v, **options)
    with mmfast.backend(backend), pytest.raises(mmfast.BackendError, match="width 8"):
        ops.attention(q, k, v[..., :8])
    wide = torch.randn(1, 1, 3, 320, device=device)
    with mmfast.backend(backend), pytest.raises(mmfast.BackendError, match="above 256"):
        ops.attention(wide, wide, wide)


@triton_only
@pytest.mark.parametrize("causal", [False, True])
def test_compiled_equals_eager(device: torch.device, causal: bool) -> None:
    q, k, v = (x.requires_grad_() for x in draw(device, torch.float32, (1, 2, 20, 16), n_k=33))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q * 1.5, k, v, is_causal=causal).transpose(1, 2).flatten(2)

    with mmfast.backend("triton"):
        expected = run(q, k, v)
        truth = torch.autograd.grad(expected.sum(), (q, k, v))
        found = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v)
        assert found.stride() == expected.stride()
        grads = torch.autograd.grad(found.sum(), (q, k, v))
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, truth, strict=True))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
@pytest.mark.parametrize("mask", ["none", "bool", "added"])
def test_torch_path_is_pytorch(device: torch.device, options: dict[str, Any], mask: str) -> None:
    q, k, v = draw(device, torch.float32, (2, 3, 20, 16), n_k=33)
    hidden = {"none": None, "bool": torch.rand(20, 33) > 0.3, "added": torch.randn(20, 33)}[mask]
    if hidden is not None:
        hidden = hidden.to(device)
        hidden[:, 0] = hidden[:, 0] if mask == "added" else True
    with mmfast.backend("torch"):
        found = ops.attention(q, k, v, hidden, **options)
    truth = reference.attention(q.double(), k.double(), v.double(), hidden, **options)
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-5)
    if mask == "none" or not options.get("is_causal"):
        assert torch.equal(found, F.scaled_dot_product_attention(q, k, v, hidden, **options))


def test_dropout_and_other_calls_of_pytorch() -> None:
    q, k, v = draw(torch.device("cpu"), torch.float32, (2, 3, 20, 16), n_k=33)
    torch.manual_seed(3)
    found = ops.attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(found, F.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    assert torch.equal(ops.attention(q, k, v[..., :8]), F.scaled_dot_product_attention(q, k, v[..., :8]))
    mask = torch.randn(20, 33, requires_grad=True)
    found = torch.autograd.grad(ops.attention(q, k, v, mask).square().sum(), mask)
    torch.testing.assert_close(
        found, torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, mask).square().sum(), mask)
    )
    empty = torch.randn(2, 3, 0, 16)
    assert torch.equal(ops.attention(q, empty, empty), torch.zeros(2, 3, 20, 16))
    assert ops.attention(empty, k, v).shape == (2, 3, 0, 16)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "bool", "added"])
def test_gradients_of_the_registered_op(causal: bool, mask: str) -> None:
    """gradcheck of the op's torch backend, and its second derivatives."""
    q, k, v = (x.requires_grad_() for x in draw(torch.device("cpu"), torch.float64, (1, 4, 5, 3), n_k=6, kv_heads=2))
    hidden: Tensor | None = {"none": None, "bool": torch.rand(5, 6) > 0.3, "added": torch.randn(5, 6)}[mask]
    if hidden is not None:
        hidden = hidden[None, None]
        if mask == "bool":
            hidden[..., 2, :] = False

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.mmfast.attention.default(q, k, v, hidden, causal, 0.4)[0]

    assert torch.autograd.gradcheck(run, (q, k, v))
    assert torch.autograd.gradgradcheck(run, (q, k, v))


@pytest.mark.parametrize("mask", ["none", "bool", "added"])
def test_opcheck(mask: str) -> None:
    q, k, v = (x.requires_grad_() for x in draw(torch.device("cpu"), torch.float32, (2, 4, 5, 8), n_k=6, kv_heads=2))
    hidden = {"none": None, "bool": torch.rand(1, 1, 5, 6) > 0.3, "added": torch.randn(1, 1, 5, 6)}[mask]
    torch.library.opcheck(torch.ops.mmfast.attention.default, (q, k, v, hidden, False, 0.4))
    with torch.no_grad():
        out, lse = torch.ops.mmfast.attention_forward.default(q, k, v, hidden, False, 0.4)
        args = (torch.randn_like(out), q, k, v, out, lse, hidden, False, 0.4, [True, False, True])
        torch.library.opcheck(torch.ops.mmfast.attention_backward.default, args)


def test_autocast() -> None:
    q, k, v = draw(torch.device("cpu"), torch.float32, (1, 2, 5, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.attention(q, k, v).dtype == torch.bfloat16
        assert torch.ops.mmfast.attention.default(q, k, v, None, False, 0.3)[0].dtype == torch.bfloat16


def test_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU takes the kernel for, and what PyTorch."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setitem(backends._capability, gpu, (9, 0))
    monkeypatch.setattr(backends, "TRITON_MISSING", None)

    def reason(dtype: torch.dtype, n_q: int, n_k: int, refusal: str | None = None) -> str | None:
        return dict(backends.TABLE["attention"])["triton"](backends.Facts(gpu, dtype, 64, n_q, n_k, refusal))

    with mmfast.backend(None):
        assert reason(torch.bfloat16, 197, 197) is None
        assert reason(torch.bfloat16, 4096, 77) is None
        assert "4096 keys" in str(reason(torch.bfloat16, 4096, 4096))
        assert reason(torch.bfloat16, 32, 62000) is None
        assert reason(torch.bfloat16, 197, 197, "dropout") == "dropout"
        assert "full precision" in str(reason(torch.float32, 197, 197))
        monkeypatch.setattr(backends, "ieee_products", lambda: False)
        assert reason(torch.float32, 197, 197) is None
    with mmfast.backend("triton"):
        assert reason(torch.bfloat16, 4096, 4096) is None


GOOD = (torch.randn(2, 4, 5, 8), torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8))


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({0: [1.0]}, {}, TypeError, "q must be a tensor, got list"),
        ({1: torch.zeros(2, 4, 6, 8, dtype=torch.int64)}, {}, TypeError, "k must be floating point"),
        ({1: GOOD[1].half()}, {}, TypeError, "k must be torch.float32 like q, got torch.float16"),
        ({0: torch.randn(8)}, {}, ValueError, "q must have at least 2 dimensions"),
        ({2: torch.randn(4, 6, 8)}, {}, ValueError, "v must have 4 dimensions like q"),
        ({1: torch.randn(2, 4, 6, 9)}, {}, ValueError, "k must have head_dim 8 like q, got 9"),
        ({2: torch.randn(2, 4, 7, 8)}, {}, ValueError, "v must have 6 rows like k, got 7"),
        ({1: torch.randn(3, 4, 6, 8)}, {}, ValueError, "k must have leading dimensions that broadcast"),
        ({1: torch.randn(2, 2, 6, 8), 2: torch.randn(2, 2, 6, 8)}, {}, ValueError, "broadcast"),
        ({1: torch.randn(2, 3, 6, 8), 2: torch.randn(2, 3, 6, 8)}, {"enable_gqa": True}, ValueError, "divides q's 4"),
        ({}, {"dropout_p": 1.5}, ValueError, "dropout_p must be between 0 and 1, got 1.5"),
        ({}, {"scale": float("nan")}, ValueError, "scale must be a finite number"),
        ({}, {"attn_mask": [True]}, TypeError, "attn_mask must be a tensor or None, got list"),
        ({}, {"attn_mask": torch.ones(5, 6, dtype=torch.int32)}, TypeError, "attn_mask must be torch.bool"),
        ({}, {"attn_mask": torch.ones(5, 7)}, ValueError, r"attn_mask must broadcast to \(2, 4, 5, 6\), got \(5, 7\)"),
        ({}, {"attn_mask": torch.ones(6)}, ValueError, "attn_mask must broadcast"),
        ({}, {"dropout_p": 0.5, "return_lse": True}, ValueError, "return_lse needs dropout_p 0"),
        ({1: torch.empty(2, 4, 6, 8, device="meta")}, {}, ValueError, "k must be on cpu like q, got meta"),
    ],
)
def test_errors(changes: dict[int, Any], options: dict[str, Any], error: type, message: str) -> None:
    tensors = [changes.get(index, x) for index, x in enumerate(GOOD)]
    with pytest.raises(error, match=message):
        ops.attention(*tensors, **options)
