"""`contrastive_step`: the gradients of one large batch, from micro-batches, and one call of the loss."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmfast


class Towers(nn.Module):
    """Two towers with dropout, running statistics and a learnable scale, called as open_clip's models are."""

    def __init__(self, dropout: float = 0.3, norm: bool = False, output: str = "dict") -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8))
        if norm:
            self.image.insert(1, nn.BatchNorm1d(16))
        self.text = nn.Sequential(nn.Linear(5, 16), nn.Dropout(dropout), nn.Linear(16, 8))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.output = output

    def forward(self, image: Tensor, text: Tensor) -> Any:
        image, text = (F.normalize(x, dim=-1) for x in (self.image(image), self.text(text)))
        if self.output == "dict":
            return {"image_features": image, "text_features": text, "logit_scale": self.logit_scale.exp()}
        return image, text, self.logit_scale.exp(), None


class Counted:
    """A loss that counts its calls, and draws random numbers of its own."""

    def __init__(self, loss: Any = None, **kwargs: Any) -> None:
        self.loss, self.kwargs, self.calls = loss or mmfast.nn.ClipLoss(), kwargs, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        torch.rand(2)
        return self.loss(*args, **kwargs, **self.kwargs)


def batches(sizes: tuple[int, ...] = (4, 4, 3), dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 6, dtype=dtype), torch.randn(size, 5, dtype=dtype)) for size in sizes]


def with_every_graph(model: nn.Module, pairs: list[tuple[Tensor, Tensor]], loss: Any) -> Tensor:
    """The same step with all activations kept."""
    outputs = [model(*pair) for pair in pairs]
    if isinstance(outputs[0], dict):
        joined = {key: torch.cat([o[key] for o in outputs]) for key in ("image_features", "text_features")}
        total = loss(**joined, logit_scale=outputs[0]["logit_scale"])
    else:
        total = loss(*(torch.cat([o[i] for o in outputs]) for i in (0, 1)), outputs[0][2])
    total = sum(total.values()) if isinstance(total, dict) else total
    total.backward()
    return total.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def compare(model: nn.Module, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(found[name], grad, rtol=1e-11, atol=1e-13, msg=name)


@pytest.mark.parametrize("output", ["dict", "tuple"])
def test_gradients_are_those_of_the_whole_batch_with_its_dropout(output: str) -> None:
    model, pairs = Towers(output=output).double(), batches()
    loss = Counted(output_dict=output == "dict")
    torch.manual_seed(3)
    expected = with_every_graph(model, pairs, loss)
    wanted, after = gradients(model), torch.rand(3)
    torch.manual_seed(3)
    loss.calls = 0
    step = mmfast.contrastive_step(model, pairs, loss)
    assert loss.calls == 1
    compare(model, gradients(model), wanted)
    assert (torch.rand(3) == after).all()  # as many random numbers were drawn
    total = sum(step.loss.values()) if output == "dict" else step.loss
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    assert not total.requires_grad
    image = step.outputs["image_features"] if output == "dict" else step.outputs[0]
    assert image.shape == (11, 8)
    assert not image.requires_grad


def test_without_dropout_micro_batches_are_one_batch() -> None:
    model, pairs = Towers(dropout=0.0).double(), batches((5, 1, 2))
    whole = [tuple(torch.cat(side) for side in zip(*pairs, strict=True))]
    mmfast.contrastive_step(model, iter(pairs), mmfast.nn.ClipLoss())
    found = gradients(model)
    with_every_graph(model, whole, mmfast.nn.ClipLoss())  # type: ignore[arg-type]
    compare(model, found, gradients(model))


def test_gradients_are_added_to_those_that_are_there() -> None:
    model, pairs = Towers(dropout=0.0).double(), batches()
    mmfast.contrastive_step(model, pairs, mmfast.nn.ClipLoss())
    once = {name: p.grad.clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]
    mmfast.contrastive_step(model, pairs, mmfast.nn.ClipLoss())
    compare(model, gradients(model), {name: 2 * grad for name, grad in once.items()})


def test_batch_norm_is_updated_once() -> None:
    torch.manual_seed(1)
    model, pairs = Towers(norm=True).double(), batches()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    with_every_graph(model, pairs, mmfast.nn.ClipLoss())
    wanted = gradients(model)
    expected = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.load_state_dict(state)
    torch.manual_seed(3)
    mmfast.contrastive_step(model, pairs, mmfast.nn.ClipLoss())
    found = gradients(model)
    # A bias before BatchNorm has no gradient but rounding.
    compare(model, *({k: g for k, g in grads.items() if k != "image.0.bias"} for grads in (found, wanted)))
    assert int(expected["image.1.num_batches_tracked"]) == len(pairs)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, expected[name], rtol=0, atol=0, msg=name)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("ambient", [False, True], ids=["inside", "around"])
def test_autocast(ambient: bool) -> None:
    """In bfloat16, in contexts of the step's own or in one around it, weights get their gradients."""
    model, pairs = Towers(dropout=0.0), batches(dtype=torch.float32)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    with autocast():
        with_every_graph(model, pairs, mmfast.nn.ClipLoss())
    wanted = gradients(model)
    if ambient:
        with autocast():
            step = mmfast.contrastive_step(model, pairs, mmfast.nn.ClipLoss())
    else:
        step = mmfast.contrastive_step(model, pairs, mmfast.nn.ClipLoss(), autocast=autocast)
    assert step.loss.dtype == torch.float32
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert (found[name] - grad).norm() <= 0.02 * grad.norm(), name


