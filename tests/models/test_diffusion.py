from __future__ import annotations

import copy
import io
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfast
from mmfast import NoiseSchedule, ops, reference, sample_seeds
from mmfast.models import GaussianDiffusion
from mmfast.models import diffusion as module
from mmfast.models._diffusion_training import kept_loss, left_out, seeds_of, timesteps_of
from tests.models.diffusion_networks import PREDICTIONS, SHAPE, Function, Pointwise, images, make

CPU = torch.device("cpu")


LOSSES: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "weight": {"weight": torch.tensor([1.0, 0.0, 2.0, 3.0, 0.5])},
    "min_snr": {"snr_gamma": 5.0},
    "min_snr_weight_none": {"snr_gamma": 1.0, "weight": torch.arange(5.0), "reduction": "none"},
    "offset_noise": {"offset_noise": 0.3},
}


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_its_formula_in_float64(name: str, prediction_type: str) -> None:
    options = dict(LOSSES[name])
    made = {key: options.pop(key) for key in ("snr_gamma", "offset_noise") if key in options}
    diffusion, x, t = make(prediction_type, **made).eval(), images(), torch.tensor([0, 3, 500, 998, 999])
    labels = torch.tensor([0, 1, 2, 3, 0])
    found = diffusion(x, labels, t=t, seed=11, **options)

    noise = reference.noise_like(x.double(), sample_seeds(11, 5), offset_noise=made.get("offset_noise", 0.0))
    alpha_bar = diffusion.schedule.alphas_cumprod_double[1 + t].view(-1, 1, 1, 1)
    noised = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise
    target = {
        "epsilon": noise,
        "sample": x.double(),
        "v_prediction": alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x,
    }[prediction_type]
    squares = (copy.deepcopy(diffusion.model).double()(noised, t, labels) - target).square()
    snr = alpha_bar / (1 - alpha_bar)
    if "snr_gamma" in made:
        least = snr.clamp_max(made["snr_gamma"])
        squares = (
            squares * {"epsilon": least / snr, "sample": least, "v_prediction": least / (snr + 1)}[prediction_type]
        )
    if "weight" in options:
        squares = squares * options["weight"].view(-1, 1, 1, 1)
    expected = {"mean": squares.mean(), "sum": squares.sum(), "none": squares.mean((1, 2, 3))}
    expected_loss = expected[options.get("reduction", "mean")]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected_loss, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_kept_target_and_noise_made_again_give_one_loss(name: str, prediction_type: str) -> None:
    """What runs on a CPU and what runs on a GPU: values and gradients."""
    options = {"weight": None, "snr_gamma": None, "offset_noise": 0.0, "reduction": "mean", **LOSSES[name]}
    offset_noise = options.pop("offset_noise")
    schedule, x, t = NoiseSchedule(prediction_type=prediction_type), images(), torch.tensor([0, 3, 500, 998, 999])
    seeds, prediction = sample_seeds(2, 5), torch.randn(5, *SHAPE, requires_grad=True)
    _, target = ops.q_sample(x, t, schedule, seed=seeds, target=prediction_type, offset_noise=offset_noise)
    kept = kept_loss(prediction, target, t, schedule, **options)
    again = ops.noise_mse(
        *(prediction, seeds), target=prediction_type, x0=x, t=t, schedule=schedule, offset_noise=offset_noise, **options
    )
    torch.testing.assert_close(kept, again)
    first, second = (torch.autograd.grad(loss.sum(), prediction)[0] for loss in (kept, again))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_training_stores_no_noise_elsewhere(prediction_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a GPU gives the loss and the gradients of a CPU's."""
    diffusion = make(prediction_type, snr_gamma=2.0, offset_noise=0.1, condition_dropout=0.5)
    diffusion.model.dropout.p = 0.0
    x, labels, weight = images(), torch.tensor([0, 1, 2, 3, 0]), torch.rand(5)
    parameters = list(diffusion.parameters())

    def run(**options: Any) -> list[Tensor]:
        loss = diffusion(x, labels, weight=weight, **options)
        return [loss, *torch.autograd.grad(loss, parameters)]

    expected = run(seed=3), run(seed=3, t=7)
    assert not {choice.op for choice in mmfast.explain(run, seed=3)} & {"noise_mse"}
    monkeypatch.setattr(module, "STORED", ())
    assert {choice.op for choice in mmfast.explain(run)} >= {"q_sample", "noise_mse"}
    for found, wanted in zip((run(seed=3), run(seed=3, t=7)), expected, strict=True):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)
    first, second = run(), run()
    assert first[0] != second[0]


