"""Noise from seeds: the same integers and normals everywhere, whatever the batch, the layout and the launch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfast
from mmfast import ops
from mmfast.ops import _philox_torch
from mmfast.reference import _philox
from mmfast.reference._philox import MASK, Stream
from tests.grading import ALL_BACKENDS, DTYPES

KERNELS = ALL_BACKENDS[1:]
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
ANSWERS = {  # Random123's kat_vectors: counter and key, then the words
    "zero": ((0,) * 6, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((MASK,) * 6, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
}
SEED = -0x123456789ABCDEF
WORD_0_SEED = 627779616  # the third word of its first chunk is 0
# |z| of a number and its bound: rounding of the angle, which grows with the radius of the pair.
ACCURACY = 5e-7


def torch_words(key: Tensor, sample: Tensor, stream: int | Tensor, batch: int, chunks: range) -> Tensor:
    """The torch backend's words (batch, chunks, 4)."""
    found = torch.full((batch, len(chunks), 2, 2), -1)
    for rows, columns, even, odd in _philox_torch.words(key, sample, stream, batch, chunks):
        found[rows, columns, :, 0] = even.permute(1, 2, 0)
        found[rows, columns, :, 1] = odd.permute(1, 2, 0) & MASK
    return found.view(batch, len(chunks), 4)


def reference_words(key: Tensor, sample: Tensor, stream: int | Tensor, batch: int, chunks: range) -> Tensor:
    counter = torch.arange(chunks.start, chunks.stop).expand(batch, -1)
    key, sample = key[:, None], sample[:, None]
    stream = stream[:, None] if isinstance(stream, Tensor) else stream
    return torch.stack(
        _philox.philox(key & MASK, key >> 32 & MASK, counter & MASK, counter >> 32, sample, stream), dim=-1
    )


def true_normals(x: Tensor, seed: int | Tensor, stream: int | Tensor = 0) -> Tensor:
    return _philox.normals(len(x), x[0].numel(), seed, stream).view(x.shape)


def radius(z: Tensor) -> Tensor:
    """Of the pair that each number belongs to; (..., even)."""
    return z.unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True).expand(*z.shape[:-1], -1, 2).flatten(-2)


@pytest.mark.parametrize("words", [reference_words, torch_words], ids=["reference", "torch"])
@pytest.mark.parametrize("name", ANSWERS)
def test_published_words(name: str, words: Callable[..., Tensor]) -> None:
    (c0, c1, c2, c3, low, high), answer = ANSWERS[name]
    chunk, key = c1 << 32 | c0, torch.tensor([_philox.signed(high << 32 | low)])
    if words is torch_words or chunk >> 63 == 0:
        found = words(key, torch.tensor([c2]), c3, 1, range(chunk, chunk + 1))
        assert found.flatten().tolist() == list(answer)
    else:  # no int64 holds this chunk
        halves = (torch.tensor([value]) for value in (low, high, c0, c1, c2, c3))
        assert [int(word) for word in _philox.philox(*halves)] == list(answer)


def write(
    backend: str, seed: int, sample: int, stream: int, chunks: range, device: torch.device, *, normals: bool
) -> Tensor:
    """The words (int64) or the normals (float32) of chunks, (len(chunks), 4), by a kernel."""
    if backend == "triton":
        from tests import philox_kernels

        return philox_kernels.write(seed, sample, stream, chunks, device, normals=normals)
    from mmfast.cuda._common import current, extension

    words, z = (torch.empty(len(chunks), 4, dtype=dtype, device=device) for dtype in (torch.int32, torch.float32))
    counter = (seed % (1 << 64), sample, stream, chunks.start, len(chunks))
    extension().philox_words(words.data_ptr(), z.data_ptr(), *counter, *current(z))
    return z if normals else words.long() & MASK


