"""The schedulers alone: what they take besides what diffusers' do, their state, and that nothing waits for a device."""

from __future__ import annotations

import copy
import json
import pickle
import tempfile
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfast
from mmfast import NoiseSchedule, ops
from mmfast.schedulers import DDIMScheduler, DDPMScheduler
from tests.fresh import run

KINDS = pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])


def made(kind: type[Any], steps: int | None = 10, device: Any = None, **words: Any) -> Any:
    scheduler = kind(**words)
    if steps is not None:
        scheduler.set_timesteps(steps, device=device)
    return scheduler


def noisy(kind: type[Any]) -> dict[str, Any]:
    """Arguments of a step that adds noise."""
    return {"eta": 1.0} if kind is DDIMScheduler else {}


def inputs(batch: int = 3, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> tuple[Tensor, Tensor]:
    x, output = torch.randn(2, batch, 3, 4, 5, dtype=dtype, device=device)
    return x, output


def test_without_diffusers() -> None:
    """Nothing needs diffusers."""
    code = """
import sys, torch, mmfast
scheduler = mmfast.DDIMScheduler()
scheduler.set_timesteps(5)
x = torch.ones(1, 1, 2, 2)
print(scheduler.step(x, 800, x)[0].sum().item())
scheduler.save_pretrained(sys.argv[1])
assert mmfast.DDPMScheduler.from_pretrained(sys.argv[1]).config.beta_end == 0.02
print("diffusers" in sys.modules)
"""
    with tempfile.TemporaryDirectory() as folder:
        assert run(code, folder).splitlines()[1] == "False"


def test_lazy_exports() -> None:
    assert mmfast.DDPMScheduler is DDPMScheduler
    assert mmfast.DDIMScheduler is DDIMScheduler
    assert mmfast.NoiseSchedule is NoiseSchedule
    assert mmfast.sample_seeds(7, 3).dtype == torch.int64


@KINDS
@pytest.mark.parametrize("as_", ["int", "int32 scalar", "(B,)", "(B,) int32"])
def test_timestep_of_any_kind(kind: type[Any], as_: str) -> None:
    scheduler = made(kind)
    x, output = inputs()
    t: Any = {
        "int": 300,
        "int32 scalar": torch.tensor(300, dtype=torch.int32),
        "(B,)": torch.full((3,), 300),
        "(B,) int32": torch.full((3,), 300, dtype=torch.int32),
    }[as_]
    found = scheduler.step(output, t, x, seed=4, **noisy(kind))
    op = ops.ddpm_step if kind is DDPMScheduler else ops.ddim_step
    expected = op(output, 300, 200, x, NoiseSchedule(), seed=4, return_x0=True, **noisy(kind))
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-6)


@KINDS
def test_a_timestep_for_each_sample(kind: type[Any]) -> None:
    """Each sample goes its own way, as if it were alone: the wish of diffusers' issue 1784."""
    scheduler = made(kind)
    x, output = inputs()
    seeds = mmfast.sample_seeds(5, 3)
    steps = torch.tensor([900, 400, 0])
    found = scheduler.step(output, steps, x, seed=seeds, **noisy(kind))
    for i, t in enumerate(steps.tolist()):
        alone = scheduler.step(output[i : i + 1], t, x[i : i + 1], seed=seeds[i : i + 1], **noisy(kind))
        for mine, its in zip(found, alone, strict=True):
            torch.testing.assert_close(mine[i : i + 1], its, rtol=1e-6, atol=1e-6)
    assert scheduler.previous_timestep(steps).tolist() == [800, 300, -1]


@KINDS
def test_seeds_give_the_same_images_at_any_batch_size(kind: type[Any]) -> None:
    seeds = mmfast.sample_seeds(11, 4)

    def sample(which: slice) -> Tensor:
        scheduler = made(kind, 4)
        x = ops.noise_like(torch.empty(4, 2, 3, 3)[which], seeds[which])
        for t in scheduler.timesteps:
            x = scheduler.step(0.3 * x, t, x, seed=seeds[which], **noisy(kind)).prev_sample
        return x

    whole = sample(slice(0, 4))
    assert whole.std() > 0.1
    torch.testing.assert_close(torch.cat((sample(slice(0, 1)), sample(slice(1, 4)))), whole, rtol=1e-6, atol=1e-6)


