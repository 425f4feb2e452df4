from __future__ import annotations

import copy
import pickle

import pytest
import torch

import mmfast
from tests.grading import BACKENDS


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"eps": 1e-3}, {"bias": False}, {"elementwise_affine": False}, {"dtype": torch.float64}],
    ids=str,
)
def test_is_torch_nn_layer_norm(kwargs: dict) -> None:
    """Same arguments, initialisation, keys, repr and answer."""
    ours, theirs = mmfast.nn.LayerNorm(12, **kwargs), torch.nn.LayerNorm(12, **kwargs)
    assert isinstance(ours, torch.nn.LayerNorm)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 12, dtype=kwargs.get("dtype"))
    assert torch.equal(ours(x), theirs(x))


def test_several_dimensions() -> None:
    ours, theirs = mmfast.nn.LayerNorm((3, 4)), torch.nn.LayerNorm((3, 4))
    x = torch.randn(2, 3, 4)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend: str, device: torch.device) -> None:
    ours, theirs = mmfast.nn.LayerNorm(20, device=device), torch.nn.LayerNorm(20, device=device)
    x = torch.randn(2, 5, 20, device=device)
    with mmfast.backend(backend):
        ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-5)


def test_copies_pickles_and_traces() -> None:
    module = mmfast.nn.LayerNorm(8)
    x = torch.randn(2, 8)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(copied) is mmfast.nn.LayerNorm
        assert torch.equal(copied(x), module(x))
    traced = torch.fx.symbolic_trace(torch.nn.Sequential(module))
    assert [node.name for node in traced.graph.nodes if node.op == "call_function"] == ["layer_norm"]
    assert torch.equal(traced(x), module(x))


def test_wrong_width_names_op_argument_expected_and_got() -> None:
    with pytest.raises(ValueError, match=r"layer_norm: weight must have shape \(4,\), got \(8,\)"):
        mmfast.nn.LayerNorm(8)(torch.randn(2, 4))