@pytest.mark.parametrize("backend", KERNELS)
def test_published_words_of_the_kernels(backend: str, device: torch.device) -> None:
    """Of the published counters one has a second word of 0, as all of ours have."""
    found = write(backend, 0, 0, 0, range(1), device, normals=False)
    assert found.flatten().tolist() == list(ANSWERS["zero"][1])


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("first", [0, 1 << 20, (1 << 32) - 300], ids=str)
@pytest.mark.parametrize("seed", [0, SEED, (1 << 64) - 1, 0xFFFFFFFF, 1 << 63])
def test_kernels_make_the_same_words(seed: int, first: int, backend: str, device: torch.device) -> None:
    chunks = range(first, first + 300)
    for sample, stream in ((0, 0), (5, 1 + 4 * 999), (MASK, MASK)):
        found = write(backend, seed, sample, stream, chunks, device, normals=False)
        key = torch.tensor([_philox.signed(seed)])
        wanted = reference_words(key, torch.tensor([sample]), stream, 1, chunks)
        assert torch.equal(found.cpu(), wanted[0])


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (50, 3), (5, 1), (7, 64), (2, 129), (130, 2)], ids=str)
@pytest.mark.parametrize("seeds", [False, True], ids=["one seed", "a seed a sample"])
def test_torch_backend_makes_the_same_words(
    seeds: bool, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of 64 counters: parts of a sample, several samples, and rests of both."""
    monkeypatch.setattr(_philox_torch, "PIECE", 64)
    batch, chunks = size
    key = torch.randint(-(1 << 63), (1 << 63) - 1, (batch,)) if seeds else torch.tensor([SEED])
    sample = torch.zeros(1, dtype=torch.int64) if seeds else torch.arange(batch)
    for stream in (0, Stream.REVERSE_STEP + 4 * 999, Stream.Q_STEP + 4 * torch.arange(batch)):
        arguments = (key, sample, stream, batch, range(chunks))
        assert torch.equal(torch_words(*arguments), reference_words(*arguments))


def test_chunks_have_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_philox_torch, "PIECE", 64)
    arguments = (torch.tensor([SEED]), torch.arange(2), 1, 2, range((1 << 32) - 64, (1 << 32) + 100))
    assert torch.equal(torch_words(*arguments), reference_words(*arguments))


SHAPES = [(3, 4, 8, 8), (2, 5), (5, 1), (4, 3, 5, 7), (2, 200_002)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_backend_makes_the_same_normals(shape: tuple[int, ...]) -> None:
    """float64 to its rounding, float32 to that of the angle; and other dtypes as float32."""
    x = torch.empty(shape, dtype=torch.float64)
    seeds = torch.randint(-(1 << 63), (1 << 63) - 1, (len(x),))
    for arguments in ((None, SEED), (seeds, 0)):
        true = true_normals(x, SEED if arguments[0] is None else seeds)
        found = _philox_torch.normals(x, *arguments)
        assert found.dtype == torch.float64
        assert found.is_contiguous()
        torch.testing.assert_close(found, true, rtol=1e-13, atol=1e-14)
        single = _philox_torch.normals(x.float(), *arguments)
        assert (single.double() - true).abs().max() <= ACCURACY * 7
        assert torch.equal(_philox_torch.normals(x.bfloat16(), *arguments), single)


@pytest.mark.parametrize("threads", [1, 2])
def test_float32_normals_of_the_torch_backend_are_rounded_well(threads: int) -> None:
    torch.set_num_threads(threads)
    x = torch.empty(4, 250_000)
    found = _philox_torch.normals(x, None, SEED)
    torch.set_num_threads(1)
    true = true_normals(x, SEED)
    assert ((found.double() - true).abs() / radius(true)).max() <= ACCURACY


@pytest.mark.parametrize("backend", KERNELS)
def test_float32_normals_of_the_kernels_are_rounded_well(backend: str, device: torch.device) -> None:
    chunks = range(250_000 if device.type == "cuda" else 10_000)
    found = write(backend, SEED, 0, 0, chunks, device, normals=True).cpu().double()
    true = _philox.normals(1, 4 * len(chunks), SEED).view(-1, 4)
    assert ((found - true).abs() / radius(true)).max() <= ACCURACY


@pytest.mark.triton
@pytest.mark.cuda
def test_normals_of_both_kernels_are_the_same(device: torch.device) -> None:
    """The same polynomials: on a GPU the same bits, in Triton's interpreter, which does not contract, to rounding."""
    found, wanted = (write(name, SEED, 3, 9, range(5000), device, normals=True) for name in ("cuda", "triton"))
    if device.type == "cuda":
        assert torch.equal(found, wanted)
    assert ((found - wanted).abs() / radius(wanted)).max() <= ACCURACY


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_no_tail_is_cut(backend: str, device: torch.device) -> None:
    """A word of 0 makes a radius of sqrt(-2 ln 2^-33) = 6.76, which no clamp of the uniform may shorten."""
    seeds = torch.tensor([WORD_0_SEED, 1505650019, 138874391], device=device)
    with mmfast.backend(backend):
        z = ops.noise_like(torch.empty(3, 4, device=device), seeds)
    assert math.isclose(z[0, 2:].double().norm(), math.sqrt(66 * math.log(2)), rel_tol=1e-6)
    wanted = torch.tensor([6.698258, -6.349136, 6.235765])
    torch.testing.assert_close(z[[0, 1, 2], [2, 2, 3]].cpu(), wanted, rtol=0, atol=5e-6)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_has_its_noise_in_any_batch(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    x = torch.empty(5, 3, 6, 6, device=device, dtype=dtype)
    seeds = mmfast.sample_seeds(7, 5, device=device)
    with mmfast.backend(backend):
        whole = ops.noise_like(x, seeds)
        assert torch.equal(ops.noise_like(x[1:4], seeds[1:4]), whole[1:4])
        assert torch.equal(ops.noise_like(x[[4, 0]], seeds[[4, 0]]), whole[[4, 0]])
        assert torch.equal(ops.noise_like(x, 11)[:2], ops.noise_like(x[:2], 11))
        # An int's first sample is that of the same seed as a tensor; its others have noise of their own.
        assert torch.equal(ops.noise_like(x, 11)[0], ops.noise_like(x[:1], torch.tensor([11], device=device))[0])
        assert not torch.equal(ops.noise_like(x, 11)[0], ops.noise_like(x, 11)[1])
    assert whole.dtype == dtype


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("shape", [(2, 16, 4, 4), (2, 3, 5, 3), (2, 5, 4, 6), (1, 40, 8, 8)], ids=str)
def test_layout_changes_nothing(shape: tuple[int, ...], backend: str, device: torch.device) -> None:
    x = torch.empty(shape, device=device)
    last = x.contiguous(memory_format=torch.channels_last)
    with mmfast.backend(backend):
        found, wanted = ops.noise_like(last, SEED, offset_noise=0.5), ops.noise_like(x, SEED, offset_noise=0.5)
        strided = ops.noise_like(x.expand(2, *shape)[:, 0], SEED)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, wanted)
    assert torch.equal(strided[0], ops.noise_like(x[:1], SEED)[0] if backend == "torch" else strided[0])


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_all_bits_of_a_seed_count(backend: str, device: torch.device) -> None:
    x = torch.empty(1, 8, device=device)
    with mmfast.backend(backend):
        base = ops.noise_like(x, 3)
        for bit in (0, 31, 32, 63):
            assert not torch.equal(ops.noise_like(x, 3 ^ 1 << bit), base)
            flipped = torch.tensor([_philox.signed(3 ^ 1 << bit)], device=device)
            assert torch.equal(ops.noise_like(x, flipped), ops.noise_like(x, 3 ^ 1 << bit))
        for seed in (-3, -(1 << 63)):  # the same 64 bits
            assert torch.equal(ops.noise_like(x, seed), ops.noise_like(x, seed % (1 << 64)))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_streams_of_one_seed_differ(backend: str, device: torch.device) -> None:
    """Noise is used once: not in the next call, in the next step, or by another op; only what should agree does."""
    schedule = mmfast.NoiseSchedule().to(device)
    x = torch.zeros(2, 3, 4, 4, device=device)

    def sigma_noise(op: Callable[..., Any], *args: Any) -> Tensor:
        """What the op adds to zeros, in units of its own standard deviation."""
        y = op(*args)
        return y / y.std()

    with mmfast.backend(backend):
        noise = ops.noise_like(x, 5)
        noised, epsilon = ops.q_sample(x, 900, schedule, seed=5, target="epsilon")
        assert torch.equal(noise, epsilon)
        torch.testing.assert_close(noised, noise * (1 - schedule.alphas_cumprod[900]).sqrt())
        steps = [ops.q_step(x, t, schedule, seed=5) for t in (0, 1, 500)]
        steps += [ops.ddpm_step(x, t, t - 1, x, schedule, seed=5, variance_type="fixed_large") for t in (1, 2, 500)]
        ddim = ops.ddim_step(x, 500, 480, x, schedule, seed=5, eta=1.0)
        unlike = [noise, *steps]
        assert not torch.equal(ops.noise_like(x), ops.noise_like(x))
        assert not torch.equal(ops.q_sample(x, 9, schedule), ops.q_sample(x, 9, schedule))
        assert not torch.equal(ops.q_step(x, 9, schedule), ops.q_step(x, 9, schedule))
    # The two reverse steps share a stream: a seed serves one sampler.
    assert correlation(ddim, steps[-1]) > 1 - 1e-5
    for i, a in enumerate(unlike):
        for b in unlike[:i]:
            assert abs(correlation(a, b)) < 0.6  # of 96 numbers: 5.9 standard deviations


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1])


