"""`mmfast.models.CLIP` beside open_clip's with the same weights: images, texts, and steps of training.

Launch gaps are part of these times, as a user has them. `eager` and `compile` are open_clip's model, `accelerate` is it
after `mmfast.accelerate`. The captions have 8 to 40 tokens, padded to the context length: `mmfast+trim` cuts them after
the longest in host memory (`CLIP.trim_text`), which on a CPU the model does by itself. A training step is both towers,
the plain symmetric loss (the same for all) and its gradients, without the optimizer.

FLOPs are those of open_clip's model: mmfast's leaves out what no feature depends on, so its share of a limit is that of
the work asked for, not of the work done. Bytes are the weights, once, and their gradients in training.

Compiling takes most of the time of a run: only B/32 is compiled without `--full`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mmfast
from mmfast.benchmarks import _harness
from mmfast.benchmarks._harness import DTYPES, Options, Spec, Unavailable
from mmfast.models import CLIP
from mmfast.models._clip_config import clip_config

SMALL_TEXT = {"context_length": 77, "vocab_size": 1000, "width": 128, "heads": 2, "layers": 4}
SMALL: dict[str, dict[str, Any]] = {
    "clip_vit_small": {
        "embed_dim": 64,
        "vision_cfg": {"layers": 4, "width": 192, "patch_size": 16, "image_size": 64},
        "text_cfg": SMALL_TEXT,
    },
    "clip_resnet_small": {
        "embed_dim": 64,
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "patch_size": None, "image_size": 96},
        "text_cfg": {**SMALL_TEXT, "layers": 2},
    },
}
NAMES = {"clip_b32": "ViT-B-32", "clip_b16": "ViT-B-16", "clip_l14": "ViT-L-14", "clip_rn50": "RN50"}
# (model, mode, batch), the most important first: a run with a budget leaves out the last.
GPU_GROUPS = (
    ("clip_b32", "encode_image", 256),
    ("clip_b32", "encode_text", 256),
    ("clip_b32", "training", 256),
    ("clip_l14", "encode_image", 256),
    ("clip_rn50", "encode_image", 256),
    ("clip_b16", "encode_image", 256),
    ("clip_b32", "encode_image", 1),
    ("clip_b32", "encode_text", 1),
    ("clip_b16", "training", 256),
    ("clip_rn50", "training", 256),
    ("clip_l14", "encode_text", 256),
    ("clip_l14", "training", 128),
)
CPU_GROUPS = tuple((name, mode, 4) for name in SMALL for mode in ("encode_image", "encode_text", "training"))
SHORTEST, LONGEST = 8, 40  # tokens of a caption


def measurements(options: Options) -> Iterator[tuple[Spec, int]]:
    on_gpu = options.device == "cuda"
    for name, mode, batch in GPU_GROUPS if on_gpu else CPU_GROUPS:
        size = config(name)["text_cfg"]["context_length"]
        if mode != "encode_text":
            size = config(name)["vision_cfg"]["image_size"]
        shape = ((batch, size), "bf16" if on_gpu else "fp32")
        yield from _harness.specs(name, options, (shape,), (mode,), providers(name, mode, options))


def providers(name: str, mode: str, options: Options) -> list[str]:
    """Those of a group; what takes minutes to compile only where it is asked for."""
    slow = options.full or name in ("clip_b32", *SMALL)
    trims = options.device == "cuda" and mode != "encode_image"
    return [
        "eager",
        *(["compile"] if slow or "compile" in options.peers else []),
        "accelerate",
        "mmfast",
        *(["mmfast+trim"] if trims else []),
        *(["mmfast+compile"] if slow or "mmfast+compile" in options.peers else []),
    ]


def config(name: str) -> dict[str, Any]:
    return clip_config(NAMES[name]) if name in NAMES else copy.deepcopy(SMALL[name])


@cache
def open_clip_model(name: str, device: str) -> Any:
    try:
        from open_clip import CLIP as Peer
    except ImportError as missing:
        raise Unavailable(f"open_clip: {missing}") from missing
    torch.manual_seed(0)
    with torch.device(device):
        model = Peer(**config(name))
    if device != "meta":
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "bn3.weight" in key:  # 0 at first, which would hide a wrong branch
                    parameter.fill_(0.5)
    return model


@cache
def model(name: str, kind: str, device: str, dtype: torch.dtype) -> Any:
    """open_clip's model, the same accelerated, or mmfast's, with the same weights."""
    theirs = open_clip_model(name, device)
    if kind == "mmfast":
        ours = CLIP(**config(name), device=device)
        ours.load_state_dict(theirs.state_dict())
        return ours.to(dtype)
    made = copy.deepcopy(theirs).to(dtype)
    return mmfast.accelerate(made) if kind == "accelerate" else made


@cache
def flops(name: str, mode: str) -> int:
    """Of one pair, image or text: the products and convolutions of open_clip's model, counted without computing."""
    found, settings = open_clip_model(name, "meta"), config(name)
    size, length = settings["vision_cfg"]["image_size"], settings["text_cfg"]["context_length"]
    images = torch.empty(1, 3, size, size, device="meta")
    text = torch.empty(1, length, device="meta", dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        if mode == "encode_image":
            found.encode_image(images)
        elif mode == "encode_text":
            found.encode_text(text)
        else:
            image_features, text_features, _ = found(images, text)
            (image_features.sum() + text_features.sum()).backward()
    return counter.get_total_flops()


def captions(batch: int, name: str, device: str) -> Tensor:
    """Random token ids of random lengths, ended by the largest and padded with 0."""
    text = config(name)["text_cfg"]
    length, end = text["context_length"], text["vocab_size"] - 1
    ids = torch.randint(1, end, (batch, length))
    ends = torch.randint(SHORTEST - 1, LONGEST, (batch, 1))
    positions = torch.arange(length)
    ids = ids.masked_fill(positions > ends, 0).masked_fill(positions == ends, end)
    return ids.to(device)


def loss_of(outputs: tuple[Tensor, ...]) -> Tensor:
    """The symmetric contrastive loss of one batch."""
    image_features, text_features, scale = outputs
    logits = scale * image_features @ text_features.T
    target = torch.arange(len(logits), device=logits.device)
    cross_entropy = nn.functional.cross_entropy
    return (cross_entropy(logits.float(), target) + cross_entropy(logits.T.float(), target)) / 2


def call_of(chosen: Any, mode: str, images: Tensor, text: Tensor, provider: str = "") -> Callable[[], Any]:
    """One forward pass of a tower without gradients, or one step of training without its optimizer."""
    compiles = provider.endswith("compile")
    if mode == "training":
        run = _harness.compiled(chosen) if compiles else chosen

        def step() -> Tensor:
            for parameter in chosen.parameters():
                parameter.grad = None
            loss = loss_of(run(images, text))
            loss.backward()
            return loss

        return step
    method, x = (chosen.encode_image, images) if mode == "encode_image" else (chosen.encode_text, text)
    encode = _compiled_method(chosen, mode) if compiles else method

    def forward() -> Tensor:
        with torch.inference_mode():
            return encode(x)

    return forward


@cache
def _compiled_method(chosen: Any, mode: str) -> Callable[..., Any]:
    return _harness.compiled(getattr(chosen, mode))


def test_clip(spec: Spec, pass_number: int, options: Options, measure: Callable[..., None]) -> None:
    dtype, training = DTYPES[spec.dtype], spec.mode == "training"
    kind = spec.provider.partition("+")[0]
    chosen = model(spec.op, kind if kind in ("mmfast", "accelerate") else "eager", options.device, dtype)
    chosen.train(training)
    batch, size = spec.shape[0], config(spec.op)["vision_cfg"]["image_size"]
    images = torch.randn(batch, 3, size, size, device=options.device, dtype=dtype)
    text = captions(batch, spec.op, options.device)
    given = chosen.trim_text(text.cpu()).to(options.device) if spec.provider.endswith("trim") else text
    call = call_of(chosen, spec.mode, images, given, spec.provider)
    if pass_number == 0:
        theirs = model(spec.op, "eager", options.device, dtype).train(training)
        state = {key: value.clone() for key, value in theirs.named_buffers()}
        truth = call_of(theirs, spec.mode, images, text)()
        _harness.check_same(call(), truth, dtype, spec.provider)
        with torch.no_grad():  # of a BatchNorm
            for key, value in theirs.named_buffers():
                value.copy_(state[key])
        del truth
    weights = sum(parameter.numel() * parameter.element_size() for parameter in chosen.parameters())
    measure(
        call,
        moved=weights * (2 if training else 1),
        flops=batch * flops(spec.op, spec.mode),
        images=batch,
        gaps=True,
    )
    for parameter in chosen.parameters():
        parameter.grad = None


@pytest.mark.parametrize("mode", ["encode_image", "encode_text", "training"])
@pytest.mark.parametrize("name", SMALL)
def test_never_slower_on_cpu(name: str, mode: str, options: Options) -> None:
    """On a CPU mmfast's model takes at most 3 % longer than open_clip's, also of texts as long as the context."""
    if options.device != "cpu":
        pytest.skip("a CPU's bound")
    pair = [model(name, kind, "cpu", torch.float32).train(mode == "training") for kind in ("eager", "mmfast")]
    size = config(name)["vision_cfg"]["image_size"]
    images, text = torch.randn(2, 3, size, size), captions(2, name, "cpu")
    text[:, -1] = config(name)["text_cfg"]["vocab_size"] - 1
    text[text == 0] = 1
    text[:, :-1].clamp_(max=900)
    with _harness.one_thread():
        ratio = _harness.interleaved_ratio(*(call_of(net, mode, images, text) for net in pair))
    assert ratio >= 0.97, f"{name} {mode}: {ratio:.3f} of open_clip's speed"