def test_one_seed_one_loss() -> None:
    """A sample's noise, timestep and dropout depend on its seed and not on the batch it is in."""
    diffusion, x, labels = make(condition_dropout=0.5), images(), torch.tensor([0, 1, 2, 3, 0])
    diffusion.model.dropout.p = 0.0  # the network's own
    first = diffusion(x, labels, seed=3, reduction="none")
    assert torch.equal(first, diffusion(x, labels, seed=3, reduction="none"))
    assert torch.equal(first[:3], diffusion(x[:3], labels[:3], seed=3, reduction="none"))
    assert torch.equal(first[2:], diffusion(x[2:], labels[2:], seed=sample_seeds(3, 5)[2:], reduction="none"))
    assert (first != diffusion(x, labels, seed=4, reduction="none")).all()
    assert (first != diffusion(x, labels, reduction="none")).all()
    torch.manual_seed(5)
    fresh = diffusion(x, labels)
    torch.manual_seed(5)
    assert torch.equal(fresh, diffusion(x, labels))


@pytest.mark.parametrize("seeded", [True, False], ids=["seeds", "generator"])
def test_draws_are_uniform(seeded: bool) -> None:
    n = 40_000
    seeds = seeds_of(7, n, CPU) if seeded else None
    t = timesteps_of(seeds, n, 10, CPU)
    counts = torch.bincount(t, minlength=10).double()
    assert counts.shape == (10,)
    assert float(((counts - n / 10) ** 2 / (n / 10)).sum()) < 28  # chi-square of 9 degrees: 0.1 % are above
    dropped = left_out(seeds, n, 0.1, CPU)
    assert dropped.dtype == torch.bool
    assert abs(float(dropped.double().mean()) - 0.1) < 4 * math.sqrt(0.09 / n)
    assert abs(float(dropped[t < 5].double().mean()) - 0.1) < 4 * math.sqrt(0.09 / (n / 2))  # independent of t
    assert left_out(seeds, n, 1.0, CPU).all()
    assert not left_out(seeds, n, 0.0, CPU).any()
    assert timesteps_of(seeds, n, 1, CPU).max() == 0


def test_conditions_are_left_out_in_training_alone() -> None:
    diffusion, labels = make(condition_dropout=0.25), torch.arange(4).repeat(500)
    diffusion(images(2000), labels, seed=1)
    found = diffusion.model.seen[-1]
    dropped = found == 4
    assert abs(float(dropped.double().mean()) - 0.25) < 0.04
    assert torch.equal(found[~dropped], labels[~dropped])
    diffusion.eval()(images(2000), labels, seed=1)
    assert torch.equal(diffusion.model.seen[-1], labels)
    diffusion(images(3))
    assert diffusion.model.seen[-1].tolist() == [4, 4, 4]  # none given: the null condition
    diffusion(images(3), 2)
    assert diffusion.model.seen[-1].tolist() == [2, 2, 2]


