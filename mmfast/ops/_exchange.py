"""What one process of a group needs of the others to compute a contrastive loss over the whole batch.

Each process holds its own rows, image and text features of as many pairs as any other. `Alone` is a process without
others, `Ranks` (in _exchange_ranks.py) one of a torch.distributed group. `exchange(name)` gives the one for a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

Shard = tuple[Any, ...]
"""Tensors of the columns, each (n, ...): of text features and what belongs to them. None, but for the first, stays."""

GATHERED = 1 << 28
"""Values of text features that are gathered: 512 MB in 16 bits. More go round the ranks in a ring. Not measured."""


class Exchange(Protocol):
    """Collectives in the order in which every process calls them."""

    rank: int
    size: int

    def check(self, *sizes: int, op: str = ..., device: torch.device | None = None, **options: float) -> None:
        """Raise ValueError on every process unless all processes call with the same numbers.

        `sizes` are images, width, texts; `options` are whatever else must agree, by name.
        """

    def gather(self, own: Tensor) -> Tensor:
        """Concatenate a small tensor of every process along its first dimension."""

    def add(self, tensor: Tensor) -> Tensor:
        """Sum of the tensor over the processes, the same bits on all of them."""

    def greatest(self, tensor: Tensor) -> Tensor:
        """Elementwise maximum over the processes."""

    def keep(self, own: Shard) -> Shard:
        """What the backward pass wants kept from the forward pass: all shards concatenated, or empty for a ring."""

    def shards(self, own: Shard, kept: Shard | None = None) -> Iterator[tuple[int, Shard]]:
        """Columns of all processes in one shard, or in several: the index of the first column, and the tensors.

        In a ring they begin with the process's own, not with column 0. With `kept`, from `keep`, nothing is gathered
        again; without, columns are gathered if there are few.
        """

    def gradients(
        self, own: Shard, kept: Shard | None, compute: Callable[[int, Shard], Tensor | None]
    ) -> Tensor | None:
        """Call `compute(first column, shard)` for each shard, and return the sum over all processes of what is its own.

        `compute` returns this process's part of a gradient of the shard's columns (n, D), a tensor that it does not
        touch again, or None where no process wants it.
        """


class Alone:
    """A single process: every collective is the identity."""

    rank = 0
    size = 1

    def check(self, *sizes: int, op: str = "", device: torch.device | None = None, **options: float) -> None:
        """Nothing to compare with."""

    def gather(self, own: Tensor) -> Tensor:
        """The tensor itself."""
        return own

    def add(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def greatest(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def keep(self, own: Shard) -> Shard:
        """Nothing: the columns are at hand."""
        return ()

    def shards(self, own: Shard, kept: Shard | None = None) -> Iterator[tuple[int, Shard]]:
        """All columns."""
        yield 0, own

    def gradients(
        self, own: Shard, kept: Shard | None, compute: Callable[[int, Shard], Tensor | None]
    ) -> Tensor | None:
        """The gradient of all columns."""
        return compute(0, own)


def exchange(name: str) -> Exchange:
    """The exchange of the process group called `name`; of none if it is empty."""
    if not name or group_size(name) == 1:
        return Alone()
    from ._exchange_ranks import Ranks

    return Ranks(_resolved(name))


def group_name(group: Any) -> str:
    """What `exchange` knows a process group by, given itself or by that name; empty for None.

    Raises:
        TypeError: it is no process group.
        ValueError: this process is not in it.
    """
    if group is None:
        return ""
    if isinstance(group, str):
        return group
    if isinstance(group, int) and not isinstance(group, bool):  # torch.distributed's mark of someone else's group
        raise ValueError("group: this process must be one of the group's, got GroupMember.NON_GROUP_MEMBER")
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected a torch.distributed process group or None, got {type(group).__name__}")
    return group.group_name


def group_size(group: Any) -> int:
    """Processes of a group, given itself or by its name; 1 without."""
    name = group_name(group)
    return _size(name) if name else 1


def _size(name: str) -> int:
    return _resolved(name).size()


# torch.compile cannot trace the look-up of a name; it takes the answer as a constant.
_size._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _resolved(name: str) -> dist.ProcessGroup:
    """The process group of that name. Ops carry the name, since a schema has no type for the group."""
    find: Any = dist.distributed_c10d._resolve_process_group  # its argument is of another type in each version
    return find(name)


def rings(own: Tensor, size: int) -> bool:
    """Whether a shard like `own` goes round the processes, rather than being gathered: by the memory of all."""
    return own.numel() * size > GATHERED
