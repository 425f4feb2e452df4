"""`NoiseSchedule` against 50 digits, its settings, and what a module goes through: moves, casts, copies, loads."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mmfast
from mmfast.noise_schedule import BETA_SCHEDULES, SPACINGS, VARIANCE_TYPES, NoiseSchedule

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
BETAS = [0.1, 0.25, 0.5]


def exact_alphas_cumprod(name: str, count: int, start: float, end: float, zero_snr: bool) -> list[Any]:
    """The definition in 50 digits."""
    mpf, pi = mpmath.mpf, mpmath.pi
    at = [mpf(i) / max(count - 1, 1) for i in range(count)]
    start, end = mpf(start), mpf(end)
    if name == "linear":
        betas = [start + (end - start) * u for u in at]
    elif name == "scaled_linear":
        betas = [(mpmath.sqrt(start) + (mpmath.sqrt(end) - mpmath.sqrt(start)) * u) ** 2 for u in at]
    elif name == "sigmoid":
        betas = [(end - start) / (1 + mpmath.exp(6 - 12 * u)) + start for u in at]
    else:

        def cosine(u: Any) -> Any:
            return mpmath.cos((u + mpf("0.008")) / mpf("1.008") * pi / 2) ** 2

        def laplace(u: Any) -> Any:
            sign = 1 if u <= 0.5 else -1
            snr = mpmath.exp(-sign * mpmath.log(1 - 2 * abs(mpf(0.5) - u) + mpf("1e-6")) / 2)
            return mpmath.sqrt(snr / (1 + snr))

        bar = cosine if name == "squaredcos_cap_v2" else laplace
        bars = [bar(mpf(i) / count) for i in range(count + 1)]
        betas = [min(1 - bars[i + 1] / bars[i], mpf("0.999")) for i in range(count)]
    found, product = [], mpf(1)
    for beta in betas:
        product *= 1 - beta
        found.append(product)
    if zero_snr:
        roots = [mpmath.sqrt(value) for value in found]
        found = [((root - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2 for root in roots]
    return found


@pytest.mark.parametrize("zero_snr", [False, True], ids=["", "zero_snr"])
@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_right_at_every_timestep(name: str, zero_snr: bool) -> None:
    """Coefficients that a kernel computes in float32 from a row of the table, against 50 digits."""
    with mpmath.workdps(50):
        exact = exact_alphas_cumprod(name, 1000, 1e-4, 0.02, zero_snr)
        signal = torch.tensor([float(mpmath.sqrt(a)) for a in exact], dtype=torch.float64)
        sigma = torch.tensor([float(mpmath.sqrt(1 - a)) for a in exact], dtype=torch.float64)
        before = [mpmath.mpf(1), *exact[:-1]]
        beta = torch.tensor([float((b - a) / b) for b, a in zip(before, exact, strict=True)], dtype=torch.float64)
        snr = torch.tensor([float(a / (1 - a)) for a in exact], dtype=torch.float64)
        whole = torch.tensor([float(a) for a in exact], dtype=torch.float64)
    schedule = NoiseSchedule(name, rescale_betas_zero_snr=zero_snr)
    high, low = schedule.alpha_table.unbind(1)
    assert high.dtype == torch.float32
    half_ulp = 2.0**-23  # of what is rounded three times: the difference, the sum and the root

    def off(found: Tensor, expected: Tensor) -> float:
        error = (found.double() - expected).abs()
        return float((error / expected).nan_to_num(0.0).max())  # 0/0 where both are 0

    assert off((1 - high[1:]) - low[1:], sigma**2) <= half_ulp
    assert off(((1 - high[1:]) - low[1:]).sqrt(), sigma) <= half_ulp
    assert off(high[1:].sqrt(), signal) <= half_ulp
    difference = (high[:-1] - high[1:]) + (low[:-1] - low[1:])
    assert off(difference / high[:-1], beta) <= 2 * half_ulp
    assert off(schedule.betas, beta) <= half_ulp
    assert off(schedule.snr(), snr) <= half_ulp
    assert off(schedule.alphas_cumprod_double[1:], whole) <= 2.0**-36  # the tail of a schedule: T roundings to 53 bits
    assert torch.equal(schedule.alphas_cumprod, whole.float())
    torch.testing.assert_close(schedule.alphas, (1 - beta).float(), rtol=half_ulp, atol=0)
    assert schedule.zero_terminal_snr is zero_snr
    assert bool(schedule.alphas_cumprod[-1] == 0) is zero_snr


def test_pairs_hold_48_bits() -> None:
    schedule = NoiseSchedule()
    product, exact = 1.0, [1.0]
    for t in range(1000):
        product *= 1.0 - (1e-4 + (0.02 - 1e-4) * (t / 999))
        exact.append(product)
    error = (schedule.alphas_cumprod_double - torch.tensor(exact, dtype=torch.float64)).abs()
    assert (error <= 2.0**-48 * torch.tensor(exact, dtype=torch.float64)).all()


@pytest.mark.parametrize("kind", ["list", "tuple", "tensor", "array"])
def test_trained_betas(kind: str) -> None:
    betas: Any = {"list": BETAS, "tuple": tuple(BETAS), "tensor": torch.tensor(BETAS), "array": None}[kind]
    if kind == "array":
        betas = pytest.importorskip("numpy").array(BETAS)
    schedule = NoiseSchedule(trained_betas=betas)
    assert schedule.num_train_timesteps == 3
    torch.testing.assert_close(schedule.alphas_cumprod, torch.tensor([0.9, 0.675, 0.3375]), rtol=1e-7, atol=0)
    torch.testing.assert_close(schedule.betas, torch.tensor(BETAS), rtol=1e-7, atol=0)
    assert schedule.config["trained_betas"] == schedule.trained_betas
    assert NoiseSchedule(trained_betas=[0.5, 1.0]).zero_terminal_snr


def test_row_before_the_first_timestep() -> None:
    assert NoiseSchedule().alpha_table[0].tolist() == [1.0, 0.0]
    schedule = NoiseSchedule(set_alpha_to_one=False)
    assert torch.equal(schedule.alpha_table[0], schedule.alpha_table[1])
    assert schedule.betas[0].item() == pytest.approx(1e-4, rel=1e-6), "beta at 0 does not depend on it"


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"beta_schedule": "exp"}, ValueError, "beta_schedule must be one of linear, .*, got 'exp'"),
        ({"prediction_type": "eps"}, ValueError, "prediction_type must be one of epsilon, .*, got 'eps'"),
        ({"variance_type": None}, ValueError, "variance_type must be one of fixed_small, .*, got None"),
        ({"timestep_spacing": "even"}, ValueError, "timestep_spacing must be one of leading, .*, got 'even'"),
        ({"num_train_timesteps": 0}, ValueError, "num_train_timesteps must be at least 1, got 0"),
        ({"num_train_timesteps": 10.0}, TypeError, "num_train_timesteps must be an int, got float"),
        ({"num_train_timesteps": True}, TypeError, "num_train_timesteps must be an int, got bool"),
        ({"steps_offset": -1}, ValueError, "steps_offset must be at least 0, got -1"),
        ({"beta_start": 0.0}, ValueError, r"beta_start must be in \(0, 1\], got 0.0"),
        ({"beta_end": 1.5}, ValueError, r"beta_end must be in \(0, 1\], got 1.5"),
        ({"beta_end": float("nan")}, ValueError, r"beta_end must be in \(0, 1\], got nan"),
        ({"beta_end": "0.02"}, TypeError, "beta_end must be a number, got str"),
        ({"clip_sample": 1.0}, TypeError, "clip_sample must be a bool, got float"),
        ({"thresholding": None}, TypeError, "thresholding must be a bool, got NoneType"),
        ({"set_alpha_to_one": 1}, TypeError, "set_alpha_to_one must be a bool, got int"),
        ({"rescale_betas_zero_snr": "yes"}, TypeError, "rescale_betas_zero_snr must be a bool, got str"),
        ({"clip_sample_range": 0}, ValueError, "clip_sample_range must be positive and finite, got 0"),
        ({"sample_max_value": float("inf")}, ValueError, "sample_max_value must be positive and finite, got inf"),
        ({"dynamic_thresholding_ratio": 2}, ValueError, r"dynamic_thresholding_ratio must be in \(0, 1\], got 2"),
        ({"trained_betas": []}, ValueError, r"trained_betas must have shape \(T,\), got \(0,\)"),
        ({"trained_betas": [[0.1]]}, ValueError, r"trained_betas must have shape \(T,\), got \(1, 1\)"),
        ({"trained_betas": [0.1, 0.0]}, ValueError, r"trained_betas must be in \(0, 1\], got 0.0 at timestep 1"),
        ({"trained_betas": [float("nan")]}, ValueError, r"trained_betas must be in \(0, 1\], got nan at timestep 0"),
        ({"trained_betas": ["a"]}, TypeError, "trained_betas must be a sequence of numbers, got list"),
        ({"trained_betas": [0.1, 1.0, 0.1]}, ValueError, "alphas_cumprod must not be 0 before the last timestep, 2"),
        ({"beta_start": 0.5, "beta_end": 0.5}, ValueError, "must not be 0 before the last timestep, 999, got 0 at"),
        ({"trained_betas": [0.1], "rescale_betas_zero_snr": True}, ValueError, "needs at least 2 timesteps, got 1"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_wrong_arguments(words: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"NoiseSchedule: .*{message}"):
        NoiseSchedule(**words)


@pytest.mark.parametrize(
    "words",
    [
        {},
        {**STABLE_DIFFUSION, "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False},
        {"trained_betas": BETAS, "variance_type": VARIANCE_TYPES[-1]},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "thresholding": True},
    ],
    ids=["default", "stable diffusion", "trained", "zero snr"],
)
def test_config_makes_the_same_schedule(words: dict[str, Any]) -> None:
    schedule = NoiseSchedule(**words)
    again = NoiseSchedule(**schedule.config)
    assert torch.equal(again.alpha_table, schedule.alpha_table)
    assert again.config == schedule.config
    assert {word: schedule.config[word] for word in words} == words
    assert NoiseSchedule.from_diffusers(schedule.config).config == schedule.config


def test_from_diffusers_config() -> None:
    schedule = NoiseSchedule.from_diffusers(
        {**STABLE_DIFFUSION, "_class_name": "DDIMScheduler", "lower_order_final": 1}
    )
    assert (schedule.beta_schedule, schedule.beta_start, schedule.clip_sample) == ("scaled_linear", 0.00085, True)
    assert not NoiseSchedule.from_diffusers({**STABLE_DIFFUSION, "_class_name": "PNDMScheduler"}).clip_sample
    array = pytest.importorskip("numpy").array(BETAS)
    assert NoiseSchedule.from_diffusers({"trained_betas": array, "variance_type": None}).num_train_timesteps == 3
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no beta_schedule"):
        NoiseSchedule.from_diffusers({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000})
    with pytest.raises(ValueError, match="snr_shift_scale must be 1 in a config, got 3"):
        NoiseSchedule.from_diffusers({**STABLE_DIFFUSION, "snr_shift_scale": 3})
    with pytest.raises(ValueError, match=r"prediction_type must be one of .*, got 'flow_prediction'"):
        NoiseSchedule.from_diffusers({**STABLE_DIFFUSION, "prediction_type": "flow_prediction"})
    with pytest.raises(TypeError, match="expected a scheduler or its config, got list"):
        NoiseSchedule.from_diffusers([])
    assert NoiseSchedule.from_diffusers(mmfast.DDIMScheduler(**STABLE_DIFFUSION)).beta_end == 0.012


def test_timesteps() -> None:
    schedule = NoiseSchedule(steps_offset=1)
    assert schedule.timesteps(4).tolist() == [751, 501, 251, 1]
    assert schedule.timesteps(4, "trailing").tolist() == [999, 749, 499, 249]
    assert schedule.timesteps(4, spacing="linspace").tolist() == [999, 666, 333, 0]
    for spacing in SPACINGS:
        for steps in (1, 2, 3, 61, 103, 121, 999, 1000):
            if (spacing, steps) == ("leading", 1000):
                continue
            found = schedule.timesteps(steps, spacing)
            assert found.dtype == torch.int64
            assert found.device.type == "cpu"
            assert found.shape == (steps,)
            assert 0 <= found[-1] <= found[0] <= 999
            assert (found[1:] < found[:-1]).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "num_inference_steps must be at least 1, got 0"),
        ((1001,), ValueError, "num_inference_steps must be at most num_train_timesteps=1000, got 1001"),
        ((2.0,), TypeError, "num_inference_steps must be an int, got float"),
        ((10, "even"), ValueError, "spacing must be one of leading, trailing, linspace, got 'even'"),
        ((1000,), ValueError, "steps_offset=1 takes the first of 1000 timesteps to 1000, beyond 999"),
    ],
)
def test_wrong_timesteps(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"NoiseSchedule.timesteps: {message}"):
        NoiseSchedule(steps_offset=1).timesteps(*arguments)


def test_snr_at_timesteps() -> None:
    schedule = NoiseSchedule(trained_betas=[0.2, 0.5, 1.0])
    torch.testing.assert_close(schedule.snr(), torch.tensor([4.0, 2 / 3, 0.0]))
    assert schedule.snr(1).item() == pytest.approx(2 / 3)
    torch.testing.assert_close(schedule.snr(torch.tensor([[2, 0]], dtype=torch.uint8)), torch.tensor([[0.0, 4.0]]))
    assert schedule.snr(torch.tensor(2)).item() == 0.0
    for wrong in (3, -1, torch.tensor([0, 3])):
        with pytest.raises(ValueError, match="t must be from 0 to 2, got"):
            schedule.snr(wrong)
    for wrong in (0.5, True, torch.tensor([0.5]), torch.tensor([True])):
        with pytest.raises(TypeError, match="t must be an int or an integer tensor, got"):
            schedule.snr(wrong)  # type: ignore[arg-type]


def test_repr_says_what_is_not_the_default() -> None:
    text = "NoiseSchedule(linear, num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, prediction_type=epsilon)"
    assert repr(NoiseSchedule()) == text
    schedule = NoiseSchedule("squaredcos_cap_v2", 10, prediction_type="v_prediction", clip_sample=False)
    text = "NoiseSchedule(squaredcos_cap_v2, num_train_timesteps=10, prediction_type=v_prediction, clip_sample=False)"
    assert repr(schedule) == text
    assert repr(NoiseSchedule(trained_betas=BETAS)) == "NoiseSchedule(trained_betas=(3,), prediction_type=epsilon)"


class Model(nn.Module):
    """A schedule among weights."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.schedule = NoiseSchedule(trained_betas=BETAS)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to", "to_device", "float"])
