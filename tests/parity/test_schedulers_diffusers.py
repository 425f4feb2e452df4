"""The schedulers beside diffusers' own: every option in float64, the same numbers from a generator, real pipelines."""

from __future__ import annotations

import inspect
import json
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfast
from mmfast.noise_schedule import BETA_SCHEDULES, PREDICTION_TYPES, SPACINGS, NoiseSchedule

diffusers = pytest.importorskip("diffusers")
diffusers.logging.set_verbosity_error()

SHAPE = (2, 3, 4, 5)
PAIRS = {name: (getattr(mmfast, name), getattr(diffusers, name)) for name in ("DDPMScheduler", "DDIMScheduler")}


def pair(name: str, steps: int | None = 20, **config: Any) -> tuple[Any, Any]:
    """Our scheduler and diffusers', which gets our tables in float64."""
    ours, theirs = (kind(**config) for kind in PAIRS[name])
    table = ours.schedule.alphas_cumprod_double
    theirs.alphas_cumprod, theirs.one, theirs.final_alpha_cumprod = table[1:], table[0], table[0]
    if steps is not None:
        ours.set_timesteps(steps)
        theirs.set_timesteps(steps)
        assert torch.equal(ours.timesteps, theirs.timesteps)
    return ours, theirs


def inputs(channels: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A sample, and a model's output within -1 and 1, as a learned variance is."""
    return torch.randn(SHAPE, dtype=dtype), torch.rand(2, channels, *SHAPE[2:], dtype=dtype) * 2 - 1


def check(ours: Any, theirs: Any, timesteps: Any, channels: int = 3, **kwargs: Any) -> None:
    """Steps of both from the same generator agree to float64's rounding."""
    x, output = inputs(channels)
    for t in timesteps:
        generators = [torch.Generator().manual_seed(int(t)) for _ in range(2)]
        if isinstance(theirs, diffusers.DDIMScheduler) and kwargs.get("eta", 0.0) == 0:
            generators = [None, None]
        found = ours.step(output, t, x, generator=generators[0], **kwargs)
        expected = theirs.step(output, t, x, generator=generators[1], **kwargs)
        for name in ("prev_sample", "pred_original_sample"):
            assert found[name].dtype == torch.float64
            scale = expected[name].abs().max().item()
            torch.testing.assert_close(
                found[name], expected[name], rtol=0, atol=1e-10 * max(scale, 1.0), msg=f"{name}, t={t}"
            )
        if generators[0] is not None:
            assert torch.equal(generators[0].get_state(), generators[1].get_state()), "as many numbers drawn"


# diffusers' DDIM has three schedules.
SCHEDULES = [("DDPMScheduler", schedule) for schedule in BETA_SCHEDULES]
SCHEDULES += [("DDIMScheduler", schedule) for schedule in ("linear", "scaled_linear", "squaredcos_cap_v2")]


@pytest.mark.parametrize("name", PAIRS)
def test_arguments_are_those_of_diffusers(name: str) -> None:
    ours, theirs = (inspect.signature(kind.__init__).parameters for kind in PAIRS[name])
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]
    for method in ("step", "set_timesteps", "add_noise", "get_velocity", "scale_model_input", "save_pretrained"):
        ours, theirs = (inspect.signature(getattr(kind, method)).parameters for kind in PAIRS[name])
        positional = [p for p in ours.values() if p.kind != p.KEYWORD_ONLY]
        assert [p.name for p in positional] == [p.name for p in theirs.values()], method


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "free"])
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize(("name", "schedule"), SCHEDULES)
def test_step(name: str, schedule: str, prediction: str, clip: bool) -> None:
    ours, theirs = pair(name, beta_schedule=schedule, prediction_type=prediction, clip_sample=clip)
    check(ours, theirs, [950, 500, 50, 0])


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("clip", [True, False], ids=["clip", "free"])
def test_ddpm_variance(variance: str, clip: bool) -> None:
    ours, theirs = pair("DDPMScheduler", variance_type=variance, clip_sample=clip)
    learned = variance.startswith("learned")
    if variance == "learned":  # the variance itself, so positive
        x, output = inputs(6)
        output = output.abs()
        for t in (900, 100, 0):
            found = ours.step(output, t, x, generator=torch.Generator().manual_seed(1))[0]
            expected = theirs.step(output, t, x, generator=torch.Generator().manual_seed(1))[0]
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    else:
        check(ours, theirs, [950, 500, 50, 0], channels=6 if learned else 3)


