from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmfast
from mmfast import ops, reference
from mmfast.commands._grading import error
from mmfast.noise_schedule import NoiseSchedule
from mmfast.reference.noise_mse import cases
from tests.grading import ALL_BACKENDS, DTYPES, check_against_reference, outputs_and_gradients

LABELS = [case.label for case in cases(torch.float32, torch.device("cpu"), large=False)]
GPU_LABELS = [case.label for case in cases(torch.float32, torch.device("meta"), large=True)][len(LABELS) :]
TARGETS = ("epsilon", "v_prediction", "sample")
LAYOUTS = (
    pytest.param(torch.contiguous_format, id="contiguous"),
    pytest.param(torch.channels_last, id="channels_last"),
)
SHAPE = (3, 5, 4, 7)  # 140 elements a sample: 35 chunks of 4 in NCHW order, none whole in channels_last


@pytest.fixture
def schedule(device: torch.device) -> NoiseSchedule:
    return NoiseSchedule("squaredcos_cap_v2", rescale_betas_zero_snr=True).to(device)


def arguments(schedule: NoiseSchedule, target: str, device: torch.device, **others: Any) -> dict[str, Any]:
    """Keyword arguments of a weighted loss at timesteps among which are both ends."""
    t = torch.tensor([0, 999, 400], device=device)
    x0 = torch.randn(SHAPE, device=device)
    weight = torch.tensor([0.5, 2.0, 1.5], device=device)
    return {"target": target, "x0": x0, "t": t, "schedule": schedule, "weight": weight, "snr_gamma": 5.0, **others}


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label", [*LABELS, *(pytest.param(x, marks=pytest.mark.gpu) for x in GPU_LABELS)])
@pytest.mark.usefixtures("poisoned")
def test_matches_the_reference(label: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    case = next(c for c in cases(dtype, device, large=label in GPU_LABELS) if c.label == label)
    kwargs = dict(case.kwargs)
    functions = [partial(fn, x0=kwargs["x0"]) for fn in (ops.noise_mse, reference.noise_mse)]  # x0 has no gradient
    del kwargs["x0"]
    check_against_reference(*functions, case.args, kwargs, backend, dtype)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seeded", ["seed", "seeds"])
@pytest.mark.usefixtures("poisoned")
def test_is_mse_loss_of_the_noise_that_noise_like_makes(
    seeded: str, layout: torch.memory_format, backend: str, device: torch.device
) -> None:
    seed = 5 if seeded == "seed" else torch.tensor([5, -1, 1 << 62], device=device)
    prediction = torch.randn(SHAPE, device=device).to(memory_format=layout).requires_grad_()
    noise = ops.noise_like(prediction.detach(), seed)
    for reduction in ("mean", "sum"):
        with mmfast.backend(backend):
            loss = ops.noise_mse(prediction, seed, reduction=reduction)
            (found,) = torch.autograd.grad(loss, prediction)
        wanted = F.mse_loss(prediction, noise, reduction=reduction)
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(found, torch.autograd.grad(wanted, prediction)[0], rtol=1e-4, atol=1e-6)
        assert found.stride() == prediction.stride()
    with mmfast.backend(backend):
        each = ops.noise_mse(prediction, seed, reduction="none")
    torch.testing.assert_close(each, F.mse_loss(prediction, noise, reduction="none").mean((1, 2, 3)))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", TARGETS)
def test_target_of_q_sample_has_no_loss(
    target: str, layout: torch.memory_format, backend: str, schedule: NoiseSchedule, device: torch.device
) -> None:
    """Both ops make the same noise, offset noise too: what one writes as target is what the other compares with."""
    x0 = torch.randn(SHAPE, device=device).to(memory_format=layout)
    t = torch.tensor([3, 500, 999], device=device)
    kwargs = {"seed": 9, "target": target, "offset_noise": 0.3}
    with mmfast.backend(backend):
        _, perfect = ops.q_sample(x0, t, schedule, **kwargs)
        loss = ops.noise_mse(perfect, x0=x0, t=t, schedule=schedule, reduction="none", **kwargs)
        other = ops.noise_mse(
            perfect, x0=x0, t=t, schedule=schedule, reduction="none", **kwargs | {"offset_noise": 0.0}
        )
    assert loss.max() < 1e-11
    assert (target == "sample") == bool(other.max() < 1e-11)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("target", TARGETS)
def test_min_snr_weights_at_every_timestep(
    target: str, backend: str, schedule: NoiseSchedule, device: torch.device
) -> None:
    """min(snr, gamma) over 1, snr or snr + 1, from alpha-bars in float64, down to an alpha-bar of 0."""
    t = torch.arange(0, 1000, 1 if backend == "torch" else 111, device=device)
    t[-1] = 999
    alpha_bar = schedule.alphas_cumprod_double[t + 1]
    snr = alpha_bar / (1 - alpha_bar)
    assert snr[-1] == 0
    least = snr.clamp(max=5.0)
    wanted = {"epsilon": least / snr, "v_prediction": least / (snr + 1), "sample": least}[target]
    if target == "epsilon":
        wanted[-1] = 1.0  # the limit
    x = torch.randn(len(t), 3, device=device)
    kwargs: dict[str, Any] = {"target": target, "x0": torch.zeros_like(x), "t": t, "schedule": schedule}
    with mmfast.backend(backend):
        plain = ops.noise_mse(x, 1, **kwargs, reduction="none")
        found = ops.noise_mse(x, 1, **kwargs, reduction="none", snr_gamma=5.0)
    torch.testing.assert_close(found, (plain.double() * wanted).float(), rtol=2e-6, atol=1e-12)
    assert found.isfinite().all()


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.usefixtures("poisoned")
def test_all_options_together(
    reduction: str, target: str, backend: str, schedule: NoiseSchedule, device: torch.device
) -> None:
    kwargs = arguments(schedule, target, device, reduction=reduction, offset_noise=0.2)
    prediction = torch.randn(SHAPE, device=device, requires_grad=True)
    weight = kwargs["weight"].requires_grad_()
    with mmfast.backend(backend):
        loss = ops.noise_mse(prediction, 3, **kwargs)
        found = torch.autograd.grad(loss.square().sum(), (prediction, weight))
    truth = reference.noise_mse(prediction.double(), 3, **kwargs)
    torch.testing.assert_close(loss.double(), truth, rtol=2e-6, atol=1e-6)
    for got, want in zip(found, torch.autograd.grad(truth.square().sum(), (prediction, weight)), strict=True):
        assert error(got, want.double()) < 1e-6


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_a_sample_is_worth_the_same_in_any_batch(backend: str, device: torch.device) -> None:
    """Seeds of samples alone key the noise, and a sample's sum depends on nothing but its own elements."""
    prediction = torch.randn(4, 3, 33, 11, device=device)
    seeds = torch.tensor([4, 8, -15, 1 << 40], device=device)
    with mmfast.backend(backend):
        batch = ops.noise_mse(prediction, seeds, reduction="none")
        alone = torch.cat([ops.noise_mse(p[None], s[None], reduction="none") for p, s in zip(prediction, seeds)])  # noqa: B905
        first = ops.noise_mse(prediction[:1], 4, reduction="none")
    assert torch.equal(first, batch[:1])  # an int keys sample 0 as a seed of its own does
    if backend != "torch":
        assert torch.equal(batch, alone)
    torch.testing.assert_close(batch, alone)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("wanted", ["prediction", "weight", "both"])
@pytest.mark.usefixtures("poisoned")
def test_only_the_gradients_asked_for(wanted: str, backend: str, schedule: NoiseSchedule, device: torch.device) -> None:
    kwargs = arguments(schedule, "v_prediction", device)
    prediction = torch.randn(SHAPE, device=device, requires_grad=wanted != "weight")
    kwargs["weight"].requires_grad_(wanted != "prediction")
    asked = [x for x in (prediction, kwargs["weight"]) if x.requires_grad]
    with mmfast.backend(backend):
        found = torch.autograd.grad(ops.noise_mse(prediction, 3, **kwargs), asked)
    truth = torch.autograd.grad(reference.noise_mse(prediction.double(), 3, **kwargs), asked)
    for got, want in zip(found, truth, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ALL_BACKENDS[1:])
@pytest.mark.parametrize("target", TARGETS)
def test_no_noise_is_saved(target: str, backend: str, schedule: NoiseSchedule, device: torch.device) -> None:
    """Between the passes there is the prediction itself, x0 where it is compared with, and (B,) numbers: no copies."""
    kwargs = arguments(schedule, target, device)
    kwargs["weight"].requires_grad_()
    prediction = torch.randn(SHAPE, device=device, requires_grad=True)
    saved: list[Tensor] = []
    with (
        mmfast.backend(backend),
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x),
    ):
        ops.noise_mse(prediction, 3, **kwargs)
    places = {prediction.data_ptr()} | ({kwargs["x0"].data_ptr()} if target != "epsilon" else set())
    assert {x.data_ptr() for x in saved if x.numel() >= prediction.numel() and x.dim() > 2} == places
    small = [x for x in saved if x.data_ptr() not in places | {schedule.alpha_table.data_ptr()}]
    assert all(x.shape in ((3,), ()) for x in small)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.usefixtures("poisoned")
