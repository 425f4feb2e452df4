"""What only the CUDA C++ kernel of `attention`'s forward has: its tiles, its plan, its layouts, what it refuses.

Without a GPU the kernel runs on the CPU, from an emulated build of the extension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfast
from mmfast import backends, cuda, ops, reference
from mmfast.commands import _grading
from tests.grading import ATOL

HALF = (pytest.param(torch.float16, id="fp16"), pytest.param(torch.bfloat16, id="bf16"))
WIDTHS = tuple(range(32, 129, 8))
on_cuda = pytest.mark.cuda


def draw(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], *, n_k: int | None = None, kv_heads: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, N, d) in memory as (B, N, H, d), and k and v contiguous."""
    batch, heads, length, width = shape
    q = torch.randn(batch, length, heads, width, device=device).to(dtype).transpose(1, 2)
    k, v = (torch.randn(batch, kv_heads or heads, n_k or length, width, device=device).to(dtype) for _ in range(2))
    return q, k, v


def run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    with mmfast.backend("cuda"), torch.no_grad():
        return ops.attention(q, k, v, **options)


def check(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Assert the project's rule for the output: error at most twice PyTorch's own in the same dtype."""
    found = run(q, k, v, **options)
    truth = reference.attention(q.double(), k.double(), v.double(), **options)
    with mmfast.backend("torch"):
        peer = ops.attention(q, k, v, **options)
    assert found.dtype == q.dtype
    assert found.shape == truth.shape
    ours, theirs = _grading.error(found, truth), _grading.error(peer, truth)
    assert ours <= 2 * theirs + ATOL[q.dtype], f"error {ours:.3g}, PyTorch's {theirs:.3g}"
    return found


def counted(call: Callable[[], Any]) -> dict[str, int]:
    """What the emulator counts during a call."""
    extension = cuda.extension()
    extension.reset_statistics()
    call()
    return dict(extension.statistics())


@pytest.fixture
def emulated(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("asks the emulator")


@pytest.fixture
def processors(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Tell the launcher how many multiprocessors there are to fill."""

    def tell(count: int) -> None:
        from mmfast.cuda import attention

        monkeypatch.setattr(attention, "programs", lambda x, each: each * count)

    return tell


# ---------------------------------------------------------------- tiles


@on_cuda
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 31, 32, 33, 50, 64, 65, 197, 257])
def test_lengths(device: torch.device, dtype: torch.dtype, length: int) -> None:
    """Whole tiles of 16 and 32 queries and 8 and 16 keys, and tails of every kind; the class token alone in one."""
    check(*draw(device, dtype, (1, 2, length, 64)))


@on_cuda
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(device: torch.device, dtype: torch.dtype, width: int) -> None:
    """Heads of an even and an odd number of 16-byte pieces, and keys with a tail of 8 and of 16."""
    check(*draw(device, dtype, (1, 2, 37, width)))
    check(*draw(device, dtype, (1, 1, 9, width), n_k=44))


@on_cuda
@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("width", [40, 64])
def test_577_tokens(device: torch.device, dtype: torch.dtype, width: int) -> None:
    check(*draw(device, dtype, (1, 1, 577, width)))


@on_cuda
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("n_q", "n_k", "width"), [(32, 257, 64), (300, 77, 40), (130, 77, 80), (1, 500, 32), (32, 32, 64), (5, 1, 128)]
)
def test_cross_attention(device: torch.device, dtype: torch.dtype, n_q: int, n_k: int, width: int) -> None:
    """Few queries on many keys and many on few: a U-Net's, a Q-Former's."""
    check(*draw(device, dtype, (1, 2, n_q, width), n_k=n_k))