@KINDS
def test_nothing_waits_for_the_device(kind: type[Any]) -> None:
    """On the meta device every look at a value raises: none is taken, whatever the kind of timestep."""
    scheduler = made(kind, device="meta")
    x, output = inputs(device="meta")
    for t in (scheduler.timesteps[3], scheduler.timesteps[:3], torch.tensor(300), 300):
        x_prev, x0 = scheduler.step(output, t, x, seed=1, **noisy(kind))
        assert x_prev.shape == x0.shape == x.shape
        assert x_prev.is_meta
    t = torch.zeros(3, dtype=torch.int32, device="meta")
    assert scheduler.add_noise(x, output, t).is_meta
    assert scheduler.get_velocity(x, output, t).is_meta
    assert scheduler.previous_timestep(t).is_meta
    # What callers hold stays where it is: diffusers moves it under them.
    assert scheduler.alphas_cumprod.device.type == "cpu"
    assert scheduler.betas.device.type == scheduler.alphas.device.type == "cpu"
    # And the schedule comes back whole.
    x, output = inputs()
    assert torch.equal(
        scheduler.add_noise(x, output, torch.tensor([5])), made(kind).add_noise(x, output, torch.tensor([5]))
    )


def test_a_loop_over_timesteps_tells_where_it_is() -> None:
    """A view of `timesteps` gives its place by its address: a timestep on a GPU is known without a look at it."""
    scheduler = made(DDPMScheduler)
    assert [scheduler._place(t) for t in scheduler.timesteps] == list(range(10))
    assert [scheduler._place(t) for t in scheduler.timesteps[4:]] == list(range(4, 10))
    assert scheduler._place(scheduler.timesteps[-1]) == 9
    assert scheduler._place(torch.tensor(900)) is None
    assert scheduler._place(scheduler.timesteps.int()[0]) is None
    assert scheduler._place(scheduler.timesteps.clone()[0]) is None
    scheduler.timesteps.add_(1)
    assert scheduler._place(scheduler.timesteps[0]) is None, "written to since"
    with torch.inference_mode():
        scheduler.set_timesteps(10)
        assert scheduler._place(scheduler.timesteps[0]) is None


def test_timesteps_assigned() -> None:
    scheduler = made(DDPMScheduler)
    scheduler.timesteps = torch.tensor([700, 20, 1])
    assert scheduler.previous_timestep(700) == 20
    assert scheduler.previous_timestep(torch.tensor([1, 20])).tolist() == [-1, 1]
    scheduler.set_timesteps(timesteps=[5, 2])
    assert scheduler.previous_timestep(torch.tensor([5])).tolist() == [2]
    assert made(DDPMScheduler, None).previous_timestep(torch.tensor([5, 0])).tolist() == [4, -1]


@KINDS
def test_alphas_cumprod_assigned(kind: type[Any]) -> None:
    """Training scripts replace the table by hand; moving it changes nothing."""
    scheduler = made(kind)
    table = scheduler.schedule.alpha_table.clone()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.clone()
    assert torch.equal(scheduler.schedule.alpha_table, table)
    scheduler.alphas_cumprod = kind(rescale_betas_zero_snr=True).alphas_cumprod
    assert scheduler.schedule.zero_terminal_snr
    x, noise = inputs(1)
    assert torch.equal(scheduler.add_noise(x, noise, torch.tensor([999])), noise)
    exact = NoiseSchedule("scaled_linear").alphas_cumprod_double[1:]
    scheduler.alphas_cumprod = exact
    assert torch.equal(scheduler.schedule.alphas_cumprod_double[1:], exact)
    with pytest.raises(ValueError, match=r"alphas_cumprod must have shape \(1000,\), got \(10,\)"):
        scheduler.alphas_cumprod = torch.ones(10)
    if kind is DDIMScheduler:
        scheduler.final_alpha_cumprod = torch.tensor(0.75)
        assert scheduler.schedule.alphas_cumprod_double[0] == 0.75


