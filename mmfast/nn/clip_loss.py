"""`ClipLoss` and `DistillClipLoss`: open_clip's, on `mmfast.ops.clip_loss`."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ops import clip_loss
from ..ops._exchange import group_name, group_size
from ..ops._traffic import Traffic, clip_loss_traffic


class ContrastiveLoss(nn.Module):
    """What open_clip's losses take alike: the ranks over which a batch is spread."""

    def __init__(self, rank: int, world_size: int, group: Any, grad_reduction: str) -> None:
        super().__init__()
        name = type(self).__name__
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"{name}: rank must be in [0, world_size), got rank={rank} and world_size={world_size}")
        if grad_reduction not in ("ddp_mean", "sum"):
            raise ValueError(f"{name}: grad_reduction must be one of ddp_mean, sum, got {grad_reduction!r}")
        self.rank = rank
        self.world_size = world_size
        self.grad_reduction = grad_reduction
        self._group = group_name(group)  # a name can be copied and pickled, a group cannot
        if self._group:
            self._check_group(self._group)

    def group_name(self) -> str:
        """The name of the process group that forward exchanges features over; empty without."""
        if self._group or self.world_size == 1:
            return self._group
        name = type(self).__name__
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(f"{name}: world_size={self.world_size} needs torch.distributed.init_process_group first")
        group = group_name(dist.group.WORLD)
        self._check_group(group)
        return group

    def extra_repr(self) -> str:
        """What `repr` shows."""
        shown = [f"group={self._group!r}"] if self._group else []
        shown += [f"rank={self.rank}, world_size={self.world_size}"] if self.world_size > 1 else []
        if shown and self.grad_reduction != "ddp_mean":
            shown.append(f"grad_reduction={self.grad_reduction!r}")
        return ", ".join(shown)

    def _check_group(self, group: str) -> None:
        size = group_size(group)
        if self.world_size not in (1, size):
            raise ValueError(
                f"{type(self).__name__}: world_size must be the size of the group, {size}, got {self.world_size}"
            )


