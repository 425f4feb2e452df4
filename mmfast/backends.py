"""Which implementation of an op runs, and why.

Every op asks `choose(op, facts)` once per call. The answer comes from a small table of rules that look
at the facts (device, dtype, width), never from trying a kernel and catching its failure. A rule answers
None where its backend serves, or the reason why it does not; the first backend that serves is taken, and
`torch`, PyTorch's own op, always serves.

The forced backend is one setting of the process, like `torch.backends`: a backward pass runs on threads of
autograd's own, which must see it too.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from . import cuda

__all__ = ["BackendError", "Choice", "Explanation", "Facts", "backend", "choose", "explain"]

BACKENDS = ("cuda", "triton", "torch")
"""In order of preference."""


class BackendError(RuntimeError):
    """A forced backend cannot serve a call; the message says why."""


class Facts(NamedTuple):
    """What a rule may look at."""

    device: torch.device
    dtype: torch.dtype
    width: int  # size of the dimension that one program of the kernel has to hold
    seqlen_q: int = 0  # of attention
    seqlen_k: int = 0
    refusal: str | None = None  # why no kernel of the op can serve this call, whatever the device
    no_cuda: str | None = None  # why its CUDA C++ kernel cannot, where the Triton kernel may
    detail: str | None = None  # what a kernel's launcher makes of this call, for `explain`


class Choice(NamedTuple):
    """One decision: `backend` serves `op`, and `reason` says why it and not one before it."""

    op: str
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op}: {self.backend} ({self.reason})"


class Explanation(tuple[Choice, ...]):
    """The choices made during one call, in the order in which the ops ran. Prints one a line."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(str(choice) for choice in self) or "no mmfast op ran"


def _find_triton() -> str | None:
    """Return why Triton cannot be used at all, or None. Does not import it."""
    try:
        found = importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):  # hidden: sys.modules["triton"] is None, or a broken install
        found = False
    return None if found else "triton is not installed"


def _find_version() -> tuple[int, ...]:
    """Triton's version, major and minor, without importing it; (0,) where it cannot be told."""
    try:
        return tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return (0,)


def _checked(name: str | None) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