def test_any_strides(backend: str, device: torch.device) -> None:
    base = torch.randn(4, 8, 7, 6, device=device, requires_grad=True)
    views: dict[str, Callable[[Tensor], Tensor]] = {
        "half of the channels": lambda x: x[:, :3],
        "every second sample": lambda x: x[::2],
        "transposed": lambda x: x.transpose(2, 3),
        "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
        "vectors": lambda x: x.flatten(1)[:, 1:],
        "numbers": lambda x: x[:, 0, 0, 0],
    }
    for name, view in views.items():
        noise = ops.noise_like(view(base).detach(), 2)
        with mmfast.backend(backend):
            loss = ops.noise_mse(view(base), 2)
            (found,) = torch.autograd.grad(loss, base)
        wanted = F.mse_loss(view(base), noise)
        torch.testing.assert_close(loss, wanted, msg=name)
        torch.testing.assert_close(found, torch.autograd.grad(wanted, base)[0], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.usefixtures("poisoned")
def test_x0_may_differ_in_layout_and_dtype(backend: str, schedule: NoiseSchedule, device: torch.device) -> None:
    kwargs = arguments(schedule, "v_prediction", device)
    prediction = torch.randn(SHAPE, device=device, requires_grad=True)
    x0 = kwargs["x0"].half()
    results = []
    for other in (x0, x0.float().to(memory_format=torch.channels_last), x0.double()):
        with mmfast.backend(backend):
            loss = ops.noise_mse(prediction, 3, **kwargs | {"x0": other})
            results.append((loss, torch.autograd.grad(loss, prediction)[0]))
    for loss, grad in results:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(grad, results[0][1])


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_upstream_gradients(backend: str, device: torch.device) -> None:
    """A scaler's 2^24 times the loss does not overflow on the way, and one number may be expanded over the batch."""
    prediction = (torch.randn(2, 3, 8, 8, device=device) * 4).half().requires_grad_()
    truth = torch.autograd.grad(reference.noise_mse(prediction.double(), 1), prediction)[0]
    with mmfast.backend(backend):
        loss = ops.noise_mse(prediction, 1)
        assert loss.dtype == torch.float32
        (scaled,) = torch.autograd.grad(loss * 2.0**16, prediction, retain_graph=True)
        (vast,) = torch.autograd.grad(loss * 2.0**16, prediction, torch.tensor(2.0**-10, device=device))
        (expanded,) = torch.autograd.grad(ops.noise_mse(prediction, 1, reduction="none").sum(), prediction)
        strided = torch.tensor([2.0, 0.0, 3.0, 0.0], device=device)[::2]
        (each,) = torch.autograd.grad(ops.noise_mse(prediction, 1, reduction="none"), prediction, strided)
    exact = reference.noise_mse(prediction.double(), 1, reduction="none")
    torch.testing.assert_close(scaled.float() / 2**16, truth.float(), rtol=2e-3, atol=1e-7)
    torch.testing.assert_close(vast.float() / 2**6, truth.float(), rtol=2e-3, atol=1e-5)
    (wanted,) = torch.autograd.grad(exact.sum(), prediction, retain_graph=True)
    torch.testing.assert_close(expanded, wanted, rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(each, torch.autograd.grad(exact, prediction, strided.double())[0], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_squares_of_16_bit_predictions_do_not_overflow(backend: str, device: torch.device) -> None:
    prediction = torch.full((2, 3, 4, 4), 3000.0, dtype=torch.float16, device=device)
    with mmfast.backend(backend):
        loss = ops.noise_mse(prediction, 1)
    torch.testing.assert_close(loss.double(), reference.noise_mse(prediction.double(), 1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (0,)], ids=str)
def test_empty(shape: tuple[int, ...], backend: str, schedule: NoiseSchedule, device: torch.device) -> None:
    """As `F.mse_loss`: the mean of nothing is NaN, and its sum 0."""
    for target in TARGETS:
        prediction = torch.empty(shape, device=device, requires_grad=True)
        weight = torch.ones(shape[0], device=device, requires_grad=True)
        kwargs: dict[str, Any] = {"target": target, "x0": prediction, "t": 3, "schedule": schedule, "weight": weight}
        for reduction in ("mean", "sum", "none"):
            with mmfast.backend(backend):
                loss = ops.noise_mse(prediction, 1, **kwargs, reduction=reduction)
                found, dweight = torch.autograd.grad(loss.sum(), (prediction, weight))
            assert found.shape == shape
            assert dweight.shape == weight.shape
            if reduction == "none":
                assert loss.shape == shape[:1]
                assert loss.isnan().all()
            else:
                torch.testing.assert_close(
                    loss, F.mse_loss(prediction, prediction, reduction=reduction), equal_nan=True
                )


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_nan_and_inf_stay_in_their_sample(value: float, backend: str, device: torch.device) -> None:
    prediction = torch.randn(SHAPE, device=device)
    prediction[1, 2, 3, 4] = value
    prediction.requires_grad_()
    with mmfast.backend(backend):
        loss = ops.noise_mse(prediction, 1, reduction="none")
        (found,) = torch.autograd.grad(loss.sum(), prediction)
        mean = ops.noise_mse(prediction, 1)
    assert loss.isfinite().tolist() == mean.new_tensor([True, False, True]).bool().tolist()
    assert not mean.isfinite()
    assert int(found.isfinite().logical_not().sum()) == 1


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.usefixtures("poisoned")
def test_timesteps_out_of_range_give_nan(
    target: str, backend: str, schedule: NoiseSchedule, device: torch.device
) -> None:
    """Where they cannot be looked at, as on a GPU, and below the public function's checks on a CPU."""
    prediction = torch.randn(SHAPE, device=device, requires_grad=True)
    t = torch.tensor([1000, 5, -1], device=device)
    x0 = None if target == "epsilon" else torch.randn(SHAPE, device=device)
    with mmfast.backend(backend):
        loss = torch.ops.mmfast.noise_mse(
            prediction, x0, t, schedule.alpha_table, None, None, 1, target, 5.0, 0.0, "none"
        )
        (found,) = torch.autograd.grad(loss.sum(), prediction)
    assert loss.isnan().tolist() == [True, False, True]
    assert found[[0, 2]].isnan().all()
    assert found[1].isfinite().all()


@pytest.mark.triton
@pytest.mark.parametrize(
    ("programs", "layout"),
    [
        pytest.param(7, torch.contiguous_format, id="a tile a program"),
        pytest.param(3, torch.channels_last, id="three tiles a program, channels_last"),
    ],
)
@pytest.mark.usefixtures("poisoned")
def test_many_tiles_programs_and_samples(
    programs: int, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """As large samples and batches have them, with tiny tiles: loops that go round more than once, the last in part."""
    from mmfast.kernels import noise_mse as kernels
    from mmfast.kernels._samples import SamplePlan

    x = torch.randn(3, 4, 7, 4, device=device).to(memory_format=layout)  # 4 channels: one run of memory
    plan = SamplePlan.of(x).with_block(16 if x.is_contiguous() else 4)
    assert plan.blocks(112) == 7
    monkeypatch.setattr(kernels, "PARTIALS", programs)
    monkeypatch.setattr(kernels, "FINISH", {"BLOCK_B": 2, "BLOCK_P": 2})
    rest = (None, None, None, None, None, 5, "epsilon", None, 0.0, "mean")
    loss, _ = kernels.noise_mse_forward(x, *rest, count=x.numel(), plan=plan)
    found = kernels.noise_mse_backward(torch.ones((), device=device), x, *rest, count=x.numel(), plan=plan)
    leaf = x.clone().requires_grad_()
    wanted = F.mse_loss(leaf, ops.noise_like(x, 5))
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, leaf)[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", ALL_BACKENDS[1:])
def test_same_bits_twice(backend: str, schedule: NoiseSchedule, device: torch.device) -> None:
    kwargs = arguments(schedule, "v_prediction", device)
    prediction = torch.randn(SHAPE, device=device)
    fn = partial(ops.noise_mse, x0=kwargs.pop("x0"))
    with mmfast.backend(backend):
        first, second = (outputs_and_gradients(fn, (prediction, 1), kwargs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
