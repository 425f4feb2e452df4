"""How the benchmarks measure: what is timed, by which clock, against which limit, and what a row of results holds.

pytest-benchmark takes the rounds and keeps the statistics. On a GPU its clock is a pair of CUDA events, L2 is
overwritten before each round, and the round is queued behind a delay longer than the host needs to launch it, so that
the events enclose kernels and no launch gap. Each group of providers is measured in several passes, providers in turn
within a pass, so that a drift of clocks or of a neighbour's load falls on all of them. `_limits.py` measures, in the
same run, what a row is held against. On a CPU the clock is the wall's and torch keeps to one thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

MODES = ("forward", "backward", "forward+backward")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ATOL = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


Shapes = tuple[tuple[tuple[int, ...], str], ...]
"""Shapes with their dtypes, as `DTYPES` names them."""


class Unavailable(Exception):
    """A provider cannot run here; the message says why."""


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    device: str = "cpu"
    quick: bool = False
    peers: tuple[str, ...] = ()  # empty: all
    passes: int = 3
    full: bool = False  # also what takes minutes

    def providers(self, names: Sequence[str], own: Sequence[str] = ("mmfast",)) -> list[str]:
        """Of a file's providers, those to run: all, but no torch.compile, which takes longest, in a quick CPU run."""
        if self.peers:
            return [name for name in names if name in (*own, *self.peers)]
        slow = self.quick and self.device == "cpu"
        return [name for name in names if not (slow and name.endswith("compile"))]


@dataclass(frozen=True)
class Spec:
    """One measurement: what a row of the results is about."""

    op: str
    provider: str
    mode: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def group(self) -> tuple[str, str, tuple[int, ...], str]:
        """What the providers that are compared with one another have in common."""
        return self.op, self.mode, self.shape, self.dtype

    @property
    def size(self) -> str:
        """The shape as text."""
        return "x".join(map(str, self.shape))

    @property
    def title(self) -> str:
        """The measurement in words, which `--only` looks into."""
        return f"{self.op} {self.mode} {self.size} {self.dtype} {self.provider}"

    def label(self, number: int) -> str:
        """The id of its test in pass `number`."""
        return f"{self.mode}-{self.dtype}-{self.size}-{self.provider}-pass{number}"


def specs(
    op: str, options: Options, shapes: Shapes, modes: Sequence[str], names: Sequence[str]
) -> Iterator[tuple[Spec, int]]:
    """Every measurement of a file with the number of its pass: passes outermost within a group, then providers."""
    for (shape, dtype), mode in product(shapes, modes):
        for number, provider in product(range(options.passes), options.providers(names)):
            yield Spec(op, provider, mode, shape, dtype), number


@dataclass
class Record:
    """The times of one measurement over all passes, in seconds."""

    spec: Spec
    times: list[float] = field(default_factory=list)
    moved: int = 0  # bytes that a call cannot do without, 0 where memory is not the limit
    flops: int = 0  # likewise
    normals: int = 0  # normal numbers that a call makes
    limit: float | None = None  # seconds that something else than bytes and FLOPs takes at least
    images: int = 0  # a call
    backend: str = ""  # the implementation that served the call, where a provider may pick one
    peak_mb: float | None = None


def randn(shape: tuple[int, ...], spec: Spec, device: str, *, gradient: bool = True) -> Tensor:
    """Normal random values of a spec's dtype, with gradient unless the mode is forward alone."""
    wanted = gradient and spec.mode != "forward"
    return torch.randn(shape, device=device).to(DTYPES[spec.dtype]).requires_grad_(wanted)


def call_of(mode: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[], Any]:
    """The call to time: `fn(*args)`, its backward, or both. "host" is a forward with gradient."""
    if mode == "host":
        return lambda: fn(*args)
    if mode == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return fn(*args)

        return forward
    inputs = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
    outputs = fn(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # The same gradients for every provider, so that their results can be compared.
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    grads = [torch.randn(y.shape, generator=generator, device=y.device).to(y.dtype) for y in outputs]
    if mode == "backward":
        return lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)

    def both() -> Any:
        found = fn(*args)
        return torch.autograd.grad(found if isinstance(found, tuple) else (found,), inputs, grads)

    return both


def check_same(found: Any, expected: Any, dtype: torch.dtype, name: str) -> None:
    """Raise unless two results agree within rounding: a time of a wrong answer is worth nothing."""
    pairs = zip(_flat(found), _flat(expected), strict=True)
    for index, (a, b) in enumerate(pairs):
        error = float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-6))
        if not error <= ATOL[dtype]:
            raise ValueError(f"{name}: result {index} is off by {error:.2g} from PyTorch's")


