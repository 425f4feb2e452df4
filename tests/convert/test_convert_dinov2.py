"""DINOv2 as Meta released it, against its forward pass written out from the released names."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast import convert

D, HEADS, DEPTH, HIDDEN = 12, 3, 4, 20


def released(registers: int, swiglu: bool, chunked: bool) -> dict[str, Tensor]:
    """A random state dict with the names and shapes of a release, 3 x 3 patches of 4 x 4 pixels."""
    generator = torch.Generator().manual_seed(5)

    def t(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, dtype=torch.float64, generator=generator)

    state = {"cls_token": t(1, 1, D), "pos_embed": t(1, 10, D), "mask_token": t(1, D)}
    state |= {"patch_embed.proj.weight": t(D, 3, 4, 4), "patch_embed.proj.bias": t(D)}
    if registers:
        state["register_tokens"] = t(1, registers, D)
    mlp = {"w12": (2 * HIDDEN, D), "w3": (D, HIDDEN)} if swiglu else {"fc1": (HIDDEN, D), "fc2": (D, HIDDEN)}
    for i in range(DEPTH):
        block = f"blocks.{i // 2}.{i}" if chunked else f"blocks.{i}"
        for name, shape in {"norm1": (D,), "attn.qkv": (3 * D, D), "attn.proj": (D, D), "norm2": (D,)}.items():
            state |= {f"{block}.{name}.weight": t(*shape), f"{block}.{name}.bias": t(shape[0])}
        for name, shape in mlp.items():
            state |= {f"{block}.mlp.{name}.weight": t(*shape), f"{block}.mlp.{name}.bias": t(shape[0])}
        state |= {f"{block}.ls1.gamma": t(D), f"{block}.ls2.gamma": t(D)}
    return state | {"norm.weight": t(D), "norm.bias": t(D)}


def forward(state: dict[str, Tensor], image: Tensor) -> Tensor:
    """Meta's `forward_features`: positions for class token and patches, registers put in between afterwards."""
    s = {
        (".".join(("blocks", *k.split(".")[2:])) if k.split(".")[2].isdigit() else k): v
        for k, v in state.items()
        if k.startswith("blocks.")
    }
    s |= {k: v for k, v in state.items() if not k.startswith("blocks.")}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (D,), s[f"{name}.weight"], s[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, s[f"{name}.weight"], s[f"{name}.bias"])

    x = F.conv2d(image, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=4).flatten(2).transpose(1, 2)
    batch = len(x)
    x = torch.cat((s["cls_token"].expand(batch, -1, -1), x), 1) + s["pos_embed"]
    if "register_tokens" in s:
        x = torch.cat((x[:, :1], s["register_tokens"].expand(batch, -1, -1), x[:, 1:]), 1)
    for i in range(DEPTH):
        b = f"blocks.{i}"
        q, k, v = (
            linear(norm(x, f"{b}.norm1"), f"{b}.attn.qkv")
            .reshape(batch, -1, 3, HEADS, D // HEADS)
            .permute(2, 0, 3, 1, 4)
        )
        out = ((q @ k.mT * (D // HEADS) ** -0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(out, f"{b}.attn.proj") * s[f"{b}.ls1.gamma"]
        y = norm(x, f"{b}.norm2")
        if f"{b}.mlp.w12.weight" in s:
            gate, value = linear(y, f"{b}.mlp.w12").chunk(2, -1)
            y = linear(F.silu(gate) * value, f"{b}.mlp.w3")
        else:
            y = linear(F.gelu(linear(y, f"{b}.mlp.fc1")), f"{b}.mlp.fc2")
        x = x + y * s[f"{b}.ls2.gamma"]
    return norm(x, "norm")


@pytest.mark.parametrize("chunked", [False, True], ids=["flat", "chunked"])
@pytest.mark.parametrize("swiglu", [False, True], ids=["mlp", "swiglu"])
@pytest.mark.parametrize("registers", [0, 4], ids=["no-registers", "registers"])
def test_dinov2_computes_the_same(registers: int, swiglu: bool, chunked: bool) -> None:
    state = released(registers, swiglu, chunked)
    assert convert.detect(state) == "dinov2"
    image = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    vit = convert.vit_from(state, num_heads=HEADS)
    assert vit.num_reg_tokens == registers
    torch.testing.assert_close(vit.forward_features(image), forward(state, image), rtol=1e-9, atol=1e-9)
    out = convert.to_timm(state)
    assert list(out.aside) == ["mask_token"]
    back = convert.from_timm(out, "dinov2")
    torch.testing.assert_close(forward(back, image), forward(state, image), rtol=1e-9, atol=1e-9)
    if not registers and not chunked:
        assert back.keys() == state.keys()
        assert all(torch.equal(back[key], value) for key, value in state.items())


def test_training_checkpoint_and_linear_head() -> None:
    state = released(0, False, True)
    teacher = {f"teacher.backbone.{key}": value for key, value in state.items()}
    out = convert.to_timm(teacher | {"teacher.dino_head.mlp.0.weight": torch.zeros(2, 2)})
    assert out.reasons["teacher.dino_head.mlp.0.weight"] == "not the backbone"
    assert out.reasons["teacher.backbone.mask_token"].startswith("only masked pre-training")
    assert len(out) == len(state) - 1
    with pytest.raises(ValueError, match="the linear head reads the class token and the mean of the patches"):
        convert.to_timm(state | {"linear_head.weight": torch.zeros(5, 2 * D)})


def test_two_blocks_with_one_number() -> None:
    state = released(0, False, True)
    state["blocks.1.0.norm1.weight"] = torch.zeros(D, dtype=torch.float64)
    with pytest.raises(ValueError, match="two have the same number"):
        convert.to_timm(state)


def test_other_image_sizes_use_metas_rule() -> None:
    """Meta's positions are resampled with an offset of 0.1 and without antialiasing, with registers by size."""
    plain = convert.vit_from(released(0, False, False), num_heads=HEADS)
    registers = convert.vit_from(released(4, False, False), num_heads=HEADS)
    assert (plain.pos_embed_resample, registers.pos_embed_resample) == ("dinov2", "timm")
    assert plain(torch.randn(1, 3, 20, 8, dtype=torch.float64)).shape == (1, D)