def test_conditions_may_be_tensors() -> None:
    null = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor, *, prompt: Tensor) -> Tensor:
        seen.append(prompt)
        return x * prompt.sum((1, 2)).view(-1, 1, 1, 1)

    diffusion = GaussianDiffusion(
        Function(network), image_shape=SHAPE, condition_name="prompt", null_condition=null, condition_dropout=0.5
    )
    assert "null_condition" not in diffusion.state_dict()
    prompts = torch.randn(200, 2, 2)
    diffusion(images(200), prompts, seed=0)
    dropped = (seen[-1] == null).all(-1).all(-1)
    assert 60 < int(dropped.sum()) < 140
    assert torch.equal(seen[-1][~dropped], prompts[~dropped])
    diffusion.sample(2, condition=prompts[:2], steps=2, guidance=3.0)
    assert torch.equal(seen[-1], torch.cat((null.expand(2, 2, 2), prompts[:2])))
    diffusion.sample(2, steps=1)
    assert torch.equal(seen[-1], null.expand(2, 2, 2))
    with pytest.raises(ValueError, match=r"condition must have shape \(3, 2, 2\) as null_condition says, got \(3, 5\)"):
        diffusion(images(3), torch.zeros(3, 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_networks(dtype: torch.dtype) -> None:
    diffusion = make("v_prediction").eval()
    options = {"condition": torch.tensor([0, 1, 2]), "steps": 5, "guidance": 1.5, "seed": 3, "sampler": "ddpm"}
    exact, x = diffusion.sample(3, **options), images()
    loss = diffusion(x, 1, seed=3)
    diffusion.to(dtype)
    assert diffusion.schedule.alpha_table.dtype == torch.float32
    found = diffusion.sample(3, **options)
    assert found.dtype == dtype
    assert float((found.float() - exact).norm() / exact.norm()) < (2e-3 if dtype == torch.float16 else 2e-2)
    for given in (x, x.to(dtype)):
        again = diffusion(given, 1, seed=3)
        assert again.dtype == torch.float32
        torch.testing.assert_close(again, loss, rtol=2e-2, atol=0)


def test_autocast() -> None:
    """The network computes in bfloat16; states, schedule and loss stay in float32."""
    seen: list[torch.dtype] = []
    network = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))

    def forward(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.dtype)
        return network(x)

    wrapped = Function(forward)
    wrapped.network = network
    diffusion, x = GaussianDiffusion(wrapped, image_shape=(4,)), torch.rand(6, 4)
    exact, expected = diffusion(x, seed=1), diffusion.sample(3, steps=4, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, found = diffusion(x, seed=1), diffusion.sample(3, steps=4, seed=2)
    assert set(seen) == {torch.float32}
    assert loss.dtype == found.dtype == torch.float32
    assert loss != exact  # it was in bfloat16
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-2)
    loss.backward()
    assert network[0].weight.grad is not None


@pytest.mark.parametrize("named", [True, False], ids=["by_name", "third_argument"])
def test_diffusers_unet(named: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        num_class_embeds=11,
    )
    diffusion = GaussianDiffusion(
        network, image_shape=(1, 8, 8), null_condition=10, condition_name="class_labels" if named else None
    )
    diffusion(torch.rand(4, 1, 8, 8), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())

    labels = torch.arange(3)
    found = diffusion.sample(3, condition=labels, steps=4, guidance=2.0, seed=6)
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(4)
    x = ops.noise_like(torch.empty(3, 1, 8, 8), sample_seeds(6, 3))
    network.eval()
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = network(torch.cat((x, x)), t, torch.cat((torch.full((3,), 10), labels))).sample
        unconditional, conditional = output.chunk(2)
        output = unconditional + 2.0 * (conditional - unconditional)
        x = scheduler.step(output, t, x, use_clipped_model_output=True).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("wrap", [lambda y: (y, None), lambda y: SimpleNamespace(sample=y)], ids=["tuple", "object"])
def test_outputs_in_a_wrapper(wrap: Any) -> None:
    plain, wrapped = (
        GaussianDiffusion(Function(lambda x, t, wrap=w: wrap(0.3 * x)), image_shape=(4,)) for w in (lambda y: y, wrap)
    )
    assert torch.equal(plain.sample(2, steps=3, seed=1), wrapped.sample(2, steps=3, seed=1))
    assert plain(torch.ones(2, 4), seed=1) == wrapped(torch.ones(2, 4), seed=1)