def _flat(value: Any) -> list[Tensor]:
    return [value.detach()] if isinstance(value, Tensor) else [item.detach() for item in value]


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: with more, a busy machine's scheduler is what gets measured."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def compiled(fn: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """`torch.compile(fn, mode=mode)` for static shapes, whose graph may be run backward more than once."""
    import torch._dynamo
    import torch._functorch.config

    torch._dynamo.config.cache_size_limit = 512  # one function, many shapes
    if hasattr(torch._functorch.config, "donated_buffer"):
        torch._functorch.config.donated_buffer = False  # as retain_graph=True needs
    return torch.compile(fn, fullgraph=True, dynamic=False, mode=mode)


class CudaTime:
    """A moment on the GPU's own clock; subtracting two waits for the later one and gives seconds."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, start: CudaTime) -> float:
        self.event.synchronize()
        return start.event.elapsed_time(self.event) / 1e3


class Quiet:
    """Prepares the GPU for one round: a delay that outlasts the launch, then a buffer of at least twice L2 written."""

    def __init__(self, launch_seconds: float) -> None:
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        self.buffer = torch.empty(max(2 * l2, 1 << 28), dtype=torch.int8, device="cuda")
        self.cycles = int((launch_seconds * 1.5 + 50e-6) * _cycles_per_second())

    def __call__(self) -> None:
        """Queue both; nothing is waited for."""
        torch.cuda._sleep(self.cycles)
        self.buffer.zero_()


@cache
def _cycles_per_second() -> float:
    torch.cuda._sleep(1000)
    start = CudaTime()
    torch.cuda._sleep(10_000_000)
    return 10_000_000 / (CudaTime() - start)


def measure(benchmark: Any, record: Record, call: Callable[[], Any], options: Options, *, gaps: bool = False) -> None:
    """Time `call` with pytest-benchmark and add the times to `record`.

    `gaps=True` keeps launch gaps in the time, as a user of a whole model has them.
    """
    on_gpu = options.device == "cuda" and not record.spec.mode.startswith("host")
    for _ in range(3):
        call()
    seconds, launch = _estimate(call, on_gpu)
    budget = 0.03 if options.quick else 0.15
    if on_gpu:
        _peak_memory(record, call)
        rounds = max(5, min(50, int(budget / seconds)))
        setup = None if gaps else Quiet(launch)
        benchmark.pedantic(call, setup=setup, rounds=rounds, warmup_rounds=2)
    else:
        iterations = max(1, int(2e-4 / seconds))
        rounds = max(5, min(200, int(budget / (seconds * iterations))))
        benchmark.pedantic(call, rounds=rounds, iterations=iterations, warmup_rounds=1)
    if benchmark.stats is not None:  # None under --benchmark-disable
        record.times += benchmark.stats.stats.data


def _estimate(call: Callable[[], Any], on_gpu: bool) -> tuple[float, float]:
    """Seconds that a call takes, and seconds until the host has launched it."""
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    launch = time.perf_counter() - start
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start, launch


def _peak_memory(record: Record, call: Callable[[], Any]) -> None:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    record.peak_mb = (torch.cuda.max_memory_allocated() - before) / 2**20
    del result


def interleaved_ratio(
    baseline: Callable[[], Any], candidate: Callable[[], Any], *, seconds: float = 1.0, attempts: int = 3
) -> float:
    """Time of `baseline` over time of `candidate`, measured in turn: above 1 where the candidate is faster.

    Run it under `one_thread()`. The two alternate in short rounds, and which comes first alternates too; the answer is
    the median of the rounds' ratios, so that a neighbour's burst of load spoils a few rounds and not the answer. Up to
    `attempts` such answers are taken while the candidate looks slower, and the best is returned.
    """
    best = 0.0
    for _ in range(attempts):
        best = max(best, _one_ratio(baseline, candidate, seconds))
        if best >= 1.0:
            break
    return best


def _one_ratio(baseline: Callable[[], Any], candidate: Callable[[], Any], seconds: float) -> float:
    for _ in range(3):
        baseline()
        candidate()
    calls = max(1, int(2e-3 / max(1e-7, _seconds(baseline, 1))))
    ratios: list[float] = []
    end = time.perf_counter() + seconds
    while len(ratios) < 10 or time.perf_counter() < end:
        if len(ratios) % 2:
            ours, theirs = _seconds(candidate, calls), _seconds(baseline, calls)
        else:
            theirs, ours = _seconds(baseline, calls), _seconds(candidate, calls)
        ratios.append(theirs / ours)
    return statistics.median(ratios)


def _seconds(call: Callable[[], Any], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - start


def smallest_times(calls: dict[str, Callable[[], Any]], *, repeats: int = 500, number: int = 10) -> dict[str, float]:
    """Seconds a call of each, the least over repeats taken in turn: host time.

    A repeat is shorter than a time slice of the scheduler, so that some are free of what else the machine does.
    """
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            least[name] = min(least[name], _seconds(call, number) / number)
    return least
