from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmfast
from mmfast import ops, reference
from mmfast.ops import _siglip_loss_torch as chunked
from mmfast.reference.siglip_loss import cases
from tests.grading import BACKENDS, DTYPES, check_against_reference, outputs_and_gradients

LABELS = [case.label for case in cases(torch.float32, torch.device("cpu"), large=False)]
GPU_LABELS = [case.label for case in cases(torch.float32, torch.device("meta"), large=True)][len(LABELS) :]
SERVED = (None, *BACKENDS)
"""None: few logits, so PyTorch's own ops on the matrix."""


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch backend's chunks: 8 rows."""
    monkeypatch.setattr(chunked, "LEAST_ROWS", 8)
    monkeypatch.setattr(chunked, "CHUNK", {"cpu": 1, "cuda": 1})


def draw(m: int, n: int | None = None, width: int = 20, device: Any = "cpu", **kwargs: Any) -> list[Tensor]:
    """Features of unit length, a scale and a bias, with gradients."""
    n = m if n is None else n
    shared = torch.randn(max(m, n), width)
    image, text = (F.normalize(shared[:k] + torch.randn(k, width), dim=-1) for k in (m, n))
    values = (image, text, torch.tensor(10.0), torch.tensor(-10.0))
    return [x.to(device, **kwargs).requires_grad_() for x in values]


def gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


