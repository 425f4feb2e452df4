"""The torch backend's normals: the integers of `reference._philox`, in the dtype of an op's statistics.

On a CPU each step of a round is one PyTorch op over int64, so the time goes to calls where a piece is small and to
memory where it is large: pieces of 16384 counters stay in the caches, and all work is done in place. They are also the
largest that PyTorch does not share out among threads (but for logarithms and the like, which it always does): a
hundred short ops that each wait for all threads take many times as long where another process has one of the cores.

The words 0 and 2 are one tensor, so are 1 and 3, of which only the low halves count: the product as it is serves for
both. The first round and half of the second depend on a piece's row or column alone (on the sample or on the element)
and are made for those once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..reference import _philox
from ..reference._philox import MASK, MULTIPLIERS, ROUNDS, WEYL
from ._register import stats_dtype

PIECE = 1 << 14
"""Counters of a piece: a power of two."""


def normals(x: Tensor, seeds: Tensor | None, seed: int, stream: int | Tensor = _philox.Stream.NOISE) -> Tensor:
    """Normal numbers of x's shape in float32 (float64 for a float64 x), contiguous.

    `seeds` is int64 (B,) or None for `seed` and the samples' indices; `stream` one number or an integer tensor (B,).
    """
    dtype = stats_dtype(x)
    if x.is_meta or x.numel() == 0:
        return torch.empty(x.shape, dtype=dtype, device=x.device)
    batch = x.shape[0]
    per_sample = x.numel() // batch
    if not (x.is_cpu and _plain(x, seeds, stream)):
        flat = _philox.normals(batch, per_sample, seed if seeds is None else seeds, stream, dtype, x.device)
        return flat.reshape(x.shape).contiguous()
    chunks = (per_sample + 3) // 4
    z = torch.empty(batch, 4 * chunks, dtype=dtype, device="cpu")
    write = _BoxMuller(z)
    if seeds is None:
        key, sample = torch.tensor([_philox.signed(seed)], device="cpu"), torch.arange(batch, device="cpu")
    else:
        key, sample = seeds, torch.zeros(1, dtype=torch.int64, device="cpu")
    for piece in words(key, sample, stream, batch, range(chunks)):
        write(*piece)
    return z[:, :per_sample].contiguous().view(x.shape)


def _plain(*tensors: object) -> bool:
    """Whether nobody traces or transforms these: then buffers may be written in place."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors if isinstance(t, Tensor))


