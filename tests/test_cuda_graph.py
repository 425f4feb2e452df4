from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import mmfast
import mmfast.cuda_graph as module
from tests.fake_cuda import FakeCuda, FakeEvent, FakeGraph, FakeStream


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)).eval()


class Counted(nn.Module):
    """Counts how often its Python code runs."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn, self.runs = fn, 0
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.runs += 1
        return self.fn(*args, **kwargs)


def test_outputs_are_the_models(fake: FakeCuda) -> None:
    model = small()
    graph = mmfast.cuda_graph(model, torch.randn(2, 4))
    for _ in range(3):
        x = torch.randn(2, 4)
        before = x.clone()
        y = graph(x)
        torch.testing.assert_close(y, model(x))
        assert not y.requires_grad
        assert torch.equal(x, before)
    assert len(FakeGraph.made) == 1
    assert FakeGraph.made[0].replays == 3


def test_python_runs_only_for_warm_up_and_capture(fake: FakeCuda) -> None:
    model = Counted(torch.sin)
    x = torch.randn(3)
    graph = mmfast.cuda_graph(model, x, warmup=2)
    graph(x)
    graph(x)
    assert model.runs == 3


def test_weights_stay_live(fake: FakeCuda) -> None:
    """In-place changes are seen: of a parameter, by an optimizer, by load_state_dict."""
    model = small()
    x = torch.randn(2, 4)
    graph = mmfast.cuda_graph(model, x)
    first = graph(x)
    with torch.no_grad():
        model[0].weight.mul_(2)
    second = graph(x)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, model(x))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(x).sum().backward()
    optimizer.step()
    torch.testing.assert_close(graph(x), model(x))
    model.load_state_dict(small().state_dict())
    torch.testing.assert_close(graph(x), model(x))


@pytest.mark.parametrize(
    "replace",
    [
        lambda m: setattr(m[2], "bias", nn.Parameter(torch.ones(3))),
        lambda m: m.load_state_dict(small().state_dict(), assign=True),
        lambda m: setattr(m[2].bias, "data", torch.ones(3)),
    ],
    ids=["parameter", "assign", "data"],
)
def test_a_weight_put_in_anothers_place_is_an_error_until_reset(fake: FakeCuda, replace: Callable[..., Any]) -> None:
    model = small()
    x = torch.randn(2, 4)
    graph = mmfast.cuda_graph(model, x)
    replace(model)
    with pytest.raises(ValueError, match=r"cuda_graph: [02]\.(weight|bias) was replaced after the capture: call reset"):
        graph(x)
    graph.reset()
    torch.testing.assert_close(graph(x), model(x))


def test_buffers_are_weights_too(fake: FakeCuda) -> None:
    model = nn.BatchNorm1d(4).eval()
    x = torch.randn(2, 4)
    graph = mmfast.cuda_graph(model, x)
    model.running_mean.add_(1)
    torch.testing.assert_close(graph(x), model(x))
    model.running_mean = torch.zeros(4)
    with pytest.raises(ValueError, match="running_mean was replaced"):
        graph(x)


def test_outputs_are_cloned_unless_told(fake: FakeCuda) -> None:
    x, z = torch.randn(3), torch.randn(3)
    graph = mmfast.cuda_graph(torch.sin, x)
    first = graph(x)
    graph(z)
    torch.testing.assert_close(first, torch.sin(x))
    graph = mmfast.cuda_graph(torch.sin, x, clone_outputs=False)
    first = graph(x)
    torch.testing.assert_close(first, torch.sin(x))
    second = graph(z)
    assert first.data_ptr() == second.data_ptr()
    torch.testing.assert_close(first, torch.sin(z))


def test_nested_inputs_and_outputs(fake: FakeCuda) -> None:
    def model(x: Tensor, pair: Any, *, scale: float, extra: dict[str, Tensor] | None = None) -> Any:
        assert extra is not None
        return {"sum": x + pair[0] * scale, "rest": [(pair[1], extra["a"] * 2), "label", None]}

    def draw() -> tuple[Any, Any]:
        a, b, c, d = torch.randn(4, 3)
        return (a, (b, c)), {"scale": 0.5, "extra": {"a": d}}

    args, kwargs = draw()
    graph = mmfast.cuda_graph(model, *args, **kwargs)
    args, kwargs = draw()
    found, wanted = graph(*args, **kwargs), model(*args, **kwargs)
    assert pytree.tree_structure(found) == pytree.tree_structure(wanted)
    torch.testing.assert_close(found["sum"], wanted["sum"])
    torch.testing.assert_close(found["rest"][0], wanted["rest"][0])
    assert found["rest"][1:] == ["label", None]
    kwargs["scale"] = 0.25
    with pytest.raises(ValueError, match=re.escape("input 3 must be 0.5 as captured, got 0.25")):
        graph(*args, **kwargs)
    with pytest.raises(ValueError, match=re.escape("inputs must be structured as the captured ones (float32[3]")):
        graph(*args[:1], list(args[1]), **kwargs)


def test_one_tensor_given_twice_stays_one(fake: FakeCuda) -> None:
    """Self-attention is recognised by `query is key`."""
    model = Counted(lambda q, k: q * 2 if q is k else q + k)
    x, z = torch.randn(3), torch.randn(3)
    graph = mmfast.cuda_graph(model, x, x, max_graphs=2)
    torch.testing.assert_close(graph(z, z), z * 2)
    torch.testing.assert_close(graph(x, z), x + z)
    strict = mmfast.cuda_graph(model, x, x)
    with pytest.raises(ValueError, match="input 1 must be the same tensor as another input exactly where it was"):
        strict(x, z)


def test_several_shapes_on_demand(fake: FakeCuda) -> None:
    model = small()
    graph = mmfast.cuda_graph(model, torch.randn(1, 4), max_graphs=2)
    for rows in (1, 3, 1, 3):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(graph(x), model(x))
    assert len(FakeGraph.made) == 2
    assert len(set(map(id, fake.pools))) == 1, "the graphs share their memory"
    with pytest.raises(
        ValueError,
        match=re.escape(
            "inputs must be of one of the 2 kinds captured (float32[1, 4]; float32[3, 4]), got float32[5, 4]"
        ),
    ):
        graph(torch.randn(5, 4))
    assert repr(graph) == "CudaGraph(Sequential: float32[1, 4]; float32[3, 4])"
    graph.reset()
    assert repr(graph) == "CudaGraph(Sequential: no graph)"
    torch.testing.assert_close(graph(x), model(x))


def test_layout_of_the_example_is_kept(fake: FakeCuda) -> None:
    seen: list[bool] = []
    model = Counted(lambda x: (seen.append(x.is_contiguous(memory_format=torch.channels_last)), x * 2)[1])
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    graph = mmfast.cuda_graph(model, x)
    assert all(seen)
    y = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(graph(y), y * 2)


def test_calls_on_another_stream_wait(fake: FakeCuda) -> None:
    x = torch.randn(3)
    graph = mmfast.cuda_graph(torch.sin, x)
    graph(x)
    graph(x)
    first, fake.stream = fake.stream, FakeStream()
    graph(x)
    assert [type(w) for w in fake.stream.waited] == [FakeEvent]
    assert not [w for w in first.waited if isinstance(w, FakeEvent)]


def test_calls_of_several_threads(fake: FakeCuda) -> None:
    graph = mmfast.cuda_graph(torch.sin, torch.randn(64))
    wrong: list[int] = []

    def work(seed: int) -> None:
        x = torch.full((64,), float(seed))
        wrong.extend(seed for _ in range(20) if not torch.equal(graph(x), torch.sin(x)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_autocast_is_part_of_what_was_captured(fake: FakeCuda) -> None:
    """Weights cast by autocast are cast again in every replay, not kept from the warm-up."""
    model = small()
    x = torch.randn(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)  # fills autocast's cache
        graph = mmfast.cuda_graph(model, x)
        with torch.no_grad():
            model[0].weight.mul_(3)
            torch.clear_autocast_cache()
            found, wanted = graph(x), model(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted)
    with pytest.raises(ValueError, match="autocast must be bfloat16 as captured, got none"):
        graph(x)


def test_inside_and_outside_of_inference_mode(fake: FakeCuda) -> None:
    model = small()
    with torch.inference_mode():
        x = torch.randn(2, 4)
        graph = mmfast.cuda_graph(model, x)
        graph(x)
    y = torch.randn(2, 4)
    torch.testing.assert_close(graph(y), model(y))
    with torch.inference_mode():
        torch.testing.assert_close(graph(x), model(x))


def test_a_method_of_a_module(fake: FakeCuda) -> None:
    """The weights are those of its module, and so is the mode."""
    model = mmfast.models.ViT(
        img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3, class_token=True
    ).eval()
    x = torch.randn(1, 3, 16, 16)
    graph = mmfast.cuda_graph(model.forward_features, x)
    torch.testing.assert_close(graph(x), model.forward_features(x))
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.zero_()
    torch.testing.assert_close(graph(x), model.forward_features(x))
    model.train()
    with pytest.raises(ValueError, match="eval mode"):
        graph(x)


def test_inputs_that_want_gradients(fake: FakeCuda) -> None:
    x = torch.randn(3, requires_grad=True)
    graph = mmfast.cuda_graph(torch.sin, x)
    with pytest.raises(ValueError, match=re.escape("inputs must not require gradients, got one that does")):
        graph(x)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), torch.sin(x))


def test_a_model_that_reads_results(fake: FakeCuda) -> None:
    x = torch.randn(3)
    with pytest.raises(RuntimeError, match=r"cannot be captured: it reads results on the host.*\(operation not perm"):
        mmfast.cuda_graph(lambda x: x * x.sum().item(), x)
    torch.testing.assert_close(mmfast.cuda_graph(torch.sin, x)(x), torch.sin(x))


class Opaque:
    pass


def partly_training() -> nn.Module:
    model = small()
    model[1].train()
    return model


CPU = torch.zeros(2, 4)
BAD: dict[str, Any] = {
    "no tensor": (lambda: mmfast.cuda_graph(small()), ValueError, "needs CUDA tensors as inputs, got none"),
    "training": (
        lambda: mmfast.cuda_graph(small().train(), CPU),
        ValueError,
        "model must be in eval mode, got training mode of Sequential: call model.eval()",
    ),
    "a part in training": (
        lambda: mmfast.cuda_graph(partly_training(), CPU),
        ValueError,
        "model must be in eval mode, got training mode of 1: call model.eval()",
    ),
    "weights elsewhere": (
        lambda: mmfast.cuda_graph(small().to("meta"), CPU),
        ValueError,
        "0.weight must be on cpu like the inputs, got meta",
    ),
    "two devices": (
        lambda: mmfast.cuda_graph(torch.add, CPU, CPU.to("meta")),
        ValueError,
        "needs CUDA tensors, got an input on meta",
    ),
    "input's type": (
        lambda: mmfast.cuda_graph(small(), CPU, Opaque()),
        TypeError,
        "inputs must be tensors or constants, got Opaque",
    ),
    "output's type": (
        lambda: mmfast.cuda_graph(lambda x: Opaque(), CPU),
        TypeError,
        "outputs must be tensors, constants, lists, tuples, dicts or registered dataclasses of them, got Opaque",
    ),
    "output's gradient": (
        lambda: mmfast.cuda_graph(torch.enable_grad()(small().forward), CPU),
        ValueError,
        "outputs must not require gradients",
    ),
    "not callable": (lambda: mmfast.cuda_graph(3, CPU), TypeError, "model must be callable, got int"),
    "max_graphs": (
        lambda: mmfast.cuda_graph(small(), CPU, max_graphs=0),
        ValueError,
        "max_graphs must be at least 1, got 0",
    ),
    "warmup": (lambda: mmfast.cuda_graph(small(), CPU, warmup="3"), TypeError, "warmup must be an integer, got str"),
    "shape": (
        lambda: mmfast.cuda_graph(small(), CPU)(torch.zeros(3, 4)),
        ValueError,
        "input 0 must be float32[2, 4] on cpu:None as captured, got float32[3, 4] on cpu:None; max_graphs allows",
    ),
    "dtype": (
        lambda: mmfast.cuda_graph(small(), CPU)(CPU.double()),
        ValueError,
        "input 0 must be float32[2, 4] on cpu:None as captured, got float64[2, 4]",
    ),
    "number of inputs": (
        lambda: mmfast.cuda_graph(small(), CPU)(CPU, CPU),
        ValueError,
        "inputs must be structured as the captured ones (float32[2, 4]), got float32[2, 4], float32[2, 4]",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str, fake: FakeCuda) -> None:
    make, kind, message = BAD[what]
    with pytest.raises(kind, match=re.escape(f"cuda_graph: {message}")):
        make()


def test_cpu_tensors_are_refused_before_any_work() -> None:
    model = Counted(torch.sin)
    with pytest.raises(ValueError, match="cuda_graph: needs CUDA tensors, got an input on cpu"):
        mmfast.cuda_graph(model, torch.zeros(3))
    assert model.runs == 0


def test_the_module_can_be_called(fake: FakeCuda) -> None:
    """`import mmfast.cuda_graph` binds the name to the module; it works like the function."""
    x = torch.randn(3)
    for function in (module, module.cuda_graph, mmfast.cuda_graph):
        torch.testing.assert_close(function(torch.sin, x)(x), torch.sin(x))
    assert isinstance(mmfast.cuda_graph(torch.sin, x), mmfast.CudaGraph)


@pytest.fixture(scope="module")
def vit(device: torch.device) -> nn.Module:
    return mmfast.models.ViT(weight_init="jax").to(device, torch.bfloat16).eval()


@pytest.mark.gpu
def test_vit_of_batch_1(vit: nn.Module, device: torch.device) -> None:
    """ViT-B/16: the same bits as without, replay after replay; a changed weight is seen."""
    x = torch.randn(1, 3, 224, 224, device=device, dtype=torch.bfloat16)
    graph = mmfast.cuda_graph(vit, x)
    for _ in range(3):
        x = torch.randn_like(x)
        with torch.no_grad():
            assert torch.equal(graph(x), vit(x))
    with torch.no_grad():
        vit.blocks[3].mlp.fc1.weight.mul_(1.5)
        found = graph(x)
        assert torch.equal(found, vit(x))
        vit.blocks[3].mlp.fc1.weight.div_(1.5)
        assert not torch.equal(found, graph(x))


@pytest.mark.gpu
def test_on_other_streams(vit: nn.Module, device: torch.device) -> None:
    """Calls alternate between streams without waiting on the host, and each result is its own."""
    graph = mmfast.cuda_graph(vit, torch.randn(1, 3, 224, 224, device=device, dtype=torch.bfloat16))
    inputs = [torch.randn(1, 3, 224, 224, device=device, dtype=torch.bfloat16) for _ in range(6)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    found = []
    for index, x in enumerate(inputs):
        with torch.cuda.stream(streams[index % 2]):
            found.append(graph(x))
    torch.cuda.synchronize()
    with torch.no_grad():
        for x, y in zip(inputs, found, strict=True):
            assert torch.equal(y, vit(x))


@pytest.mark.gpu
def test_random_numbers_are_new_and_seeded(device: torch.device) -> None:
    x = torch.ones(1000, device=device)
    graph = mmfast.cuda_graph(lambda x: torch.dropout(x, 0.5, True), x)
    torch.cuda.manual_seed(7)
    first, second = graph(x), graph(x)
    assert not torch.equal(first, second)
    torch.cuda.manual_seed(7)
    assert torch.equal(graph(x), first)
    assert torch.equal(graph(x), second)


@pytest.mark.gpu
def test_autocast_on_the_gpu(device: torch.device) -> None:
    """Also where the model itself enters autocast, whose copies of weights outlive the warm-up."""
    model = small().to(device)
    x = torch.randn(2, 4, device=device)

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                return self.model(x)

    with torch.autocast("cuda", dtype=torch.float16):
        model(x)
        outside = mmfast.cuda_graph(model, x)
    inside = mmfast.cuda_graph(Inside().eval(), x)
    with torch.no_grad():
        model[0].weight.mul_(3)
        torch.testing.assert_close(inside(x), Inside()(x))
        with torch.autocast("cuda", dtype=torch.float16):
            torch.testing.assert_close(outside(x), model(x))


@pytest.mark.gpu
def test_a_failed_capture_leaves_the_device_usable(device: torch.device) -> None:
    x = torch.randn(3, device=device)
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="cuda_graph: the model cannot be captured"):
        mmfast.cuda_graph(lambda x: x * x.sum().item(), x)
    assert torch.cuda.current_stream() == stream
    assert torch.equal(mmfast.cuda_graph(torch.sin, x)(x), torch.sin(x))


@pytest.mark.gpu
def test_reset_gives_the_memory_back(vit: nn.Module, device: torch.device) -> None:
    x = torch.randn(128, 3, 224, 224, device=device, dtype=torch.bfloat16)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    graph = mmfast.cuda_graph(vit, x)
    held = torch.cuda.memory_reserved() - before
    graph.reset()
    torch.cuda.empty_cache()
    kept = torch.cuda.memory_reserved() - before
    assert held > 2**27, "the tokens of 128 images and what the blocks make of them"
    assert kept < held / 2, "libraries keep their workspaces, the graph nothing"
    with torch.no_grad():
        assert torch.equal(graph(x), vit(x))
