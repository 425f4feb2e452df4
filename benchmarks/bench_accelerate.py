"""Models of timm, torchvision, transformers and open_clip beside themselves after `mmfast.accelerate`.

A row is a batch of images through the model; the shape is (batch, channels, height, width). Of CLIP and SigLIP it is a
batch through one tower, without gradients, or a step of training of both (the plain contrastive loss, no optimizer);
then the shape of the texts is (batch, tokens). The original and the accelerated model are two copies with the same
weights. On a CPU the accelerated one must not be slower. `--full` adds the originals compiled, which takes minutes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfast
from mmfast.benchmarks import _harness
from mmfast.benchmarks._harness import DTYPES, Options, Spec, Unavailable

MODES = ("forward", "forward+backward")


def timm(small: bool) -> nn.Module:
    from timm import create_model

    options = {"img_size": 64, "depth": 4} if small else {}
    name = "vit_tiny_patch16_224" if small else "vit_base_patch16_224"
    return create_model(name, init_values=1e-5, drop_path_rate=0.1, num_classes=10, **options)


def torchvision(small: bool) -> nn.Module:
    from torchvision.models import VisionTransformer

    if small:
        return VisionTransformer(64, 16, 4, 3, 192, 768, num_classes=10)
    return VisionTransformer(224, 16, 12, 12, 768, 3072, num_classes=10)


def transformers(small: bool) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"image_size": 64, "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3}
    return ViTForImageClassification(ViTConfig(**(sizes | {"intermediate_size": 768} if small else {}), num_labels=10))


def dinov2(small: bool) -> nn.Module:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    sizes = {"image_size": 64, "patch_size": 16, "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3}
    return Dinov2ForImageClassification(Dinov2Config(**(sizes if small else {}), num_labels=10))


def open_clip(name: str) -> Callable[[bool], nn.Module]:
    def build(small: bool) -> nn.Module:
        from open_clip import create_model
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

        if not small:
            return create_model(name, pretrained=None)
        vision = CLIPVisionCfg(layers=4, width=192, head_width=64, patch_size=16, image_size=64)
        return CLIP(64, vision, CLIPTextCfg(context_length=77, vocab_size=1000, width=128, heads=2, layers=4))

    return build


def hugging_face(name: str) -> Callable[[bool], nn.Module]:
    """CLIP's default config is OpenAI's ViT-B/32, SigLIP's is base, patch 16."""

    def build(small: bool) -> nn.Module:
        import transformers

        layers = {"num_hidden_layers": 4, "intermediate_size": 512}
        vision = {**layers, "hidden_size": 192, "num_attention_heads": 3, "image_size": 64, "patch_size": 16}
        text = {**layers, "hidden_size": 128, "num_attention_heads": 2, "vocab_size": 1000, "eos_token_id": 999}
        text |= {"bos_token_id": 998, "pad_token_id": 1, **({} if name == "CLIP" else {"projection_size": 192})}
        options: dict[str, Any] = {"vision_config": vision, "text_config": text} if small else {}
        return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**options))

    return build


MODELS: dict[str, Callable[[bool], nn.Module]] = {
    "timm": timm,
    "torchvision": torchvision,
    "transformers": transformers,
    "dinov2": dinov2,
}
TOWERS: dict[str, Callable[[bool], nn.Module]] = {
    "open_clip-b32": open_clip("ViT-B-32"),
    "open_clip-l14": open_clip("ViT-L-14"),
    "transformers-clip": hugging_face("CLIP"),
    "transformers-siglip": hugging_face("Siglip"),
}
SMALL_TOWERS = [name for name in TOWERS if name != "open_clip-l14"]  # which is like B/32 where all are small
TOWER_MODES = ("encode_image", "encode_text", "training")


@cache
def pair(
    name: str, *, small: bool, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, nn.Module]:
    """The original and an accelerated copy, in evaluation mode."""
    try:
        original = (MODELS | TOWERS)[name](small).eval()
    except ImportError as missing:
        raise Unavailable(f"{name}: {missing}") from missing
    original = original.to(device, dtype)
    return original, mmfast.accelerate(copy.deepcopy(original), strict=True)


