"""`clip_loss`: values against the float64 reference, PyTorch's cross entropy and the peers; options; gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmfast
from mmfast import ops, reference
from mmfast.commands import _grading
from mmfast.reference._case import Case
from mmfast.reference.clip_loss import cases

from ..grading import BACKENDS, DTYPES

SERVED = (None, "torch", pytest.param("triton", marks=pytest.mark.triton))
"""The whole matrix by PyTorch's ops, its chunks, and the kernels."""

# The lecture's matrix of similarities, with the identity as texts.
LECTURE = [[2.0, 0.5, 0.3], [0.2, 2.5, 0.4], [0.1, 0.6, 3.0]]


def lecture(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Features of width 16 whose products are the lecture's matrix."""
    image, text = torch.zeros(3, 16, dtype=dtype, device=device), torch.zeros(3, 16, dtype=dtype, device=device)
    image[:, :3] = torch.tensor(LECTURE, dtype=dtype)
    text[:, :3] = torch.eye(3, dtype=dtype)
    return image, text


def pairs(
    m: int,
    width: int,
    device: torch.device,
    *,
    n: int | None = None,
    dtype: torch.dtype = torch.float32,
    alike: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Unit rows of m images and n texts that resemble each other."""
    n = m if n is None else n
    shared = alike * torch.randn(max(m, n), width, device=device)
    image, text = (F.normalize(shared[:k] + torch.randn(k, width, device=device), dim=1).to(dtype) for k in (m, n))
    return image.requires_grad_(), text.requires_grad_()


def eager(image: Tensor, text: Tensor, scale: Tensor | float, **options: Any) -> Tensor:
    """CLIP's loss as everyone writes it."""
    logits, places = scale * image @ text.T, torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, places, **options) + F.cross_entropy(logits.T, places, **options)) / 2


@pytest.mark.parametrize("backend", SERVED)
def test_lecture_example(backend: str | None, device: torch.device) -> None:
    """The slides: -log(e^2.0 / (e^2.0 + e^0.2 + e^0.1)) = 0.274 for text 1, and the mean of both directions."""
    image, text = lecture(device)
    scale = torch.ones((), device=device, requires_grad=True)
    with mmfast.backend(backend):
        rows, columns = ops.clip_loss(image, text, scale, reduction="none")
        loss, metrics = ops.clip_loss(image, text, scale, return_metrics=True)
        loss.backward()
        cold = ops.clip_loss(image, text, 1 / 0.07)
    torch.testing.assert_close(rows.cpu(), torch.tensor([0.3406162698, 0.2010740185, 0.1360517406]))
    torch.testing.assert_close(columns.cpu(), torch.tensor([0.2737359058, 0.2506839315, 0.1323248697]))
    assert f"{float(columns[0].detach()):.3f}" == "0.274"
    assert math.isclose(float(rows.mean().detach()), 0.2259140096, abs_tol=1e-7)
    assert math.isclose(float(columns.mean().detach()), 0.2189149023, abs_tol=1e-7)
    assert math.isclose(float(loss.detach()), 0.2224144560, abs_tol=1e-7)
    assert math.isclose(float(scale.grad), -0.3982634148, abs_tol=1e-6)
    assert metrics["image_to_text_top1"] == metrics["text_to_image_top1"] == 1
    assert math.isclose(float(metrics["image_to_text_loss"]), 0.2259140096, abs_tol=1e-7)
    assert math.isclose(float(metrics["text_to_image_loss"]), 0.2189149023, abs_tol=1e-7)
    assert 0 <= float(cold) < 1e-6  # 8.88e-11 in exact arithmetic


def test_lecture_gradient_of_the_logits() -> None:
    image, text = (x.requires_grad_() for x in lecture(torch.device("cpu"), torch.float64))
    with mmfast.backend("torch"):
        ops.clip_loss(image, text, 1.0).backward()
    # The texts are unit vectors: the gradient of an image is that of its logits.
    expected = [
        [-0.0880225, 0.0440078, 0.0314707],
        [0.0346187, -0.0673133, 0.0275365],
        [0.0269627, 0.0325972, -0.0418577],
    ]
    torch.testing.assert_close(image.grad[:, :3], torch.tensor(expected, dtype=torch.float64), atol=6e-8, rtol=0)
    assert float(image.grad.sum().abs()) < 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", range(len(cases(torch.float32, torch.device("cpu"), large=False))))
