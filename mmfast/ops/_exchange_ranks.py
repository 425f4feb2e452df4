"""`Ranks`: the exchange of a torch.distributed process group.

Columns come to a rank in one of two ways. Gathered: `all_gather` once, kept for the backward pass, and `reduce_scatter`
of their gradient. In a ring, where all columns would take too much memory: each rank passes the shard that it holds on
to the next and takes one from the one before, while it computes; the gradient of a shard's columns follows one step
behind, gathering every rank's part on its way, and ends where it belongs. The sums are taken in the ring's order, the
same every time.

A rank sends as many bytes as it receives. With W ranks, n columns of width D on each, and b bytes a value:

    gathered    (W - 1) n D b forward, (W - 1) n D 4 backward
    ring        (W - 1) n D b forward, again backward, (W - 1) n D 4 backward

and a few numbers a column, see `mmfast.nn.ClipLoss.bytes_per_step`.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ._exchange import Shard, rings

CHECKS = os.environ.get("MMFAST_CHECK_RANKS", "1").strip() != "0"
"""Whether ranks compare their batches and options before they exchange features."""
TABLE = 16
"""Numbers that a rank gives to the comparison."""
GRADIENT_TAG = 64
"""gloo tells messages between two ranks apart by their tags: a shard's begin at 0."""