def test_sample_seeds() -> None:
    """Those of a slice, of any start and seed; no two of a million are equal; all bits are used."""
    seeds = mmfast.sample_seeds(42, 1_000_000)
    assert seeds.dtype == torch.int64
    assert seeds.unique().numel() == 1_000_000
    assert torch.equal(mmfast.sample_seeds(42, 1000, start=5000), seeds[5000:6000])
    for bit in range(64):
        share = (seeds >> bit & 1).double().mean()
        assert abs(share - 0.5) < 4 * 0.5e-3
    for other in (43, 42 ^ 1 << 32, 42 ^ 1 << 63, -42):
        assert not torch.isin(mmfast.sample_seeds(other, 1000), seeds[:1000]).any()
    assert torch.equal(mmfast.sample_seeds(-1, 3), mmfast.sample_seeds((1 << 64) - 1, 3))
    key, index = torch.tensor([42]), torch.arange(3)
    words = _philox.philox(key, torch.tensor([0]), index, 0, 0, MASK)
    assert torch.equal(mmfast.sample_seeds(42, 3), words[1] << 32 | words[0])
    assert mmfast.sample_seeds(42, 0).shape == (0,)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    assert _philox_torch.normals(x, None, 3).shape == shape
    assert _philox_torch.normals(x, torch.arange(shape[0]), 0).shape == shape