@on_cuda
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 1), (24, 8)])
def test_grouped_heads(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    check(*draw(device, dtype, (2, heads, 19, 40), n_k=21, kv_heads=kv_heads), enable_gqa=True)


@on_cuda
@pytest.mark.parametrize("length", [17, 32, 50])
@pytest.mark.parametrize("width", [32, 72])
def test_several_heads_a_block(
    device: torch.device, length: int, width: int, processors: Callable[[int], None]
) -> None:
    """Short heads side by side, with a last block that is not full."""
    processors(1)
    plan = cuda.extension().attention_forward_plan(1, 13, 13, length, length, width, 1, 227 << 10)
    assert plan[2] > 1 or (length == 50 and width == 72)
    check(*draw(device, torch.float16, (1, 13, length, width)))


@on_cuda
@pytest.mark.sanitized
@pytest.mark.parametrize(("n_q", "n_k", "width"), [(130, 41, 64), (130, 20, 40), (150, 17, 72), (40, 9, 32)])
def test_several_items_a_warp(
    device: torch.device, n_q: int, n_k: int, width: int, processors: Callable[[int], None]
) -> None:
    """Warps that go on to the next queries, which arrive while they work: of one head, and of grouped heads."""
    processors(1)
    rows, warps, units, splits, _ = cuda.extension().attention_forward_plan(1, 28, 7, n_q, n_k, width, 1, 227 << 10)
    assert splits == 1
    assert units * 4 * -(-n_q // rows) > warps
    check(*draw(device, torch.bfloat16, (1, 28, n_q, width), n_k=n_k, kv_heads=7), enable_gqa=True)
    if n_q > 64:
        rows, warps, units, splits, _ = cuda.extension().attention_forward_plan(1, 7, 7, n_q, n_k, width, 1, 227 << 10)
        assert splits == 1
        assert -(-n_q // rows) > warps
        check(*draw(device, torch.bfloat16, (1, 7, n_q, width), n_k=n_k))


@on_cuda
@pytest.mark.parametrize(("n_q", "n_k", "width"), [(81, 50, 64), (70, 33, 88), (50, 50, 40)])
def test_bits_do_not_depend_on_the_plan(
    device: torch.device, n_q: int, n_k: int, width: int, processors: Callable[[int], None]
) -> None:
    """Rows of 16 and 32, one block a head and several, alone and in a batch: the same bits."""
    q, k, v = draw(device, torch.bfloat16, (2, 3, n_q, width), n_k=n_k)
    processors(1)
    expected = run(q, k, v)
    plans = set()
    for count in (1, 2, 132):
        processors(count)
        plans.add(cuda.extension().attention_forward_plan(2, 3, 3, n_q, n_k, width, count, 227 << 10))
        assert torch.equal(run(q, k, v), expected)
        assert torch.equal(run(q[1:], k[1:], v[1:]), expected[1:])
    assert len(plans) > 1


# ---------------------------------------------------------------- numbers


@on_cuda
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("steps", ["up", "down", "one"])
def test_scores_of_any_size(device: torch.device, dtype: torch.dtype, steps: str) -> None:
    """Scores in the hundreds, whose exponentials would overflow, with the largest first, last, and in one key alone."""
    q, k, v = draw(device, dtype, (1, 2, 40, 32), n_k=90)
    factors = {
        "up": torch.linspace(0.1, 20, 90),
        "down": torch.linspace(20, 0.1, 90),
        "one": torch.ones(90).index_fill(0, torch.tensor([88]), 60.0),
    }[steps]
    k = (k.float() * factors.to(device)[:, None]).to(dtype)
    check(q, k, v)
    check(q, k, v, scale=-0.3)
    check(q, k, v, scale=0.0)


@on_cuda
def test_scores_that_grow_by_less_than_the_slack(device: torch.device) -> None:
    """Maxima that rise by 7 in base 2 are not rescaled for: sums stay exact all the same."""
    q = torch.full((1, 1, 16, 32), 1.0, device=device).half()
    k = torch.zeros(1, 1, 64, 32, device=device).half()
    k[0, 0, :, 0] = torch.arange(64, device=device).div(16, rounding_mode="floor") * 7 * math.log(2)
    v = torch.randn(1, 1, 64, 32, device=device).half()
    check(q, k, v, scale=1.0)


@on_cuda
@pytest.mark.parametrize("dtype", HALF)
def test_lse(device: torch.device, dtype: torch.dtype) -> None:
    for n_q, n_k, width in ((20, 33, 32), (70, 70, 64), (5, 9, 104)):
        q, k, v = draw(device, dtype, (2, 4, n_q, width), n_k=n_k, kv_heads=2)
        with mmfast.backend("cuda"), torch.no_grad():
            out, lse = ops.attention(q, k, v, enable_gqa=True, return_lse=True)
        scores = q.double() @ k.double().repeat_interleave(2, 1).mT / math.sqrt(width)
        torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
        assert torch.equal(out, run(q, k, v, enable_gqa=True))


@on_cuda
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_stays_in_its_rows(device: torch.device, bad: float) -> None:
    q, k, v = draw(device, torch.float16, (1, 2, 40, 64), n_k=33)
    expected = run(q, k, v)
    q[0, 1, 4, 2] = bad
    found = run(q, k, v)
    assert found[0, 1, 4].isnan().all()
    hit = torch.zeros(1, 2, 40, dtype=torch.bool, device=device)
    hit[0, 1, 4] = True
    assert torch.equal(found[~hit], expected[~hit])
    q, k, v = draw(device, torch.float16, (1, 2, 40, 64), n_k=33)
    k[0, 0, 32, 5] = math.nan
    found = run(q, k, v)
    assert found[0, 0].isnan().all()
    assert found[0, 1].isfinite().all()


@on_cuda
def test_scores_of_minus_infinity(device: torch.device) -> None:
    """A key of -inf has no weight; a row that has no other gives 0, as the reference says."""
    q = torch.ones(1, 1, 20, 32, device=device).half()
    k, v = (torch.randn(1, 1, 9, 32, device=device).half().abs() for _ in range(2))
    k[0, 0, 3, 0] = -math.inf
    keep = [0, 1, 2, 4, 5, 6, 7, 8]
    torch.testing.assert_close(run(q, k, v), run(q, k[:, :, keep], v[:, :, keep]), rtol=2e-3, atol=2e-3)
    k[..., 0] = -math.inf
    assert (run(q, k, v) == 0).all()


# ---------------------------------------------------------------- layouts


@on_cuda
@pytest.mark.parametrize("dtype", HALF)
def test_strides(device: torch.device, dtype: torch.dtype) -> None:
    packed = torch.randn(2, 21, 3, 2, 40, device=device).to(dtype)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    from mmfast.cuda.attention import aligned

    assert all(aligned(x) is x for x in (q, k, v))
    expected = check(q, k, v)
    assert expected.transpose(1, 2).is_contiguous()
    assert torch.equal(run(*(x.contiguous() for x in (q, k, v))), expected)
    check(q, k[:, :1].expand(2, 2, 21, 40), v.flip(2))
    check(q.mT.contiguous().mT, k, v[:, :, ::1])  # columns are not one apart: copied
    odd = torch.randn(2, 2, 21, 43, device=device).to(dtype)[..., 1:41]  # rows that start anywhere: copied
    assert aligned(odd) is not odd
    check(odd, odd.flip(1), odd.flip(2))
    shifted = torch.randn(2 * 2 * 21 * 40 + 4, device=device).to(dtype)[4:].view(2, 2, 21, 40)  # 8 bytes off: copied
    check(shifted, shifted, shifted)


@on_cuda
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("length", [1, 16, 50, 65])
@pytest.mark.parametrize("width", [40, 64, 72])
def test_packed_projections(device: torch.device, length: int, width: int) -> None:
    """The bits of `attention` of the three views, contiguous, every element written."""
    qkv = torch.randn(2, length, 3 * 3 * width, device=device).half()
    q, k, v = qkv.view(2, length, 3, 3, width).permute(2, 0, 3, 1, 4).unbind(0)
    with mmfast.backend("cuda"), torch.no_grad():
        out = ops.attention_qkv(qkv, 3)
        assert torch.equal(ops.attention_qkv(qkv.transpose(0, 1).contiguous().transpose(0, 1), 3), out)
        apart = torch.empty(2, length + 1, 3 * 3 * width + 3, device=device).half()
        apart[:, 1:, 1:-2] = qkv
        assert torch.equal(ops.attention_qkv(apart[:, 1:, 1:-2], 3), out)  # rows that start anywhere: copied
    assert out.is_contiguous()
    assert torch.equal(out, run(q, k, v).transpose(1, 2).flatten(2))
    truth = reference.attention_qkv(qkv.double(), 3)
    torch.testing.assert_close(out.double(), truth, rtol=2e-3, atol=2e-3)


@on_cuda
def test_other_ranks_and_options(device: torch.device) -> None:
    for shape in ((20, 32), (3, 20, 32), (2, 2, 3, 20, 32)):
        check(*(torch.randn(shape, device=device).half() for _ in range(3)), scale=0.3)
    q, k, v = (torch.randn(n, 2, 9, 32, device=device).half() for n in (2, 1, 1))
    check(q, k, v)


@on_cuda
def test_compiled_equals_eager(device: torch.device) -> None:
    q, k, v = draw(device, torch.float16, (1, 2, 20, 32), n_k=33)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q * 1.5, k, v).transpose(1, 2).flatten(2)

    with mmfast.backend("cuda"), torch.no_grad():
        expected = attend(q, k, v)
        found = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v)
    assert found.stride() == expected.stride()
    assert torch.equal(found, expected)


# ---------------------------------------------------------------- the emulator's evidence


@on_cuda
@pytest.mark.sanitized
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("length", "width"), [(65, 64), (44, 72), (33, 40)])
def test_any_order_of_threads_gives_the_same_bits(length: int, width: int) -> None:
    q, k, v = draw(torch.device("cpu"), torch.bfloat16, (1, 3, length, width))
    extension = cuda.extension()
    found = []
    try:
        for order in (0, 1, 3, 4):
            extension.set_thread_order(order)
            found.append(run(q, k, v))
    finally:
        extension.set_thread_order(0)
    assert all(torch.equal(x, found[0]) for x in found)