def test_error_and_gradients(index: int, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    case = cases(dtype, device, large=False)[index]
    grade = _grading.grade("clip_loss", case, dtype, backend)
    assert grade.passed, grade


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0, 112.0])
@pytest.mark.parametrize("batch", [1, 3, 63, 64, 65, 1000])
def test_batches_and_scales(batch: int, scale: float, device: torch.device) -> None:
    """Chunks of the torch backend against the float64 reference."""
    args = (*(x.detach() for x in pairs(batch, 40, device, alike=0.5)), torch.tensor(scale, device=device))
    grade = _grading.grade("clip_loss", Case("", lambda: (args, {})), torch.float32, "torch")
    assert grade.passed, grade


@pytest.mark.parametrize("width", [16, 384, 512, 640, 768, 1024])
def test_widths(width: int, device: torch.device) -> None:
    args = (*(x.detach() for x in pairs(65, width, device)), torch.tensor(14.3, device=device))
    grade = _grading.grade("clip_loss", Case("", lambda: (args, {})), torch.float32, "torch")
    assert grade.passed, grade


@pytest.mark.parametrize("backend", SERVED)
def test_rows_apart(backend: str | None, device: torch.device) -> None:
    """Every second row, a slice of columns, and a transposed tensor."""
    wide = torch.randn(26, 40, device=device)
    image, text = wide[::2, 3:27], torch.randn(24, 13, device=device).T
    with mmfast.backend(backend):
        found = ops.clip_loss(image, text, 3.0, normalize=True)
    expected = reference.clip_loss(image.double(), text.double(), 3.0, normalize=True)
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("backend", SERVED)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_is_cross_entropy(backend: str | None, smoothing: float, device: torch.device) -> None:
    image, text = pairs(21, 24, device)
    other = [x.detach().clone().requires_grad_() for x in (image, text)]
    scale, other_scale = (torch.tensor(9.0, device=device, requires_grad=True) for _ in range(2))
    with mmfast.backend(backend):
        loss = ops.clip_loss(image, text, scale, label_smoothing=smoothing)
        loss.backward()
    expected = eager(*other, other_scale, label_smoothing=smoothing)
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=2e-6, rtol=2e-6)
    for mine, theirs in ((image, other[0]), (text, other[1]), (scale, other_scale)):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", SERVED)
def test_scale_is_a_number_a_scalar_or_one_element(backend: str | None, device: torch.device) -> None:
    image, text = pairs(9, 16, device)
    with mmfast.backend(backend):
        number = ops.clip_loss(image, text, 12.5)
        for shape in ((), (1,)):
            scale = torch.full(shape, 12.5, device=device, requires_grad=True)
            loss = ops.clip_loss(image, text, scale)
            loss.backward()
            assert loss.shape == ()
            assert torch.equal(loss, number)
            assert scale.grad.shape == shape
            step = 1e-2
            slope = [float(reference.clip_loss(image.double(), text.double(), 12.5 + sign * step)) for sign in (1, -1)]
            assert math.isclose(float(scale.grad), (slope[0] - slope[1]) / (2 * step), rel_tol=1e-3)


@pytest.mark.parametrize("backend", SERVED)
def test_bias_cancels(backend: str | None, device: torch.device) -> None:
    image, text = pairs(9, 16, device)
    bias = torch.tensor([-10.0], device=device, requires_grad=True)
    with mmfast.backend(backend):
        plain = ops.clip_loss(image, text, 10.0)
        loss = ops.clip_loss(image, text, 10.0, logit_bias=bias)
        loss.backward()
        assert torch.equal(loss, plain)
        assert torch.equal(bias.grad, torch.zeros(1, device=device))
        assert torch.isnan(ops.clip_loss(image, text, 10.0, logit_bias=float("nan")))


