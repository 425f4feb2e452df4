from __future__ import annotations

import math
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import mmfast
from mmfast import ops, reference
from mmfast.reference.attention_maps import cases
from tests.grading import BACKENDS, DTYPES, check_against_reference, outputs_and_gradients

LABELS = [case.label for case in cases(torch.float32, torch.device("cpu"), large=False)]
GPU_LABELS = [c.label for c in cases(torch.float32, torch.device("meta"), large=True) if c.label not in LABELS]


def draw(
    device: torch.device,
    rows: int = 20,
    keys: int = 33,
    width: int = 24,
    heads: tuple[int, int] = (4, 4),
    batch: int = 2,
) -> tuple[torch.Tensor, torch.Tensor]:
    q = torch.randn(batch, heads[0], rows, width, device=device)
    return q, torch.randn(batch, heads[1], keys, width, device=device)


def truth(q: torch.Tensor, k: torch.Tensor, **options) -> torch.Tensor:  # type: ignore[no-untyped-def]
    for name in ("attn_mask", "lse"):
        if options.get(name) is not None and options[name].is_floating_point():
            options[name] = options[name].double()
    return reference.attention_maps(q.double(), k.double(), **options)


def check(found: torch.Tensor, q: torch.Tensor, k: torch.Tensor, **options) -> None:  # type: ignore[no-untyped-def]
    torch.testing.assert_close(found.double(), truth(q, k, **options), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label", [*LABELS, *(pytest.param(x, marks=pytest.mark.gpu) for x in GPU_LABELS)])
@pytest.mark.usefixtures("poisoned")
def test_matches_the_reference(label: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    case = next(c for c in cases(dtype, device, large=label in GPU_LABELS) if c.label == label)
    bound = {name: case.kwargs[name] for name in case.constants}
    functions = (partial(ops.attention_maps, **bound), partial(reference.attention_maps, **bound))
    options = {name: value for name, value in case.kwargs.items() if name not in bound}
    check_against_reference(*functions, case.args, options, backend, dtype)


@pytest.mark.triton
@pytest.mark.parametrize("width", [16, 17, 40, 72, 80, 88, 104, 160, 256])
@pytest.mark.usefixtures("poisoned")
def test_every_head_dim(width: int, device: torch.device) -> None:
    q, k = draw(device, 5, 9, width, (1, 1), 1)
    with mmfast.backend("triton"):
        check(ops.attention_maps(q, k), q, k)


MASKS = {
    "bool": lambda b, h, n, m: torch.rand(b, h, n, m) > 0.4,
    "bool of pairs": lambda b, h, n, m: torch.rand(n, m) > 0.4,
    "key padding": lambda b, h, n, m: (torch.arange(m) < torch.tensor([[m], [5]]))[:, None, None],
    "one row": lambda b, h, n, m: torch.rand(1, m) > 0.4,
    "added": lambda b, h, n, m: torch.randn(b, h, n, m) * 2,
    "added to heads": lambda b, h, n, m: torch.randn(h, n, m) * 2,
    "added, transposed": lambda b, h, n, m: torch.randn(m, n).T,
    "-inf": lambda b, h, n, m: torch.zeros(b, 1, n, m).masked_fill(torch.rand(b, 1, n, m) > 0.6, -math.inf),
    "finfo.min": lambda b, h, n, m: torch.zeros(n, m).masked_fill(torch.rand(n, m) > 0.6, torch.finfo().min),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lse", [False, True], ids=["two passes", "lse"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.usefixtures("poisoned")
def test_masks(mask: str, lse: bool, backend: str, device: torch.device) -> None:
    q, k = draw(device, 7, 37, heads=(2, 2))
    attn_mask = MASKS[mask](2, 2, 7, 37).to(device)
    given = ops.attention(q, k, k, attn_mask, return_lse=True)[1] if lse else None
    with mmfast.backend(backend):
        found = ops.attention_maps(q, k, attn_mask=attn_mask, lse=given)
        causal = ops.attention_maps(q, k, attn_mask=attn_mask, is_causal=True)
    check(found, q, k, attn_mask=attn_mask)
    check(causal, q, k, attn_mask=attn_mask, is_causal=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lse", [False, True], ids=["two passes", "lse"])
@pytest.mark.parametrize("added", [False, True], ids=["bool", "added"])
@pytest.mark.usefixtures("poisoned")
def test_rows_without_keys_are_zero(added: bool, lse: bool, backend: str, device: torch.device) -> None:
    """Also their gradients, which softmax's own backward would make NaN."""
    q, k = (x.requires_grad_() for x in draw(device, 5, 9, heads=(2, 2)))
    keep = torch.rand(5, 9, device=device) > 0.3
    keep[2] = False
    attn_mask = torch.zeros(5, 9, device=device).masked_fill(~keep, -math.inf) if added else keep
    given = ops.attention(q, k, k, attn_mask, return_lse=True)[1] if lse else None
    with mmfast.backend(backend):
        p = ops.attention_maps(q, k, attn_mask=attn_mask, lse=given)
        dq, dk = torch.autograd.grad(p.square().sum(), (q, k))
    assert (p[:, :, 2] == 0).all()
    torch.testing.assert_close(p.sum(-1)[:, :, [0, 1, 3, 4]], torch.ones(2, 2, 4, device=device))
    assert (dq[:, :, 2] == 0).all()
    wanted = torch.autograd.grad(reference.attention_maps(q, k, attn_mask=keep).square().sum(), (q, k))
    torch.testing.assert_close((dq, dk), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("poisoned")
def test_a_mask_that_swallows_the_logarithm_of_the_sum(backend: str, device: torch.device) -> None:
    """With -1e30 added to a whole row, lse is -1e30: exp(s - lse) would be 1 for every key instead of 1/9."""
    q, k = draw(device, 4, 9, heads=(1, 1), batch=1)
    attn_mask = torch.zeros(4, 9, device=device)
    attn_mask[1] = -1e30
    lse = ops.attention(q, k, k, attn_mask, return_lse=True)[1]
    with mmfast.backend(backend):
        p = ops.attention_maps(q, k, attn_mask=attn_mask, lse=lse)
    torch.testing.assert_close(p[0, 0, 1], torch.full((9,), 1 / 9, device=device))


@pytest.mark.triton
@pytest.mark.parametrize(("rows", "keys"), [(70, 70), (70, 140), (140, 70)], ids=str)
@pytest.mark.parametrize("lse", [False, True], ids=["two passes", "lse"])
@pytest.mark.usefixtures("poisoned")
def test_causal_in_blocks(lse: bool, rows: int, keys: int, device: torch.device) -> None:
    """Blocks of keys behind the diagonal are written without being computed."""
    q, k = draw(device, rows, keys, 16, (1, 1), 1)
    given = ops.attention(q, k, k, is_causal=True, return_lse=True)[1] if lse else None
    with mmfast.backend("triton"):
        check(ops.attention_maps(q, k, is_causal=True, lse=given), q, k, is_causal=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_saves_the_first_pass(backend: str, device: torch.device) -> None:
    """The kernel trusts lse: one that is larger by log 2 halves the probabilities. PyTorch's ops do not need it."""
    q, k = draw(device)
    lse = ops.attention(q, k, k, return_lse=True)[1]
    with mmfast.backend(backend):
        found = ops.attention_maps(q, k, lse=lse + math.log(2.0))
    check(found * (2 if backend == "triton" else 1), q, k)


HEADS = {
    "one": 2,
    "last": -1,
    "in order": (0, 1, 2),
    "every second": [1, 3],
    "any order": (3, 0, 1),
    "one twice": (2, 2),
    "a range": range(3, -1, -1),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.usefixtures("poisoned")
def test_chosen_heads(heads: str, kv_heads: int, backend: str, device: torch.device) -> None:
    """Each chosen head's map is that of the full result, its mask and lse those of the head."""
    q, k = draw(device, 6, 9, heads=(4, kv_heads))
    chosen = HEADS[heads]
    attn_mask = torch.rand(2, 4, 6, 9, device=device) > 0.4
    lse = ops.attention(q, k, k, attn_mask, enable_gqa=True, return_lse=True)[1]
    index = [chosen] if isinstance(chosen, int) else list(chosen)
    with mmfast.backend(backend):
        found = ops.attention_maps(q, k, heads=chosen, attn_mask=attn_mask, lse=lse)
        plain = ops.attention_maps(q, k, heads=chosen, attn_mask=attn_mask[:, :1])
    torch.testing.assert_close(found.double(), truth(q, k, attn_mask=attn_mask)[:, index], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plain.double(), truth(q, k, attn_mask=attn_mask[:, :1])[:, index], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("poisoned")
def test_gradients_of_chosen_and_grouped_heads(backend: str, device: torch.device) -> None:
    q, k = draw(device, 6, 9, heads=(4, 2))
    options = {"heads": (3, 0, 3), "scale": 0.3}
    check_against_reference(ops.attention_maps, reference.attention_maps, (q, k), options, backend, torch.float32)
    check_against_reference(ops.attention_maps, reference.attention_maps, (q, k), {}, backend, torch.float32)


def test_gradient_of_an_added_mask_is_pytorchs(device: torch.device) -> None:
    q, k = draw(device)
    bias = torch.randn(4, 20, 33, device=device, requires_grad=True)
    assert "gradient of attn_mask" in str(mmfast.explain(ops.attention_maps, q, k, attn_mask=bias))
    (found,) = torch.autograd.grad(ops.attention_maps(q, k, attn_mask=bias).square().sum(), bias)
    (wanted,) = torch.autograd.grad(reference.attention_maps(q, k, attn_mask=bias).square().sum(), bias)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


LAYOUTS = {
    "packed qkv": lambda x: x.reshape(2, 4, 20, 3, 8)[:, :, :, 1],
    "heads after rows": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels first": lambda x: x.mT.contiguous().mT,
    "every second row": lambda x: x[:, :, ::2],
    "one image for all": lambda x: x[:1].expand(2, -1, -1, -1),
    "unaligned": lambda x: x[..., 1:24],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("poisoned")
def test_any_strides(layout: str, backend: str, device: torch.device) -> None:
    q, k = (LAYOUTS[layout](x) for x in draw(device, 20, 20))
    with mmfast.backend(backend):
        found = ops.attention_maps(q, k)
    assert found.is_contiguous()
    check(found, q, k)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("poisoned")
def test_ranks_and_broadcasting(backend: str, device: torch.device) -> None:
    q, k = draw(device, 5, 7)
    with mmfast.backend(backend):
        wanted = truth(q, k)
        for sub in ((0, 0), (0,)):
            found = ops.attention_maps(q[sub], k[sub])
            torch.testing.assert_close(found.double(), wanted[sub], rtol=1e-5, atol=1e-6)
        lse = ops.attention(q[0], k[0], k[0], return_lse=True)[1]
        found = ops.attention_maps(q[0], k[0], lse=lse, heads=1)
        torch.testing.assert_close(found.double(), wanted[0, 1:2], rtol=1e-5, atol=1e-6)
        mask = torch.rand(2, 1, 5, 7, device=device) > 0.3
        found = ops.attention_maps(q[None].expand(3, -1, -1, -1, -1), k[None], attn_mask=mask)
        torch.testing.assert_close(
            found.double(), truth(q, k, attn_mask=mask).expand(3, -1, -1, -1, -1), rtol=1e-5, atol=1e-6
        )
        found = ops.attention_maps(q[:1], k)  # one query for every image
        torch.testing.assert_close(found.double(), truth(q[:1].expand(2, -1, -1, -1), k), rtol=1e-5, atol=1e-6)
        q1 = q[:1].clone().requires_grad_()
        (dq,) = torch.autograd.grad(ops.attention_maps(q1, k).square().sum(), q1)
    (wanted_dq,) = torch.autograd.grad(reference.attention_maps(q1, k).square().sum(), q1)
    torch.testing.assert_close(dq, wanted_dq, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
def test_float32_result_of_16_bit_inputs(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    q, k = (x.to(dtype) for x in draw(device))
    with mmfast.backend(backend):
        p, rounded = ops.attention_maps(q, k, dtype=torch.float32), ops.attention_maps(q, k)
    assert (p.dtype, rounded.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(p.double(), truth(q, k), rtol=2e-5 if backend == "triton" else 1e-2, atol=1e-6)
    torch.testing.assert_close(p.to(dtype), rounded, rtol=4e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 8), (2, 2, 0, 4, 8), (2, 2, 3, 0, 8), (2, 2, 3, 4, 0)], ids=str)
def test_empty(shape: tuple[int, ...], device: torch.device) -> None:
    """PyTorch's ops serve them: nothing, or the uniform distribution of scores of no terms."""
    batch, heads, rows, keys, width = shape
    q, k = draw(device, rows, keys, width, (heads, heads), batch)
    found = ops.attention_maps(q, k, attn_mask=torch.ones(rows, keys, dtype=torch.bool, device=device))
    torch.testing.assert_close(found, torch.full((batch, heads, rows, keys), 1 / max(1, keys), device=device))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_nan_and_inf_stay_in_their_row(value: float, backend: str, device: torch.device) -> None:
    q, k = draw(device, 5, 70, heads=(1, 1), batch=1)
    q[0, 0, 2, 3] = value
    with mmfast.backend(backend):
        p = ops.attention_maps(q, k)
    assert p[0, 0, 2].isnan().all()
    assert p[0, 0, [0, 1, 3, 4]].isfinite().all()


@pytest.mark.triton
def test_same_bits_twice(device: torch.device) -> None:
    q, k = draw(device, 70, 130, 16, (1, 1), 1)
    with mmfast.backend("triton"):
        assert torch.equal(ops.attention_maps(q, k), ops.attention_maps(q, k))


@pytest.mark.parametrize("backend", BACKENDS)
def test_times_values_is_attention(backend: str, device: torch.device) -> None:
    q, k = draw(device, width=16)
    v = torch.randn_like(k)
    with mmfast.backend(backend):
        out, lse = ops.attention(q, k, v, return_lse=True)
        p = ops.attention_maps(q, k, lse=lse)
    torch.testing.assert_close(p @ v, out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_differentiable_twice(backend: str, device: torch.device) -> None:
    inputs = [x.requires_grad_() for x in draw(device, 3, 5, 8, (2, 1), 1)]

    def penalty(fn) -> tuple[torch.Tensor, ...]:  # type: ignore[no-untyped-def]
        grads = torch.autograd.grad(fn(*inputs).sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    with mmfast.backend(backend):
        found = penalty(ops.attention_maps)
    for got, want in zip(found, penalty(reference.attention_maps), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_formulas_in_float64() -> None:
    q, k = (x.double().requires_grad_() for x in draw(torch.device("cpu"), 3, 4, 5, (4, 2), 1))
    mask = torch.rand(3, 4) > 0.3
    for options in ({}, {"is_causal": True}, {"attn_mask": mask}, {"heads": (1, 0), "scale": 0.7}):
        assert torch.autograd.gradcheck(lambda q, k, o=options: reference.attention_maps(q, k, **o), (q, k))
        assert torch.autograd.gradcheck(lambda q, k, o=options: ops.attention_maps(q, k, **o), (q, k))
    # Below the public function, which sends float64 to PyTorch's ops: the registered autograd formula.
    registered = torch.ops.mmfast.attention_maps
    assert torch.autograd.gradcheck(lambda q, k: registered(q, k, mask, None, True, 0.6, torch.float64), (q, k))
    assert torch.autograd.gradgradcheck(lambda q, k: registered(q, k, mask, None, True, 0.6, torch.float64), (q, k))


@pytest.mark.parametrize(
    ("index", "backend"),
    [*((i, "torch") for i in range(4)), *(pytest.param(i, "triton", marks=pytest.mark.triton) for i in (1, 3))],
)
def test_opcheck(index: int, backend: str, device: torch.device) -> None:
    q, k = draw(device, 3, 5, 8, (2, 1))
    leaf = [x.clone().requires_grad_() for x in (q, k)]
    mask = torch.rand(2, 1, 3, 5, device=device) > 0.3
    lse = ops.attention(q, k, k, enable_gqa=True, return_lse=True)[1]
    name, args = (
        ("attention_maps", (*leaf, None, None, False, 0.3, torch.float32)),
        ("attention_maps", (*leaf, mask, lse, True, 0.3, torch.float32)),
        ("attention_maps_forward", (q, k, mask, None, False, 0.3, torch.float32)),
        ("attention_maps_forward", (q.half(), k.half(), None, lse, False, 0.3, torch.float16)),
    )[index]
    with mmfast.backend(backend):
        opcheck(getattr(torch.ops.mmfast, name).default, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(compiler: str, backend: str, device: torch.device) -> None:
    def fn(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return ops.attention_maps(q * 2, k, heads=(1, 0), is_causal=True)

    compiled = torch.compile(fn, fullgraph=True, backend=compiler, dynamic=True)
    with mmfast.backend(backend):
        for rows in (5, 9):
            args = draw(device, rows, 7, 16)
            eager = outputs_and_gradients(fn, args, {})
            for got, want in zip(outputs_and_gradients(compiled, args, {}), eager, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str, device: torch.device) -> None:
    """Scores and result in the autocast dtype; lse stays float32, of which bfloat16 would lose the digits."""
    half = torch.float16 if device.type == "cpu" else torch.bfloat16
    q, k = draw(device)
    lse = ops.attention(q, k, k, return_lse=True)[1]
    with torch.autocast(device.type, dtype=half), mmfast.backend(backend):
        p, wide = ops.attention_maps(q, k, lse=lse), ops.attention_maps(q, k.to(half), dtype=torch.float32)
    assert (p.dtype, wide.dtype) == (half, torch.float32)
    for found in (p, wide):
        torch.testing.assert_close(found.double(), truth(q.to(half), k.to(half)), rtol=2e-2, atol=2e-3)


def test_torch_func_transforms_take_pytorchs_ops(device: torch.device) -> None:
    q, k = draw(device, 3, 5, 8)
    wanted = ops.attention_maps(q, k)
    torch.testing.assert_close(torch.func.vmap(ops.attention_maps)(q, k), wanted)
    grad = torch.func.grad(lambda q: ops.attention_maps(q, k).square().sum())(q)
    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(reference.attention_maps(leaf, k).square().sum(), leaf)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


def test_cost() -> None:
    q, k = torch.empty(2, 4, 5, 8), torch.empty(2, 4, 7, 8)
    from mmfast.ops.attention_maps import cost

    assert cost(q, k) == {"bytes": 4 * (320 + 448 + 280), "flops": 2 * 280 * 8}
    assert cost(q, k, heads=1, itemsize=2) == {"bytes": 80 * 4 + 112 * 4 + 70 * 2, "flops": 2 * 70 * 8}


Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 7, 8)
BAD = {
    "q is a list": (([1.0], K), {}, TypeError, "q must be a tensor, got list"),
    "k is integer": ((Q, K.int()), {}, TypeError, "k must be floating point, got torch.int32"),
    "q is a vector": ((Q[0, 0, 0], K), {}, ValueError, "q must have at least 2 dimensions, got (8,)"),
    "k's rank": ((Q, K[0]), {}, ValueError, "k must have 4 dimensions like q, got (4, 7, 8)"),
    "k's dtype": ((Q, K.half()), {}, TypeError, "k must be torch.float32 like q, got torch.float16"),
    "k's device": ((Q, K.to("meta")), {}, ValueError, "k must be on cpu like q, got meta"),
    "k's width": ((Q, K[..., 1:]), {}, ValueError, "k must have head_dim 8 like q, got 7"),
    "k's heads": ((Q, K[:, :3]), {}, ValueError, "k's heads must divide q's 4, got 3"),
    "k's batch": ((Q, K[:1].expand(3, -1, -1, -1)), {}, ValueError, "k must have leading dimensions that broadcast"),
    "mask": ((Q, K), {"attn_mask": torch.ones(7, 5).bool()}, ValueError, "attn_mask must broadcast to (2, 4, 5, 7)"),
    "mask's dtype": ((Q, K), {"attn_mask": torch.ones(5, 7).int()}, TypeError, "attn_mask must be torch.bool,"),
    "lse's shape": ((Q, K), {"lse": torch.zeros(2, 4, 7)}, ValueError, "lse must have shape (2, 4, 5)"),
    "lse's dtype": ((Q, K), {"lse": torch.zeros(2, 4, 5).half()}, TypeError, "lse must be torch.float32"),
    "dtype": ((Q, K), {"dtype": torch.float16}, TypeError, "dtype must be None, torch.float32 or torch.float32"),
    "scale": ((Q, K), {"scale": float("nan")}, ValueError, "scale must be a finite number or None, got nan"),
    "a head too many": ((Q, K), {"heads": [0, 4]}, ValueError, "heads must be head indices in -4..3, got [0, 4]"),
    "no head": ((Q, K), {"heads": []}, ValueError, "heads must be head indices in -4..3, got []"),
    "heads of no heads": ((Q[0, 0], K[0, 0]), {"heads": 0}, ValueError, "heads must be head indices"),
    "a mask as heads": ((Q, K), {"heads": [True]}, ValueError, "heads must be head indices in -4..3, got [True]"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str) -> None:
    args, options, kind, message = BAD[what]
    with pytest.raises(kind, match=re.escape(f"attention_maps: {message}")):
        ops.attention_maps(*args, **options)


@pytest.mark.gpu
def test_offsets_beyond_31_bits(device: torch.device) -> None:
    """More than 2^31 probabilities: the last rows are right."""
    q, k = (x.bfloat16() for x in draw(device, 16400, 16400, 64, (8, 8), 1))
    with mmfast.backend("triton"):
        p = ops.attention_maps(q, k)
    wanted = reference.attention_maps(q[:, -1:, -3:].double(), k[:, -1:].double())
    torch.testing.assert_close(p[:, -1:, -3:].double(), wanted, rtol=2e-2, atol=1e-4)


@pytest.mark.gpu
def test_cuda_graph(device: torch.device) -> None:
    """Chosen heads in any order go through no index tensor, whose copy to the device a capture refuses."""
    q, k = draw(device, 197, 197, 64)
    with mmfast.backend("triton"):
        ops.attention_maps(q, k, heads=(3, 0))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            p = ops.attention_maps(q, k, heads=(3, 0))
        q.copy_(torch.randn_like(q))
        graph.replay()
    torch.testing.assert_close(p, reference.attention_maps(q, k, heads=(3, 0)), rtol=2e-3, atol=1e-4)