class ClipLoss(ContrastiveLoss):
    """Drop-in for open_clip's `ClipLoss`: same constructor, call and parameter gradients, without the matrix of logits.

    With `world_size` above 1 features are exchanged over the default process group (or over `group`): each rank
    computes its rows against all columns, once. What forward returns is the loss of the whole batch, on every rank; it
    is the mean of what open_clip's returns on the ranks with `local_loss`.

    Gradients are the whole batch's, which after DistributedDataParallel's mean is what open_clip computes with
    `gather_with_grad=True`, with or without `local_loss`. With `gather_with_grad=False` open_clip's towers get 1 /
    world_size of that (or, with `local_loss`, lack what other ranks' rows contribute); this loss then warns, and still
    gives the whole. `local_loss`, `gather_with_grad` and `cache_labels` change nothing else here.

    Every rank must give as many pairs and the same options; otherwise every rank raises ValueError. On a group that has
    only NCCL that comparison makes the host wait for the GPU once a step: initialise with "cpu:gloo,cuda:nccl", or set
    MMFAST_CHECK_RANKS=0 to leave it out. An error in the arguments of one rank alone leaves the others waiting until
    the group's timeout, as with any collective.

    Args:
        local_loss: as open_clip's; accepted.
        gather_with_grad: as open_clip's; see above.
        cache_labels: accepted; there are no labels to cache.
        rank: of this process in the group.
        world_size: size of the default process group; 1: this process alone, or `group`.
        use_horovod: must be False.
        normalize: divide features by their lengths (open_clip's models have done so).
        label_smoothing: in [0, 1), see `mmfast.ops.clip_loss`.
        group: a torch.distributed process group in place of the default one.
        grad_reduction: "ddp_mean", for parameters whose gradients are averaged over the ranks, or "sum", for those
            whose gradients are added up.

    Raises:
        ValueError: rank, world_size or the group do not fit; use_horovod.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        normalize: bool = False,
        label_smoothing: float = 0.0,
        group: Any = None,
        grad_reduction: str = "ddp_mean",
    ) -> None:
        if use_horovod:
            raise ValueError(f"{type(self).__name__}: use_horovod must be False: only torch.distributed is supported")
        super().__init__(rank, world_size, group, grad_reduction)
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.use_horovod = use_horovod
        self.normalize = normalize
        self.label_smoothing = label_smoothing
        if world_size > 1 and not gather_with_grad:
            lack = (
                "lack what other ranks' rows contribute" if local_loss else f"are 1/{world_size} of the whole batch's"
            )
            warnings.warn(
                f"{type(self).__name__}: with gather_with_grad=False and local_loss={local_loss} open_clip's gradients "
                f"of the towers {lack}; here they are the whole batch's, as with gather_with_grad=True",
                stacklevel=2,
            )

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        *,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
        return_metrics: bool = False,
    ) -> Any:
        """Return the loss, or {"contrastive_loss": loss} if `output_dict`; with `return_metrics` that and a dict.

        Args:
            image_features: (M, D), this rank's.
            text_features: (N, D).
            logit_scale: the multiplier, as open_clip's models return it.
            logit_bias: added to every logit; its gradient is 0.
            output_dict: return a dict, whose values open_clip's training loop adds up.
            image_ids: (M,) integers that tell positives, with `text_ids` (N,), see `mmfast.ops.clip_loss`.
            text_ids: see image_ids.
            return_metrics: also return losses and top-1 shares of both directions, see `mmfast.ops.clip_loss`.
        """
        result = self._loss(
            (image_features, text_features, logit_scale),
            logit_bias=logit_bias,
            image_ids=image_ids,
            text_ids=text_ids,
            return_metrics=return_metrics,
        )
        loss, metrics = result if return_metrics else (result, None)
        shown = {"contrastive_loss": loss} if output_dict else loss
        return (shown, metrics) if return_metrics else shown

    def bytes_per_step(
        self,
        batch_size: int,
        width: int,
        dtype: torch.dtype = torch.bfloat16,
        *,
        world_size: int | None = None,
        ids: bool = False,
    ) -> Traffic:
        """Count the bytes that a rank sends in a step, forward and backward; it receives as many.

        Args:
            batch_size: pairs on a rank.
            width: D.
            dtype: of the products: autocast's, or the features'.
            world_size: ranks; by default those of the loss's group.
            ids: whether positives are told by ids.

        Returns:
            `features`, `gradient`, `statistics` and `total`, in bytes, and whether texts go round in a `ring`.
        """
        ranks = group_size(self.group_name()) if world_size is None else world_size
        smooth = self.label_smoothing > 0
        return clip_loss_traffic(batch_size, batch_size, width, dtype, ranks, ids=ids, label_smoothing=smooth)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        shown = [f"normalize={self.normalize}"] if self.normalize else []
        shown += [f"label_smoothing={self.label_smoothing}"] if self.label_smoothing else []
        return ", ".join(filter(None, (super().extra_repr(), *shown)))

    def _loss(self, features: tuple[Tensor, Tensor, Tensor | float], **kwargs: Any) -> Any:
        return clip_loss(
            *features,
            normalize=self.normalize,
            label_smoothing=kwargs.pop("label_smoothing", self.label_smoothing),
            group=self.group_name() or None,
            grad_reduction=self.grad_reduction,
            **kwargs,
        )


class DistillClipLoss(ClipLoss):
    """Drop-in for open_clip's `DistillClipLoss`: the contrastive loss, and cross entropy with a teacher's similarities.

    Arguments and gradients are as `ClipLoss`'s. `label_smoothing` is of the contrastive loss alone.
    """

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> Any:
        """Return (contrastive loss, distillation loss), or a dict of both if `output_dict`.

        Args:
            image_features: (B, D), this rank's.
            text_features: (B, D).
            logit_scale: the multiplier.
            dist_image_features: (B, E), the teacher's, which get no gradient.
            dist_text_features: (B, E).
            dist_logit_scale: the teacher's multiplier.
            output_dict: return {"contrastive_loss": ..., "distill_loss": ...}.
        """
        features = image_features, text_features, logit_scale
        teacher = dist_image_features, dist_text_features, dist_logit_scale
        contrastive = self._loss(features)
        distill = self._loss(features, teacher=teacher, label_smoothing=0.0)
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distill}
        return contrastive, distill