def words(
    key: Tensor, sample: Tensor, stream: int | Tensor, batch: int, chunks: range
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Pieces of (batch, chunks) with their words (0, 2) and (1, 3), int64 (2, rows, columns), overwritten by the next.

    Key, sample and a stream that is a tensor have `batch` elements or one. Only the low halves of words 1 and 3 count.
    """
    width = min(PIECE, len(chunks))
    height = min(PIECE // width, batch)
    buffers = torch.empty(3, 2 * height * width, dtype=torch.int64, device="cpu")
    first, second, mask, half = (torch.tensor(value, device="cpu") for value in (*MULTIPLIERS, MASK, 32))
    shape: tuple[int, ...] = ()
    for left in range(0, len(chunks), width):
        columns = slice(left, min(left + width, len(chunks)))
        numbers = chunks[columns]  # below 2^32, or all in the same 2^32
        if left == 0 or numbers[0] & MASK == 0:
            keys, c2_1, c0_2, c2_2, c3_2 = _rows(key, sample, stream, batch, numbers[0] >> 32)
        low = torch.arange(numbers[0] & MASK, (numbers[0] & MASK) + len(numbers), device="cpu").mul_(first)
        high = (low >> half).bitwise_and_(mask)
        low.bitwise_and_(mask)
        for top in range(0, batch, height):
            rows = slice(top, min(top + height, batch))
            if shape != (2, rows.stop - rows.start, len(numbers)):
                shape = (2, rows.stop - rows.start, len(numbers))
                x, p, q = buffers[:, : math.prod(shape)].view(3, *shape).unbind()
                (x0, x1), (p0, p1), (q0, q1) = x.unbind(), p.unbind(), q.unbind()
            # Rounds 1 and 2.
            torch.bitwise_xor(high, c2_1[rows], out=x1)
            torch.mul(x1, second, out=q0)
            torch.bitwise_right_shift(q0, half, out=x0).bitwise_xor_(c0_2[rows]).bitwise_and_(mask)
            torch.bitwise_xor(low, c2_2[rows], out=x1)
            q1.copy_(c3_2[rows])
            for round_key in keys if len(key) == 1 else (k[:, rows] for k in keys):
                torch.mul(x1, second, out=p0)
                torch.mul(x0, first, out=p1)
                torch.bitwise_right_shift(p, half, out=x).bitwise_xor_(q).bitwise_xor_(round_key).bitwise_and_(mask)
                p, p0, p1, q, q0, q1 = q, q0, q1, p, p0, p1
            yield rows, columns, x, q


def _rows(
    key: Tensor, sample: Tensor, stream: int | Tensor, batch: int, chunk_high: int
) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor, Tensor]:
    """What depends on the sample alone: the keys of rounds 3 to 10, (2, batch or 1, 1) each, and as (batch, 1) what
    is xored into c2 of round 1, c0 of round 2 and c2 of round 2, and c3 of round 2."""
    key = key[:, None]
    halves = torch.stack((key & MASK, key >> 32 & MASK))  # (2, batch or 1, 1)
    steps = torch.tensor([[r * step & MASK for step in WEYL] for r in range(ROUNDS)], device="cpu")
    keys = (halves + steps[..., None, None]).bitwise_and_(MASK).unbind()
    c3 = stream[:, None].to(torch.int64) & MASK if isinstance(stream, Tensor) else int(stream)
    b = sample[:, None] * MULTIPLIERS[1]
    a = ((b >> 32 & MASK) ^ keys[0][0] ^ chunk_high) * MULTIPLIERS[0]
    found = (keys[0][1] ^ c3, keys[1][0] ^ (b & MASK), keys[1][1] ^ (a >> 32 & MASK), a & MASK)
    return keys[2:], *(value.expand(batch, 1) for value in found)  # type: ignore[return-value]


class _BoxMuller:
    """Writes the normals of words to z (batch, 4 chunks)."""

    def __init__(self, z: Tensor) -> None:
        self.pairs = torch.view_as_complex(z.view(z.shape[0], -1, 2, 2))
        size = min(PIECE, self.pairs.numel() // 2)
        self.buffers = torch.empty(3, 2 * size, dtype=z.dtype, device="cpu")
        self.half = torch.tensor(2.0**-33, dtype=torch.float32, device="cpu")
        self.mask = torch.tensor(MASK, device="cpu")

    def __call__(self, rows: slice, columns: slice, even: Tensor, odd: Tensor) -> None:
        radius, real, angle = self.buffers[:, : even.numel()].view(3, *even.shape).unbind()
        self._uniforms(even, radius)
        radius.log_().mul_(-2.0).sqrt_()
        self._uniforms(odd.bitwise_and_(self.mask), angle)
        angle.mul_(2.0 * math.pi)
        torch.cos(angle, out=real).mul_(radius)
        angle.sin_().mul_(radius)
        pairs = self.pairs[rows, columns]
        for k in range(2):
            torch.complex(real[k], angle[k], out=pairs[..., k])

    def _uniforms(self, words: Tensor, out: Tensor) -> None:
        single = out if out.dtype == torch.float32 else torch.empty(out.shape, dtype=torch.float32, device="cpu")
        single.copy_(words)
        torch.add(self.half, single, alpha=2.0**-32, out=single)
        if single is not out:
            out.copy_(single)