def test_state_copies_and_averages() -> None:
    diffusion = make()
    state = diffusion.state_dict()
    assert set(state) == {"model.scale", "model.label.weight", "schedule.alpha_table"}
    other = GaussianDiffusion(Pointwise(), NoiseSchedule("linear"), image_shape=SHAPE, null_condition=4)
    other.load_state_dict(state)
    options = {"condition": 2, "steps": 4, "seed": 1}
    expected = diffusion.sample(2, **options)
    assert torch.equal(other.sample(2, **options), expected)
    assert torch.equal(copy.deepcopy(diffusion).sample(2, **options), expected)
    file = io.BytesIO()
    torch.save(diffusion, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False).sample(2, **options), expected)
    average = torch.optim.swa_utils.AveragedModel(diffusion)
    average.update_parameters(diffusion)
    assert torch.equal(average.module.sample(2, **options), expected)
    assert "image_shape=(2, 4, 3), null_condition=4, condition_dropout=0.1" in repr(diffusion)


def test_loss_compiles_without_a_graph_break() -> None:
    diffusion, x, labels = make("v_prediction"), images(), torch.tensor([0, 1, 2, 3, 0])
    diffusion.model.dropout.p = 0.0
    compiled = torch.compile(diffusion, fullgraph=True, backend="eager")
    seeds = sample_seeds(1, 5)
    found, expected = compiled(x, labels, seed=seeds), diffusion(x, labels, seed=seeds)
    torch.testing.assert_close(found, expected)
    first, second = (torch.autograd.grad(loss, diffusion.model.scale)[0] for loss in (found, expected))
    torch.testing.assert_close(first, second)
    torch.manual_seed(4)
    fresh = compiled(x, labels, t=torch.tensor([0, 1, 2, 500, 999]))
    torch.manual_seed(4)
    torch.testing.assert_close(fresh, diffusion(x, labels, t=torch.tensor([0, 1, 2, 500, 999])))