@KINDS
def test_config(kind: type[Any]) -> None:
    scheduler = kind(beta_end=0.01, _class_name="Other")
    assert scheduler.config.beta_end == scheduler.config["beta_end"] == scheduler.config.get("beta_end") == 0.01
    assert dict(scheduler.config.items())["beta_start"] == 0.0001
    assert scheduler.config._use_default_values == [
        w for w in scheduler.config if w not in ("beta_end",) and w[0] != "_"
    ]
    with pytest.raises(AttributeError, match="no 'nothing'"):
        _ = scheduler.config.nothing
    for change in (
        lambda: scheduler.config.update(beta_end=1),
        lambda: scheduler.config.__setitem__("beta_end", 1),
        lambda: setattr(scheduler.config, "beta_end", 1),
        lambda: scheduler.config.pop("beta_end"),
    ):
        with pytest.raises(TypeError, match="use register_to_config"):
            change()
    assert kind(**scheduler.config).config.beta_end == 0.01
    with pytest.raises(TypeError, match="nothing"):
        kind(nothing=1)


@KINDS
def test_settings_changed_later(kind: type[Any]) -> None:
    scheduler = kind()
    scheduler.register_to_config(prediction_type="sample", clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    x, output = inputs()
    assert torch.equal(scheduler.step(9 * output, 249, x, seed=0).pred_original_sample, 9 * output)


@KINDS
def test_save_and_load(kind: type[Any], tmp_path: Any) -> None:
    scheduler = kind(trained_betas=torch.tensor([0.25, 0.5]), prediction_type="v_prediction")
    scheduler.save_pretrained(tmp_path / "model" / "scheduler")
    for path, subfolder in ((tmp_path / "model", "scheduler"), (tmp_path / "model" / "scheduler", None)):
        loaded = kind.from_pretrained(path, subfolder=subfolder)
        assert loaded.config.prediction_type == "v_prediction"
        assert torch.equal(loaded.alphas_cumprod, scheduler.alphas_cumprod)
    file = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    assert kind.load_config(tmp_path / "model", subfolder="scheduler") == json.loads(file.read_text())
    assert kind.from_pretrained(str(file), prediction_type="sample").config.prediction_type == "sample"
    saved = json.loads(file.read_text())
    assert saved["_class_name"] == kind.__name__
    assert saved["trained_betas"] == [0.25, 0.5]
    file.write_text(json.dumps({**saved, "lower_order_final": True, "use_karras_sigmas": False}))
    kept, unused = kind.from_pretrained(file, return_unused_kwargs=True, other=3)
    assert kept.config.lower_order_final is True
    assert unused["other"] == 3
    with pytest.raises(OSError, match=r"no file scheduler_config.json in .*model"):
        kind.from_pretrained(tmp_path / "model")
    file.write_text("{")
    with pytest.raises(OSError, match="is not JSON"):
        kind.from_pretrained(file)
    with pytest.raises(TypeError, match="config must be a mapping or a scheduler, got int"):
        kind.from_config(3)


@KINDS
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(kind: type[Any], how: str) -> None:
    scheduler = made(kind, beta_schedule="scaled_linear", clip_sample=False)
    again = copy.deepcopy(scheduler) if how == "deepcopy" else pickle.loads(pickle.dumps(scheduler))
    assert type(again) is kind
    assert again.config == scheduler.config
    x, output = inputs()
    for t in scheduler.timesteps:
        assert torch.equal(again.step(output, t, x, seed=1)[0], scheduler.step(output, t, x, seed=1)[0])


def test_output() -> None:
    scheduler = made(DDIMScheduler)
    x, output = inputs()
    found = scheduler.step(output, 500, x)
    assert found.prev_sample is found[0] is found["prev_sample"]
    assert found.pred_original_sample is found[1] is found["pred_original_sample"]
    assert found.keys() == ("prev_sample", "pred_original_sample")
    assert len(found.to_tuple()) == 2
    x_prev, x0 = found
    pair = scheduler.step(output, 500, x, return_dict=False)
    assert type(pair) is tuple
    assert torch.equal(pair[0], x_prev)
    assert torch.equal(pair[1], x0)
    assert type(found)(x_prev).to_tuple() == (x_prev,)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_sixteen_bits(kind: type[Any], dtype: torch.dtype) -> None:
    """Rounded once: what float64 gives, to half a unit in the last place and a little."""
    scheduler = made(kind, clip_sample=False)
    x, output = inputs(dtype=dtype)
    for t in (900, 100, 0):
        found = scheduler.step(output, t, x, seed=3, **noisy(kind))
        exact = scheduler.step(output.double(), t, x.double(), seed=3, **noisy(kind))
        for mine, its in zip(found, exact, strict=True):
            assert mine.dtype == dtype
            assert ((mine.double() - its).abs() <= 0.51 * torch.finfo(dtype).eps * its.abs() + 1e-5).all()


@KINDS
def test_wrong_arguments(kind: type[Any]) -> None:
    scheduler, name = made(kind), kind.__name__
    x, output = inputs()
    generator = torch.Generator()
    with pytest.raises(ValueError, match=f"{name}.step: generator and seed are both given"):
        scheduler.step(output, 500, x, generator=generator, seed=1, **noisy(kind))
    with pytest.raises(ValueError, match=f"{name}.step: generator must be one or a list of 3, got 2"):
        scheduler.step(output, 500, x, generator=[generator, generator], **noisy(kind))
    with pytest.raises(ValueError, match=r"t must be from 0 to 999, got|must be some of the timesteps, got"):
        scheduler.step(output, torch.tensor([0, 100, 1000]), x, seed=1)
    for wrong, found in ((True, "bool"), (0.5, "float"), (torch.tensor([True] * 3), "torch.bool")):
        with pytest.raises(TypeError, match=f"{name}: timestep must be an int or an integer tensor, got {found}"):
            scheduler.step(output, wrong, x, seed=1)
    with pytest.raises(TypeError, match=f"{name}.add_noise: timesteps must be a tensor, got int"):
        scheduler.add_noise(x, output, 3)
    with pytest.raises(ValueError, match="num_inference_steps must be at most num_train_timesteps=1000, got 1001"):
        scheduler.set_timesteps(1001)
    with pytest.raises(ValueError, match="prediction_type must be one of"):
        kind(prediction_type="x")


def test_wrong_arguments_of_ddpm() -> None:
    scheduler = made(DDPMScheduler)
    x, output = inputs()
    with pytest.raises(ValueError, match="timestep must be one of the timesteps, got 501"):
        scheduler.step(output, 501, x)
    with pytest.raises(ValueError, match=r"timestep must be some of the timesteps, got \[500, 501, 500\]"):
        scheduler.step(output, torch.tensor([500, 501, 500]), x)
    for words in ({}, {"num_inference_steps": 3, "timesteps": [2, 1]}):
        with pytest.raises(ValueError, match="give one of num_inference_steps and timesteps"):
            scheduler.set_timesteps(**words)
    for wrong in ([1, 2], [2, 2], [], 3):
        with pytest.raises(ValueError, match="timesteps must be descending, got"):
            scheduler.set_timesteps(timesteps=wrong)
    for wrong in ([1000, 1], [3, -1]):
        with pytest.raises(ValueError, match="timesteps must be from 0 to 999, got"):
            scheduler.set_timesteps(timesteps=wrong)


def test_wrong_arguments_of_ddim() -> None:
    x, output = inputs()
    with pytest.raises(ValueError, match="set_timesteps must be called before step"):
        made(DDIMScheduler, None).step(output, 500, x)
    with pytest.raises(ValueError, match="variance_noise is given"):
        made(DDIMScheduler).step(output, 500, x, eta=1.0, variance_noise=x, seed=1)


@KINDS
def test_noise_is_drawn_only_where_it_is_added(kind: type[Any]) -> None:
    scheduler = made(kind)
    x, output = inputs()
    state = torch.get_rng_state()
    scheduler.step(output, 0, x)
    if kind is DDIMScheduler:
        scheduler.step(output, 500, x)
    assert torch.equal(torch.get_rng_state(), state)
    scheduler.step(output, 500, x, **noisy(kind))
    assert not torch.equal(torch.get_rng_state(), state)


@KINDS
def test_gradients_reach_the_model(kind: type[Any]) -> None:
    scheduler = made(kind, clip_sample=False)
    x, output = inputs(dtype=torch.float64)
    output.requires_grad_()
    scheduler.step(output, 500, x, seed=2, **noisy(kind))[0].sum().backward()
    assert output.grad is not None
    assert output.grad.std() < 1e-12, "one factor for all elements"
    assert output.grad.mean() < -0.01


@KINDS
def test_compiled(kind: type[Any]) -> None:
    scheduler = made(kind)
    x, output = inputs()

    def step(output: Tensor, t: Tensor, x: Tensor) -> Any:
        return scheduler.step(output, t, x, seed=3, return_dict=False, **noisy(kind))

    t = torch.tensor([900, 400, 0])
    for found, expected in zip(
        torch.compile(step, fullgraph=True, backend="aot_eager")(output, t, x), step(output, t, x), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.triton
@KINDS
def test_kernels_give_the_same_images(kind: type[Any], device: torch.device) -> None:
    results = []
    for backend in ("torch", "triton"):
        with mmfast.backend(backend):
            scheduler = made(kind, 2, device=device)
            torch.manual_seed(0)
            x, output = (z.to(device) for z in inputs(2))
            x = scheduler.add_noise(x, output, torch.tensor([700, 900], device=device))
            for t in scheduler.timesteps:
                x = scheduler.step(output, t.expand(2), x, seed=5, **noisy(kind)).prev_sample
            results.append(x)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@KINDS
@pytest.mark.parametrize("kind_of_t", ["view", "copy", "(B,)", "int"])
def test_no_sync_on_a_gpu(kind: type[Any], kind_of_t: str, device: torch.device) -> None:
    """A loop under the detector of waits, after a first step that brings the tables; the same images as on a CPU."""
    results = []
    for where in (torch.device("cpu"), device):
        scheduler = made(kind, device=where)
        torch.manual_seed(0)
        x, output = (z.to(where) for z in inputs())
        scheduler.step(output, torch.full((3,), 500, device=where), x, seed=0, **noisy(kind))
        torch.cuda.set_sync_debug_mode("error" if where is device else "default")
        try:
            for i, known in enumerate(range(900, -1, -100)):
                view = scheduler.timesteps[i]
                t = {"view": view, "copy": view.clone(), "(B,)": view.expand(3), "int": known}[kind_of_t]
                x = scheduler.step(output, t, x, seed=i, **noisy(kind)).prev_sample
                scheduler.step(output, t, x, **noisy(kind))
                scheduler.add_noise(x, output, scheduler.timesteps[:1])
                scheduler.get_velocity(x, output, scheduler.timesteps[:3])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append(x.cpu())
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@KINDS
def test_generators_on_a_gpu(kind: type[Any], device: torch.device) -> None:
    results, states = [], []
    for where in ("cpu", device):
        scheduler = made(kind, 4, device=where)
        torch.manual_seed(0)
        x, output = (z.to(where) for z in inputs())
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        for t in scheduler.timesteps:
            x = scheduler.step(output, t, x, generator=generators, **noisy(kind)).prev_sample
        results.append(x.cpu())
        states.append(generators[0].get_state())
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(states[0], states[1]), "as many numbers drawn"