@pytest.mark.parametrize("backend", SERVED)
def test_captions_of_one_image(backend: str | None, device: torch.device) -> None:
    """Four images with three captions each, and two captions of none: only negatives."""
    image, text = pairs(4, 16, device, n=14)
    image_ids = torch.arange(4, device=device) * 10**12  # all 64 bits count
    text_ids = torch.cat([image_ids.repeat_interleave(3), torch.tensor([7, 8], device=device)])
    with mmfast.backend(backend):
        loss = ops.clip_loss(image, text, 8.0, image_ids=image_ids, text_ids=text_ids)
        rows, columns = ops.clip_loss(image, text, 8.0, image_ids=image_ids, text_ids=text_ids, reduction="none")
    logits = 8.0 * image.detach().double() @ text.detach().double().T
    target = (image_ids[:, None] == text_ids).double() / 3
    expected_rows = -(target * logits.log_softmax(1)).sum(1)
    expected_columns = -(logits.log_softmax(0)[torch.arange(12, device=device) // 3, torch.arange(12, device=device)])
    torch.testing.assert_close(rows.double(), expected_rows, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(columns[:12].double(), expected_columns, atol=2e-6, rtol=2e-6)
    assert torch.equal(columns[12:], torch.zeros(2, device=device))
    torch.testing.assert_close(
        loss.double(), (expected_rows.mean() + expected_columns.mean()) / 2, atol=2e-6, rtol=2e-6
    )


@pytest.mark.parametrize("backend", SERVED)
def test_duplicates_are_not_negatives(backend: str | None, device: torch.device) -> None:
    """Two equal captions: the least loss is log 2 for the two, not more."""
    text = torch.eye(4, device=device)[[0, 0, 1, 2]]
    ids = torch.tensor([5, 5, -1, 2], device=device, dtype=torch.int32)
    with mmfast.backend(backend):
        rows, columns = ops.clip_loss(text, text, 100.0, image_ids=ids, text_ids=ids, reduction="none")
    expected = torch.tensor([math.log(2), math.log(2), 0.0, 0.0], device=device)
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(columns, expected)


@pytest.mark.parametrize("backend", SERVED)
def test_first_of_equal_logits_counts(backend: str | None, device: torch.device) -> None:
    """Collapsed features: argmax is 0 for all, so one in five is right, not all."""
    image = torch.ones(5, 16, device=device)
    with mmfast.backend(backend):
        _, metrics = ops.clip_loss(image, image, 1.0, return_metrics=True)
        image, text = pairs(150, 16, device)
        _, found = ops.clip_loss(image, text, 5.0, return_metrics=True)
    assert math.isclose(float(metrics["image_to_text_top1"]), 0.2, rel_tol=1e-6)
    assert math.isclose(float(metrics["text_to_image_top1"]), 0.2, rel_tol=1e-6)
    logits, places = image.detach() @ text.detach().T, torch.arange(150, device=device)
    assert math.isclose(
        float(found["image_to_text_top1"]), float((logits.argmax(1) == places).float().mean()), rel_tol=1e-6
    )
    assert math.isclose(
        float(found["text_to_image_top1"]), float((logits.argmax(0) == places).float().mean()), rel_tol=1e-6
    )
    assert not any(value.requires_grad for value in found.values())


@pytest.mark.parametrize("backend", SERVED)
def test_top1_with_ids(backend: str | None, device: torch.device) -> None:
    image, text = pairs(20, 16, device, n=30)
    ids = torch.randint(8, (20,), device=device), torch.randint(8, (30,), device=device)
    with mmfast.backend(backend):
        _, found = ops.clip_loss(image, text, 5.0, image_ids=ids[0], text_ids=ids[1], return_metrics=True)
    logits = image.detach() @ text.detach().T
    share = (ids[0][:, None] == ids[1]).any(1), (ids[0][:, None] == ids[1]).any(0)
    right = (ids[1][logits.argmax(1)] == ids[0]).sum(), (ids[0][logits.argmax(0)] == ids[1]).sum()
    assert math.isclose(float(found["image_to_text_top1"]), float(right[0] / share[0].sum()), rel_tol=1e-6)
    assert math.isclose(float(found["text_to_image_top1"]), float(right[1] / share[1].sum()), rel_tol=1e-6)


@pytest.mark.parametrize("backend", SERVED)
def test_zero_rows_are_normalized(backend: str | None, device: torch.device) -> None:
    image, text = torch.randn(5, 16, device=device), torch.randn(5, 16, device=device)
    image[2] = 0
    image[3] = 1e-20  # its square underflows
    values = [x.clone().requires_grad_() for x in (image, text, image.double(), text.double())]
    with mmfast.backend(backend):
        loss = ops.clip_loss(*values[:2], 5.0, normalize=True)
    expected = reference.clip_loss(*values[2:], 5.0, normalize=True)
    torch.testing.assert_close(loss.double(), expected, atol=2e-6, rtol=2e-6)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(values[0].grad.double(), values[2].grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(values[1].grad.double(), values[3].grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", SERVED)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_propagates(backend: str | None, value: float, device: torch.device) -> None:
    """A loss is finite where it is in PyTorch."""
    image, text = pairs(7, 16, device)
    with torch.no_grad():
        image[3, 5] = value
    places = torch.arange(7, device=device)
    logits = 5.0 * image.detach() @ text.detach().T
    with mmfast.backend(backend):
        rows, columns = ops.clip_loss(image, text, 5.0, reduction="none")
        loss = ops.clip_loss(image, text, 5.0)
        loss.backward()
    assert torch.equal(rows.isfinite(), F.cross_entropy(logits, places, reduction="none").isfinite())
    assert torch.equal(columns.isfinite(), F.cross_entropy(logits.T, places, reduction="none").isfinite())
    assert torch.isnan(loss)
    assert torch.isnan(text.grad).any()
    assert torch.isnan(image.grad).any()


@pytest.mark.parametrize("backend", [None, "torch"])
def test_empty_batch(backend: str | None, device: torch.device) -> None:
    image = torch.zeros(0, 16, device=device, requires_grad=True)
    with mmfast.backend(backend):
        assert torch.isnan(ops.clip_loss(image, image, 5.0))
        loss = ops.clip_loss(image, image, 5.0, reduction="sum")
    loss.backward()
    assert loss == 0
    assert image.grad.shape == (0, 16)


@pytest.mark.triton
@pytest.mark.parametrize(("one", "other"), [("torch", "triton"), ("triton", "torch")])
def test_backward_by_another_backend(one: str, other: str, device: torch.device) -> None:
    image, text = pairs(11, 16, device)
    found = []
    for second in (one, other):
        with mmfast.backend(one):
            loss = ops.clip_loss(image, text, 5.0, normalize=True)
        with mmfast.backend(second):
            found.append(torch.autograd.grad(loss, (image, text)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("backend", SERVED)
def test_reductions(backend: str | None, device: torch.device) -> None:
    image, text = pairs(11, 16, device)
    with mmfast.backend(backend):
        rows, columns = ops.clip_loss(image, text, 5.0, reduction="none")
        total = ops.clip_loss(image, text, 5.0, reduction="sum")
        weight = torch.rand(11, device=device), torch.rand(11, device=device)
        (rows @ weight[0] + columns @ weight[1]).backward()
    torch.testing.assert_close(total, (rows.sum() + columns.sum()) / 2)
    exact = [x.detach().double().requires_grad_() for x in (image, text)]
    logits = 5.0 * exact[0] @ exact[1].T
    loss = -(
        logits.log_softmax(1).diagonal() @ weight[0].double() + logits.log_softmax(0).diagonal() @ weight[1].double()
    )
    loss.backward()
    for mine, theirs in zip((image, text), exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", SERVED)
def test_only_what_needs_a_gradient(backend: str | None, device: torch.device) -> None:
    """A locked image tower; a scale alone."""
    image, text = pairs(9, 16, device)
    scale = torch.tensor(9.0, device=device, requires_grad=True)
    with mmfast.backend(backend):
        every = torch.autograd.grad(ops.clip_loss(image, text, scale), (image, text, scale))
        (for_text,) = torch.autograd.grad(ops.clip_loss(image.detach(), text, 9.0), text)
        locked = torch.autograd.grad(ops.clip_loss(image.detach(), text, scale), (text, scale))
        (alone,) = torch.autograd.grad(ops.clip_loss(image.detach(), text.detach(), scale), scale)
    torch.testing.assert_close(for_text, every[1])
    torch.testing.assert_close(locked, every[1:])
    torch.testing.assert_close(alone, every[2])


@pytest.mark.parametrize("backend", [None, "torch"])
def test_gradcheck(backend: str | None) -> None:
    image, text = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 1, 1, 2, 3])
    teacher = (torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64), 2.0)

    def run(*args: Tensor, **options: Any) -> Any:
        with mmfast.backend(backend):
            return ops.clip_loss(*args, **options)

    for options in (
        {"normalize": True},
        {"image_ids": ids, "text_ids": ids.flip(0), "label_smoothing": 0.1},
        {"teacher": teacher, "teacher_weight": 0.3},
    ):
        assert torch.autograd.gradcheck(lambda *args, o=options: run(*args, **o), (image, text, scale))
    assert torch.autograd.gradgradcheck(lambda *args: run(*args, normalize=True), (image, text, scale))


@pytest.mark.parametrize("backend", [None, "torch"])
def test_transforms(backend: str | None) -> None:
    image, text = pairs(4, 8, torch.device("cpu"))
    image, text = image.detach(), text.detach()
    (expected,) = torch.autograd.grad(eager(x := image.clone().requires_grad_(), text, 5.0), x)
    with mmfast.backend(backend):
        found = torch.func.grad(lambda x: ops.clip_loss(x, text, 5.0))(image)
        batch = torch.func.vmap(lambda x: ops.clip_loss(x, text, 5.0))(torch.stack([image, text]))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(batch, torch.stack([eager(image, text, 5.0), eager(text, text, 5.0)]))


@pytest.mark.parametrize("backend", SERVED)
def test_same_bits_twice(backend: str | None, device: torch.device, poisoned: None) -> None:
    values = []
    for _ in range(2):
        torch.manual_seed(3)
        image, text = pairs(130, 24, device)
        scale = torch.tensor(20.0, device=device, requires_grad=True)
        with mmfast.backend(backend):
            loss = ops.clip_loss(image, text, scale, normalize=True)
            loss.backward()
        values.append((loss, image.grad, text.grad, scale.grad))
    for first, second in zip(*values, strict=True):
        assert torch.equal(first, second)
        assert torch.isfinite(first).all()


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.triton)])
def test_saved_bytes_are_linear_in_the_batch(backend: str, device: torch.device) -> None:
    """Twice the batch keeps twice the bytes, not four times."""
    kept = []
    for batch in (64, 128):
        image, text = pairs(batch, 16, device)
        found: dict[int, int] = {}

        def note(x: Tensor, found: dict[int, int] = found) -> Tensor:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with mmfast.backend(backend), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            ops.clip_loss(image, text, 5.0, normalize=True)
        kept.append(sum(found.values()))
    assert kept[1] <= 2 * kept[0]
    assert kept[0] < 64 * 64 * 4


@pytest.mark.parametrize("batch", [7, 40])
@pytest.mark.parametrize("options", [{}, {"normalize": True, "label_smoothing": 0.1, "return_metrics": True}])
def test_compiles_in_one_graph(batch: int, options: dict[str, Any]) -> None:
    image, text = pairs(batch, 16, torch.device("cpu"))
    scale = torch.tensor(2.0, requires_grad=True)

    def step(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        out = ops.clip_loss(image, text, scale.exp(), **options)
        return out[0] if isinstance(out, tuple) else out

    with mmfast.backend("torch" if batch == 40 else None):  # chunks in the op; the whole matrix in the graph
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(image, text, scale), (image, text, scale))
        expected = torch.autograd.grad(step(image, text, scale), (image, text, scale))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", [(0.0, 1.0, False, False), (0.1, 0.5, True, True)], ids=["plain", "all"])
@pytest.mark.parametrize("ids", [False, True], ids=["pairs", "ids"])
def test_registered_op(options: tuple[Any, ...], ids: bool) -> None:
    image, text = pairs(6, 8, torch.device("cpu"))
    scale = torch.tensor(5.0, requires_grad=True)
    both = (torch.arange(6), torch.arange(6) // 2) if ids else (None, None)
    teacher = (torch.randn(6, 4), torch.randn(6, 4), torch.tensor(3.0)) if options[0] else (None,) * 3
    torch.library.opcheck(
        torch.ops.mmfast.clip_loss.default,
        (image, text, scale, *both, *teacher, *options, torch.float32, "", 1.0),
    )
    arguments = (image.detach(), text.detach(), scale.detach(), *both, *teacher, *options, torch.float32, "")
    torch.library.opcheck(torch.ops.mmfast.clip_loss_forward.default, arguments)


def test_autocast_keeps_the_gradient_of_float32_features(device: torch.device) -> None:
    image, text = pairs(40, 64, device)
    scale = torch.tensor(20.0, device=device, requires_grad=True)
    exact = [x.detach().bfloat16().double().requires_grad_() for x in (image, text)]
    reference.clip_loss(*exact, 20.0).backward()
    with mmfast.backend("torch"), torch.autocast(device.type, torch.bfloat16):
        loss = ops.clip_loss(image, text, scale)
        loss.backward()
    assert loss.dtype == torch.float32
    assert image.grad.dtype == torch.float32
    assert _grading.error(image.grad, exact[0].grad) < 1e-5  # not rounded to bfloat16, inside or out
    assert math.isclose(float(loss.detach()), float(reference.clip_loss(*exact, 20.0).detach()), rel_tol=1e-5)


@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=(pytest.mark.triton, pytest.mark.gpu))])
def test_error_is_a_third_of_autocasts(backend: str, scale: float, device: torch.device) -> None:
    """bfloat16 features, float32 sums: eager under autocast rounds every logit to bfloat16."""
    # At a scale of 100 pairs that resemble each other more have no loss left, and no gradient.
    image, text = pairs(1024, 256, device, dtype=torch.bfloat16, alike=1.0 if scale < 100 else 0.5)
    scales = [torch.tensor(scale, device=device, requires_grad=True) for _ in range(3)]
    truth = [x.detach().double().requires_grad_() for x in (image, text)]
    peer = [x.detach().float().requires_grad_() for x in (image, text)]
    ours = [x.detach().float().requires_grad_() for x in (image, text)]
    exact = reference.clip_loss(*truth, scales[0].double())
    exact.backward()
    with torch.autocast(device.type, torch.bfloat16):
        theirs = eager(*peer, scales[1])
        theirs.backward()
        with mmfast.backend(backend):
            mine = ops.clip_loss(*ours, scales[2])
            mine.backward()
    errors = [abs(float((value - exact).detach())) for value in (mine, theirs)]
    assert errors[0] <= errors[1] / 3 + 1e-7, errors
    for side in range(2):
        found = _grading.error(ours[side].grad, truth[side].grad), _grading.error(peer[side].grad, truth[side].grad)
        assert found[0] <= found[1] / 3, found