def test_training_finds_two_points() -> None:
    """Vectors of two numbers from two points: samples lie at both, and each label at its own."""
    points = torch.tensor([[0.6, -0.4], [-0.5, 0.7]])

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.label = nn.Embedding(3, 32)
            self.inside = nn.Sequential(nn.Linear(35, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

        def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            return self.inside(torch.cat((x, t[:, None] / 500 - 1, self.label(label)), 1))

    schedule = NoiseSchedule("squaredcos_cap_v2", prediction_type="v_prediction")
    diffusion = GaussianDiffusion(Network(), schedule, image_shape=(2,), null_condition=2, condition_dropout=0.2)
    optimizer = torch.optim.AdamW(diffusion.parameters(), lr=3e-3)
    losses = []
    for _ in range(400):
        labels = torch.randint(2, (256,))
        loss = diffusion(points[labels], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-50:]) < 0.3 * sum(losses[:50])
    for guidance in (None, 2.0):
        labels = torch.arange(2).repeat(50)
        found = diffusion.sample(100, condition=labels, guidance=guidance, seed=0)
        assert float((found - points[labels]).norm(dim=1).median()) < 0.2  # the points are 1.6 apart
    free = diffusion.sample(200, seed=1)
    nearest = torch.cdist(free, points).argmin(1)
    assert 50 < int(nearest.sum()) < 150


X = torch.zeros(2, *SHAPE)


ERRORS: dict[str, tuple[Any, type[Exception], str]] = {
    "model": (lambda: GaussianDiffusion(3, image_shape=SHAPE), TypeError, "model must be callable, got int"),
    "schedule": (
        lambda: GaussianDiffusion(Pointwise(), object(), image_shape=SHAPE),
        TypeError,
        "schedule must be a NoiseSchedule, got object; of a diffusers scheduler make one by NoiseSchedule.from_diff",
    ),
    "image_shape": (
        lambda: GaussianDiffusion(Pointwise(), image_shape=(1, 0)),
        ValueError,
        r"image_shape must be positive ints, got \(1, 0\)",
    ),
    "image_shape_number": (lambda: GaussianDiffusion(Pointwise(), image_shape=8), ValueError, "positive ints, got 8"),
    "null": (
        lambda: GaussianDiffusion(Pointwise(), image_shape=SHAPE, null_condition="no"),
        TypeError,
        "null_condition must be a tensor, an int or None, got str",
    ),
    "dropout": (lambda: make(condition_dropout=1.5), ValueError, "condition_dropout must be from 0 to 1, got 1.5"),
    "snr_gamma": (lambda: make(snr_gamma=0.0), ValueError, "snr_gamma must be positive, got 0.0"),
    "images": (lambda: make()([1.0]), TypeError, "images must be a tensor, got list"),
    "images_shape": (
        lambda: make()(torch.zeros(2, 3)),
        ValueError,
        r"images must have shape \(B, 2, 4, 3\), got \(2, 3\)",
    ),
    "images_bytes": (
        lambda: make()(X.to(torch.uint8)),
        TypeError,
        "images must be floating, from -1 to 1, got torch.u",
    ),
    "t_range": (lambda: make()(X, t=torch.tensor([0, 1000])), ValueError, "t must be from 0 to 999"),
    "t_shape": (lambda: make()(X, t=torch.tensor([0, 1, 2])), ValueError, r"t must have shape \(2,\) or \(\)"),
    "seed_type": (lambda: make()(X, seed=1.5), TypeError, "seed must be an int or an int64 tensor"),
    "seed_shape": (lambda: make().sample(3, seed=sample_seeds(0, 2)), ValueError, r"seed must have shape \(3,\)"),
    "reduction": (
        lambda: make()(X, reduction="max"),
        ValueError,
        "reduction must be one of mean, sum, none, got 'max'",
    ),
    "output": (
        lambda: GaussianDiffusion(Function(lambda x, t: x[:, :1]), image_shape=SHAPE)(X),
        ValueError,
        r"the network's output must have shape \(2, 2, 4, 3\), got \(2, 1, 4, 3\)",
    ),
    "n": (lambda: make().sample(2.0), TypeError, "n must be an int, got float"),
    "n_negative": (lambda: make().sample(-1), ValueError, "n must be at least 0, got -1"),
    "batch_size": (lambda: make().sample(2, batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
    "sampler": (
        lambda: make().sample(2, sampler="euler"),
        ValueError,
        "sampler must be one of ddim, ddpm, got 'euler'",
    ),
    "steps": (lambda: make().sample(2, steps=1001), ValueError, "num_inference_steps must be at most"),
    "eta": (lambda: make().sample(2, sampler="ddpm", eta=0.5), ValueError, "eta is DDIM's, got eta=0.5"),
    "guidance_condition": (
        lambda: make().sample(2, guidance=2.0),
        ValueError,
        "guidance needs a condition, and there is none",
    ),
    "guidance_null": (
        lambda: GaussianDiffusion(Pointwise(), image_shape=SHAPE).sample(2, guidance=2.0, condition=1),
        ValueError,
        "guidance needs a null_condition, and there is none",
    ),
    "condition_type": (lambda: make()(X, "cat"), TypeError, "condition must be a tensor, an int or None, got str"),
    "condition_length": (
        lambda: make()(X, torch.zeros(3, dtype=torch.int64)),
        ValueError,
        r"condition must have shape \(2, ...\), got \(3,\)",
    ),
    "denoise_t": (lambda: make().denoise(X, 1000), ValueError, "t must be from 0 to 999, got 1000"),
    "denoise_t_type": (lambda: make().denoise(X, torch.tensor(3)), TypeError, "t must be an int, got Tensor"),
    "interpolate": (
        lambda: make().interpolate(X, X[:1]),
        ValueError,
        r"x1 and x2 must have one shape, got \(2, 2, 4, 3\), \(1, 2, 4, 3\)",
    ),
    "cuda_graph": (
        lambda: make().sample(2, cuda_graph=True),
        ValueError,
        "cuda_graph=True needs the model on a GPU, it is on cpu",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name: str) -> None:
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call()


def test_public_names() -> None:
    assert mmfast.models.GaussianDiffusion is GaussianDiffusion
    assert GaussianDiffusion(Pointwise(), image_shape=[4]).schedule.config == NoiseSchedule().config