@on_cuda
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("width", WIDTHS)
def test_no_bank_conflicts(width: int) -> None:
    q, k, v = draw(torch.device("cpu"), torch.float16, (1, 1, 44, width), n_k=29)
    statistics = counted(lambda: run(q, k, v))
    assert statistics["ldmatrix_phases"] > 0
    assert statistics["ldmatrix_conflicts"] == 0


# ---------------------------------------------------------------- plans and rules


@pytest.mark.parametrize("length", [197, 257, 577])
@pytest.mark.parametrize("width", [64, 72, 80, 128])
def test_padding_waste(length: int, width: int) -> None:
    from mmfast.cuda.attention import waste

    assert waste(length, length, width) <= 1.10
    assert waste(64, 64, 64) == 1
    assert waste(1, 1, 64) == 128


@on_cuda
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("n_q", "n_k", "width"), [(81, 50, 64), (33, 33, 72), (50, 17, 40)])
def test_the_waste_is_what_is_computed(n_q: int, n_k: int, width: int) -> None:
    from mmfast.cuda.attention import waste

    q, k, v = draw(torch.device("cpu"), torch.float16, (1, 2, n_q, width), n_k=n_k)
    statistics = counted(lambda: run(q, k, v))
    assert statistics["products"] == pytest.approx(2 * 2 * n_q * n_k * width * waste(n_q, n_k, width), rel=1e-12)