def close(found: Any, wanted: Any, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want.to(got.dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label", [*LABELS, *(pytest.param(x, marks=pytest.mark.gpu) for x in GPU_LABELS)])
@pytest.mark.usefixtures("poisoned")
def test_matches_the_reference(label: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    case = next(c for c in cases(dtype, device, large=label in GPU_LABELS) if c.label == label)
    check_against_reference(ops.siglip_loss, reference.siglip_loss, case.args, case.kwargs, backend, dtype)


@pytest.mark.parametrize("scale", [1.0, 10.0, 112.0])
@pytest.mark.parametrize("batch", [1, 3, 63, 64, 65, 1000])
@pytest.mark.usefixtures("poisoned")
def test_batches_and_scales(batch: int, scale: float, device: torch.device) -> None:
    image, text, _, bias = draw(batch, width=16, device=device)
    args = (image.detach(), text.detach(), torch.tensor(scale, device=device), bias.detach())
    check_against_reference(ops.siglip_loss, reference.siglip_loss, args, {}, "torch", torch.float32)


@pytest.mark.parametrize("width", [16, 384, 512, 640, 768, 1024])
@pytest.mark.usefixtures("poisoned", "small_chunks")
def test_widths(width: int, device: torch.device) -> None:
    args = [x.detach() for x in draw(21, width=width, device=device)]
    check_against_reference(ops.siglip_loss, reference.siglip_loss, args, {}, "torch", torch.float32)


@pytest.mark.parametrize("backend", SERVED)
def test_worked_example(backend: str | None, device: torch.device) -> None:
    """Logits 2 and -1 (positives), 0 and -3: softplus(-2) + softplus(1) + softplus(0) + softplus(-3), over 2 images."""
    image = torch.tensor([[2.5, 0.5], [-2.5, -0.5]], device=device, requires_grad=True)
    text = torch.eye(2, device=device)
    terms = [math.log1p(math.exp(w)) for w in (-2, 1, 0, -3)]
    with mmfast.backend(backend):
        loss = ops.siglip_loss(image, text, 1.0, -0.5)
        (dimage,) = torch.autograd.grad(loss, image)
        total = ops.siglip_loss(image, text, 1.0, -0.5, reduction="sum")
    torch.testing.assert_close(loss.item(), sum(terms) / 2)
    torch.testing.assert_close(total.item(), sum(terms))
    sigmoid = [1 / (1 + math.exp(-w)) for w in (-2, 1, 0, -3)]
    wanted = torch.tensor([[-sigmoid[0], sigmoid[2]], [sigmoid[3], -sigmoid[1]]]) / 2
    torch.testing.assert_close(dimage.cpu(), wanted)


@pytest.mark.parametrize("backend", SERVED)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_is_open_clips(with_bias: bool, backend: str | None, device: torch.device) -> None:
    open_clip = pytest.importorskip("open_clip")
    inputs = draw(37, device=device)
    theirs = inputs if with_bias else [*inputs[:3], None]
    expected = open_clip.loss.SigLipLoss()(*theirs)
    with mmfast.backend(backend):
        loss = ops.siglip_loss(*theirs)
        wanted = [x for x in theirs if x is not None]
        torch.testing.assert_close(loss, expected)
        close(gradients(loss, wanted), gradients(expected, wanted))


def test_is_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.SiglipConfig(
        text_config={**shape, "vocab_size": 50, "max_position_embeddings": 8, "projection_size": 16},
        vision_config={**shape, "image_size": 16, "patch_size": 8},
    )
    model = transformers.SiglipModel(config).eval()
    found = model(pixel_values=torch.randn(5, 3, 16, 16), input_ids=torch.randint(50, (5, 8)), return_loss=True)
    loss = ops.siglip_loss(found.image_embeds, found.text_embeds, model.logit_scale.exp(), model.logit_bias)
    assert model.logit_scale.shape == (1,)
    torch.testing.assert_close(loss, found.loss)


@pytest.mark.parametrize("options", [{}, {"ids": True}, {"normalize": True}], ids=["diagonal", "ids", "normalize"])
@pytest.mark.usefixtures("poisoned", "small_chunks")
def test_chunks_of_the_torch_backend(options: dict[str, bool], device: torch.device) -> None:
    """Five chunks, the last of three rows."""
    inputs = draw(35, device=device)
    kwargs: dict[str, Any] = {"normalize": options.get("normalize", False)}
    if options.get("ids"):
        kwargs |= {f"{side}_ids": torch.randint(9, (35,), device=device) for side in ("image", "text")}
    with mmfast.backend("torch"):
        loss, metrics = ops.siglip_loss(*inputs, **kwargs, return_metrics=True)
    expected, wanted = ops.siglip_loss(*inputs, **kwargs, return_metrics=True)
    torch.testing.assert_close(loss, expected)
    close(metrics.values(), wanted.values())
    close(gradients(loss, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("ids", [False, True], ids=["diagonal", "ids"])
@pytest.mark.usefixtures("poisoned", "small_chunks")
def test_torch_backend_with_rounded_gradients(ids: bool, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """As 16-bit features are served on a GPU without Triton: the scale's gradient is not of what was rounded."""
    monkeypatch.setattr(chunked, "rounds", lambda image: image.dtype == torch.float16)
    inputs = draw(35, device=device)
    args = [*(x.detach().half().requires_grad_() for x in inputs[:2]), *inputs[2:]]
    labels = torch.arange(35, device=device) // 2
    kwargs = {"image_ids": labels, "text_ids": labels} if ids else {}
    with mmfast.backend("torch"):
        loss, metrics = ops.siglip_loss(*args, **kwargs, return_metrics=True)
        found = gradients(loss, args)
    exact = [x.detach().double().requires_grad_() for x in args]
    expected = reference.siglip_loss(*exact, **kwargs)
    for got, want, bound in zip(found, gradients(expected, exact), (1e-3, 1e-3, 1e-5, 1e-5), strict=True):
        assert float((got.double() - want).norm() / want.norm()) < bound
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    _, wanted = ops.siglip_loss(*exact, **kwargs, return_metrics=True)
    close(metrics.values(), wanted.values())


@pytest.mark.triton
@pytest.mark.parametrize("ids", [False, True], ids=["diagonal", "ids"])
@pytest.mark.parametrize("sizes", [(150, 140), (20, 200)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_blocks_and_parts_of_the_kernel(sizes: tuple[int, int], ids: bool, device: torch.device) -> None:
    """Several blocks, groups of rows in them, pieces of a tile, ends within both; places off by `first`."""
    from mmfast.kernels.siglip_loss import GROUP, TileConfig, siglip_loss_forward

    (m, n), first = sizes, 0 if ids else 33
    config = TileConfig(16, 64, 16, 4, 2, 4)
    assert GROUP == 128 // 16  # a block of 20 rows has fewer
    image, text, scale, bias = (x.detach() for x in draw(m, n, 20, device))
    labels = [torch.randint(30, (k,), device=device) if ids else None for k in (m, n)]
    places = [None if ids else torch.zeros(m, device=device, dtype=dtype) for dtype in (torch.float32, torch.float64)]
    needs = (True, True, True, True)
    found = siglip_loss_forward(
        *(image, text, scale, bias, -(1 << 30) if ids else first, *labels, places[0]),
        needs=needs,
        metrics=True,
        side=128,
        config=config,
    )
    exact = [x.double() for x in (image, text, scale, bias)]
    block = chunked.Block(*exact, -(1 << 30) if ids else first, *labels)
    wanted = chunked.one_pass(block, places[1], needs=needs, metrics=True)
    close(found, wanted, rtol=1e-5, atol=1e-5)
    if not ids:
        close(places[:1], places[1:])
        assert int((places[0] != 0).sum()) == min(m, n - first)


def test_block_sides_are_even() -> None:
    pytest.importorskip("triton")
    from mmfast.kernels.siglip_loss import even_side

    assert [even_side(size, 8192) for size in (0, 5, 8192, 8193, 32768, 40000)] == [1, 5, 8192, 4224, 8192, 8064]


@pytest.mark.triton
def test_accuracy_of_the_terms(device: torch.device) -> None:
    """Loss and gradient of single logits: log1p of tiny and of large arguments, and an exponential as good as its own.

    A logit of size |z| is itself known to 6e-8 |z|, which its exponential takes over.
    """
    logits = torch.cat([torch.linspace(-80, 80, 9), torch.linspace(-3, 3, 7), torch.tensor([-16.7, -1e-6])]).to(device)
    exact = logits.double().requires_grad_()
    losses = F.softplus(exact, threshold=1e9)
    (slopes,) = torch.autograd.grad(losses.sum(), exact)
    text, ids = torch.ones(1, 1, device=device), torch.arange(2, device=device)
    with mmfast.backend("triton"):
        for i, z in enumerate(logits):
            image = z.reshape(1, 1).clone().requires_grad_()
            loss = ops.siglip_loss(image, text, 1.0, 0.0, image_ids=ids[:1], text_ids=ids[1:])
            (slope,) = torch.autograd.grad(loss, image)
            bound = 4e-7 + 1e-7 * float(z.abs())
            assert abs(float(loss.detach().double() / losses[i].detach()) - 1) < bound, float(z)
            assert abs(float(slope.double() / slopes[i]) - 1) < bound, float(z)


@pytest.mark.parametrize("backend", SERVED)
def test_far_negatives_are_not_lost(backend: str | None, device: torch.device) -> None:
    """At a logit of -30 each term is e^-30, and log(1 + e) would be 0."""
    image, text = torch.zeros(2, 40, 4, device=device)
    ids = torch.arange(40, device=device)
    with mmfast.backend(backend):
        loss = ops.siglip_loss(image, text, 1.0, -30.0, image_ids=ids, text_ids=ids + 40)
    torch.testing.assert_close(loss.item() / (40 * math.exp(-30.0)), 1.0, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", SERVED)
def test_saturated_logits(backend: str | None, device: torch.device) -> None:
    """Huge logits give their limits, not NaN: a loss of |z| on the wrong side, 0 on the right one."""
    image = torch.tensor([[1.0], [-1.0]], device=device, requires_grad=True)
    text = torch.tensor([[1.0], [1.0]], device=device)
    with mmfast.backend(backend):
        loss = ops.siglip_loss(image, text, 1e20, 0.0)  # logits 1e20 (positive), 1e20; -1e20, -1e20 (positive)
        (dimage,) = torch.autograd.grad(loss, image)
    torch.testing.assert_close(loss.item(), 1e20)
    torch.testing.assert_close(dimage.cpu(), torch.tensor([[0.5e20], [-0.5e20]]))


@pytest.mark.parametrize("backend", SERVED)
def test_scale_and_bias_are_numbers_or_tensors(backend: str | None, device: torch.device) -> None:
    image, text, scale, bias = draw(9, device=device)
    expected = ops.siglip_loss(image, text, scale, bias)
    wanted = gradients(expected, [scale, bias])
    with mmfast.backend(backend):
        torch.testing.assert_close(ops.siglip_loss(image, text, 10, -10.0), expected)
        for dtype in (torch.float32, torch.bfloat16):
            pair = [x.detach().reshape(1).to(dtype).requires_grad_() for x in (scale, bias)]
            loss = ops.siglip_loss(image, text, *pair)
            assert loss.shape == ()
            assert loss.dtype == torch.float32
            found = gradients(loss, pair)
            assert [x.shape for x in found] == [(1,), (1,)]
            assert [x.dtype for x in found] == [dtype] * 2
            close(found, [x.reshape(1) for x in wanted], rtol=1e-4 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("backend", SERVED)
@pytest.mark.parametrize("ids", [False, True], ids=["diagonal", "ids"])
@pytest.mark.parametrize("index", range(1, 16))
@pytest.mark.usefixtures("poisoned")
def test_only_the_gradients_asked_for(index: int, ids: bool, backend: str | None, device: torch.device) -> None:
    """Every subset, of both features frozen and of frozen scale and bias among them."""
    inputs = draw(7, width=8, device=device)
    labels = torch.arange(7, device=device) // 2
    kwargs = {"image_ids": labels, "text_ids": labels} if ids else {}
    every = gradients(reference.siglip_loss(*inputs, **kwargs), inputs)
    wanted = [bool(index >> i & 1) for i in range(4)]
    some = [x.detach().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
    with mmfast.backend(backend):
        loss = ops.siglip_loss(*some, **kwargs)
        found = gradients(loss, [x for x in some if x.requires_grad])
    close(found, [grad for grad, want in zip(every, wanted, strict=True) if want])


@pytest.mark.parametrize("backend", SERVED)
@pytest.mark.usefixtures("poisoned")
def test_equal_ids_are_positives(backend: str | None, device: torch.device) -> None:
    """Three captions an image, M x N, one caption of no image, ids beyond 32 bits; the mean is over images."""
    image, text, scale, bias = draw(4, 13, device=device)
    image_ids = torch.arange(4, device=device) + (1 << 40)
    text_ids = torch.cat([image_ids.repeat(3), torch.tensor([7], device=device)])
    logits = 10 * image @ text.T - 10
    sign = torch.full((4, 13), -1.0, device=device)
    for j in range(12):
        sign[j % 4, j] = 1
    expected = -F.logsigmoid(sign * logits).sum() / 4
    with mmfast.backend(backend):
        loss = ops.siglip_loss(image, text, scale, bias, image_ids=image_ids, text_ids=text_ids)
        torch.testing.assert_close(loss, expected)
        close(gradients(loss, [image, text]), gradients(expected, [image, text]))
        same = ops.siglip_loss(image, text[:4], scale, bias, image_ids=image_ids, text_ids=image_ids)
        torch.testing.assert_close(same, ops.siglip_loss(image, text[:4], scale, bias))


@pytest.mark.parametrize("backend", SERVED)
@pytest.mark.parametrize("ids", [False, True], ids=["diagonal", "ids"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.usefixtures("poisoned")
def test_metrics(reduction: str, ids: bool, backend: str | None, device: torch.device) -> None:
    image, text, _, _ = draw(21, width=3, device=device)
    labels = torch.arange(21, device=device)
    kwargs = {"image_ids": labels // 2, "text_ids": labels // 3} if ids else {}
    positive = kwargs["image_ids"][:, None] == kwargs["text_ids"] if ids else torch.eye(21, device=device).bool()
    logits = (3 * image @ text.T - 0.5).detach()
    terms = -F.logsigmoid(torch.where(positive, logits, -logits)) / 21
    wanted = {
        "positive_loss": terms[positive].sum(),
        "negative_loss": terms[~positive].sum(),
        "positive_accuracy": (logits > 0)[positive].float().mean(),
        "negative_accuracy": (logits < 0)[~positive].float().mean(),
    }
    assert 0 < wanted["positive_accuracy"] < 1
    assert 0 < wanted["negative_accuracy"] < 1
    with mmfast.backend(backend):
        loss, metrics = ops.siglip_loss(image, text, 3.0, -0.5, reduction=reduction, return_metrics=True, **kwargs)
    assert list(metrics) == list(wanted)
    for name, value in metrics.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-5, msg=name)
        assert not value.requires_grad
    torch.testing.assert_close(loss.detach(), terms.sum() * (1 if reduction == "mean" else 21), rtol=1e-5, atol=1e-5)


LAYOUTS = {
    "every second row": lambda x: x[::2],
    "columns apart": lambda x: x[:, ::2],
    "transposed": lambda x: x.t(),
    "slice of columns": lambda x: x[:, 3:16],
    "expanded": lambda x: x[:1].expand(5, -1),
}


@pytest.mark.parametrize("backend", SERVED)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("poisoned")
def test_any_strides(layout: str, backend: str | None, device: torch.device) -> None:
    base, other, scale, bias = draw(20, device=device)
    image, text = LAYOUTS[layout](base), LAYOUTS[layout](other)
    with mmfast.backend(backend):
        loss = ops.siglip_loss(image, text, scale, bias, normalize=True)
        found = gradients(loss, [base, other, scale, bias])
    expected = reference.siglip_loss(image, text, scale, bias, normalize=True)
    close([loss, *found], [expected, *gradients(expected, [base, other, scale, bias])])


@pytest.mark.parametrize("backend", SERVED)
def test_rows_of_zeros_are_normalized(backend: str | None, device: torch.device) -> None:
    image, text, scale, bias = draw(6, device=device)
    with torch.no_grad():
        image[2] = 0
    with mmfast.backend(backend):
        loss = ops.siglip_loss(image, text, scale, bias, normalize=True)
        found = gradients(loss, [image, text])
    expected = reference.siglip_loss(image, text, scale, bias, normalize=True)
    torch.testing.assert_close(loss, expected)
    close(found, gradients(expected, [image, text]))
    assert found[0][2].abs().max() > 1e9  # divided by 1e-12, as F.normalize does


@pytest.mark.parametrize("backend", SERVED)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("row", [0, 40])
def test_nan_propagates(row: int, value: float, backend: str | None, device: torch.device) -> None:
    """One value makes the loss NaN, and the gradients of its row and of the other side; other rows keep theirs."""
    image, text, scale, bias = draw(41, device=device)
    with torch.no_grad():
        image[row, 1] = value
        text[:, 1] = 0  # inf * 0
    with mmfast.backend(backend):
        loss = ops.siglip_loss(image, text, scale, bias)
        dimage, dtext, dscale, dbias = gradients(loss, [image, text, scale, bias])
    assert loss.isnan()
    assert dscale.isnan()
    assert dbias.isnan()
    assert dimage[row].isnan().any()
    assert dtext.isnan().any(1).all()
    others = torch.cat([dimage[:row], dimage[row + 1 :]])
    assert others.isfinite().all()


@pytest.mark.parametrize("backend", [None, "torch"])
def test_empty_batch(backend: str | None, device: torch.device) -> None:
    """A mean of nothing is NaN, as PyTorch's; a sum is 0. No images but texts: the same."""
    for n in (0, 3):
        inputs = [torch.ones(0, 4), torch.ones(n, 4), torch.tensor(2.0), torch.tensor(1.0)]
        inputs = [x.to(device).requires_grad_() for x in inputs]
        kwargs = {f"{k}_ids": torch.arange(c, device=device) for k, c in (("image", 0), ("text", n))} if n else {}
        with mmfast.backend(backend):
            assert ops.siglip_loss(*inputs, **kwargs).isnan()
            loss = ops.siglip_loss(*inputs, **kwargs, reduction="sum")
            assert loss == 0
            for grad, x in zip(gradients(loss, inputs), inputs, strict=True):
                assert grad.shape == x.shape
                assert (grad == 0).all()


def test_registered_op_takes_an_empty_batch() -> None:
    """As a rank of a group may hold none: below the public function, which has no use of it there."""
    x = torch.ones(0, 4, requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    loss, _ = torch.ops.mmfast.siglip_loss(x, x, scale, scale, None, None, False, True, torch.float32, "", 1.0)
    assert loss == 0
    assert torch.autograd.grad(loss, scale)[0] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ids", [False, True], ids=["diagonal", "ids"])
@pytest.mark.usefixtures("poisoned")
def test_same_bits_twice(ids: bool, backend: str, device: torch.device) -> None:
    args = [x.detach() for x in draw(70, device=device)]
    labels = torch.arange(70, device=device) // 2
    kwargs = {"image_ids": labels, "text_ids": labels} if ids else {}
    with mmfast.backend(backend):
        first, second = (outputs_and_gradients(ops.siglip_loss, args, kwargs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_and_with_a_large_factor(backend: str, device: torch.device) -> None:
    """The gradients that are kept stay as they are; a gradient scaler's 65536 comes before rounding to float16."""
    inputs = draw(30, device=device)
    half = [x.detach().half().requires_grad_() for x in inputs[:2]]
    args = [*half, *inputs[2:]]
    with mmfast.backend(backend):
        loss = ops.siglip_loss(*args)
        first = torch.autograd.grad(loss, args, retain_graph=True)
        again = torch.autograd.grad(loss, args, retain_graph=True)
        scaled = torch.autograd.grad(loss * 65536, args)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    exact = [x.detach().double().requires_grad_() for x in args]
    wanted = gradients(reference.siglip_loss(*exact) * 65536, exact)
    assert [x.dtype for x in scaled] == [torch.float16, torch.float16, torch.float32, torch.float32]
    close(scaled, wanted, rtol=2e-3, atol=1.0)  # of up to 2000


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_keeps_far_negatives(backend: str, device: torch.device) -> None:
    """Their gradient, e^-18 at a bias of -18, is far below float16's smallest number."""
    inputs = [x.detach() for x in draw(40, device=device)]
    args = [inputs[0].half(), inputs[1].half(), torch.tensor(1.0, device=device), torch.tensor(-18.0, device=device)]
    ids = {"image_ids": torch.arange(40, device=device), "text_ids": torch.arange(40, device=device) + 40}
    args = [x.requires_grad_() for x in args]
    with mmfast.backend(backend):
        found = gradients(ops.siglip_loss(*args, **ids) * 2.0**30, args)
    exact = [x.detach().double().requires_grad_() for x in args]
    wanted = gradients(reference.siglip_loss(*exact, **ids) * 2.0**30, exact)
    for got, want in zip(found, wanted, strict=True):
        assert float((got.double() - want).norm() / want.norm()) < 1e-3