TRITON_MISSING = _find_triton()
TRITON_VERSION = _find_version()
_forced: str | None = _checked(os.environ.get("MMFAST_BACKEND", "").strip().lower() or None)
_record: list[Choice] | None = None
_capability: dict[torch.device, tuple[int, int]] = {}


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors.

    Triton reads the variable when a kernel is imported, so afterwards the kernels' own state decides.
    """
    kernels = sys.modules.get("mmfast.kernels")
    if kernels is not None:
        return bool(kernels.INTERPRETED)
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _no_kernel(facts: Facts) -> str | None:
    """Why neither Triton nor CUDA C++ has a kernel for a call."""
    if facts.refusal is not None:
        return facts.refusal
    if facts.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{_name(facts.dtype)} has no kernel"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "inside a torch.func transform or forward-mode AD"
    return None


def _cuda_floats(facts: Facts) -> str | None:
    """CUDA C++ kernels of float32, float16 and bfloat16 tensors."""
    device = facts.device
    if device.type == "cpu" and _forced != "cuda":  # an emulated build serves only who asks for it
        return "CPU tensor: CUDA needs a GPU"
    if device not in _extension_refusal:
        _extension_refusal[device] = _refusal_of_extension(device)
    return _extension_refusal[device] or _no_kernel(facts) or facts.no_cuda


_extension_refusal: dict[torch.device, str | None] = {}


def _refusal_of_extension(device: torch.device) -> str | None:
    """Why the extension with the CUDA C++ kernels cannot serve a device, or None; warns where a GPU goes without."""
    if device.type not in ("cpu", "cuda"):
        return f"no kernel for device {device.type}"
    missing = cuda.missing()
    if device.type == "cpu":
        return missing or (None if cuda.emulated() else "CPU tensor: CUDA needs a GPU")
    if missing is None and cuda.emulated():
        missing = "the extension is an emulated build, for CPU tensors"
    if missing is None:
        capability = _device_capability(device)
        if cuda.runs_on(capability):
            return None
        built = ", ".join(f"sm_{arch}" for arch in cuda.architectures())
        missing = f"the CUDA C++ kernels were built for {built}, not for compute capability {_dotted(capability)}"
    _warn(f"mmfast: {missing}; other kernels serve. `mmfast info` tells more.")
    return missing


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


# As `ieee_products` below: torch.compile takes the answer as a constant.
_refusal_of_extension._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _cuda_one_row(facts: Facts) -> str | None:
    """As `_cuda_floats`, for kernels that hold a whole row in registers."""
    if facts.width > 8192:
        return f"width {facts.width} is above 8192, the widest row that is held in registers"
    return _cuda_floats(facts)


def _cuda_attention(facts: Facts) -> str | None:
    """Attention of 16-bit heads whose keys and values fit in a block's shared memory, bound by memory or by the launch.

    The model, unmeasured: 4 d (n_q + n_k) bytes a head at 4.8 TB/s, against 4 n_q n_k d FLOPs and 8 % of padding at
    610 TFLOP/s, which mma.sync reaches of Hopper's 989 (Triton's wgmma gets more, on as much padding). Both take as
    long where n_q n_k / (n_q + n_k) is 117; up to there, and a little further for the host time that a launch by Triton
    costs more, this kernel is first.
    """
    why_not = _cuda_floats(facts)
    if why_not is not None:
        return why_not
    if facts.dtype == torch.float32:
        return "float32 heads: the kernel is for 16 bits"
    if facts.width % 8 or not 32 <= facts.width <= 128:
        return f"head_dim {facts.width}: the kernel takes multiples of 8 from 32 to 128"
    capability = _device_capability(facts.device) if facts.device.type == "cuda" else (9, 0)
    keys = -(-facts.seqlen_k // 8) * 8
    # Keys and values, and 16 queries of each of four warps.
    if facts.width * (4 * keys + 128) > _SHARED_MEMORY.get(capability, 99 << 10):
        return f"{facts.seqlen_k} keys of {facts.width} columns do not fit in shared memory"
    if _forced == "cuda":
        return None
    balanced = BALANCED_LENGTH if capability < (10, 0) else BALANCED_LENGTH // 2  # as many FLOPs to 8 TB/s
    if facts.seqlen_q * facts.seqlen_k > balanced * (facts.seqlen_q + facts.seqlen_k):
        return f"{facts.seqlen_q} x {facts.seqlen_k} scores a head are bound by tensor cores, where mma.sync is slower"
    return None


BALANCED_LENGTH = 136
"""n_q n_k / (n_q + n_k) of an attention up to which mma.sync keeps up with memory: 272 x 272, or 4096 x 140."""
_SHARED_MEMORY = {(8, 0): 163 << 10, (8, 7): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10, (10, 3): 227 << 10}
"""What a block may have, by compute capability; 99 KiB elsewhere."""


def _triton_floats(facts: Facts) -> str | None:
    """Triton kernels of float32, float16 and bfloat16 tensors."""
    why_not = TRITON_MISSING or _no_kernel(facts)
    if why_not is not None:
        return why_not
    if facts.device.type == "cpu":
        # The interpreter is thousands of times slower than PyTorch: it serves only who asks for it.
        if not interpreting():
            return "CPU tensor: Triton needs a GPU"
        if facts.dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly"
        return None if _forced == "triton" else "CPU tensor: the interpreter serves only if forced"
    if facts.device.type != "cuda":
        return f"no kernel for device {facts.device.type}"
    if torch.version.hip is not None:
        return None if _forced == "triton" else "not tested on ROCm"
    if _device_capability(facts.device) < (8, 0):
        return "needs compute capability 8.0"
    return None


def _triton_one_row(facts: Facts) -> str | None:
    """As `_triton_floats`, for kernels that hold a whole row in registers."""
    if facts.width > 8192:
        return f"width {facts.width} is above 8192, the widest row a program holds"
    return _triton_floats(facts)


def ieee_products() -> bool:
    """Whether float32 matrix products on a GPU keep full precision, as `torch.set_float32_matmul_precision` says.

    `torch.get_float32_matmul_precision()` raises where the user has set `torch.backends.cuda.matmul.fp32_precision`,
    which newer versions of PyTorch have in its place.
    """
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision != "tf32"
    return torch.get_float32_matmul_precision() == "highest"


def product_precision() -> str:
    """How kernels compute float32 products, as `tl.dot` calls it: "ieee" or "tf32"."""
    return "ieee" if ieee_products() else "tf32"


# torch.compile cannot trace the question; it takes the answer as a constant, and guards the setting itself.
ieee_products._dynamo_marked_constant = True  # type: ignore[attr-defined]


LONGEST_KEYS = 1024
"""Keys above which PyTorch's own attention (cuDNN on Hopper) serves, until ours is measured faster."""
SPLIT_KEYS = 511
"""Keys above which the keys of few queries may be split."""
DECODE_QUERIES = 32
"""Queries up to which our kernel serves whatever the number of keys: it splits them, which cuDNN's engines do not."""