def test_casts_leave_the_tables_alone(cast: str) -> None:
    model = Model()
    table = model.schedule.alpha_table.clone()
    if cast == "to":
        model.to(torch.float16)
    elif cast == "to_device":
        model.to("cpu", torch.bfloat16, memory_format=torch.channels_last)
    else:
        getattr(model, cast)()
    assert model.linear.weight.dtype == (torch.float32 if cast == "float" else model.linear.bias.dtype)
    assert model.schedule.alpha_table.dtype == torch.float32
    assert torch.equal(model.schedule.alpha_table, table)
    assert model.schedule._index.tolist() == [-1, 0, 1, 2]
    assert model.schedule._index.dtype == torch.int64


def test_meta_device() -> None:
    with torch.device("meta"):
        model = Model()
    assert model.schedule.alpha_table.is_meta
    assert not model.schedule.zero_terminal_snr
    assert model.schedule.timesteps(3).tolist() == [2, 1, 0]
    model.to_empty(device="cpu")
    expected = NoiseSchedule(trained_betas=BETAS)
    assert torch.equal(model.schedule.alpha_table, expected.alpha_table), "there was nothing to move"
    assert torch.equal(model.schedule._index, expected._index)
    moved = NoiseSchedule().to("meta")
    assert moved.alpha_table.is_meta
    for shape in ((2,), ()):  # a look at a value raises there
        assert moved.snr(torch.zeros(shape, dtype=torch.int64, device="meta")).shape == shape
    with torch.device("meta"):
        model = Model()
    model.load_state_dict(Model().state_dict(), assign=True)
    assert torch.equal(model.schedule.alpha_table, expected.alpha_table)
    with FakeTensorMode():
        assert NoiseSchedule().alphas.shape == (1000,)


