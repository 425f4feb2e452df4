"""Which masks are known to be causal without a look at them: to read a mask on a GPU is to wait for the GPU.

The module that has the mask as its buffer looks at it where the buffer is made: when it is accelerated, moved or
converted, copied, loaded (`MaskOwner`). What was found is remembered with the tensor, for its version, as autograd
counts in-place writes, and its memory. A mask that was written to or replaced since, or is made in a forward, is not
known; nor is any mask in a compiled, traced or captured graph, which reads its buffers live. Those are added to the
scores as they are, which is right for every mask.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.weak import WeakIdKeyDictionary

from ._swap import Accelerated

_seen: WeakIdKeyDictionary = WeakIdKeyDictionary()  # mask -> (version, address) at which it was seen to be causal


def look(mask: Any) -> bool:
    """Whether `mask` (N, N) is -inf above the diagonal and 0 elsewhere. Waits for a GPU, and remembers the answer."""
    if type(mask) is not Tensor or mask.dim() != 2 or mask.shape[0] != mask.shape[1] or not mask.is_floating_point():
        return False
    # No values: on the meta device, in a fake mode. No version: inference mode's tensors.
    if mask.is_meta or mask.is_inference() or _get_current_dispatch_mode() is not None:
        return False
    if _capturing(mask):
        return False
    causal = torch.full(mask.shape, -math.inf, dtype=mask.dtype, device=mask.device).triu(1)
    if not torch.equal(mask, causal):
        _seen.pop(mask, None)
        return False
    _seen[mask] = (mask._version, mask.data_ptr())
    return True


def known_causal(mask: Any, length: int) -> bool:
    """Whether `mask`, or the mask whose first rows and columns it is, was seen to be causal, for `length` tokens."""
    if type(mask) is not Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing() or _capturing(mask):
        return False
    whole = mask._base if mask._is_view() else mask
    if whole is None or whole.is_inference() or _seen.get(whole) != (whole._version, whole.data_ptr()):
        return False
    corner = mask.storage_offset() == whole.storage_offset() and mask.stride() == whole.stride()
    return corner and mask.dtype == whole.dtype and mask.shape == (length, length)


def _capturing(mask: Tensor) -> bool:
    """Whether a CUDA graph is being captured."""
    return mask.is_cuda and torch.cuda.is_current_stream_capturing()


class MaskOwner(Accelerated):
    """Mixin of modules whose buffer `attn_mask` goes to each of their blocks. Their forward stays as it is."""

    mmfast_op = "attention"

    @classmethod
    def matches(cls, module: Any) -> bool:
        """Whether it has a mask."""
        return module._buffers.get("attn_mask") is not None

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        """Why its blocks need the mask, or None."""
        return None if look(module._buffers.get("attn_mask")) else "attn_mask is not the causal mask"

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._apply(*args, **kwargs)
        look(self._buffers.get("attn_mask"))
        return result

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        look(self._buffers.get("attn_mask"))