def test_teacher_is_open_clips_distillation() -> None:
    from open_clip.loss import DistillClipLoss

    image, text = pairs(12, 16, torch.device("cpu"))
    guide = pairs(12, 24, torch.device("cpu"))
    scales = torch.tensor(9.0), torch.tensor(20.0)
    contrastive, distill = DistillClipLoss()(image, text, scales[0], *guide, scales[1])
    with mmfast.backend("torch"):
        torch.testing.assert_close(ops.clip_loss(image, text, scales[0]), contrastive)
        found = ops.clip_loss(image, text, scales[0], teacher=(*guide, scales[1]))
        mixed = ops.clip_loss(image, text, scales[0], teacher=(*guide, scales[1]), teacher_weight=0.25)
    torch.testing.assert_close(found, distill)
    torch.testing.assert_close(mixed, 0.75 * contrastive + 0.25 * distill)
    expected = torch.autograd.grad(distill, (image, text))
    torch.testing.assert_close(torch.autograd.grad(found, (image, text)), expected, atol=2e-7, rtol=1e-4)


def test_peers() -> None:
    """open_clip's and transformers' losses."""
    from open_clip.loss import ClipLoss
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    image, text = pairs(12, 16, torch.device("cpu"))
    for backend in (None, "torch"):
        with mmfast.backend(backend):
            found = ops.clip_loss(image, text, 9.0)
        torch.testing.assert_close(found, ClipLoss()(image, text, torch.tensor(9.0)))
        torch.testing.assert_close(found, image_text_contrastive_loss(9.0 * text @ image.T))