@on_cuda
def test_plans() -> None:
    """(rows of an item, warps, heads a block, blocks a head, bytes) on 132 multiprocessors."""
    h200 = (132, 227 << 10)
    plan = cuda.extension().attention_forward_plan
    assert plan(256, 12, 12, 197, 197, 64, *h200) == (32, 4, 1, 1, 67584)
    assert plan(1, 12, 12, 197, 197, 64, *h200)[:4] == (16, 4, 1, 4)
    assert plan(1024, 12, 12, 50, 50, 64, *h200)[:4] == (32, 4, 2, 1)
    assert plan(128, 12, 12, 32, 32, 64, *h200)[2] == 3
    assert plan(16, 8, 8, 4096, 77, 40, *h200)[:4] == (32, 4, 1, 3)
    for width in WIDTHS:
        for length in (1, 16, 50, 77, 197, 257, 577):
            for batch in (1, 8, 300):
                for limit in (99 << 10, 163 << 10, 227 << 10):
                    rows, warps, units, splits, shared = plan(batch, 12, 12, length, length, width, 132, limit)
                    keys = 4 * -(-length // 8) * 8 * width
                    if keys + 128 * width <= limit:
                        assert units * keys + warps * rows * 2 * width == shared <= limit
                        assert 1 <= splits <= -(-length // rows)
                        assert 1 <= warps <= 16


def test_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU takes this kernel for, and what Triton's or PyTorch's."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setitem(backends._capability, gpu, (9, 0))
    monkeypatch.setitem(backends._extension_refusal, gpu, None)

    def reason(n_q: int, n_k: int, width: int = 64, dtype: torch.dtype = torch.bfloat16, **facts: Any) -> str | None:
        return dict(backends.TABLE["attention"])["cuda"](backends.Facts(gpu, dtype, width, n_q, n_k, **facts))

    with mmfast.backend(None):
        for n_q, n_k, width in ((197, 197, 64), (257, 257, 128), (50, 50, 64), (4096, 77, 40), (32, 257, 64)):
            assert reason(n_q, n_k, width) is None
        assert "mma.sync is slower" in str(reason(577, 577))
        assert "do not fit" in str(reason(577, 577, 128))
        assert "multiples of 8 from 32 to 128" in str(reason(197, 197, 36))
        assert "multiples of 8 from 32 to 128" in str(reason(197, 197, 160))
        assert "16 bits" in str(reason(197, 197, dtype=torch.float32))
        assert reason(197, 197, refusal="dropout") == "dropout"
        assert reason(197, 197, no_cuda="a mask") == "a mask"
        monkeypatch.setitem(backends._capability, gpu, (8, 6))
        assert reason(197, 197) is None
        assert "do not fit" in str(reason(197, 197, 128))
        monkeypatch.setitem(backends._capability, gpu, (10, 0))
        assert reason(50, 50) is None
        assert "mma.sync is slower" in str(reason(197, 197))
    with mmfast.backend("cuda"):
        monkeypatch.setitem(backends._capability, gpu, (9, 0))
        assert reason(577, 577) is None


@on_cuda
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout_p": 0.1}, "dropout"),
        ({"attn_mask": torch.ones(9, 9, dtype=torch.bool)}, "a mask"),
        ({"is_causal": True}, "causal attention"),
    ],
    ids=["dropout", "mask", "causal"],
)
def test_what_a_forced_kernel_refuses(device: torch.device, options: dict[str, Any], message: str) -> None:
    q, k, v = draw(device, torch.float16, (1, 2, 9, 32))
    options = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in options.items()}
    with pytest.raises(mmfast.BackendError, match=message):
        run(q, k, v, **options)
    if message != "dropout":
        with mmfast.backend("cuda"), pytest.raises(mmfast.BackendError, match=message):
            ops.attention_qkv(torch.randn(1, 9, 192, device=device).half(), 2, **options)