def test_to_empty_keeps_the_index() -> None:
    schedule = NoiseSchedule(trained_betas=BETAS).to_empty(device="cpu")
    assert schedule._index.tolist() == [-1, 0, 1, 2]


def test_state_dict() -> None:
    schedule = NoiseSchedule(rescale_betas_zero_snr=True)
    state = schedule.state_dict()
    assert list(state) == ["alpha_table"]
    other = NoiseSchedule("squaredcos_cap_v2")
    other.load_state_dict(state)
    assert torch.equal(other.alpha_table, schedule.alpha_table)
    assert other.zero_terminal_snr
    again = NoiseSchedule(**other.config)
    torch.testing.assert_close(again.alphas_cumprod, schedule.alphas_cumprod, rtol=1e-6, atol=1e-12)
    assert again.zero_terminal_snr
    other.load_state_dict(NoiseSchedule(set_alpha_to_one=False).state_dict())
    assert not other.zero_terminal_snr
    assert not other.set_alpha_to_one
    for assign in (False, True):
        same = NoiseSchedule(**STABLE_DIFFUSION)
        same.load_state_dict(copy.deepcopy(same.state_dict()), assign=assign)
        assert same.config == NoiseSchedule(**STABLE_DIFFUSION).config
    with pytest.raises(RuntimeError, match=r"size mismatch for alpha_table.*\[4, 2\].*\[1001, 2\]"):
        schedule.load_state_dict(NoiseSchedule(trained_betas=BETAS).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*alpha_table"):
        schedule.load_state_dict({})


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_checkpoint_that_was_cast(assign: bool) -> None:
    """A checkpoint cast to 16 bits holds no schedule; ours stays where it is the one that was cast."""
    model = Model()
    state = {key: value.half() for key, value in model.state_dict().items()}
    other = Model()
    other.load_state_dict(state, assign=assign)
    assert torch.equal(other.schedule.alpha_table, model.schedule.alpha_table)
    assert other.schedule.alpha_table.dtype == torch.float32
    assert state["schedule.alpha_table"].dtype == torch.float16
    other.schedule = NoiseSchedule(trained_betas=[0.1, 0.1, 0.1])
    with pytest.raises(RuntimeError, match=r"schedule.alpha_table was saved in torch.float16"):
        other.load_state_dict(state, assign=assign)
    other.load_state_dict({key: value.double() for key, value in model.state_dict().items()}, assign=assign)
    assert other.schedule.alpha_table.dtype == torch.float32
    assert torch.equal(other.schedule.alpha_table, model.schedule.alpha_table)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how: str) -> None:
    schedule = NoiseSchedule(**STABLE_DIFFUSION, rescale_betas_zero_snr=True)
    if how == "deepcopy":
        again = copy.deepcopy(schedule)
    elif how == "pickle":
        again = pickle.loads(pickle.dumps(schedule))
    else:
        file = io.BytesIO()
        torch.save(schedule, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    assert again.config == schedule.config
    assert again.zero_terminal_snr
    assert torch.equal(again.alpha_table, schedule.alpha_table)
    assert torch.equal(again._index, schedule._index)
    assert again.alpha_table.data_ptr() != schedule.alpha_table.data_ptr()


def test_compiled() -> None:
    schedule = NoiseSchedule()

    def read(t: Tensor) -> tuple[Tensor, ...]:
        return schedule.snr(t), schedule.alphas_cumprod[t], schedule.betas[t], schedule.alphas_cumprod_double[t]

    t = torch.tensor([0, 500, 999])
    compiled = torch.compile(read, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(t), read(t), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.gpu
def test_on_a_gpu(device: torch.device) -> None:
    schedule = NoiseSchedule().to(device)
    assert schedule.alpha_table.device.type == "cuda"
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = schedule.snr(torch.arange(-1, 1001, device=device))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found[0].isnan()
    assert found[-1].isnan()
    torch.testing.assert_close(found[1:-1].cpu(), NoiseSchedule().snr())
    model = Model().to(device, torch.bfloat16)
    assert torch.equal(model.schedule.alpha_table.cpu(), Model().schedule.alpha_table)
    assert model.schedule._index.device.type == "cuda"