def _triton_since_3_4(facts: Facts) -> str | None:
    """As `_triton_floats`, for kernels that older compilers fail on: tuples of tiles, noise that changes its layout."""
    why_not = _triton_floats(facts)
    if why_not is None and TRITON_VERSION < (3, 4):
        return "needs Triton 3.4"
    return why_not


def _triton_attention(facts: Facts) -> str | None:
    """Attention: kernels for short sequences and for few queries, where libraries are weak."""
    why_not = _triton_since_3_4(facts)
    if why_not is not None or _forced == "triton":
        return why_not
    capability = _device_capability(facts.device) if facts.device.type == "cuda" else (9, 0)
    if capability < (9, 0):
        return "FlashAttention-2 is at home on compute capability 8"
    if capability >= (10, 0) and (facts.width > 192 or facts.seqlen_q <= DECODE_QUERIES < SPLIT_KEYS < facts.seqlen_k):
        return "wide heads, and few queries on many keys, spill registers on compute capability 10"
    if facts.dtype == torch.float32 and ieee_products():
        return "float32 products at full precision"
    if facts.dtype == torch.float32 and facts.width > 64:
        return "float32 heads wider than 64 do not fit in registers"
    if facts.seqlen_k > LONGEST_KEYS and facts.seqlen_q > DECODE_QUERIES:
        return f"{facts.seqlen_k} keys: a long sequence is PyTorch's"
    return None


def _triton_linear(facts: Facts) -> str | None:
    """Linear layers: without tf32 a float32 product runs on CUDA cores, where cuBLAS is at home."""
    why_not = _triton_floats(facts)
    if why_not is None and _forced != "triton" and facts.dtype == torch.float32 and ieee_products():
        return "float32 products at full precision"
    return why_not


def _triton_linear_act(facts: Facts) -> str | None:
    """As `_triton_linear`, for tiles in pieces."""
    return _triton_since_3_4(facts) or _triton_linear(facts)


def _triton_contrastive(facts: Facts) -> str | None:
    """The contrastive losses: float32 products would be truncated to tf32, which biases the loss more than bfloat16."""
    why_not = _triton_since_3_4(facts)
    if why_not is None and _forced != "triton" and facts.dtype == torch.float32:
        return "float32 features: chunks of cuBLAS products"
    return why_not


Rule = Callable[[Facts], str | None]