def test_ddpm_fixed_large_log_is_fixed_large() -> None:
    ours, theirs = pair("DDPMScheduler", variance_type="fixed_large_log")
    x, output = inputs()
    assert theirs.step(output, 500, x)[0].isnan().any(), "diffusers takes the root of a negative logarithm"
    large = pair("DDPMScheduler", variance_type="fixed_large")[1]
    found = ours.step(output, 500, x, generator=torch.Generator().manual_seed(1))[0]
    expected = large.step(output, 500, x, generator=torch.Generator().manual_seed(1))[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("clipped", [False, True], ids=["", "use_clipped_model_output"])
@pytest.mark.parametrize("to_one", [True, False], ids=["to_one", "to_first"])
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_ddim_eta(prediction: str, to_one: bool, clipped: bool, eta: float) -> None:
    ours, theirs = pair("DDIMScheduler", prediction_type=prediction, set_alpha_to_one=to_one)
    # Without an alpha-bar of 1 before it, diffusers' variance at the first timestep is not a number.
    last = [0] if to_one or eta == 0 else []
    check(ours, theirs, [950, 500, 50, *last], eta=eta, use_clipped_model_output=clipped)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", PAIRS)
def test_spacing(name: str, spacing: str, offset: int) -> None:
    ours, theirs = pair(name, 7, timestep_spacing=spacing, steps_offset=offset)
    check(ours, theirs, ours.timesteps)
    for steps in (1, 2, 25, 48, 96, 999):
        ours.set_timesteps(steps)
        theirs.set_timesteps(steps)
        assert torch.equal(ours.timesteps, theirs.timesteps)
        assert ours.num_inference_steps == theirs.num_inference_steps == steps


def test_trailing_never_visits_timestep_minus_one() -> None:
    ours, theirs = (kind(timestep_spacing="trailing") for kind in PAIRS["DDIMScheduler"])
    ours.set_timesteps(61)
    theirs.set_timesteps(61)
    assert len(ours.timesteps) == 61
    assert theirs.timesteps.tolist() == [*ours.timesteps.tolist(), -1], "diffusers adds one by rounding"


def test_custom_timesteps() -> None:
    ours, theirs = pair("DDPMScheduler", None)
    check(ours, theirs, [999, 500, 0])  # one by one, before any set_timesteps
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(timesteps=[900, 650, 649, 3])
    assert ours.timesteps.tolist() == [900, 650, 649, 3]
    assert ours.custom_timesteps
    check(ours, theirs, ours.timesteps)
    assert [ours.previous_timestep(t) for t in (900, 649, 3)] == [650, 3, -1]
    ours.set_timesteps(10)
    assert not ours.custom_timesteps


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("name", PAIRS)
def test_thresholding(name: str, prediction: str) -> None:
    words = {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}
    ours, theirs = pair(name, prediction_type=prediction, **words)
    check(ours, theirs, [950, 500, 0])


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("name", PAIRS)
def test_zero_terminal_snr(name: str, prediction: str) -> None:
    words = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    ours, theirs = pair(name, prediction_type=prediction, **words)
    assert ours.timesteps[0] == 999
    assert ours.alphas_cumprod[-1] == 0
    check(ours, theirs, [999, 949, 49], **({"eta": 1.0} if name == "DDIMScheduler" else {}))


@pytest.mark.parametrize("name", PAIRS)
def test_zero_terminal_snr_of_epsilon_is_an_error(name: str) -> None:
    ours, theirs = pair(name, rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False)
    x, output = inputs()
    assert not theirs.step(output, 999, x)[0].isfinite().all()
    with pytest.raises(ValueError, match="v_prediction"):
        ours.step(output, 999, x)


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("name", PAIRS)
def test_add_noise_and_velocity(name: str, schedule: str) -> None:
    ours, theirs = pair(name, beta_schedule=schedule)
    x, noise = torch.randn(2, *SHAPE, dtype=torch.float64)
    for t in (torch.tensor([0, 999]), torch.tensor([7, 500], dtype=torch.int32), torch.tensor([4]), torch.tensor(31)):
        for method in ("add_noise", "get_velocity"):
            found, expected = (getattr(s, method)(x, noise, t) for s in (ours, theirs))
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    # One image noised to many timesteps, and dtypes that differ, as PyTorch's arithmetic would do it.
    found, expected = (s.add_noise(x[:1], noise, torch.tensor([3, 900])) for s in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found, expected = (s.add_noise(x.bfloat16(), noise.float(), torch.tensor([3, 900])) for s in (ours, theirs))
    assert found.dtype == expected.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_no_timestep_is_noised_worse_than_by_diffusers(schedule: str, dtype: torch.dtype) -> None:
    ours, theirs = (kind(beta_schedule=schedule) for kind in PAIRS["DDPMScheduler"])
    t = torch.arange(1000)
    x, noise = torch.randn(2, 1000, 16, dtype=torch.float64).to(dtype)
    table = ours.schedule.alphas_cumprod_double[1:, None]
    exact = table.sqrt() * x.double() + (1 - table).sqrt() * noise.double()
    found, expected = (s.add_noise(x, noise, t) for s in (ours, theirs))
    assert found.dtype == expected.dtype == dtype
    errors = [(y.double() - exact).abs().amax(1) for y in (found, expected)]
    assert errors[0].max() <= errors[1].max()
    unit = torch.finfo(dtype).eps * exact.abs().amax(1)
    assert (errors[0] <= 0.51 * unit + (4e-7 if dtype == torch.float32 else 2e-7)).all(), "rounded once"


@pytest.mark.parametrize(("schedule", "lost"), [("linear", 10), ("scaled_linear", 16), ("squaredcos_cap_v2", 21)])
def test_noise_that_diffusers_loses_in_bfloat16(schedule: str, lost: int) -> None:
    """diffusers rounds alpha-bar to bfloat16 before it subtracts it from 1: the first timesteps get no noise."""
    ours, theirs = (kind(beta_schedule=schedule) for kind in PAIRS["DDPMScheduler"])
    zeros, ones = torch.zeros(1000, 1, dtype=torch.bfloat16), torch.ones(1000, 1, dtype=torch.bfloat16)
    sigmas = [s.add_noise(zeros, ones, torch.arange(1000)).double().flatten() for s in (ours, theirs)]
    exact = (1 - ours.schedule.alphas_cumprod_double[1:]).sqrt()
    assert int((sigmas[1] == 0).sum()) == lost
    assert ((sigmas[0] - exact).abs() <= 2**-8 * exact).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("source", ["generator", "generators", "default"])
def test_same_numbers_from_a_generator(name: str, source: str, dtype: torch.dtype) -> None:
    """A whole loop: noise is what diffusers draws, and what is drawn afterwards too."""
    ours, theirs = (kind() for kind in PAIRS[name])
    kwargs = {"eta": 1.0} if name == "DDIMScheduler" else {}
    results = []
    for scheduler in (ours, theirs):
        torch.manual_seed(5)
        x, output = inputs(dtype=dtype)
        seeded = [torch.Generator().manual_seed(i) for i in (3, 4)]
        generator: Any = {"generator": seeded[0], "generators": seeded, "default": None}[source]
        scheduler.set_timesteps(5)
        for t in scheduler.timesteps:
            step = scheduler.step(output, t, x, generator=generator, **kwargs)
            x = step.prev_sample
            assert x.dtype == step.pred_original_sample.dtype == dtype
        results.append((x, torch.randn(3, generator=seeded[0] if source != "default" else None)))
    tolerance = 1e-5 if dtype == torch.float32 else 0.04  # diffusers rounds tables and coefficients
    torch.testing.assert_close(results[0][0], results[1][0], rtol=tolerance, atol=tolerance)
    assert torch.equal(results[0][1], results[1][1])


def test_ddim_variance_noise() -> None:
    ours, theirs = pair("DDIMScheduler")
    (x, output), noise = inputs(), torch.randn(SHAPE, dtype=torch.float64)
    found, expected = (s.step(output, 500, x, 1.0, False, None, noise, False) for s in (ours, theirs))
    assert isinstance(found, tuple)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", PAIRS)
def test_tables(name: str) -> None:
    ours, theirs = (kind(beta_schedule="scaled_linear") for kind in PAIRS[name])
    for table in ("betas", "alphas", "alphas_cumprod"):
        found, expected = getattr(ours, table), getattr(theirs, table)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-7)
    first = "one" if name == "DDPMScheduler" else "final_alpha_cumprod"
    assert getattr(ours, first) == getattr(theirs, first) == 1
    for attribute in ("order", "init_noise_sigma", "num_inference_steps"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert len(ours) == len(theirs) == 1000
    ours, theirs = (kind(set_alpha_to_one=False) for kind in PAIRS["DDIMScheduler"])
    assert math.isclose(ours.final_alpha_cumprod, theirs.final_alpha_cumprod, rel_tol=1e-7)


SD = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "clip_sample": False,
}


@pytest.mark.parametrize("source", ["PNDMScheduler", "EulerDiscreteScheduler", "DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("name", PAIRS)
def test_from_config_of_another_class(name: str, source: str) -> None:
    words = {key: value for key, value in SD.items() if source[:2] == "DD" or key != "clip_sample"}
    other = getattr(diffusers, source)(**words)
    ours, theirs = (kind.from_config(other.config, timestep_spacing="trailing") for kind in PAIRS[name])
    both = set(ours.config) | set(theirs.config)
    for word in both - {"_use_default_values", "_diffusers_version"}:
        assert ours.config.get(word) == theirs.config.get(word), word
    assert ours.config.steps_offset == 1
    assert ours.schedule.beta_end == 0.012
    ours, unused = PAIRS[name][0].from_config(other.config, return_unused_kwargs=True, nothing=1)
    assert unused["nothing"] == 1
    back = getattr(diffusers, source).from_config(ours.config)
    for word in inspect.signature(type(other)).parameters:
        assert back.config[word] == other.config[word], word


@pytest.mark.parametrize("direction", ["ours to theirs", "theirs to ours"])
@pytest.mark.parametrize("name", PAIRS)
def test_saved_configs_load_in_either(name: str, direction: str, tmp_path: Any) -> None:
    ours, theirs = PAIRS[name]
    writer, reader = (ours, theirs) if direction == "ours to theirs" else (theirs, ours)
    made = writer(**SD, trained_betas=[0.1, 0.2, 0.3])
    made.save_pretrained(tmp_path / "scheduler")
    read = reader.from_pretrained(tmp_path, subfolder="scheduler", prediction_type="v_prediction")
    assert read.config.prediction_type == "v_prediction"
    assert read.config.trained_betas == [0.1, 0.2, 0.3]
    assert read.config.beta_end == 0.012
    torch.testing.assert_close(read.alphas_cumprod, made.alphas_cumprod)
    saved = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert saved["_class_name"] == name
    assert "_use_default_values" not in saved


@pytest.mark.parametrize("name", PAIRS)
def test_is_one_of_diffusers_schedulers(name: str) -> None:
    """Pipelines ask for diffusers' mixin when they load and save, and users for what can take a scheduler's place."""
    ours, theirs = (kind() for kind in PAIRS[name])
    assert isinstance(ours, diffusers.SchedulerMixin)
    assert isinstance(ours, diffusers.ConfigMixin)
    assert set(ours.compatibles) == set(theirs.compatibles)
    for method in ("step", "from_config", "save_pretrained", "load_config", "__repr__"):
        assert getattr(PAIRS[name][0], method).__module__.startswith("mmfast."), method
    own = type("Own", (PAIRS[name][0],), {"__module__": "elsewhere"})()
    assert own.__module__ == "elsewhere"
    assert ours.__module__ == "diffusers"
    assert type(ours).__module__ == f"mmfast.schedulers.{name[:4].lower()}"


@pytest.mark.parametrize("kind", ["DDPM", "DDIM", "PNDM", "EulerDiscrete", "DPMSolverMultistep", "LCM", "DDIMInverse"])
def test_schedule_from_diffusers(kind: str) -> None:
    scheduler = getattr(diffusers, f"{kind}Scheduler")(beta_schedule="scaled_linear", beta_start=0.001)
    for source in (scheduler, scheduler.config):
        schedule = NoiseSchedule.from_diffusers(source)
        torch.testing.assert_close(schedule.alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-5, atol=1e-6)
        assert schedule.beta_start == 0.001
        assert schedule.clip_sample == scheduler.config.get("clip_sample", False)
        assert schedule.set_alpha_to_one == scheduler.config.get("set_alpha_to_one", True)
        assert schedule.timestep_spacing == scheduler.config.timestep_spacing


def test_schedule_from_a_scheduler_changed_by_hand() -> None:
    scheduler = diffusers.DDPMScheduler()
    changed = diffusers.DDPMScheduler(rescale_betas_zero_snr=True)
    scheduler.alphas_cumprod = changed.alphas_cumprod
    schedule = NoiseSchedule.from_diffusers(scheduler)
    assert schedule.zero_terminal_snr
    assert torch.equal(schedule.alphas_cumprod, changed.alphas_cumprod)
    shifted = diffusers.CogVideoXDDIMScheduler(snr_shift_scale=3.0)
    torch.testing.assert_close(
        NoiseSchedule.from_diffusers(shifted).alphas_cumprod, shifted.alphas_cumprod.float(), rtol=1e-6, atol=0
    )
    with pytest.raises(ValueError, match="snr_shift_scale"):
        NoiseSchedule.from_diffusers(shifted.config)


def test_schedules_without_betas_are_refused() -> None:
    for scheduler in (diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.EDMEulerScheduler()):
        with pytest.raises(ValueError, match="no beta_schedule"):
            NoiseSchedule.from_diffusers(scheduler)


# Real pipelines, of random weights and a few thousand parameters.


def stable_diffusion(scheduler: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    config = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=50
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(config),
        tokenizer=None,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", PAIRS)
def test_stable_diffusion_pipeline(name: str, tmp_path: Any) -> None:
    """Guidance, a list of generators, a whole sampling loop; the pipeline saves and loads with our scheduler in it."""
    theirs = PAIRS[name][1](**SD)
    pipe = stable_diffusion(theirs)
    prompt = torch.randn(2, 77, 16)
    kwargs = {"eta": 0.5} if name == "DDIMScheduler" else {}

    def images(pipe: Any) -> Tensor:
        result = pipe(
            prompt_embeds=prompt,
            negative_prompt_embeds=torch.zeros_like(prompt),
            guidance_scale=5.0,
            num_inference_steps=4,
            height=8,
            width=8,
            output_type="pt",
            generator=[torch.Generator().manual_seed(i) for i in range(2)],
            **kwargs,
        )
        return result.images

    expected = images(pipe)
    assert expected.std() > 0.02
    pipe.scheduler = PAIRS[name][0].from_config(pipe.scheduler.config)
    assert pipe.scheduler.config.steps_offset == 1
    torch.testing.assert_close(images(pipe), expected, rtol=0, atol=2e-5)

    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", name], "who loads the pipeline need not have mmfast"
    scheduler = PAIRS[name][0].from_pretrained(tmp_path, subfolder="scheduler")
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, scheduler=scheduler, tokenizer=None)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.scheduler is scheduler
    torch.testing.assert_close(images(loaded), expected, rtol=0, atol=2e-5)


def test_pipeline_corrects_old_configs() -> None:
    """Stable Diffusion's pipeline sets steps_offset and clip_sample of a scheduler whose config is outdated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = stable_diffusion(mmfast.DDIMScheduler())
    assert pipe.scheduler.config.steps_offset == 1
    assert pipe.scheduler.config.clip_sample is False
    pipe.scheduler.set_timesteps(10)
    assert pipe.scheduler.timesteps[-1] == 1
    x = torch.full((1, 4, 2, 2), 9.0)
    assert pipe.scheduler.step(torch.zeros_like(x), 500, x).pred_original_sample.min() > 1, "not clipped"


@pytest.mark.parametrize("name", PAIRS)
def test_unconditional_pipeline(name: str) -> None:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    kind = getattr(diffusers, name.replace("Scheduler", "Pipeline"))
    pipe = kind(unet=unet, scheduler=PAIRS[name][1]())
    pipe.set_progress_bar_config(disable=True)
    kwargs = {"eta": 1.0, "use_clipped_model_output": True} if name == "DDIMScheduler" else {}
    results = []
    for scheduler in (pipe.scheduler, PAIRS[name][0].from_config(pipe.scheduler.config)):
        pipe.scheduler = scheduler
        generator = torch.Generator().manual_seed(3)
        images = pipe(batch_size=2, num_inference_steps=4, generator=generator, output_type="np", **kwargs).images
        results.append(torch.from_numpy(images))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=2e-5)