def _fails(kind: type[Exception], message: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(kind) as raised:
        ops.clip_loss(*args, **kwargs)
    assert str(raised.value).startswith("clip_loss: ")
    assert message in str(raised.value)


def test_refuses_what_does_not_fit() -> None:
    image, ids = torch.randn(4, 8), torch.arange(4)
    _fails(TypeError, "image_features must be a tensor, got list", [1.0], image, 1.0)
    _fails(TypeError, "text_features must be floating point, got torch.int64", image, image.long(), 1.0)
    _fails(ValueError, "image_features must have shape (B, D), got (8,)", image[0], image, 1.0)
    _fails(ValueError, "text_features must have 8 columns like image_features, got 7", image, image[:, :7], 1.0)
    _fails(
        TypeError,
        "text_features must be torch.float32 like image_features, got torch.float16",
        image,
        image.half(),
        1.0,
    )
    _fails(ValueError, "4 images and 3 texts need image_ids and text_ids", image, image[:3], 1.0)
    _fails(ValueError, "text_ids must be given beside image_ids", image, image, 1.0, image_ids=ids)
    _fails(
        TypeError,
        "image_ids must be a tensor of integers, got torch.float32",
        image,
        image,
        1.0,
        image_ids=ids.float(),
        text_ids=ids,
    )
    _fails(ValueError, "text_ids must have shape (4,), got (3,)", image, image, 1.0, image_ids=ids, text_ids=ids[:3])
    _fails(ValueError, "logit_scale must have shape () or (1,), got (2,)", image, image, torch.ones(2))
    _fails(TypeError, "logit_scale must be a number or a tensor, got str", image, image, "1")
    _fails(ValueError, "label_smoothing must be in [0, 1), got 1.0", image, image, 1.0, label_smoothing=1.0)
    _fails(ValueError, "teacher_weight must be in [0, 1], got 2", image, image, 1.0, teacher_weight=2)
    _fails(ValueError, "reduction must be one of mean, sum, none, got 'max'", image, image, 1.0, reduction="max")
    _fails(ValueError, "grad_reduction must be one of", image, image, 1.0, grad_reduction="mean")
    _fails(TypeError, "teacher must be a tuple", image, image, 1.0, teacher=image)
    _fails(ValueError, "teacher must have 4 images and 4 texts", image, image, 1.0, teacher=(image[:2], image, 1.0))


def test_explains_itself() -> None:
    image, text = pairs(4, 8, torch.device("cpu"))
    assert "clip_loss: torch" in str(mmfast.explain(ops.clip_loss, image, text, 1.0))
    many = torch.zeros(1025, 2), torch.zeros(1025, 2)
    assert "CPU tensor" in str(mmfast.explain(ops.clip_loss, *many, 1.0))


def test_whole_matrix_and_chunks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that do not divide the batch, and their last of one row."""
    from mmfast.ops import _clip_loss_torch

    monkeypatch.setitem(_clip_loss_torch.CHUNK, "cpu", 1)
    monkeypatch.setattr(_clip_loss_torch, "LEAST_ROWS", 12)
    image, text = pairs(37, 16, torch.device("cpu"), dtype=torch.float64)
    ids = torch.randint(20, (37,))
    for options in ({}, {"image_ids": ids, "text_ids": ids}, {"label_smoothing": 0.3, "normalize": True}):
        found = []
        for backend in (None, "torch"):
            with mmfast.backend(backend):
                loss, metrics = ops.clip_loss(image, text, 5.0, return_metrics=True, **options)
            found.append((loss, *torch.autograd.grad(loss, (image, text)), *metrics.values()))
        torch.testing.assert_close(found[0], found[1])