# torch 2.13 gave both a new name, and warns of the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Ranks:
    """This process among those of a group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank: int = group.rank()
        self.size: int = group.size()

    def check(
        self, *sizes: int, op: str = "contrastive loss", device: torch.device | None = None, **options: float
    ) -> None:
        """Raise ValueError on every rank unless all give as many images and texts, and the same options.

        It takes one exchange of 128 bytes, through a CPU backend if the group has one (`init_process_group()` without
        a backend, or "cpu:gloo,cuda:nccl"), which costs a GPU nothing. A group of NCCL alone makes the host wait for
        the GPU, once a call; while a CUDA graph is captured the comparison is left out. MMFAST_CHECK_RANKS=0 leaves it
        out always. Without it, ranks that disagree wait for each other until the group's timeout.
        """
        if not CHECKS:
            return
        names = ("images", "width", "texts", *options)
        key = zlib.crc32(repr((op, len(sizes), *names)).encode())
        values = [float(value) for value in (key, *sizes, *options.values())]
        own = torch.tensor(values + [0.0] * (TABLE - len(values)), dtype=torch.float64, device="cpu")
        if not _has_cpu(self.group):
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return
            own = own.to(device or torch.device("cuda", torch.cuda.current_device()))
        table: list[list[float]] = self.gather(own).view(self.size, TABLE).tolist()
        if any(row != table[0] for row in table):
            raise ValueError(_disagreement(op, names, len(sizes), table))

    def gather(self, own: Tensor) -> Tensor:
        """Every rank's tensor in one."""
        out = own.new_empty((self.size * own.shape[0], *own.shape[1:]))
        _all_gather(out, own.contiguous(), group=self.group)
        return out

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def greatest(self, tensor: Tensor) -> Tensor:
        """The maximum over the ranks."""
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def keep(self, own: Shard) -> Shard:
        """Every rank's columns, unless they are too many."""
        if rings(_first(own), self.size):
            return ()
        return tuple(None if x is None else self.gather(x) for x in own)

    def shards(self, own: Shard, kept: Shard | None = None) -> Iterator[tuple[int, Shard]]:
        """All columns at once, or as they come round."""
        whole = self._whole(own, kept)
        if whole is None:
            yield from self._round(own)
        else:
            yield 0, whole

    def gradients(
        self, own: Shard, kept: Shard | None, compute: Callable[[int, Shard], Tensor | None]
    ) -> Tensor | None:
        """The gradient of the own columns."""
        whole = self._whole(own, kept)
        if whole is None:
            return self._round_gradients(own, compute)
        parts = compute(0, whole)
        if parts is None:
            return None
        out = parts.new_empty((parts.shape[0] // self.size, *parts.shape[1:]))
        _reduce_scatter(out, parts.contiguous(), group=self.group)
        return out

    def _reduced(self, tensor: Tensor, op: Any) -> Tensor:
        out = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, op=op, group=self.group)
        return out

    def _whole(self, own: Shard, kept: Shard | None) -> Shard | None:
        """The columns of all ranks, or None if they go round."""
        if _first(own).shape[0] == 0:  # nor has any other rank a column
            return own
        kept = self.keep(own) if kept is None else kept
        if not kept:
            return None
        return tuple(None if mine is None else x for mine, x in zip(own, kept, strict=True))

    def _round(self, own: Shard) -> Iterator[tuple[int, Shard]]:
        """The own shard, then that of the rank before, and so on. The next one travels while one is in use."""
        shard = own
        for step in range(self.size):
            coming = self._pass_on(shard, 0) if step < self.size - 1 else None
            yield (self.rank - step) % self.size * _first(own).shape[0], shard
            if coming is not None:
                shard = coming.arrived()

    def _round_gradients(self, own: Shard, compute: Callable[[int, Shard], Tensor | None]) -> Tensor | None:
        """As `_round`; what `compute` returns for a shard is added to the sum that follows it."""
        home: Tensor | None = None
        coming: _Passing | None = None
        for step, (first, shard) in enumerate(self._round(own)):
            part = compute(first, shard)
            if step == 0:
                home = part
            elif part is not None:
                if coming is not None:
                    part += _first(coming.arrived())
                # The rank after holds this shard next, and after the last step it is the shard's own.
                coming = self._pass_on((part,), GRADIENT_TAG)
        if home is None or coming is None:
            return home
        return home.add_(_first(coming.arrived()))

    def _pass_on(self, shard: Shard, tag: int) -> _Passing:
        """Send a shard to the rank after, and receive one of the same shapes from the rank before."""
        after, before = ((self.rank + step) % self.size for step in (1, -1))
        after, before = (dist.get_global_rank(self.group, rank) for rank in (after, before))
        sent = tuple(None if x is None else x.contiguous() for x in shard)
        received = tuple(None if x is None else torch.empty_like(x) for x in sent)
        moves = []
        for i, (out, into) in enumerate(zip(sent, received, strict=True)):
            if out is not None and into is not None:
                moves.append(dist.P2POp(dist.isend, out, after, self.group, tag + i))
                moves.append(dist.P2POp(dist.irecv, into, before, self.group, tag + i))
        return _Passing(dist.batch_isend_irecv(moves), sent, received)


class _Passing(NamedTuple):
    """A shard on its way, and the one that comes for it."""

    works: list[Any]
    sent: Shard  # must live until it has been
    received: Shard

    def arrived(self) -> Shard:
        """Wait for both, on a GPU without the host; what was received."""
        for work in self.works:
            work.wait()
        return self.received


def _first(shard: Shard) -> Tensor:
    """The one that is never None."""
    return shard[0]


def _has_cpu(group: dist.ProcessGroup) -> bool:
    """Whether the group moves CPU tensors."""
    return any(part.startswith("cpu:") for part in dist.get_backend_config(group).split(","))


def _disagreement(op: str, names: tuple[str, ...], sizes: int, table: list[list[float]]) -> str:
    """What differs, and between which ranks."""
    rows = [row[1:] for row in table]
    if len({row[0] for row in table}) > 1:
        return f"{op}: every rank of the group must call the same op, and some call another"
    if len({tuple(row[:sizes]) for row in rows}) > 1:
        found = _by_rank(["x".join(f"{value:.0f}" for value in row[:sizes]) for row in rows])
        what = " x ".join(names[:sizes])
        return f"{op}: every rank of the group must give as many pairs; {what}, got {found}"
    place = next(i for i in range(len(names)) if len({row[i] for row in rows}) > 1)
    found = _by_rank([f"{row[place]:g}" for row in rows])
    return f"{op}: {names[place]} must be the same on every rank of the group, got {found}"


def _by_rank(values: list[str]) -> str:
    """Each value with the ranks that have it."""
    parts = []
    for value in dict.fromkeys(values):
        ranks = [str(rank) for rank, other in enumerate(values) if other == value]
        some = ", ".join(ranks[:8]) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
        parts.append(f"{value} on rank{'s' if len(ranks) > 1 else ''} {some}")
    return ", ".join(parts)