def logits(model: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    out = model(x)
    return out if isinstance(out, Tensor) else out.logits


def call_of(model: Callable[[Tensor], Any], x: Tensor, mode: str) -> Callable[[], Any]:
    """A forward pass without gradients, or one step of training without its optimiser."""
    if mode == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return logits(model, x)

        return forward

    def step() -> None:
        logits(model, x).float().square().mean().backward()

    return step


def encode_image(model: Any, images: Tensor) -> Tensor:
    if hasattr(model, "encode_image"):
        return model.encode_image(images)
    out = model.get_image_features(pixel_values=images)
    return out if isinstance(out, Tensor) else out.pooler_output  # transformers 4, 5


def encode_text(model: Any, text: Tensor) -> Tensor:
    if hasattr(model, "encode_text"):
        return model.encode_text(text)
    out = model.get_text_features(input_ids=text)
    return out if isinstance(out, Tensor) else out.pooler_output


def contrastive_loss(model: Any, images: Tensor, text: Tensor) -> Tensor:
    features = (encode_image(model, images), encode_text(model, text))
    image, words = (nn.functional.normalize(x.float(), dim=-1) for x in features)
    logits = 100.0 * image @ words.T
    target = torch.arange(len(logits), device=logits.device)
    return (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2


def tower_call(model: Any, mode: str, images: Tensor, text: Tensor) -> Callable[[], Any]:
    """One tower's forward without gradients, or a step of training of both without its optimizer."""
    if mode == "training":

        def step() -> None:
            contrastive_loss(model, images, text).backward()

        return step

    def encode() -> Tensor:
        with torch.no_grad():
            return encode_image(model, images) if mode == "encode_image" else encode_text(model, text)

    return encode


def pairs(model: Any, batch: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random images of the model's size, and captions of its length that end and are padded."""
    if hasattr(model, "config"):
        settings = model.config.text_config
        size, length = model.config.vision_config.image_size, settings.max_position_embeddings
        vocabulary = settings.vocab_size
        end, pad = min(settings.eos_token_id, vocabulary - 1), settings.pad_token_id
    else:
        size, length, vocabulary = model.visual.image_size[0], model.context_length, model.vocab_size
        end, pad = vocabulary - 1, 0
    text = torch.randint(2, min(900, vocabulary - 2), (batch, length))
    ends = torch.randint(8, 40, (batch, 1))
    text = text.masked_fill(torch.arange(length) == ends, end).masked_fill(torch.arange(length) > ends, pad)
    return torch.randn(batch, 3, size, size, device=device).to(dtype), text.to(device)


def measurements(options: Options) -> Iterator[tuple[Spec, int]]:
    """Each model, original and accelerated, and with `--full` on a GPU the original compiled."""
    on_gpu = options.device == "cuda"
    slow = on_gpu and (options.full or any(peer.endswith("compile") for peer in options.peers))
    dtype = "bf16" if on_gpu else "fp32"
    count = (64 if options.quick else 256) if on_gpu else 4
    side = 224 if on_gpu else 64

    def group(names: Any, mode: str, shape: tuple[int, ...]) -> Iterator[tuple[Spec, int]]:
        providers = [f"{name} {kind}" for name in names for kind in ("eager", "mmfast", *("compile",) * slow)]
        if options.peers:
            providers = [p for p in providers if p in options.peers or p.endswith("mmfast")]
        for number in range(options.passes):
            for provider in providers:
                yield Spec("accelerate", provider, mode, shape, dtype), number

    for mode in MODES:
        yield from group(MODELS, mode, (count, 3, side, side))
    for mode in TOWER_MODES:
        shapes: dict[tuple[int, ...], list[str]] = {}
        for name in TOWERS if on_gpu else SMALL_TOWERS:
            batch = min(count, 128) if name == "open_clip-l14" and mode == "training" else count
            length = 64 if name == "transformers-siglip" else 77
            shape: tuple[int, ...] = (batch, length) if mode == "encode_text" else (batch, 3, side, side)
            shapes.setdefault(shape, []).append(name)
        for shape, names in shapes.items():
            yield from group(names, mode, shape)


def test_model(spec: Spec, pass_number: int, measure: Callable[..., None], options: Options) -> None:
    name, kind = spec.provider.split()
    dtype, on_gpu = DTYPES[spec.dtype], options.device == "cuda"
    models = pair(name, small=not on_gpu, device=options.device, dtype=dtype)
    if spec.mode in TOWER_MODES:
        _test_towers(spec, pass_number, measure, models, pairs(models[0], spec.shape[0], options.device, dtype))
        return
    x = torch.randn(spec.shape, device=options.device).to(dtype)
    if pass_number == 0:
        with torch.no_grad():
            _harness.check_same(logits(models[1], x), logits(models[0], x), dtype, spec.provider)
    model: Any = models[1] if kind == "mmfast" else models[0]
    if kind == "compile":
        model = _compiled(model)
    measure(call_of(model, x, spec.mode), images=spec.shape[0], gaps=True)


def _test_towers(
    spec: Spec,
    pass_number: int,
    measure: Callable[..., None],
    models: tuple[nn.Module, nn.Module],
    inputs: tuple[Tensor, Tensor],
) -> None:
    kind = spec.provider.split()[1]
    model: Any = models[1] if kind == "mmfast" else models[0]
    if pass_number == 0:
        mode = "encode_image" if spec.mode == "training" else spec.mode
        found, expected = (tower_call(m, mode, *inputs)() for m in (models[1], models[0]))
        _harness.check_same(found, expected, DTYPES[spec.dtype], spec.provider)
    if spec.mode == "training":
        model.zero_grad()
    call = tower_call(model, spec.mode, *inputs)
    if kind == "compile":
        call = _compiled_tower(model, spec.mode, inputs)
    measure(call, images=spec.shape[0], gaps=True)
    model.zero_grad()


def _compiled_tower(model: Any, mode: str, inputs: tuple[Tensor, Tensor]) -> Callable[[], Any]:
    if mode == "training":
        loss = _harness.compiled(contrastive_loss)
        return lambda: loss(model, *inputs).backward()
    encode, x = (encode_image, inputs[0]) if mode == "encode_image" else (encode_text, inputs[1])

    def call() -> Tensor:
        with torch.no_grad():
            return _harness.compiled(encode)(model, x)

    return call


@cache
def _compiled(model: nn.Module) -> Callable[[Tensor], Any]:
    return torch.compile(model, dynamic=False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_never_slower_on_cpu(name: str, mode: str, options: Options) -> None:
    """On a CPU an accelerated model takes at most 3 % longer than the original, measured in turn."""
    if options.device != "cpu":
        pytest.skip("a CPU's bound")
    original, accelerated = pair(name, small=True)
    x = torch.randn(2, 3, 64, 64)
    with _harness.one_thread():
        ratio = _harness.interleaved_ratio(*(call_of(model, x, mode) for model in (original, accelerated)))
    assert ratio >= 0.97, f"{name} {mode}: {ratio:.3f} of the original's speed"


@pytest.mark.parametrize("mode", TOWER_MODES)
@pytest.mark.parametrize("name", SMALL_TOWERS)
def test_towers_never_slower_on_cpu(name: str, mode: str, options: Options) -> None:
    """As above, of CLIP and SigLIP."""
    if options.device != "cpu":
        pytest.skip("a CPU's bound")
    models = pair(name, small=True)
    inputs = pairs(models[0], 2, "cpu", torch.float32)
    with _harness.one_thread():
        ratio = _harness.interleaved_ratio(*(tower_call(model, mode, *inputs) for model in models))
    assert ratio >= 0.97, f"{name} {mode}: {ratio:.3f} of the original's speed"