@on_cuda
@pytest.mark.parametrize(
    ("width", "dtype", "n_k", "message"),
    [(16, torch.float16, 9, "head_dim 16"), (32, torch.float32, 9, "16 bits"), (128, torch.float16, 600, "do not fit")],
    ids=["narrow", "float32", "many keys"],
)
def test_heads_that_do_not_fit(device: torch.device, width: int, dtype: torch.dtype, n_k: int, message: str) -> None:
    q, k, v = draw(device, dtype, (1, 1, 9, width), n_k=n_k)
    with pytest.raises(mmfast.BackendError, match=message):
        run(q, k, v)


@on_cuda
def test_empty_tensors_are_pytorchs(device: torch.device) -> None:
    q = torch.randn(2, 3, 5, 32, device=device).half()
    with mmfast.backend(None):
        assert (ops.attention(q, q[:, :, :0], q[:, :, :0]) == 0).all()
        assert ops.attention(q[:, :, :0], q, q).shape == (2, 3, 0, 32)


@on_cuda
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "sizes must be positive, got batch 0"),
        ({"head_dim": 36}, "head_dim must be a multiple of 8 from 32 to 128, got 36"),
        ({"head_dim": 136}, "got 136"),
        ({"kv_heads": 3}, "kv_heads must divide heads 2, got 3"),
        ({"dtype": 0}, "dtype must be 1 .float16. or 2 .bfloat16., got 0"),
        ({"scale": math.inf}, "scale must be finite"),
        ({"q": 8}, "aligned to 16 bytes"),
        ({"stride_k": (32, 12, 32, 1)}, "strides must be multiples of 8, got 12"),
        ({"n_k": 5000}, "5000 keys of 32 columns do not fit"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_of_the_extension(changes: dict[str, Any], message: str) -> None:
    """Checked before any memory is touched."""
    arguments: dict[str, Any] = {
        **dict.fromkeys(("q", "k", "v", "o", "lse"), 0),
        **{"batch": 1, "heads": 2, "kv_heads": 2, "n_q": 4, "n_k": 4, "head_dim": 32},
        **dict.fromkeys(("stride_q", "stride_k", "stride_v", "stride_o"), (256, 128, 32, 1)),
        **{"scale": 0.3, "processors": 4, "dtype": 1, "device": 0 if torch.cuda.is_available() else -1, "stream": 0},
    }
    with pytest.raises(ValueError, match=f"attention_forward: .*{message}"):
        cuda.extension().attention_forward(*{**arguments, **changes}.values())


@on_cuda
def test_the_launcher_refuses_masks(device: torch.device) -> None:
    from mmfast.cuda.attention import attention_forward
    from mmfast.cuda.attention_qkv import attention_qkv_forward

    q, k, v = draw(device, torch.float16, (1, 2, 9, 32))
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool, device=device)
    for options in ({"attn_mask": mask, "is_causal": False}, {"attn_mask": None, "is_causal": True}):
        with pytest.raises(ValueError, match="serves no mask"):
            attention_forward(q, k, v, scale=0.3, **options)
        with pytest.raises(ValueError, match="serves no mask"):
            attention_qkv_forward(torch.randn(1, 9, 192, device=device).half(), 2, scale=0.3, **options)