TABLE: dict[str, tuple[tuple[str, Rule], ...]] = {
    "layer_norm": (("cuda", _cuda_one_row), ("triton", _triton_floats)),
    "add_layer_norm": (("cuda", _cuda_one_row), ("triton", _triton_one_row)),
    "linear_act": (("triton", _triton_linear_act),),
    "patch_embed": (("triton", _triton_linear),),
    "attention": (("cuda", _cuda_attention), ("triton", _triton_attention)),
    "attention_qkv": (("cuda", _cuda_attention), ("triton", _triton_attention)),
    "attention_maps": (("triton", _triton_attention),),
    "attention_varlen": (("triton", _triton_attention),),
    "clip_loss": (("triton", _triton_contrastive),),
    "siglip_loss": (("triton", _triton_contrastive),),
    "noise_like": (("cuda", _cuda_floats), ("triton", _triton_since_3_4)),
    "q_sample": (("cuda", _cuda_floats), ("triton", _triton_since_3_4)),
    "q_step": (("cuda", _cuda_floats), ("triton", _triton_since_3_4)),
    "noise_mse": (("cuda", _cuda_floats), ("triton", _triton_since_3_4)),
    "ddpm_step": (("cuda", _cuda_floats), ("triton", _triton_since_3_4)),
    "ddim_step": (("cuda", _cuda_floats), ("triton", _triton_since_3_4)),
}
"""Op -> its backends but `torch`, in order of preference, each with the rule that says why not."""


def choose(op: str, facts: Facts) -> str:
    """Return the backend that serves `op` for tensors with these facts, and record it for `explain`.

    Raises BackendError if a backend is forced (`mmfast.backend`, MMFAST_BACKEND) and cannot serve.
    """
    if _record is None:
        return pick(op, facts)
    choice = _decide(op, facts)
    _record.append(choice)
    return choice.backend


def explaining() -> bool:
    """Whether `explain` records the choices: whether a `detail` in the facts is read by anyone."""
    return _record is not None


def torch_serves(x: object) -> bool:
    """Whether PyTorch's own ops serve x whatever the op: a CPU tensor, no force, and nobody asking why.

    `choose` would say the same; this says it in a tenth of the time, so that a tiny model on a CPU loses none.
    """
    return type(x) is torch.Tensor and x.is_cpu and _forced is None and _record is None


def pick(op: str, facts: Facts) -> str:
    """`choose` without a record: for the inside of an op whose caller has chosen already."""
    if _forced == "torch":
        return "torch"
    if _forced is None:
        for name, why_not in TABLE[op]:
            if why_not(facts) is None:
                return name
        return "torch"
    return _decide(op, facts).backend


def _decide(op: str, facts: Facts) -> Choice:
    refused: list[str] = []
    for name, why_not in TABLE[op]:
        if _forced in (None, name):
            reason = why_not(facts)
            if reason is None:
                refused = [f"{name} is forced"] if _forced else refused or [facts.detail or "first choice"]
                return Choice(op, name, "; ".join(refused))
            refused.append(f"{name}: {reason}")
    if _forced in (None, "torch"):
        return Choice(op, "torch", "; ".join(refused) or "torch is forced")
    raise BackendError(
        f"{op}: backend {_forced!r} is forced and cannot serve: "
        f"{'; '.join(refused) or 'there is no such implementation'}"
    )


def _device_capability(device: torch.device) -> tuple[int, int]:
    if device not in _capability:
        properties = torch.cuda.get_device_properties(device)
        _capability[device] = (properties.major, properties.minor)
    return _capability[device]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Force one backend (`"cuda"`, `"triton"`, `"torch"`) for the calls inside; None lifts a force.

    An op that the backend cannot serve raises BackendError rather than falling back. The setting holds
    for the whole process. MMFAST_BACKEND sets it from the environment.
    """
    global _forced
    before, _forced = _forced, _checked(name)
    try:
        yield
    finally:
        _forced = before


def forced() -> str | None:
    """The backend that is forced at present, or None."""
    return _forced


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Call `fn(*args, **kwargs)` and return which backend each mmfast op in it took, and why.

    `fn` is an op, a module, a model or any function. Its result is dropped. Inside a compiled function
    the choices were made when it was compiled; call the uncompiled one.
    """
    global _record
    before, _record = _record, []
    try:
        fn(*args, **kwargs)
        return Explanation(_record)
    finally:
        _record = before