def test_grad_scaler() -> None:
    model, pairs = Towers(dropout=0.0).double(), batches()
    mmfast.contrastive_step(model, pairs, mmfast.nn.ClipLoss())
    wanted = gradients(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    step = mmfast.contrastive_step(model, pairs, mmfast.nn.ClipLoss(), scaler=scaler)
    compare(model, {n: p.grad for n, p in model.named_parameters()}, {n: 1024 * g for n, g in wanted.items()})  # type: ignore
    assert step.loss < 10
    scaler.step(optimizer)
    scaler.update()
    for p, old, grad in zip(model.parameters(), before, wanted.values(), strict=True):
        torch.testing.assert_close(p.detach(), old - 0.5 * grad, rtol=1e-9, atol=1e-12)


def test_frozen_tower_and_a_loss_with_parameters() -> None:
    """LiT: the image tower takes no gradient; a scale in the loss takes its own."""
    model, pairs = Towers(dropout=0.0).double(), batches()
    model.image.requires_grad_(False)
    scale = nn.Parameter(torch.tensor(4.0, dtype=torch.float64))

    def loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        return mmfast.ops.clip_loss(image_features, text_features, logit_scale * scale)

    with_every_graph(model, pairs, loss)
    wanted, expected = gradients(model), scale.grad.clone()  # type: ignore[union-attr]
    scale.grad = None
    mmfast.contrastive_step(model, pairs, loss)
    found = gradients(model)
    assert not any(name.startswith("image") for name in found)
    compare(model, found, wanted)
    torch.testing.assert_close(scale.grad, expected, rtol=1e-11, atol=0)


def test_a_function_of_two_towers_and_dicts_as_batches() -> None:
    model, pairs = Towers(norm=True).double(), batches()
    torch.manual_seed(3)
    step = mmfast.contrastive_step(model, pairs, mmfast.nn.ClipLoss())
    wanted = gradients(model)
    count = int(model.image[1].num_batches_tracked)

    def encode(pixels: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        image, text = model.image(pixels), model.text(tokens)
        return F.normalize(image, dim=-1), F.normalize(text, dim=-1), model.logit_scale.exp()

    torch.manual_seed(3)
    again = mmfast.contrastive_step(
        encode,
        [{"pixels": image, "tokens": text} for image, text in pairs],
        mmfast.nn.ClipLoss(),
        modules=[model.image, model.text],
    )
    assert again.loss == step.loss
    compare(model, *({k: g for k, g in grads.items() if k != "image.0.bias"} for grads in (gradients(model), wanted)))
    assert int(model.image[1].num_batches_tracked) == 2 * count


def test_of_a_compiled_model() -> None:
    torch._dynamo.reset()
    model, pairs = Towers(dropout=0.0, norm=True).double(), batches((4, 4))
    compiled = torch.compile(model, backend="eager")
    mmfast.contrastive_step(compiled, pairs, mmfast.nn.ClipLoss())
    assert int(model.image[1].num_batches_tracked) == 2
    found = gradients(model)
    mmfast.contrastive_step(model, pairs, mmfast.nn.ClipLoss())
    wanted = gradients(model)
    compare(model, *({k: g for k, g in grads.items() if k != "image.0.bias"} for grads in (found, wanted)))


class Saved:
    """A tensor that a backward pass needs; counts the hidden activations among those alive."""

    alive = peak = 0

    def __init__(self, x: Tensor) -> None:
        self.x, self.counts = x, x.numel() == 16 * 16  # features have another width
        Saved.alive += self.counts
        Saved.peak = max(Saved.peak, Saved.alive)

    def __del__(self) -> None:
        Saved.alive -= self.counts


def test_keeps_the_activations_of_one_micro_batch() -> None:
    most = []
    for count in (2, 8):
        model, pairs = Towers().double(), batches((16,) * count)
        Saved.alive = Saved.peak = 0
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.x):
            mmfast.contrastive_step(model, pairs, mmfast.nn.ClipLoss())
        most.append(Saved.peak)
        gradients(model)
    assert most[0] == most[1] > 0


@pytest.mark.parametrize(
    ("model", "pairs", "loss", "error", "words"),
    [
        (Towers(), [], None, ValueError, "micro_batches must have at least one entry, got none"),
        (lambda x: x, [torch.ones(2, 2)], None, TypeError, "must return a dict or a tuple of tensors, got Tensor"),
        (lambda x: (x, "a"), [torch.ones(2, 2)], None, TypeError, "outputs must be tensors or None, got str"),
        (lambda x: (x,), [torch.ones(2)], None, ValueError, "must return features of two or more dimensions, got none"),
        (lambda x: (x, x[1:]), [torch.ones(2, 2)], None, ValueError, r"must have as many rows, got \[1, 2\]"),
        (lambda x: (x,), [torch.ones(2, 2)], lambda x: (x.sum(), {}), TypeError, "a dict of scalars, got tuple"),
        (lambda x: (x,), [torch.ones(2, 2)], lambda x: x, TypeError, r"a dict of scalars, got shape \(2, 2\)"),
    ],
    ids=["no batches", "a tensor", "a string", "no features", "other rows", "a tuple", "no scalar"],
)
def test_wrong_arguments(model: Any, pairs: Any, loss: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"contrastive_step: .*{words}"):
        mmfast.contrastive_step(model, pairs, loss)
