from __future__ import annotations

import threading
import warnings

import pytest
import torch

import mmfast
from mmfast import backends, ops
from mmfast.backends import Facts
from mmfast.ops import _noise

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


@pytest.fixture
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Facts of CUDA tensors can be asked about on any machine."""
    monkeypatch.setitem(backends._capability, CUDA, (9, 0))
    monkeypatch.setattr(backends, "TRITON_MISSING", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setitem(backends._extension_refusal, CUDA, "no extension")


def reasons(op: str, *rest: str) -> str:
    """What is said of a choice where there is no extension."""
    first = ["cuda: no extension"] if "cuda" in dict(backends.TABLE[op]) else []
    return "; ".join([*first, *rest]) or "first choice"


def reason(op: str, facts: Facts) -> tuple[str, str]:
    choice = backends._decide(op, facts)
    return choice.backend, choice.reason


@pytest.mark.usefixtures("no_gpu_needed")
@pytest.mark.parametrize("op", ops.NAMES)
def test_the_choice_on_a_gpu(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "TRITON_VERSION", (3, 6))
    for dtype in (torch.float16, torch.bfloat16):
        assert reason(op, Facts(CUDA, dtype, 256)) == ("triton", reasons(op))
    # Products of float32 in full precision are the vendor's libraries'; of contrastive losses any in float32.
    contrastive = op in ("clip_loss", "siglip_loss")
    diffusion = op in ("noise_like", "q_sample", "q_step", "noise_mse", "ddpm_step", "ddim_step")
    elementwise = diffusion or op in ("layer_norm", "add_layer_norm")
    products = "float32 features: chunks of cuBLAS products" if contrastive else "float32 products at full precision"
    assert reason(op, Facts(CUDA, torch.float32, 64)) == (
        ("triton", reasons(op)) if elementwise else ("torch", reasons(op, f"triton: {products}"))
    )
    monkeypatch.setattr(backends, "ieee_products", lambda: False)
    assert reason(op, Facts(CUDA, torch.float32, 64))[0] == ("torch" if contrastive else "triton")
    assert reason(op, Facts(CUDA, torch.float64, 768)) == ("torch", reasons(op, "triton: float64 has no kernel"))
    monkeypatch.setitem(backends._capability, CUDA, (8, 0))
    name, why = reason(op, Facts(CUDA, torch.float16, 64))
    assert (name == "torch" and "FlashAttention-2" in why) if op.startswith("attention") else name == "triton"
    monkeypatch.setitem(backends._capability, CUDA, (7, 5))
    assert reason(op, Facts(CUDA, torch.float16, 768)) == (
        "torch",
        reasons(op, "triton: needs compute capability 8.0"),
    )
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert reason(op, Facts(CUDA, torch.float16, 768)) == (
        "torch",
        reasons(op, "triton: not tested on ROCm"),
    )


WITH_CUDA = [op for op, rules in backends.TABLE.items() if "cuda" in dict(rules)]


@pytest.mark.usefixtures("no_gpu_needed")
@pytest.mark.parametrize("op", WITH_CUDA)
def test_cuda_comes_first_where_there_is_an_extension(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._extension_refusal, CUDA, None)
    facts = Facts(CUDA, torch.bfloat16, 64, 197, 197)
    assert reason(op, facts) == ("cuda", "first choice")
    assert reason(op, facts._replace(dtype=torch.float64))[0] == "torch"
    assert reason(op, facts._replace(no_cuda="odd"))[1].startswith("cuda: odd")
    with mmfast.backend("triton"):
        assert reason(op, facts) == ("triton", "triton is forced")
    # Without Triton it serves all the same.
    monkeypatch.setattr(backends, "TRITON_MISSING", "triton is not installed")
    assert reason(op, facts)[0] == "cuda"


class Extension:
    """What `mmfast.cuda` looks at of an extension."""

    def __init__(self, architectures: str, *, emulated: bool = False) -> None:
        self.architectures = architectures
        self.emulated = emulated


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("80;90a;100a", (8, 0), True),
        ("80;90a;100a", (8, 6), True),
        ("80;90a;100a", (9, 0), True),
        ("80;90a;100a", (10, 0), True),
        ("80;90a;100a", (10, 3), False),
        ("80;90a;100a", (12, 0), False),
        ("90a", (8, 0), False),
        ("86", (8, 0), False),
        ("100f", (10, 3), True),
    ],
)
def test_what_a_build_runs_on(
    built: str, capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mmfast.cuda, "_found", Extension(built))
    assert mmfast.cuda.runs_on(capability) == runs


def test_a_gpu_that_goes_without_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build for other architectures, and none at all: a warning and the reason; nothing raises."""
    monkeypatch.setitem(backends._capability, CUDA, (9, 0))
    for found, missing, words in (
        (Extension("80;100a"), None, "built for sm_80, sm_100a, not for compute capability 9.0"),
        (Extension("", emulated=True), None, "emulated build"),
        (None, "this install has no CUDA C++ kernels", "no CUDA C"),
    ):
        monkeypatch.setattr(mmfast.cuda, "_found", found)
        monkeypatch.setattr(mmfast.cuda, "_missing", missing)
        with pytest.warns(RuntimeWarning, match=words):
            assert words in str(backends._refusal_of_extension(CUDA))
    monkeypatch.setattr(mmfast.cuda, "_missing", None)
    monkeypatch.setattr(mmfast.cuda, "_found", Extension("90a"))
    assert backends._refusal_of_extension(CUDA) is None
    assert backends._refusal_of_extension(CPU) == "CPU tensor: CUDA needs a GPU"