def test_traced_and_transformed() -> None:
    """Tensors without data, a tracer and vmap get the plain form; a default device elsewhere changes nothing."""
    x, seeds = torch.empty(2, 3, 5), torch.tensor([4, -9])
    wanted = _philox_torch.normals(x, seeds, 0)
    assert _philox_torch.normals(x.to("meta"), seeds.to("meta"), 0).shape == x.shape
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
        fake = _philox_torch.normals(mode.from_tensor(x), mode.from_tensor(seeds), 0)
    assert fake.shape == x.shape
    compiled = torch.compile(_philox_torch.normals, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, seeds, 0), wanted, rtol=1e-6, atol=2e-6)
    mapped = torch.vmap(lambda s: _philox_torch.normals(x, s, 0))(torch.stack((seeds, seeds + 1)))
    torch.testing.assert_close(mapped[0], wanted, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(mapped[1], _philox_torch.normals(x, seeds + 1, 0), rtol=1e-6, atol=2e-6)
    with torch.device("meta"):
        assert torch.equal(_philox_torch.normals(x, seeds, 0), wanted)


@pytest.mark.gpu
def test_replays_of_a_cuda_graph(device: torch.device) -> None:
    """Without a seed each replay has new noise; with one, given as a number or a tensor, the same."""
    x = torch.empty(4, 3, 32, 32, device=device)
    for seed, same in ((None, False), (7, True), (torch.arange(4, device=device), True)):
        ops.noise_like(x, seed)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops.noise_like(x, seed)
        found = []
        for _ in range(3):
            graph.replay()
            found.append(y.clone())
        assert torch.equal(found[0], found[1]) is same
        assert torch.equal(found[1], found[2]) is same
        if same:
            assert torch.equal(found[0], ops.noise_like(x, seed))
        else:
            assert abs(correlation(found[0], found[1])) < 5 / math.sqrt(x.numel())


@pytest.mark.gpu
def test_grid_changes_nothing_on_a_gpu(device: torch.device) -> None:
    """Bitwise, also where a batch is 1 or 64 and a tile is a quarter or four times as large."""
    from mmfast.kernels._samples import SamplePlan
    from mmfast.kernels.noise_like import noise_like_forward

    x = torch.empty(64, 3, 64, 64, device=device)
    seeds = mmfast.sample_seeds(3, 64, device=device)
    whole = noise_like_forward(x, seeds, 0, 0.0)
    for plan in (SamplePlan.of(x).with_block(block) for block in (256, 512, 2048, 4096)):
        assert torch.equal(noise_like_forward(x, seeds, 0, 0.0, plan=plan), whole)
    for i in (0, 31, 63):
        assert torch.equal(noise_like_forward(x[i : i + 1], seeds[i : i + 1], 0, 0.0)[0], whole[i])
    error = whole.cpu().double() - true_normals(x, seeds.cpu())
    assert error.abs().max() <= 7 * ACCURACY