def test_one_warning_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_extension_refusal", {})
    monkeypatch.setattr(mmfast.cuda, "_found", None)
    monkeypatch.setattr(mmfast.cuda, "_missing", "nothing here")
    monkeypatch.setitem(backends._capability, CUDA, (9, 0))
    with pytest.warns(RuntimeWarning, match="nothing here"):
        assert backends._cuda_floats(Facts(CUDA, torch.float16, 64)) == "nothing here"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends._cuda_floats(Facts(CUDA, torch.float16, 64)) == "nothing here"


@pytest.mark.usefixtures("no_gpu_needed")
@pytest.mark.parametrize("op", ops.NAMES)
def test_older_triton(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.3 fails on the kernels of all ops but these three."""
    monkeypatch.setattr(backends, "TRITON_VERSION", (3, 3))
    serves = op in ("layer_norm", "add_layer_norm", "patch_embed")
    expected = ("triton", reasons(op)) if serves else ("torch", reasons(op, "triton: needs Triton 3.4"))
    assert reason(op, Facts(CUDA, torch.bfloat16, 256)) == expected


def test_samples_that_kernels_cannot_count() -> None:
    """Offsets within a sample are 32-bit numbers; the largest batch is not limited."""
    for size, serves in (((1, 1 << 30), False), ((1, (1 << 30) - 1), True), ((1 << 10, 1 << 22), True)):
        x = torch.empty(size, device="meta")
        refusal = _noise.facts(x).refusal
        assert (refusal is None) == serves
        assert serves or refusal == "a sample of 1073741824 elements: kernels count them in 32 bits"


@pytest.mark.usefixtures("no_gpu_needed")
def test_the_choice_for_wide_rows() -> None:
    assert reason("layer_norm", Facts(CUDA, torch.float32, 40000))[0] == "triton"
    name, why = reason("add_layer_norm", Facts(CUDA, torch.float32, 8193))
    assert name == "torch"
    assert why.endswith("triton: width 8193 is above 8192, the widest row a program holds")


def test_other_devices() -> None:
    facts = Facts(torch.device("mps"), torch.float32, 8)
    assert reason("layer_norm", facts) == (
        "torch",
        "cuda: no kernel for device mps; triton: no kernel for device mps",
    )


def test_explain_lists_every_choice_in_order() -> None:
    x = torch.randn(2, 8)

    def two(x: torch.Tensor) -> torch.Tensor:
        return ops.add_layer_norm(ops.layer_norm(x), x)[0]

    with mmfast.backend("torch"):
        found = mmfast.explain(two, x)
    assert [tuple(choice) for choice in found] == [
        ("layer_norm", "torch", "torch is forced"),
        ("add_layer_norm", "torch", "torch is forced"),
        ("layer_norm", "torch", "torch is forced"),
    ]
    assert str(found).splitlines()[0] == "layer_norm: torch (torch is forced)"
    assert str(mmfast.explain(torch.sin, x)) == "no mmfast op ran"


def test_explain_nests_and_ends_on_an_exception() -> None:
    inner: list[mmfast.Explanation] = []
    x = torch.randn(2, 8)

    def fails() -> None:
        inner.append(mmfast.explain(ops.layer_norm, x))
        raise KeyError

    with pytest.raises(KeyError):
        mmfast.explain(fails)
    assert len(inner[0]) == 1
    assert backends._record is None


def test_forced_backend_is_scoped_and_seen_by_other_threads() -> None:
    before = backends.forced()
    seen: list[str | None] = []

    def body() -> None:
        with mmfast.backend("torch"):
            thread = threading.Thread(target=lambda: seen.append(backends.forced()))
            thread.start()
            thread.join()
            with mmfast.backend(None):
                seen.append(backends.forced())
            seen.append(backends.forced())
            raise KeyError

    with pytest.raises(KeyError):
        body()
    assert seen == ["torch", None, "torch"]
    assert backends.forced() == before


def test_a_forced_backend_raises_rather_than_falls_back() -> None:
    x = torch.randn(2, 8, dtype=torch.float64)
    with mmfast.backend("triton"), pytest.raises(mmfast.BackendError, match="triton: float64 has no kernel"):
        ops.layer_norm(x)
    with mmfast.backend("cuda"), pytest.raises(mmfast.BackendError, match="there is no such implementation"):
        ops.patch_embed(torch.randn(1, 3, 8, 8), torch.randn(4, 3, 4, 4))


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="expected one of cuda, triton, torch, got 'cudnn'"), mmfast.backend("cudnn"):
        pass


def test_a_compiled_function_follows_a_changed_force() -> None:
    """The force is guarded: a function compiled under one is compiled anew under another."""
    compiled = torch.compile(ops.layer_norm, fullgraph=True, backend="eager")
    x = torch.randn(2, 8)
    with mmfast.backend("torch"):
        compiled(x)
    with mmfast.backend("cuda"), pytest.raises(Exception, match="is forced and cannot serve"):
        compiled(x)


@pytest.mark.triton
def test_the_interpreter_serves_only_who_asks(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("about CPU tensors")
    x = torch.randn(2, 8)
    assert mmfast.explain(ops.layer_norm, x)[0].reason.endswith(
        "triton: CPU tensor: the interpreter serves only if forced"
    )
    with mmfast.backend("triton"):
        assert mmfast.explain(ops.layer_norm, x)[0][1:] == ("triton", "triton is forced")
        with pytest.raises(mmfast.BackendError, match="interpreter computes bfloat16 wrongly"):
            ops.layer_norm(x.bfloat16())


@pytest.mark.gpu
def test_a_gpu_takes_kernels_by_default(device: torch.device) -> None:
    x = torch.randn(2, 8, device=device, dtype=torch.bfloat16)
    built = mmfast.cuda.runs_on(torch.cuda.get_device_capability(device))
    assert mmfast.explain(ops.layer_norm, x)[0].backend == ("cuda" if built else "triton")
    assert mmfast.explain(ops.linear_act, x, x, activation="gelu")[0].backend == "triton"
